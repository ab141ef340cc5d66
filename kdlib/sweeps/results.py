"""A sweep's files as tables: trials, settings averaged over their seeds, what is best, what the teacher adds.

runs/<sweep>/  sweep.json (the settings and the trials, by their runs' names)  status.json
runs/<sweep>_<hash>/  each trial, an ordinary run, with log.txt: all that its command said
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kdlib.config.task_rules import rules_in, shown_in
from kdlib.metrics.means import averaged
from kdlib.metrics.names import (
    MEASURES,
    Measure,
    called_student,
    difference,
    is_better,
    student_of,
    with_interval,
)
from kdlib.plots.axes import LABELS, label_of, upper
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run
from kdlib.runs.log import training_table
from kdlib.runs.progress import seconds_taken
from kdlib.sweeps.trials import described, plain

FILE = "sweep.json"
SEED = "seed"
STUDENT, ALONE = "distilled", "baseline"
MODELS = ("teacher", STUDENT, called_student(None), ALONE, "untrained")  # in the order of the table
DIFFERENCE = f"{LABELS[STUDENT]} − {LABELS[ALONE]}"
COSTS = {
    "parameters": ("student's parameters, millions", False),
    "tokens_per_s": ("forward pass, tokens/s", True),
    "rows_per_s": ("forward pass, rows/s", True),
    "training_s": ("training, s", False),
}
"""Column -> (how figures call it, whether more is better)."""
SPEEDS = {"tokens_per_s": "forward_tokens_per_s", "rows_per_s": "throughput_rows_per_s"}  # as the task is
SPREADS = [f"{cost}_{end}" for cost in (*SPEEDS, "training_s") for end in ("low", "high")]  # of what is timed
FOUND = {True: "helps", False: "harms", None: "open"}  # what the teacher does, by `is_better`
CLEAR = 10  # s: logs have the time to the second, so shorter trainings are not told apart


class Sweep(Run):
    """One sweep's folder, which has a status as a run's has."""

    @property
    def facts(self) -> dict[str, Any]:
        """sweep.json; `sweeps.run.begin` says what it holds."""
        return read_json(self.path / FILE, {})

    def run(self, name: str) -> Run:
        return Run(self.path.parent / name)

    @property
    def metric(self) -> str:
        return self.facts["metric"]

    @property
    def measure(self) -> Measure:
        """What the metric is."""
        return MEASURES[self.metric]

    @property
    def varied(self) -> list[str]:
        """The parameters that are compared: seeds are averaged over."""
        return [name for name in self.facts["parameters"] if name != SEED]


def figures_of_student(run: Run) -> dict[str, Any]:
    """What the comparison of a run that is done found of its student; {} where there is none."""
    results = run.comparison if run.status["state"] == "done" else None
    return results["models"].get(student_of(results), {}) if results else {}


def trial_table(sweep: Sweep) -> pd.DataFrame:
    """One row per trial: run, parameters, the metric with its interval, costs, state, message."""
    facts, rows = sweep.facts, []
    for trial in facts["trials"]:
        run = sweep.run(trial["run"])
        status = run.status
        row = {"run": run.name, **trial["parameters"], "minutes": run.manifest.get("minutes")}
        row |= {"state": status["state"].replace("created", "waiting"), "message": status.get("message", "")}
        if found := figures_of_student(run):
            row |= found.get(facts["metric"], {})
            took = seconds_taken(training_table(run))
            timed = {cost: found.get(fact) for cost, fact in SPEEDS.items()}  # a number was timed once
            timed |= {"training_s": {"value": took, "low": took, "high": took}}
            for cost, x in timed.items():
                if isinstance(x, Mapping):
                    row |= {cost: x["value"], f"{cost}_low": x["low"], f"{cost}_high": x["high"]}
            row["parameters"] = found["parameters"] / 1e6
        rows.append(row)
    numbers = ("value", "low", "high", *COSTS, *SPREADS, "minutes")
    columns = ["run", *facts["parameters"], *numbers, "state", "message"]
    return pd.DataFrame(rows, columns=columns, dtype=object).astype(dict.fromkeys(numbers, float))


def setting_table(sweep: Sweep, trials: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, the best first: the mean over its seeds' finished runs, interval, n, and the runs.

    One run has the interval of its comparison, over held-out rows; several have Student's over the seeds.
    What is timed has the lowest and the highest of the seeds besides; of one training its time is left out.
    """
    names, done = sweep.varied, trials[trials["value"].notna()]
    keys = [json.dumps(list(row[names]), sort_keys=True) for _, row in done.iterrows()]
    rows = []
    for _, seeds in done.groupby(pd.Series(keys, done.index, str), sort=False):
        found = averaged(seeds.to_dict("records"), sweep.measure.within)
        costs = seeds[list(COSTS)].mean()
        if len(seeds) == 1:
            costs["training_s"] = math.nan
        spread = {each: seeds[each].agg("min" if each.endswith("low") else "max") for each in SPREADS}
        rows.append({**seeds.iloc[0][names], **found, "runs": list(seeds["run"]), **costs, **spread})
    columns = [*names, "value", "low", "high", "n", "values", "runs", *COSTS, *SPREADS]
    return _best_first(sweep, pd.DataFrame(rows, columns=columns)).reset_index(drop=True)


def _best_first(sweep: Sweep, table: pd.DataFrame) -> pd.DataFrame:
    upwards = not sweep.measure.higher_is_better
    return table.sort_values("value", ascending=upwards, na_position="last", kind="stable")


def overlapping(settings: pd.DataFrame) -> int:
    """How many settings, beside the best, have intervals that reach into the best one's."""
    best, others = settings.iloc[0], settings.iloc[1:]
    return int((others["low"].le(best["high"]) & others["high"].ge(best["low"])).sum())


def verdict(sweep: Sweep, settings: pd.DataFrame) -> str:
    """What the sweep found, in a sentence; also where the intervals do not tell the best from the next."""
    if not len(settings):
        return "No run is done yet"
    best, words = settings.iloc[0], upper(sweep.measure.words)
    if not sweep.varied:
        seeds = f" over {best['n']} seeds" if best["n"] > 1 else ", of one seed so far"
        return f"{words} is {with_interval(best)}{seeds}"
    opening = f"{words} is {sweep.measure.best} with {described(best[sweep.varied])}: {with_interval(best)}"
    if len(settings) == 1:
        return f"{opening}, the only setting that is done"
    if count := overlapping(settings):
        others = "the next does" if count == 1 else f"{count} others do"
        return f"{opening}; but {others} as well within the intervals, so there is no clear winner"
    second = settings.iloc[1]
    next_one = f"{described(second[sweep.varied])}, is worse beyond the intervals: {with_interval(second)}"
    return f"{opening}; the next, {next_one}"


def pareto(table: pd.DataFrame, cost: str, measure: Measure) -> pd.DataFrame:
    """The rows that no other beats in both, the metric and this cost; the cheapest first."""
    higher = measure.higher_is_better
    known = table[table[cost].notna()].sort_values(
        [cost, "value"], ascending=[not COSTS[cost][1], not higher]
    )
    loss = known["value"] * (-1 if higher else 1)
    return known[loss < loss.cummin().shift(fill_value=math.inf)]


def compared_costs(table: pd.DataFrame) -> list[str]:
    """The costs in which trials can differ: students of one size differ in time alone."""
    sizes = table["parameters"].dropna()
    speeds = [speed for speed in SPEEDS if table[speed].notna().any()]
    size = ["parameters", *speeds] if len(sizes) and sizes.max() > sizes.min() else []
    times = table["training_s"]
    return [*size, "training_s"] if times.notna().all() and times.min() >= CLEAR else size


def shown_trials(sweep: Sweep, trials: pd.DataFrame) -> pd.DataFrame:
    """For reading: the best first, those without a result last."""
    ranked = _best_first(sweep, trials)
    found = [with_interval(row) if pd.notna(row["value"]) else "" for _, row in ranked.iterrows()]
    minutes = ["" if pd.isna(spent) else f"{spent:.1f}" for spent in ranked["minutes"]]
    shown = {name: ranked[name].map(plain) for name in sweep.facts["parameters"]}
    shown |= {sweep.measure.words: found, "minutes": minutes}
    return pd.DataFrame({**ranked[["run", "state"]], **shown, "message": ranked["message"]})


# what the teacher adds: the distilled student against the one trained alone


def gain_tables(sweep: Sweep, settings: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Metric → a row per setting that has a baseline: the distilled student's minus the baseline's.

    The sweep's metric comes first, then the others that the task is told by.  Each seed's two students are a
    pair: the interval is Student's over the seeds' differences; of one seed, its comparison's own.

    Returns:
        The settings' own columns with value, low, high, n, values of the difference, what is `found`: the
        teacher helps, harms, or it is open; and `clear`: how many seeds are beyond chance by themselves, by
        the paired bootstrap over held-out rows.
    """
    found = [(setting, results_of(sweep, setting["runs"])) for _, setting in settings.iterrows()]
    found = [(setting, [each for each in results if ALONE in each["models"]]) for setting, results in found]
    every = [each for _, results in found for each in results]
    if not every:
        return {}
    known = set.intersection(*({entry["metric"] for entry in each["differences"]} for each in every))
    return {
        metric: pd.DataFrame([{**setting, **gain_of(each, metric)} for setting, each in found if each])
        for metric in dict.fromkeys([sweep.metric, *rules_in(every[0]).told_first])
        if metric in known
    }


def gain_of(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The distilled student minus the one trained alone, over the seeds."""
    each = [difference(one, STUDENT, ALONE, metric) for one in results]
    gain = averaged(each, MEASURES[metric].within.of_differences)
    clear = sum(is_better(one, metric) is not None for one in each)
    return {**gain, "found": FOUND[is_better(gain, metric)], "clear": clear}


def counts(gain: pd.DataFrame, *, short: bool = False) -> str:
    """`helps in 2 of 4 settings, harms in 1, open in 1`; short: `helps 2, harms 1, open 1`."""
    times = {found: int((gain["found"] == found).sum()) for found in FOUND.values()}
    if short:
        return ", ".join(f"{found} {count}" for found, count in times.items())
    (first, count), *others = times.items()
    return ", ".join([f"{first} in {count} of {len(gain)} settings", *(f"{f} in {n}" for f, n in others)])


def counts_table(gains: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """For reading: a row per metric, in how many settings the teacher helps, harms, or it is open."""
    rows = {MEASURES[metric].name: gain["found"].value_counts() for metric, gain in gains.items()}
    return pd.DataFrame(rows).T.reindex(columns=list(FOUND.values())).fillna(0).astype(int)


def results_of(sweep: Sweep, runs: Sequence[str]) -> list[dict[str, Any]]:
    """The comparisons of these runs, as far as they have come to one."""
    return [found for name in runs if (found := sweep.run(name).comparison)]


def model_table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """For reading: a row per model and one of the difference, a column per measure that all of these have."""
    shown = [name for name in shown_in(results[0]) if all(name in shown_in(each) for each in results)]
    every = [each["models"] for each in results]
    models = [name for name in MODELS if all(name in each for each in every)]
    rows = {
        label_of(name): [
            with_interval(averaged([each[name][measure] for each in every], MEASURES[measure].within))
            for measure in shown
        ]
        for name in models
    }
    if ALONE in models:
        rows[DIFFERENCE] = [with_interval(gain_of(results, name), "+") for name in shown]
    columns = [MEASURES[name].name for name in shown]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def same_rows(sweep: Sweep, runs: Sequence[str]) -> bool:
    """Whether all these runs had the same data, split alike."""
    return len({sweep.run(name).manifest.get("data", {}).get("fingerprint") for name in runs}) == 1


def gain_words(gain: Mapping[str, Any], metric: str) -> str:
    """What the teacher adds, in a sentence."""
    over, how, alone = "in one training", "over the same held-out rows", ""
    if gain["n"] > 1:
        over, how = f"over {gain['n']} seeds", "paired by seed"
        alone = f"; {gain['clear']} of the {gain['n']} by themselves, over held-out rows"
    words = "no difference beyond chance" if gain["found"] == "open" else f"the teacher {gain['found']}"
    return (
        f"Against the same student trained without a teacher, {over}: {MEASURES[metric].words} "
        f"{with_interval(gain, '+')}, {how}: {words}{alone}"
    )
