"""What happens around training steps."""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from kdlib.errors import RunError
from kdlib.metrics.names import MEASURES
from kdlib.runs import processes
from kdlib.runs.files import StudentFolder, write_json
from kdlib.runs.log import duration, time_left

PRINTED = ("perplexity", "log_loss", "accuracy", "macro_f1", "choice_accuracy", "kl_to_teacher")
PLANNED = 400  # steps at which a plan is written down, at most twice as many
FULL = 64 * 2**20  # bytes left: a failed write is put down to the disk


class PlanFile(TrainerCallback):
    """Writes plan.json when training begins: the learning rate and what is `planned` at a fraction of it."""

    def __init__(self, folder: StudentFolder, planned: Callable[[float], dict[str, float]]) -> None:
        self.folder, self.planned = folder, planned

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not state.is_world_process_zero:
            return
        steps, lines = range(1, state.max_steps + 1, max(state.max_steps // PLANNED, 1)), []
        for step in sorted({*steps, state.max_steps}):
            line = {"step": step}
            if isinstance(lr_scheduler, LambdaLR):  # others depend on what is measured
                line["learning_rate"] = float(lr_scheduler.base_lrs[0]) * lr_scheduler.lr_lambdas[0](step - 1)
            lines.append(line | self.planned((step - 1) / state.max_steps))
        write_json(self.folder.plan, lines)


class PrintedLines(TrainerCallback):
    """One line per log, readable in a notebook, a terminal and a log file alike."""

    def __init__(self, label: str, opening: str = "", *, last_step: int | None = None) -> None:
        self.label, self.opening, self.last_step = label, opening, last_step

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.began_at = time.perf_counter(), state.global_step
        if self.opening and state.is_world_process_zero:
            print(f"{self.label}: {self.opening}", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        step, last = state.global_step, self.last_step or state.max_steps
        if "loss" in logs:
            terms = [f"{n.removesuffix('_loss')} {v:.3f}" for n, v in logs.items() if n.endswith("_loss")]
            units = [unit for unit in ("tokens", "rows") if f"{unit}_per_s" in logs]
            pace = "".join(f"  {logs[f'{unit}_per_s']:.0f} {unit}/s" for unit in units)
            left = time_left(time.perf_counter() - self.began, step - self.began_at, last - step)
            line = f"loss {logs['loss']:.3f} = {'  '.join(terms)}  lr {logs['learning_rate']:.1e}{pace}"
            line += "" if left is None else f"  {duration(left)} left"
        elif "eval_loss" in logs:
            line = f"held-out: loss {logs['eval_loss']:.3f}"
            for name in PRINTED:
                if (value := logs.get(f"eval_{name}")) is not None:
                    line += f"  {MEASURES[name].name} {value:{'.1f' if name == 'perplexity' else '.3f'}}"
        else:
            return
        print(f"{self.label} step {step}/{last}  {line}", flush=True)


class Throughput(TrainerCallback):
    """Wall time of optimizer steps, waiting for their rows included, evaluation and checkpoints not."""

    def __init__(self) -> None:
        self.seconds = 0.0  # since the last log
        self.durations: list[float] = []  # of each step

    def begin(self) -> None:
        """A step begins, with its rows; what came before is over."""
        self.began = time.perf_counter()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.durations.append(time.perf_counter() - self.began)
        self.seconds += self.durations[-1]

    def drain(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class WholeLog(TrainerCallback):
    """A checkpoint has all that its step logs, so that a resumed training's log is that of an unbroken one.

    It falls between no two log lines, and where an epoch's end brings an evaluation, it comes after that.
    """

    def __init__(self) -> None:
        self.awaited = False

    def on_step_end(self, args, state, control, **kwargs):
        is_last = control.should_training_stop or state.epoch == int(state.epoch)
        if control.should_save and is_last and args.eval_strategy == "epoch":
            control.should_save, self.awaited = False, True
        control.should_log |= control.should_save

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.awaited
        control.should_log |= control.should_save
        self.awaited = False


class StopRequest(TrainerCallback):
    """Turns Ctrl-C, a polite kill, or a file STOP in a folder, into: finish the step, save, stop.

    Attributes:
        stopped: so it ended, with steps left to make.
    """

    def __init__(self, *folders: Path) -> None:
        self.files = [folder / "STOP" for folder in folders]
        self.requested, self.stopped, self.saved = False, False, -1

    @contextmanager
    def heard(self, *, is_first: bool = True) -> Iterator[None]:
        """Inside, signals are heard; the first of several ranks says in its run that STOP is looked for."""
        runs = [file.parent for file in self.files if file.with_name("config.yaml").exists()]
        with (
            processes.hears_stop(*runs * is_first),
            processes.heard(self._request, processes.interrupted),
        ):
            yield

    def _request(self) -> None:
        self.requested = True
        print("stopping after this step, with a checkpoint; interrupt again to stop at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        for file in self.files:
            if file.exists():
                file.unlink(missing_ok=True)
                self.requested = True
        if args.world_size > 1:  # each sees an interrupt or the file at another step; all stop at the same
            flag = torch.tensor(float(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag)
        self.stopped = self.requested and state.global_step < state.max_steps
        control.should_training_stop |= self.stopped

    def on_save(self, args, state, control, **kwargs):
        self.saved = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        """Called at a stop as well, where an unbroken training would neither evaluate nor log an epoch."""
        if self.stopped:
            control.should_evaluate &= state.epoch == int(state.epoch)
            control.should_save = control.should_evaluate or self.saved < state.global_step
            control.should_log |= control.should_save


class EarlyStop(TrainerCallback):
    """Stops when what chooses best_model/ has not improved by over `min_delta` in `patience` evaluations.

    Counted in those logged, so that a resumed training goes on counting, and small gains add up.
    """

    def __init__(self, patience: int, min_delta: float) -> None:
        self.patience, self.min_delta = patience, min_delta

    def on_evaluate(self, args, state, control, **kwargs):
        best, since = -math.inf, 0
        for value in scores(args, state.log_history):
            best, since = (value, 0) if value > best + self.min_delta else (best, since + 1)
        control.should_training_stop |= since >= self.patience

    on_train_begin = on_evaluate  # one that was killed after its stop makes no step more


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


def scores(args: TrainingArguments, logged: Iterable[Mapping[str, float]]) -> list[float]:
    """What chooses best_model/, at each evaluation logged; more is better."""
    name, sign = str(args.metric_for_best_model).removeprefix("eval_"), 1 if args.greater_is_better else -1
    return [sign * line[f"eval_{name}"] for line in logged if f"eval_{name}" in line]


def best_evaluation(
    args: TrainingArguments, logged: Iterable[Mapping[str, float]]
) -> Mapping[str, float] | None:
    """The line at which best_model/ was saved; None where none says what chooses it."""
    judged = [line for line in logged if scores(args, [line])]  # questions may have been left out
    return max(judged, key=lambda line: scores(args, [line]), default=None)


def loss_at_best(args: TrainingArguments, logged: Sequence[Mapping[str, float]]) -> float:
    """The held-out loss where the model was best by a measure that no weight changes: losses are changed."""
    best = best_evaluation(args, logged)
    return best["eval_loss"] if best else min(line["eval_loss"] for line in logged if "eval_loss" in line)


def disk_is_full(folder: StudentFolder) -> bool:
    """Whether so little is left that a failed write is put down to it."""
    return shutil.disk_usage(folder.path).free < FULL


def check_disk(folder: StudentFolder, *, weights: int, args: TrainingArguments) -> None:
    """Refuse before the first step what would fail at a checkpoint; `weights`: the student's, bytes."""
    # AdamW's two averages are as large as the weights, each; the best model up to there may be another
    checkpoint = 4 * weights if args.save_strategy != "no" else 0
    needed = 3 * weights + checkpoint * ((args.save_total_limit or 2) + 1)
    free = shutil.disk_usage(next(p for p in (folder.path, *folder.path.parents) if p.exists())).free
    if free < needed:
        raise RunError(
            f"{folder.path}: {free / 2**30:.1f} GiB free, but models and checkpoints of this run need "
            f"{needed / 2**30:.1f} GiB; free some, lower training.save_total_limit, or choose another --runs"
        )
