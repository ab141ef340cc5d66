"""Measuring: interleaved rounds of time, agreement with float64, peak memory in a fresh process per case."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from kdlib.benchmarks.heads import Problem, Setting, agreement, problem
from kdlib.benchmarks.peers import CASES
from kdlib.hardware import peak_memory
from kdlib.runs.child_processes import in_fresh_process
from kdlib.training.trainer import DistillationTrainer

LOGGING_STEPS = 10  # for which the ledger's share is told
WARMUP_CHUNKS = 1  # tokens of the warm-up, in chunks: what is compiled is compiled for the same shapes
MATRICES = ((2048, 2048, 2048), (512, 576, 8192))  # rows x columns x columns of the products that are timed


def seconds(work: Callable[[], object], device: torch.device) -> dict[str, float | None]:
    """How long one call takes: wall time, and this process's CPU time; on CUDA by events, without."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return {"wall_s": begin.elapsed_time(end) / 1000, "cpu_s": None}
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def rotated(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): each name once a round, the order rotated, so that none always follows the same."""
    for number in range(rounds):
        first = number * len(names) // rounds
        for name in (*names[first:], *names[:first]):
            yield number, name


class StepClock(TrainerCallback):
    """Notes wall and CPU time at the end of each optimizer step."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    def figures(self, warmup: int) -> dict[str, float]:
        """The median step after the warm-up."""
        steps = list(zip(self.ends[warmup - 1 :], self.ends[warmup:], strict=False))
        walls, cpus = ([end[i] - begin[i] for begin, end in steps] for i in (0, 1))
        return {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus)}


class BooksClock(TrainerCallback):
    """Times what our trainer keeps of its own steps: ledger, guard, and a line of the log every so many.

    On CUDA the device is waited for around each call, which makes the steps themselves a little slower.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer, self.now, self.steps = trainer, 0.0, []
        window, guard = trainer.window, trainer.guard
        for owner, name in ((window, "add"), (guard, "begin"), (guard, "end"), (trainer, "check_step")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, call: Callable) -> Callable:
        def timed(*arguments):
            answer = []
            self.now += seconds(lambda: answer.append(call(*arguments)), self.trainer.args.device)["wall_s"]
            return answer[0]

        return timed

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.now)
        self.now = 0.0

    def figures(self, warmup: int) -> dict[str, float]:
        """Seconds of the median step after the warm-up, with its share of a line of the log."""
        line = seconds(self.trainer.term_figures, self.trainer.args.device)["wall_s"]
        return {"ledger_s": statistics.median(self.steps[warmup:]) + line / LOGGING_STEPS}


def matmul_speed(dtype: torch.dtype, device: torch.device, *, tries: int = 5) -> float:
    """FLOP/s of the fastest of a few matrix products: what this machine can do at best, now."""
    best = 0.0
    for rows, inner, columns in MATRICES:
        left, right = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
        product = partial(torch.matmul, left.to(dtype), right.to(dtype))
        times = [seconds(product, device)["wall_s"] for _ in range(tries)]
        best = max(best, 2 * rows * inner * columns / min(times))
    return best


def interleaved(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Each step once per round, in rotated order, after one that is not timed.

    Yields:
        One line per step and round: {"round": …, "name": …, "wall_s": …, "cpu_s": …}.
    """
    for step in steps.values():
        step()
    for number, name in rotated(list(steps), rounds):
        yield {"round": number, "name": name, **seconds(steps[name], device)}


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
    found = in_fresh_process(__name__, asked, what=f"measuring the memory of {name}")
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
