"""Measuring heads: interleaved rounds of time, agreement with float64, and peak memory in a fresh process
per case.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kdlib.benchmarks import machine
from kdlib.benchmarks.heads import Problem, Setting, agreement, problem
from kdlib.benchmarks.peers import CASES
from kdlib.hardware import peak_memory

WARMUP_CHUNKS = 1  # tokens of the warm-up, in chunks: what is compiled is compiled for the same shapes


def interleaved(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Each step once per round, in rotated order, after one that is not timed.

    Yields:
        One line per step and round: {"round": …, "name": …, "wall_s": …, "cpu_s": …}.
    """
    for step in steps.values():
        step()
    for number, name in machine.rotated(list(steps), rounds):
        yield {"round": number, "name": name, **machine.seconds(steps[name], device)}


def prepared(
    names: Sequence[str], inputs: Problem, setting: Setting
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The steps of these cases, and why some are not there: {name: step}, {name: reason}."""
    steps, skipped = {}, {}
    for name in names:
        try:
            steps[name] = CASES[name].prepare(CASES[name], inputs, setting)
        except ImportError as error:
            skipped[name] = str(error)
    return steps, skipped


def agreements(names: Sequence[str], setting: Setting, **inputs: Any) -> dict[str, dict[str, float]]:
    """Each case's largest relative difference from float64, on one and a half chunks of tokens."""
    few = {**inputs, "tokens": min(inputs["tokens"], setting.chunk * 3 // 2)}
    return {name: agreement(CASES[name], problem(**few), setting) for name in names if name != "floor"}


def memory(name: str, setting: Setting, **inputs: Any) -> dict[str, Any]:
    """Peak memory of one case above its inputs, in a process of its own.

    Raises:
        RunError: that process failed; its last words are in the message.
    """
    asked = {"name": name, "chunk": setting.chunk, "top_k": setting.top_k, "inputs": inputs}
    found = machine.in_fresh_process(__name__, asked, what=f"measuring the memory of {name}")
    return {"name": name, "tokens": inputs["tokens"], **found}


def memory_here(name: str, setting: Setting, **inputs: Any) -> dict[str, int]:
    """What the fresh process does.

    The compiler's own modules are not charged: a warm-up on few tokens, with a workspace of its own that is
    then released, has loaded them; the buffers that the measured step keeps are charged.
    """
    case = CASES[name]
    few = problem(**{**inputs, "tokens": min(inputs["tokens"], WARMUP_CHUNKS * setting.chunk)})
    case.prepare(case, few, setting)()
    del few
    full = problem(**inputs)
    with peak_memory(full.hidden.device) as peak:
        case.prepare(case, full, setting)()
    gradients = (full.hidden.numel() + full.head.numel()) * full.head.element_size()
    return {"peak_bytes": peak.bytes, "gradient_bytes": gradients}


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps(memory_here(asked["name"], Setting(asked["chunk"], asked["top_k"]), **asked["inputs"])))


if __name__ == "__main__":
    main()
