"""A sweep's files as tables: every trial, every setting averaged over its seeds, what is best, and the
price.  Imports no torch.

runs/<sweep>/  sweep.json (the settings and the trials, by their runs' names)  status.json
runs/<sweep>_<hash>/  each trial, an ordinary run, with log.txt: all that its command said
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.errors import RunError
from kdlib.metrics.names import MEASURES, with_interval
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run
from kdlib.runs.log import training_table
from kdlib.sweeps.config import METRICS
from kdlib.sweeps.trials import described, plain

FILE = "sweep.json"
SEED = "seed"
WORDS = {name: measure.words for name, measure in MEASURES.items()}
UNITS = {name: measure.unit.format(item="prediction") for name, measure in MEASURES.items()}
COSTS = {
    "parameters": ("student's parameters, millions", False),
    "tokens_per_s": ("forward pass, tokens/s", True),
    "rows_per_s": ("forward pass, rows/s", True),
    "training_s": ("training, s", False),
}
"""Column -> (how figures call it, whether more is better)."""
# of tokens or of rows, as the task is
SPEEDS = {"tokens_per_s": "forward_tokens_per_s", "rows_per_s": "throughput_rows_per_s"}
MANY = 12  # values, above which a parameter is a range rather than a grid
ALIKE = 0.1  # costs that differ by less than this share of the lowest are called alike
CLEAR = 10  # s: logs have the time to the second, so shorter trainings are not told apart
# times the usual time between two logs: more is a break between a stop and a resume, or an evaluation
BREAK = 20


@dataclass(frozen=True)
class Sweep:
    """One sweep, as its folder has it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def facts(self) -> dict[str, Any]:
        """sweep.json: file, base, smoke, settings, parameters, metric, trials, repeated, forecast,
        command.
        """
        return read_json(self.path / FILE, {})

    @property
    def folder(self) -> Run:
        """Its own folder, for the status."""
        return Run(self.path)

    def run(self, name: str) -> Run:
        return Run(self.path.parent / name)


def exists(root: Path, name: str) -> bool:
    """Whether there is a sweep of this name among the runs."""
    return (root / name / FILE).exists()


def open_sweep(root: Path, name: str) -> Sweep:
    """A sweep's folder.

    Raises:
        RunError: there is none.
    """
    if not exists(root, name):
        raise RunError(f"no sweep {name!r} in {root}; kd sweep FILE makes one")
    return Sweep(root / name)


def trial_table(sweep: Sweep) -> pd.DataFrame:
    """One row per trial: run, each parameter, the metric with its interval, costs, state, message."""
    facts = sweep.facts
    rows = [_row(sweep.run(trial["run"]), trial["parameters"], facts["metric"]) for trial in facts["trials"]]
    numbers = ("value", "low", "high", *COSTS, "minutes")
    table = pd.DataFrame(
        rows, columns=["run", *facts["parameters"], *numbers, "state", "message"], dtype=object
    )
    return table.astype(dict.fromkeys(numbers, float))


def _row(run: Run, parameters: Mapping[str, Any], metric: str) -> dict[str, Any]:
    distilled = (read_json(run.path / "comparison_results.json") or {}).get("models", {}).get("distilled", {})
    status, done = run.status, distilled if run.status["state"] == "done" else {}
    costs = (
        {
            "parameters": done["parameters"] / 1e6,
            "training_s": training_seconds(run),
            **{cost: done[fact] for cost, fact in SPEEDS.items() if fact in done},
        }
        if done
        else {}
    )
    return {
        "run": run.name,
        **parameters,
        **done.get(metric, {}),
        **costs,
        "minutes": run.manifest.get("minutes"),
        "state": "waiting" if status["state"] == "created" else status["state"],
        "message": status.get("message", ""),
    }


def training_seconds(run: Run) -> float:
    """From the first log of the distilled student to its last; breaks between a stop and a resume are
    left out.
    """
    table = training_table(run)
    if "time" not in table:
        return math.nan
    times = [moment.timestamp() for moment in pd.to_datetime(table["time"])]
    steps = [later - earlier for earlier, later in pairwise(times)]
    usual = max(statistics.median(steps), 1.0) if steps else 0.0
    return sum(step for step in steps if step <= BREAK * usual)


def varied(sweep: Sweep) -> list[str]:
    """The parameters that are compared: seeds are averaged over."""
    return [name for name in sweep.facts["parameters"] if name != SEED]


def setting_table(sweep: Sweep, trials: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, the best first: the mean over its seeds' finished runs, with an interval, n, and
    the runs.

    One run has the interval of its comparison, over held-out rows; several have Student's over the seeds.
    """
    names, done = varied(sweep), trials[trials["value"].notna()]
    groups: dict[str, list[int]] = {}
    for index, row in done.iterrows():
        groups.setdefault(json.dumps([row[name] for name in names], sort_keys=True, default=str), []).append(
            index
        )
    rows = [{**done.loc[members[0], names], **_of_seeds(done.loc[members])} for members in groups.values()]
    columns = [*names, "value", "low", "high", "n", "values", "runs", *COSTS]
    return pd.DataFrame(rows, columns=columns).sort_values(
        "value", ascending=not METRICS[sweep.facts["metric"]], ignore_index=True
    )


def _of_seeds(runs: pd.DataFrame) -> dict[str, Any]:
    return {
        **averaged(runs.to_dict("records")),
        "runs": list(runs["run"]),
        **{cost: runs[cost].mean() for cost in COSTS},
    }


def averaged(seeds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """value, low, high of several trainings as their mean with Student's 95 % interval, n and the values.

    One training keeps its own interval; so does what is the same in all, as a teacher that was trained once.
    """
    values = [each["value"] for each in seeds]
    mean = statistics.fmean(values)
    if max(values) == min(values):
        low, high = seeds[0]["low"], seeds[0]["high"]
    else:
        spread = student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        low, high = mean - spread, mean + spread
    return {"value": mean, "low": low, "high": high, "n": len(values), "values": values}


def student_t(freedom: int) -> float:
    """The 97.5 % point of Student's t: exact for few degrees of freedom, else the Cornish-Fisher
    expansion (to 0.1 %).
    """
    exact = (12.7062, 4.3027, 3.1824, 2.7764)
    if freedom <= len(exact):
        return exact[freedom - 1]
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def overlapping(settings: pd.DataFrame) -> int:
    """How many settings, beside the best, have intervals that reach into the best one's."""
    best, others = settings.iloc[0], settings.iloc[1:]
    return int(((others["low"] <= best["high"]) & (others["high"] >= best["low"])).sum())


def verdict(sweep: Sweep, settings: pd.DataFrame) -> str:
    """What the sweep found, in a sentence; says so where the intervals do not tell the best from the next."""
    words = WORDS[sweep.facts["metric"]]
    if not len(settings):
        return "No run is done yet"
    best, highest = settings.iloc[0], METRICS[sweep.facts["metric"]]
    if not varied(sweep):
        return f"{upper(words)} is {with_interval(best)}" + (
            f" over {best['n']} seeds" if best["n"] > 1 else ", of one seed so far"
        )
    opening = (
        f"{upper(words)} is {'highest' if highest else 'lowest'} with "
        f"{described(best[varied(sweep)])}: {with_interval(best)}"
    )
    if len(settings) == 1:
        return f"{opening}, the only setting that is done"
    if count := overlapping(settings):
        others = "the next does" if count == 1 else f"{count} others do"
        return f"{opening}; but {others} as well within the intervals, so there is no clear winner"
    second = settings.iloc[1]
    return (
        f"{opening}; the next, {described(second[varied(sweep)])}, is worse beyond the intervals: "
        f"{with_interval(second)}"
    )


def upper(words: str) -> str:
    return words[:1].upper() + words[1:]


def pareto(table: pd.DataFrame, cost: str, *, higher_is_better: bool) -> pd.DataFrame:
    """The rows that no other beats in both, the metric and this cost; the cheapest first."""
    sign, price = (-1 if higher_is_better else 1), (-1 if COSTS[cost][1] else 1)
    front, best = [], math.inf
    known = table[table[cost].notna()]
    order = sorted(
        known.index, key=lambda index: (price * known.loc[index, cost], sign * known.loc[index, "value"])
    )
    for index in order:
        if sign * known.loc[index, "value"] < best:
            best = sign * known.loc[index, "value"]
            front.append(index)
    return known.loc[front]


def compared_costs(table: pd.DataFrame) -> list[str]:
    """The costs in which trials can differ: students of one size differ in time alone."""
    sizes = table["parameters"].dropna()
    speeds = [speed for speed in SPEEDS if table[speed].notna().any()]
    size = ["parameters", *speeds] if len(sizes) and sizes.max() > sizes.min() else []
    return [*size, "training_s"] if table["training_s"].min() >= CLEAR else size


def weights_of(settings: pd.DataFrame, names: Sequence[str]) -> dict[str, float]:
    """How much of the metric's variance each parameter explains by itself, the most first: what matters here.

    By the means of its values, adjusted for their number (as R² is); numbers drawn from a range count by
    their quarters.
    """
    total, count = settings["value"].var(ddof=0), len(settings)
    shares = {}
    for name in names:
        several = len(levels(list(settings[name]))) > MANY
        groups = (
            pd.qcut(settings[name].astype(float), 4)
            if several and settings[name].map(is_number).all()
            else settings[name].map(plain)
        )
        means = settings["value"].groupby(groups, observed=True).transform("mean")
        left = 1 - means.var(ddof=0) / total if total else 1.0
        free = count - groups.nunique()
        shares[name] = max(1 - left * (count - 1) / free, 0.0) if free else 0.0
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def levels(values: Sequence[Any]) -> list[Any]:
    """The values that occur, each once: numbers by size, others in the order of the trials."""
    once = list({plain(value): value for value in values}.values())
    return sorted(once) if all(is_number(value) for value in once) else once


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown_trials(sweep: Sweep, trials: pd.DataFrame) -> pd.DataFrame:
    """For reading: the best first, those without a result last."""
    ranked = trials.sort_values(
        "value", ascending=not METRICS[sweep.facts["metric"]], na_position="last", kind="stable"
    )
    rows = {name: ranked[name].map(plain) for name in sweep.facts["parameters"]}
    rows[WORDS[sweep.facts["metric"]]] = [
        with_interval(row) if row["value"] == row["value"] else "" for _, row in ranked.iterrows()
    ]
    rows["minutes"] = ["" if math.isnan(value) else f"{value:.1f}" for value in ranked["minutes"]]
    return pd.DataFrame(
        {"run": ranked["run"], "state": ranked["state"], **rows, "message": ranked["message"]}
    )
