"""What a sweep will cost before it starts: time, memory side by side, disk; each distinct cost is
forecast once.
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from kdlib.config.run import Config
from kdlib.diagnostics.charges import GIB
from kdlib.diagnostics.measurement import Measured, measured
from kdlib.diagnostics.memory import Forecast, forecast, verdict
from kdlib.diagnostics.outlook import BUSY
from kdlib.errors import KdlibError
from kdlib.sweeps.clock import Clock, Cost, duration
from kdlib.sweeps.trials import Trial

BUDGET = 180.0  # s for all forecasts together; the runs that are left then count as the mean of the others
NEUTRAL = {
    "loss": ("temperature",),
    "training": (
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "metric_for_best_model",
        "report_to",
    ),
}
"""What changes neither memory nor time."""
BYTES = 4  # of a weight on disk


def clock_of(trials: Sequence[Trial]) -> Clock:
    """Forecast every distinct cost among the trials once, the commonest first, for as long as BUDGET
    allows.
    """
    kinds: dict[str, list[Trial]] = {}
    for trial in trials:
        kinds.setdefault(kind(trial.config), []).append(trial)
    clock, began = Clock(), time.monotonic()
    for alike in sorted(kinds.values(), key=len, reverse=True):
        if time.monotonic() - began > BUDGET:
            break
        try:
            found, took = forecast(alike[0].config), measured(alike[0].config)
        except KdlibError as error:
            clock.errors |= {trial.run: str(error) for trial in alike}
            continue
        clock.free, clock.others = found.free, max(clock.others, took.cores_of_others)
        clock.costs |= {trial.run: _cost(trial.config, found, took) for trial in alike}
    return clock


def kind(config: Config) -> str:
    """The same text for configs that cost the same."""
    plain = config.as_dict() | {"seed": 0, "compare": None}
    for section, names in NEUTRAL.items():
        plain[section] = {name: value for name, value in plain[section].items() if name not in names}
    plain["loss"]["weights"] = sorted(name for name, weight in config.loss.weights.items() if weight != 0)
    return json.dumps(plain, sort_keys=True)


def _cost(config: Config, found: Forecast, took: Measured) -> Cost:
    students, training = 2 if config.baseline else 1, config.training
    weights = students * BYTES * found.parameters["student"]
    kept = 0 if training.get("save_strategy") == "no" else training["save_total_limit"] or 2
    return Cost(
        students * took.seconds,
        found.peak,
        models=2 * weights,
        checkpoints=3 * weights * kept,
    )


def described(
    clock: Clock, trials: Sequence[Trial], *, jobs: int, keep_checkpoints: bool, folder: Path
) -> str:
    """The forecast of the whole sweep for people, with what does not fit."""
    known = [clock.costs[trial.run] for trial in trials if trial.run in clock.costs]
    if not known:
        return "\n".join(["forecast: none of the runs can be forecast", *_errors(clock)])
    side = f"{jobs} side by side" if jobs > 1 else "one after another"
    return "\n".join(
        [
            f"forecast of {len(trials)} runs, {side} (corrected as runs finish):",
            f"  time    {_time(clock, trials, jobs)}",
            f"  memory  {_memory(clock, known, jobs)}",
            f"  disk    {_disk(known, len(trials), jobs, keep_checkpoints, folder)}",
            *_errors(clock),
        ]
    )


def _time(clock: Clock, trials: Sequence[Trial], jobs: int) -> str:
    seconds = clock.left([trial.run for trial in trials], jobs)
    if seconds is None:
        return "not known: it depends on the number of rows"
    share = "; side by side they share what the machine has" if jobs > 1 else ""
    busy = ""
    if clock.others > BUSY:
        busy = (
            f"\n          other processes kept {clock.others:.1f} cores busy meanwhile: that is the time "
            "on a busy machine"
        )
    return f"{duration(seconds)} of training; setting up and comparing come on top{share}{busy}"


def _memory(clock: Clock, known: Sequence[Cost], jobs: int) -> str:
    peak = sum(sorted((cost.peak for cost in known), reverse=True)[:jobs])
    found = verdict(peak, clock.free)
    advice = "; take fewer --jobs" if found != "fits" and jobs > 1 else ""
    return f"{peak / GIB:.2f} GiB at the highest, {clock.free / GIB:.2f} free: {found}{advice}"


def _disk(known: Sequence[Cost], runs: int, jobs: int, keep_checkpoints: bool, folder: Path) -> str:
    checkpoints = sorted((cost.checkpoints for cost in known), reverse=True)
    models = runs / len(known) * sum(cost.models for cost in known)
    needed = models + (runs / len(known) * sum(checkpoints) if keep_checkpoints else sum(checkpoints[:jobs]))
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    gone = "" if keep_checkpoints else " (a run's checkpoints go when it is done)"
    advice = ": not enough; free some space, or choose another folder with --runs" if needed > free else ""
    return f"{needed / GIB:.2f} GiB{gone}, {free / GIB:.1f} free{advice}"


def _errors(clock: Clock) -> list[str]:
    return [f"  {run}: no forecast, and it will hardly run: {reason}" for run, reason in clock.errors.items()]
