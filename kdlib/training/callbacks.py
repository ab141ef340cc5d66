"""What happens around training steps: a line per log, a line per file, throughput, and a stop that loses
nothing.
"""

import math
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import rewrite_logs

from kdlib.losses.objective import Objective
from kdlib.runs.files import StudentFolder, now, write_json
from kdlib.runs.log import append_metrics, duration, time_left

HELD_OUT = {
    "eval_loss": ("loss", ".3f"),
    "eval_perplexity": ("perplexity", ".1f"),
    "eval_log_loss": ("log-loss", ".3f"),
    "eval_accuracy": ("accuracy", ".3f"),
    "eval_macro_f1": ("macro-F1", ".3f"),
    "eval_choice_accuracy": ("right choices", ".3f"),
    "eval_kl_to_teacher": ("KL to teacher", ".3f"),
}  # of an evaluation, as they are printed
PLANNED = 400  # moments at which a plan is written down, at most twice as many


def figures_of(logs: Mapping[str, float], state: TrainerState) -> dict[str, float]:
    """A log under the names that files and trackers get, train/… and eval/…; nothing where it is no log
    of losses.
    """
    if "loss" not in logs and "eval_loss" not in logs:
        return {}
    return {
        "train/step": state.global_step,
        "train/epoch": logs["epoch"],
        **rewrite_logs({k: v for k, v in logs.items() if k != "epoch"}),
    }


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl."""

    def __init__(self, folder: StudentFolder) -> None:
        self.folder = folder

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (figures := figures_of(logs, state)):
            append_metrics(self.folder, {**figures, "time": now()})


class PlanFile(TrainerCallback):
    """Writes plan.json when training begins: learning rate, weights and temperatures over the whole of
    it, as they will be logged.
    """

    def __init__(self, folder: StudentFolder, objective: Objective) -> None:
        self.folder, self.objective = folder, objective

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not state.is_world_process_zero:
            return
        stride = max(state.max_steps // PLANNED, 1)
        lines = [
            {
                "step": step,
                **self._rate(lr_scheduler, step),
                **self.objective.planned((step - 1) / state.max_steps),
            }
            for step in sorted({*range(1, state.max_steps + 1, stride), state.max_steps})
        ]
        write_json(self.folder.plan, lines)

    @staticmethod
    def _rate(scheduler, step: int) -> dict[str, float]:
        """Of this optimizer step, counted from 1; nothing where it depends on the course of the training
        (plateau).
        """
        if not isinstance(scheduler, LambdaLR):
            return {}
        return {"learning_rate": scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step - 1)}


class PrintedLines(TrainerCallback):
    """One line per log, readable in a notebook, a terminal and a log file alike."""

    def __init__(self, label: str, opening: str = "", *, last_step: int | None = None) -> None:
        self.label, self.opening, self.last_step = label, opening, last_step
        self.started: tuple[float, int] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = (time.perf_counter(), state.global_step)
        if self.opening and state.is_world_process_zero:
            print(f"{self.label}: {self.opening}", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        at = f"{self.label} step {state.global_step}/{self.last_step or state.max_steps}"
        if "loss" in logs:
            terms = "  ".join(
                f"{n.removesuffix('_loss')} {v:.3f}" for n, v in logs.items() if n.endswith("_loss")
            )
            print(
                f"{at}  loss {logs['loss']:.3f} = {terms}  "
                f"lr {logs['learning_rate']:.1e}  {_pace(logs)}{self._left(state)}",
                flush=True,
            )
        elif "eval_loss" in logs:
            figures = [
                f"{words} {logs[name]:{form}}" for name, (words, form) in HELD_OUT.items() if name in logs
            ]
            print(f"{at}  held-out: {'  '.join(figures)}", flush=True)

    def _left(self, state) -> str:
        seconds, steps = time.perf_counter() - self.started[0], state.global_step - self.started[1]
        left = time_left(seconds, steps, (self.last_step or state.max_steps) - state.global_step)
        return f"{duration(left)} left" if left is not None else ""


def _pace(logs: Mapping[str, float]) -> str:
    return "".join(
        f"{logs[f'{what}_per_s']:.0f} {what}/s  " for what in ("tokens", "rows") if f"{what}_per_s" in logs
    )


class Throughput(TrainerCallback):
    """Time spent in optimizer steps alone, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.seconds = 0.0  # since the last log
        self.durations: list[float] = []  # of each step

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - self.began)
        self.seconds += self.durations[-1]

    def drain(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class LogBeforeSave(TrainerCallback):
    """A checkpoint never falls between two log lines, so that a resumed run's lines are those of an
    unbroken one.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            control.should_log = True

    on_epoch_end = on_step_end


class StopRequest(TrainerCallback):
    """Turns an interrupt, or a file named STOP in one of the folders, into: finish the step, save a
    checkpoint, stop.

    A second interrupt stops at once.
    """

    def __init__(self, *folders: Path) -> None:
        self.files = [folder / "STOP" for folder in folders]
        self.requested = False

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.previous)

    def _interrupt(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("stopping after this step, with a checkpoint; interrupt again to stop at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        for file in self.files:
            if file.exists():
                file.unlink(missing_ok=True)
                self.requested = True
        # the ranks see an interrupt or the file at different steps; all must stop at the same
        if args.world_size > 1:
            flag = torch.tensor(float(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = control.should_log = True


class EarlyStop(TrainerCallback):
    """Stops when the metric that chooses best_model/ has not improved by more than `min_delta` in `patience`
    evaluations.

    Counted in the logged evaluations: so a resumed training goes on counting, which transformers' own
    callback does not, and gains that are small one by one add up.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience, self.min_delta = patience, min_delta

    def on_evaluate(self, args, state, control, **kwargs):
        key, sign = (
            "eval_" + args.metric_for_best_model.removeprefix("eval_"),
            1 if args.greater_is_better else -1,
        )
        best, since = -math.inf, 0
        for value in (sign * line[key] for line in state.log_history if key in line):
            best, since = (value, 0) if value > best + self.min_delta else (best, since + 1)
        control.should_training_stop |= since >= self.patience


class StopAfter(TrainerCallback):
    """Ends training after so many optimizer steps, on the schedules of the whole run: a dry run."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = True
        control.should_evaluate = control.should_save = False
        control.should_training_stop |= state.global_step >= self.steps

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save = False


def memory_gib(device: torch.device) -> float:
    """Peak memory on the GPU, or the process's memory now on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def is_better(value: float, others: list[float], *, greater: bool) -> bool:
    """Whether a metric beats all others."""
    return all((value > other) if greater else (value < other) for other in others)
