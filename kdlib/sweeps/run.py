"""`kd sweep`: from a file to its runs and their report, with a forecast before."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlib.config.run import Config
from kdlib.errors import KdlibError, RunError, refuse_keys
from kdlib.runs.files import now, write_json, writing
from kdlib.runs.folder import check_new
from kdlib.runs.log import duration
from kdlib.runs.processes import held
from kdlib.sweeps import report
from kdlib.sweeps.config import SweepConfig
from kdlib.sweeps.pool import Clock, Cost, Listed, Order, Pool, say
from kdlib.sweeps.processes import STOP, Work, executor
from kdlib.sweeps.results import FILE, Sweep, figures_of_student
from kdlib.sweeps.trials import Base, Search, Trial, described, expanded

GIB = 2**30
BUDGET = 180.0  # s for all forecasts together; the runs that are left then count as the mean of the others
# settings of `training` that change neither memory nor time
NEUTRAL = {"learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"}
NEUTRAL |= {"metric_for_best_model", "report_to", "adam_beta1", "adam_beta2", "adam_epsilon"}


def run_sweep(settings: SweepConfig, order: Order, *, dry_run: bool = False) -> Path | None:
    """Run all trials that are not done; returns the page of the sweep's report, or None for a dry run.

    Raises:
        ConfigError: a trial would make no sound config; nothing is written.
        RunError: the sweep is running already, the cluster is out of reach, runs failed, or it was stopped.
    """
    sweep = Sweep(order.root / order.name)
    base = Base(settings, order.name, Path.cwd(), smoke=order.smoke, overrides=order.overrides)
    trials, repeated = expanded(settings, base)
    if settings.search:  # those that it has made so far
        trials = [base.trial(trial["parameters"]) for trial in sweep.facts.get("trials", [])]
    ahead = to_do(sweep, trials)
    supply = searched(sweep, settings, base, trials) if settings.search else Listed(ahead)
    more = len(supply.ahead()) - len(ahead)
    print(listing(sweep, trials, repeated, more=more), flush=True)
    if more:  # one trial stands for all that are not chosen yet
        ahead += [base.trial(settings.search.first)] * more
    clock, text = Clock(), ""
    if order.forecast and ahead:
        print("forecasting …", flush=True)
        clock, text = forecast(ahead, order, keep_checkpoints=settings.keep_checkpoints)
        print(text, flush=True)
    if dry_run:
        return None
    facts = {"file": order.file, "base": settings.base, "smoke": base.smoke, "command": order.command}
    limit = settings.timeout_minutes and settings.timeout_minutes * 60
    with held(sweep.path), executor(order.jobs, order.on, order.root) as (where, jobs):
        begin(sweep, settings, trials, **facts, repeated=repeated, forecast=text)
        if order.on:
            say(f"on {order.on}: {jobs} runs at a time")
        work = Work(sweep.path, order.reports, None if order.on else jobs, limit)
        return Pool(sweep, base, order, where, jobs, work, clock, report.render).run(supply)


def listing(sweep: Sweep, trials: Sequence[Trial], repeated: Sequence[str], *, more: int = 0) -> str:
    lines = [f"{sweep.name}: {len(trials) + more} runs"]
    for trial in trials:
        state = sweep.run(trial.run).status["state"].replace("created", "new")
        lines.append(f"  {trial.run}  {state:8} {described(trial.parameters)}")
    if more:
        lines.append(f"  and {more} that are chosen as the search goes on")
    return "\n".join([*lines, *(f"  {line}" for line in repeated)])


def to_do(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """What is not done; what another process is at work on comes last."""
    states = {trial.run: sweep.run(trial.run).status["state"] for trial in trials}
    left = [trial for trial in trials if states[trial.run] != "done"]
    return sorted(left, key=lambda trial: states[trial.run] == "running")


def searched(sweep: Sweep, settings: SweepConfig, base: Base, trials: Sequence[Trial]) -> Search:
    """The search, which remembers its finished trials."""
    earlier = []
    for trial in trials:
        found = figures_of_student(sweep.run(trial.run)).get(settings.metric, {})
        earlier.append((trial.parameters, found.get("value")))
    return Search(settings, base, earlier)


def begin(sweep: Sweep, settings: SweepConfig, trials: Sequence[Trial], **facts: Any) -> None:
    """Write down what the sweep is; a RunError where it cannot."""
    if (sweep.path / "config.yaml").exists():
        raise RunError(f"{sweep.name!r} is the name of a run; choose another --name for the sweep")
    if not sweep.path.exists():
        check_new(sweep.path.parent, sweep.name)
    earlier = sweep.facts
    about = {"sweep": sweep.name, "created": earlier.get("created", now()), **facts}
    about |= {"settings": settings.as_dict(), "parameters": settings.parameters, "metric": settings.metric}
    about["trials"] = [{"run": trial.run, "parameters": dict(trial.parameters)} for trial in trials]
    refuse_keys(about)
    with writing(sweep.path):
        sweep.path.mkdir(parents=True, exist_ok=True)
        (sweep.path / STOP).unlink(missing_ok=True)
    write_json(sweep.path / FILE, about)
    if gone := {trial["run"] for trial in earlier.get("trials", [])} - {trial.run for trial in trials}:
        names = ", ".join(sorted(gone))
        say(f"{len(gone)} runs of an earlier form of this sweep are not part of it now: {names}")


def forecast(trials: Sequence[Trial], order: Order, *, keep_checkpoints: bool) -> tuple[Clock, str]:
    """Time, memory and disk of these runs; each distinct cost is forecast once, the commonest first."""
    alike: dict[str, list[Trial]] = {}
    for trial in trials:
        alike.setdefault(cost_key(trial.config), []).append(trial)
    costs: dict[str, Cost] = {}
    errors, began = [], time.monotonic()
    for group in sorted(alike.values(), key=len, reverse=True):
        if time.monotonic() - began > BUDGET:
            break
        try:
            costs |= dict.fromkeys([trial.run for trial in group], order.forecast(group[0].config))
        except KdlibError as error:
            errors += [f"  {trial.run}: no forecast, and it will hardly run: {error}" for trial in group]
    known = [(costs[trial.run], trial) for trial in trials if trial.run in costs]
    if not known:
        return Clock(), "\n".join(["forecast: none of the runs can be forecast", *errors])
    clock = Clock({trial.run: _students(trial) * cost.seconds for cost, trial in known if cost.seconds})
    how, share = "one after another", ""
    if order.jobs > 1:
        how, share = f"{order.jobs} side by side", "; side by side they share what the machine has"
    time_left = clock.left([trial.run for trial in trials], order.jobs)
    took = f"{duration(time_left or 0)} of training; setting up and comparing come on top{share}"
    lines = [
        f"forecast of {len(trials)} runs, {how} (corrected as runs finish):",
        f"  time    {took if time_left else 'not known: it depends on the number of rows'}",
        f"  memory  {_memory([cost for cost, _ in known], order.jobs)}",
        f"  disk    {_disk(known, len(trials), order, keep_checkpoints)}",
    ]
    return clock, "\n".join([*lines, *errors])


def cost_key(config: Config) -> str:
    """The same text for configs that cost the same."""
    plain = config.as_dict() | {"seed": 0, "compare": None, "trackers": None}
    terms = sorted(name for name, weight in config.loss.weights.items() if weight != 0)
    plain["loss"] |= {"temperature": 0, "weights": terms}
    plain["training"] |= dict.fromkeys(NEUTRAL)
    return json.dumps(plain, sort_keys=True)


def _students(trial: Trial) -> int:
    return 2 if trial.config.baseline else 1


def _memory(costs: Sequence[Cost], jobs: int) -> str:
    free, peaks, bounds = costs[0].free, [c.peak for c in costs], [c.at_most for c in costs]
    peak, at_most = (sum(sorted(each)[-jobs:]) for each in (peaks, bounds))
    found = "fits" if at_most <= free else "tight" if peak <= free else "does not fit"
    advice = "; take fewer --jobs" if found != "fits" and jobs > 1 else ""
    return f"{peak / GIB:.2f} GiB at the highest, {free / GIB:.2f} free: {found}{advice}"


def _disk(costs: Sequence[tuple[Cost, Trial]], runs: int, order: Order, keep_checkpoints: bool) -> str:
    """Of each student the best and the last model; a checkpoint has AdamW's averages as well."""
    models, checkpoints = [], []
    for cost, trial in costs:
        weights, training = _students(trial) * cost.weights, trial.config.training
        kept = 0 if training.get("save_strategy") == "no" else training["save_total_limit"] or 2
        models.append(2 * weights)
        checkpoints.append(3 * weights * kept)
    share = runs / len(costs)  # those that could not be forecast count as the others' mean
    needed = share * sum(models)
    needed += share * sum(checkpoints) if keep_checkpoints else sum(sorted(checkpoints)[-order.jobs :])
    there = next(folder for folder in (order.root, *order.root.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    gone = "" if keep_checkpoints else " (a run's checkpoints go when it is done)"
    advice = ": not enough; free some space, or choose another folder with --runs" if needed > free else ""
    return f"{needed / GIB:.2f} GiB{gone}, {free / GIB:.1f} free{advice}"
