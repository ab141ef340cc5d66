"""A forecast as one reads it: verdicts, what would make it fit, which card would do, and the command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_diagnostics_memory import parsed, raw

from kdlib.config import run as configs
from kdlib.diagnostics.forecast import GIB, advised, as_text, cards, remedies, single_changes, verdict
from kdlib.diagnostics.memory import forecast
from kdlib.runs.folder import project_root
from kdlib.workbench import cli
from kdlib.workbench.measurement import Measured

__all__ = ["raw"]


def test_remedies_lower_the_peak_and_keep_the_effective_batch(raw):
    config = parsed(raw, data__max_length=128, training__per_device_train_batch_size=8)
    found = forecast(config)
    tried = [changes for _, changes in single_changes(config, found)]
    assert len(tried) == 7  # checkpointing, three smaller batches, chunks, bfloat16, half as long rows
    for changes in (tried[0], tried[1], tried[-1]):
        changed = configs.parse(config.as_dict(), changes)
        assert forecast(changed).peak < found.peak
        assert (
            changed.training["per_device_train_batch_size"]
            * changed.training.get("gradient_accumulation_steps", 1)
            == 8
        )


class Fixed:
    """A forecast of this peak."""

    def __init__(self, peak):
        self.peak, self.moment, self.chunk, self.precision = peak, "backward", 64, "bfloat16"


def test_the_cheapest_remedies_that_suffice_are_named(raw):
    peaks = {True: 50, False: 200}
    config = parsed(raw, data__max_length=128)

    def forecaster(changed):
        return Fixed(peaks[bool(changed.training.get("activation_checkpointing"))])

    named = remedies(config, Fixed(200), 100, forecaster)
    assert [remedy.overrides for remedy in named] == ["-o training.activation_checkpointing=true"]
    (least,) = remedies(config, Fixed(200), 10, forecaster)
    assert least.peak == 50  # all together, and still too much
    assert remedies(config, Fixed(200), 300, forecaster) == []


def test_cards_are_judged_each_with_its_cheapest_change(raw):
    config = parsed(raw, data__max_length=128)
    lines = cards(
        config,
        Fixed(20 * GIB),
        lambda changed: Fixed((9 if changed.training.get("activation_checkpointing") else 19) * GIB),
    )
    lines = [line for line in lines if line["gib"] in (8, 12, 24)]
    assert [line["verdict"] for line in lines] == ["does not fit", "does not fit", "fits"]
    assert lines[0]["remedy"].peak == 9 * GIB  # at least
    assert lines[1]["remedy"].changes == {"training.activation_checkpointing": True}
    assert lines[2]["remedy"] is None


def test_the_command_says_what_is_held_when_and_whether_it_fits(config_file, capsys):
    cli.app(["forecast", str(config_file), "--memory", "16"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "optimizer state" in said
    assert "16.00 GiB: fits" in said
    assert "time: measure it with --measure" in said


def test_the_command_says_what_each_of_several_ranks_holds(config_file, capsys):
    cli.app(["forecast", str(config_file), "--ranks", "4", "--memory", "16"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "on each of 4 ranks" in said
    assert "peak on each rank, by how 4 share the models" in said
    assert "GiB  FSDP: student and teacher sharded" in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fsdp", [True, None])
def test_the_memory_of_a_rank_is_within_a_tenth_of_what_two_real_ones_take(fsdp, tmp_path):
    """Half of SmolLM2's layers learn from all: by FSDP, and by DDP.  What is freed is given back at once, as
    otherwise the C library's heap, cut up by what comes and goes, is measured too.
    """
    steps = {"max_steps": 3, "eval_strategy": "no", "eval_on_start": False, "save_strategy": "no"}
    changes = {"precision": "float32", "student.keep": "even", "loss.compile": False, "training.fsdp": fsdp}
    changes |= {f"training.{name}": value for name, value in steps.items()}
    config = configs.load(project_root() / "configs" / "quickstart.yaml", changes)
    (tmp_path / "ranks.yaml").write_text(config.as_yaml())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [
        Path(__file__).parent / "measured_rank.py",
        *(tmp_path / n for n in ("answer", "run", "ranks.yaml")),
    ]
    done = subprocess.run(
        [*torchrun, *words],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured, found = int((tmp_path / "answer").read_text()), forecast(config, devices=2)
    print(f"{found.peak / GIB:.2f} GiB forecast, {measured / GIB:.2f} measured")
    assert found.peak == pytest.approx(measured, rel=0.1)


def test_a_model_that_is_not_there_is_named_without_a_traceback(config_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kd", "forecast", str(config_file), "-o", "teacher.model=./nowhere"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "nowhere" in said
    assert "Traceback" not in said


def test_a_verdict_leaves_room_for_the_forecasts_error():
    assert [verdict(100, memory) for memory in (116, 110, 99)] == ["fits", "tight", "does not fit"]


def test_a_few_real_steps_are_said_beside_the_forecast(raw):
    took = Measured(0.421, 12.2, 600, 4, fastest_s=0.4, slowest_s=0.61, cores_of_others=1.5)
    data = advised(parsed(raw), forecast) | {"time": took.as_dict()}
    said = as_text(data | {"measured": {"peak_bytes": 2 * data["peak_in_training"]}})
    assert "time: 0.42 s per optimizer step, the median of a few real ones, from 0.4 to 0.61" in said
    assert "other processes kept 1.5 cores busy meanwhile" in said
    assert "the whole run: 5 min for 600 steps, with 4 evaluations of 12 s" in said
    assert "ratio 0.50" in said
