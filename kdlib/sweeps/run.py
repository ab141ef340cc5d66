"""`kd sweep`: from a file to its runs and their report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.errors import RunError
from kdlib.runs import folder as runs
from kdlib.runs.files import read_json
from kdlib.sweeps import cost
from kdlib.sweeps.clock import Clock
from kdlib.sweeps.config import SweepConfig
from kdlib.sweeps.pool import Listed, Pool, Supply, say
from kdlib.sweeps.processes import Crew
from kdlib.sweeps.results import FILE, Sweep
from kdlib.sweeps.search import Search
from kdlib.sweeps.trials import Base, Trial, base_of, described, expanded


@dataclass(frozen=True)
class Order:
    """One start of a sweep, as it was asked for."""

    name: str
    file: str  # seen from the project's folder
    command: str
    root: Path  # of the runs
    reports: Path
    jobs: int = 1
    smoke: bool = False
    overrides: Mapping[str, Any] | None = None  # in all trials
    forecast: bool = True


def conduct(settings: SweepConfig, order: Order, *, dry_run: bool = False) -> Path | None:
    """Run all trials that are not done; returns the page of the sweep's report, or None for a dry run.

    Raises:
        ConfigError: a trial would make no sound config; nothing is written.
        RunError: the sweep is running already; or runs failed, or it was stopped: the others' results are
            there.
    """
    sweep = Sweep(order.root / order.name)
    base = base_of(settings, order.name, Path.cwd(), smoke=order.smoke, overrides=order.overrides)
    trials, repeated = planned(sweep, settings, base)
    supply = supply_of(sweep, settings, base, trials)
    print(listing(sweep, trials, repeated, more=len(supply.ahead()) - len(to_do(sweep, trials))), flush=True)
    clock, text = _forecast(sweep, settings, base, trials, order) if order.forecast else (Clock(), "")
    if dry_run:
        return None
    begin(
        sweep,
        settings,
        trials,
        file=order.file,
        base=settings.base,
        smoke=base.smoke,
        command=order.command,
        repeated=repeated,
        forecast=text,
    )
    crew = Crew(
        order.reports, jobs=order.jobs, timeout_s=settings.timeout_minutes and settings.timeout_minutes * 60
    )
    return Pool(sweep, base, crew, clock, keep_checkpoints=settings.keep_checkpoints).run(supply)


def _forecast(
    sweep: Sweep, settings: SweepConfig, base: Base, trials: Sequence[Trial], order: Order
) -> tuple[Clock, str]:
    """What is to be run, foretold; of a search that has not begun one trial stands for all."""
    ahead = to_do(sweep, trials)
    if settings.search:
        first = {name: next(iter(draw.values()))[0] for name, draw in settings.search.space.items()}
        ahead = [base.trial(first)] * (settings.search.trials - len(trials) + len(ahead))
    if not ahead:
        return Clock(), ""
    print("forecasting …", flush=True)
    clock = cost.clock_of(ahead)
    text = cost.described(
        clock, ahead, jobs=order.jobs, keep_checkpoints=settings.keep_checkpoints, folder=order.root
    )
    print(text, flush=True)
    return clock, text


def planned(sweep: Sweep, settings: SweepConfig, base: Base) -> tuple[list[Trial], list[str]]:
    """The trials, with a line for each that is a repetition; of a search those that it has made so far."""
    trials, repeated = expanded(settings, base)
    if settings.search:
        trials = [base.trial(trial["parameters"]) for trial in sweep.facts.get("trials", [])]
    return trials, repeated


def listing(sweep: Sweep, trials: Sequence[Trial], repeated: Sequence[str], *, more: int = 0) -> str:
    """Every trial with what differs, and where it stands."""
    states = [sweep.run(trial.run).status["state"].replace("created", "new") for trial in trials]
    lines = [
        f"  {trial.run}  {state:8} {described(trial.parameters)}"
        for trial, state in zip(trials, states, strict=True)
    ]
    searched = [f"  and {more} that are chosen as the search goes on"] if more else []
    return "\n".join(
        [f"{sweep.name}: {len(trials) + more} runs", *lines, *searched, *(f"  {line}" for line in repeated)]
    )


def to_do(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """What is not done, in order; what another process is at work on comes last."""
    states = {trial.run: sweep.run(trial.run).status["state"] for trial in trials}
    return sorted(
        (trial for trial in trials if states[trial.run] != "done"),
        key=lambda trial: states[trial.run] == "running",
    )


def supply_of(sweep: Sweep, settings: SweepConfig, base: Base, trials: Sequence[Trial]) -> Supply:
    """The trials to run; a search remembers the finished ones."""
    if not settings.search:
        return Listed(to_do(sweep, trials))
    return Search(
        settings, base, [(trial.parameters, _metric(sweep, trial, settings.metric)) for trial in trials]
    )


def _metric(sweep: Sweep, trial: Trial, metric: str) -> float | None:
    run = sweep.run(trial.run)
    if run.status["state"] != "done":
        return None
    return read_json(run.path / "comparison_results.json")["models"]["distilled"][metric]["value"]


def begin(sweep: Sweep, settings: SweepConfig, trials: Sequence[Trial], **facts: Any) -> None:
    """Write down what the sweep is, `facts` as well, and that it runs.

    Raises:
        RunError: it is running, or its name is a run's, or unfit for a folder.
    """
    if (sweep.path / "config.yaml").exists():
        raise RunError(f"{sweep.name!r} is the name of a run; choose another --name for the sweep")
    if sweep.folder.status["state"] == "running":
        raise RunError(
            f"sweep {sweep.name} is running already, in process {sweep.folder.status['pid']}; wait for it, "
            "or stop it first"
        )
    if not sweep.path.exists():
        runs.check_new(sweep.path.parent, sweep.name)
    try:
        sweep.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise runs.write_error(sweep.path, error) from error
    earlier = sweep.facts
    runs.write_json(
        sweep.path / FILE,
        {
            "sweep": sweep.name,
            "created": earlier.get("created", runs.now()),
            **facts,
            "settings": settings.as_dict(),
            "parameters": settings.parameters,
            "metric": settings.metric,
            "trials": [{"run": trial.run, "parameters": dict(trial.parameters)} for trial in trials],
        },
    )
    sweep.folder.set_status("running")
    if gone := {trial["run"] for trial in earlier.get("trials", [])} - {trial.run for trial in trials}:
        say(
            f"{len(gone)} runs of an earlier form of this sweep are not part of it now: "
            f"{', '.join(sorted(gone))}"
        )
