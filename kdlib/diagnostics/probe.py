"""How long an optimizer step will take on this machine: its pieces timed at their real sizes, on models of
few layers.

Every layer of a model costs about the same, so two numbers of layers give the cost of one and of what
surrounds them.
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch

from kdlib.benchmarks import machine
from kdlib.diagnostics.fake_step import PHASES, Outline, Rehearsal, at_layers
from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import feature_terms

ROUNDS = 3  # timed, after one that is not
# of work that the larger of the two models has more than the smaller: enough to stand out from the noise
LAYER_SECONDS = 2.0
LONGEST = 40.0  # seconds that a probe may be expected to take, and after which no further round is begun
UTILISATION = 0.5  # of the fastest matrix product, where a step is too large to be probed

Times = dict[str, tuple[float, float]]  # phase -> wall and CPU seconds


@dataclass(frozen=True)
class Job:
    """What is timed."""

    plan: Outline
    dtype: torch.dtype
    device: torch.device
    rows: int  # of a micro-batch
    eval_rows: int  # of a batch of the evaluation
    accumulation: int
    chunk: int
    compiled: bool
    dense: bool
    flops: float  # of an optimizer step
    bytes: int  # of its peak
    parameters: int  # of the student

    @property
    def layers(self) -> tuple[int, int]:
        return self.plan.layers


def pace(job: Job, free: int) -> dict[str, Any]:
    """Seconds of an optimizer step and of a batch of the evaluation.

    Args:
        free: bytes that the probe may use.

    Returns:
        {"step_s": wall, "step_cpu_s": of all threads (None on CUDA), "first_s": what the first step takes
        more, "eval_batch_s": wall, "phases": {phase: wall seconds per micro-batch}, "how": in words}; from
        the matrix products alone where a probe would be too large. A probe also says how many
        "cores_of_others" other processes kept busy meanwhile, on which its times depend.
    """
    speed = machine.matmul_speed(job.dtype, job.device)
    small, large = _sizes(job, speed)
    share = job.flops / job.accumulation / speed * (sum(small) + sum(large)) / sum(job.layers)
    if (
        share * (ROUNDS + 1) * 1.5 > LONGEST
        or job.bytes * max(a / b for a, b in zip(large, job.layers, strict=True)) > free / 2
    ):
        return {
            "step_s": job.flops / speed / UTILISATION,
            "step_cpu_s": None,
            "first_s": None,
            "eval_batch_s": None,
            "phases": {},
            "how": (
                f"matrix products at {UTILISATION:.0%} of the {speed / 1e9:,.0f} GFLOP/s measured: too "
                "large to be probed here"
            ),
        }
    return _probed(job, small, large)


def _sizes(job: Job, speed: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Layers of student and teacher in the smaller and the larger pair of models."""
    layer = job.flops / job.accumulation / speed / max(job.layers)
    more = max(round(LAYER_SECONDS / layer), 1)
    return (1, 1), tuple(min(total, 1 + more) for total in job.layers)


def _probed(job: Job, small: tuple[int, int], large: tuple[int, int]) -> dict[str, Any]:
    workspace = Workspace(job.chunk, compiled=job.compiled)
    made = {
        size: Rehearsal(
            job.plan.with_layers(*size),
            dtype=job.dtype,
            workspace=workspace,
            dense=job.dense,
            device=str(job.device),
        )
        for size in dict.fromkeys((small, large))
    }
    rounds: dict[tuple[int, int], list[Times]] = {size: [] for size in made}
    began, busy = time.perf_counter(), _seconds_of_others()
    for number in range(ROUNDS + 1):
        if number > 1 and time.perf_counter() - began > LONGEST:
            break
        for size, rehearsal in made.items():
            rounds[size].append(_timed(job, rehearsal))
    others = max(_seconds_of_others() - busy, 0.0) / (time.perf_counter() - began)
    first = rounds[small][0]["loss"][0] - statistics.median(times["loss"][0] for times in rounds[small][1:])
    found = {size: _medians(lines[1:]) for size, lines in rounds.items()}
    # do not depend on the layers, nor does a loss that does not look inside
    alone = ["optimizer", "evaluation: measures"]
    alone += [] if feature_terms(job.plan.config.loss.weights) else ["loss"]
    phases = {
        name: [
            at_layers(
                job.layers,
                name,
                found[small][name][which],
                found[large][name][which],
                small,
                small if name in alone else large,
            )
            for which in (0, 1)
        ]
        for name in found[small]
    }
    micro = [sum(phases[name][which] for name in PHASES if name in phases) for which in (0, 1)]
    step = [job.accumulation * seconds + phases["optimizer"][which] for which, seconds in enumerate(micro)]
    evaluation = sum(seconds for name, (seconds, _) in phases.items() if name.startswith("evaluation"))
    cpu = None if job.device.type == "cuda" else step[1]
    return {
        "step_s": step[0],
        "step_cpu_s": cpu,
        "first_s": max(first, 0.0),
        "eval_batch_s": evaluation,
        "phases": {name: seconds for name, (seconds, _) in phases.items()},
        "cores_of_others": others,
        "how": (
            f"probed with {large[0]} of {job.layers[0]} and {large[1]} of {job.layers[1]} layers, against "
            "one of each"
        ),
    }


def _seconds_of_others() -> float:
    """CPU seconds that this machine has spent on other processes than this one."""
    spent = psutil.cpu_times()
    return spent.user + spent.system - time.process_time()


def _timed(job: Job, rehearsal: Rehearsal) -> Times:
    """One micro-batch, one optimizer step, one batch of the evaluation."""
    times: Times = {}
    clock, at = partial(_clock, times, job.device), rehearsal.objectives[-1]
    batch = rehearsal.batch(job.rows)
    rehearsal.train(batch, at, count=batch["labels"].numel() * job.accumulation, phase=clock)
    trained = [parameter for parameter in rehearsal.student.parameters() if parameter.grad is not None]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    optimizer.step()  # makes its state
    with clock("optimizer"):
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    each = job.parameters / sum(parameter.numel() for parameter in trained)
    times["optimizer"] = tuple(seconds * each for seconds in times["optimizer"])
    return times | _evaluation(job, rehearsal, batch)


def _evaluation(job: Job, rehearsal: Rehearsal, batch: Mapping[str, torch.Tensor]) -> Times:
    """The evaluation of a batch as large as the config's, from one as large as the training's."""
    times: Times = {}
    rehearsal.evaluate(batch, rehearsal.objectives[-1], partial(_clock, times, job.device))
    each = job.eval_rows / job.rows
    parts = {name: times[name] for name in ("student's forward", "teacher's forward")}
    parts["measures"] = tuple(
        times["evaluation"][which] - sum(part[which] for part in parts.values()) for which in (0, 1)
    )
    return {f"evaluation: {name}": tuple(seconds * each for seconds in part) for name, part in parts.items()}


@contextmanager
def _clock(times: Times, device: torch.device, name: str) -> Iterator[None]:
    """Notes wall and CPU seconds of a phase."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    _wait(device)
    times[name] = (time.perf_counter() - wall, time.process_time() - cpu)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _medians(lines: list[Times]) -> Times:
    return {
        name: tuple(statistics.median(line[name][which] for line in lines) for which in (0, 1))
        for name in lines[0]
    }
