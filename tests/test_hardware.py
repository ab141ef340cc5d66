"""What a CPU and its C library are asked: to keep memory, and not to emulate bfloat16."""

import resource
from itertools import pairwise

import pytest
import torch

from kdlib import hardware as cpu

PAGES = 64 * 2**20 // 4096  # of a tensor that glibc gives back as soon as it is freed


def faults() -> int:
    """The fewest page faults of making and freeing a tensor of 64 MiB, of thirty times."""
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(30):
        torch.ones(16 * 2**20)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(after - before for before, after in pairwise(counts))


@pytest.fixture
def usual(monkeypatch):
    """An environment that leaves glibc's switches alone."""
    for name in (*cpu.SWITCHES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(cpu._glibc() is None, reason="the C library is not glibc")
def test_memory_that_is_freed_is_found_again_inside_and_given_back_after(usual, monkeypatch):
    monkeypatch.setattr(cpu, "SHARE", 1)  # so that a small machine keeps a block of 64 MiB too
    if faults() < 0.9 * PAGES:
        pytest.skip("this system gives huge pages unasked: there are no faults to spare")
    with cpu.memory_kept() as kept:
        assert kept
        assert faults() < 0.1 * PAGES
    assert faults() > 0.9 * PAGES


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "100000"), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")],
)
def test_who_sets_glibcs_own_switches_is_left_alone(usual, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with cpu.memory_kept() as kept:
        assert not kept


def test_another_c_library_is_left_alone(usual, monkeypatch):
    monkeypatch.setattr(cpu, "_glibc", lambda: None)
    cpu.give_memory_back()
    with cpu.memory_kept() as kept:
        assert not kept


FACTS = {
    "with": ("flags : fpu avx512_bf16 amx_bf16", ("avx512_bf16", "amx_bf16")),
    "without": ("flags : fpu avx2", ()),
    "not x86": ("Features : fp bf16", None),
}


@pytest.mark.parametrize("name", FACTS)
def test_the_processor_says_which_instructions_it_has(name, monkeypatch, tmp_path):
    text, expected = FACTS[name]
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path / "cpuinfo")
    assert cpu.bf16_instructions.__wrapped__() == expected


@pytest.mark.parametrize(
    ("instructions", "made"), [((), torch.float32), (("amx_bf16",), torch.bfloat16), (None, torch.bfloat16)]
)
def test_only_bfloat16_that_is_emulated_is_avoided_and_only_on_a_cpu(instructions, made, monkeypatch):
    monkeypatch.setattr(cpu, "bf16_instructions", lambda: instructions)
    assert cpu.product_dtype(torch.bfloat16, torch.device("cpu")) is made
    assert cpu.product_dtype(torch.float64, torch.device("cpu")) is torch.float64
    assert cpu.product_dtype(torch.bfloat16, torch.device("cuda")) is torch.bfloat16
    with cpu.as_asked():
        assert cpu.product_dtype(torch.bfloat16, torch.device("cpu")) is torch.bfloat16
