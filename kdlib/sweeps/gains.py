"""What the teacher adds: every model of a setting over its seeds, and the distilled student against the one
trained alone.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kdlib.config.task_rules import rules_in, shown_in
from kdlib.metrics.names import MEASURES, difference, with_interval
from kdlib.plots.axes import LABELS, label_of
from kdlib.runs.files import read_json
from kdlib.sweeps.results import Sweep, averaged

STUDENT, ALONE = "distilled", "baseline"
MODELS = ("teacher", STUDENT, ALONE, "untrained")  # in the order of the table
DIFFERENCE = f"{LABELS[STUDENT]} − {LABELS[ALONE]}"


def gain_tables(sweep: Sweep, settings: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Metric → a row per setting, as `settings` has them: the distilled student's metric minus that of the
    student trained alone.

    The sweep's metric comes first, then the others that the task is told by.  Each seed's two students are a
    pair: the interval is Student's over the seeds' differences; of one seed, its comparison's own.  What has
    no baseline is left out.

    Returns:
        The settings' own columns with value, low, high, n, values of the difference, and clear: how many
        seeds are beyond chance by themselves, by the paired bootstrap over held-out rows.  {} without
        baselines.
    """
    found = [
        (setting, [each for each in results_of(sweep, setting["runs"]) if ALONE in each["models"]])
        for _, setting in settings.iterrows()
    ]
    found = [(setting, results) for setting, results in found if results]
    if not found:
        return {}
    every = [each for _, results in found for each in results]
    known = set.intersection(*({entry["metric"] for entry in each["differences"]} for each in every))
    told = dict.fromkeys([sweep.facts["metric"], *rules_in(every[0]).told_first])
    return {
        metric: pd.DataFrame([{**setting, **_gain(results, metric)} for setting, results in found])
        for metric in told
        if metric in known
    }


def _gain(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    each = [difference(one, STUDENT, ALONE, metric) for one in results]
    return {**averaged(each), "clear": sum(one["low"] > 0 or one["high"] < 0 for one in each)}


def results_of(sweep: Sweep, runs: Sequence[str]) -> list[dict[str, Any]]:
    """The comparisons of these runs, as far as they have come to one."""
    return [found for name in runs if (found := read_json(sweep.run(name).path / "comparison_results.json"))]


def common(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The models and the measures that all these comparisons have, in the order of tables."""
    models = [name for name in MODELS if all(name in each["models"] for each in results)]
    return models, [name for name in shown_in(results[0]) if all(name in shown_in(each) for each in results)]


def model_table(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """For reading: a row per model and one of the difference, a column per measure; mean and interval
    over the comparisons.
    """
    models, shown = common(results)
    rows = {
        label_of(name): {
            m: with_interval(averaged([each["models"][name][m] for each in results])) for m in shown
        }
        for name in models
    }
    if ALONE in models:
        rows[DIFFERENCE] = {
            m: with_interval(averaged([difference(each, STUDENT, ALONE, m) for each in results]), "+")
            for m in shown
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=shown).rename(
        columns={name: MEASURES[name].name for name in shown}
    )


def same_rows(sweep: Sweep, runs: Sequence[str]) -> bool:
    """Whether all these runs had the same data, split alike."""
    return len({sweep.run(name).manifest.get("data", {}).get("fingerprint") for name in runs}) == 1


def gain_words(gain: Mapping[str, Any], metric: str) -> str:
    """Whether the teacher helps, in a sentence; says so where chance may have done it."""
    measure = MEASURES[metric]
    over = f"over {gain['n']} seeds" if gain["n"] > 1 else "in one training"
    how = "paired by seed" if gain["n"] > 1 else "over the same held-out rows"
    if gain["low"] <= 0 <= gain["high"]:
        found = "no difference beyond chance"
    else:
        found = (
            "the teacher helps" if (gain["value"] > 0) == measure.higher_is_better else "the teacher harms"
        )
    alone = f"; {gain['clear']} of the {gain['n']} by themselves, over held-out rows" if gain["n"] > 1 else ""
    return (
        f"Against the same student trained without a teacher, {over}: {measure.words} "
        f"{with_interval(gain, '+')}, {how}: "
        f"{found}{alone}"
    )


def clear_words(results: Sequence[Mapping[str, Any]]) -> str:
    """In which measures the two students differ beyond the interval, and in which not."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference in": []}
    for name in common(results)[1]:
        gain, measure = averaged([difference(each, STUDENT, ALONE, name) for each in results]), MEASURES[name]
        chance = gain["low"] <= 0 <= gain["high"]
        found[
            "no clear difference in"
            if chance
            else "better"
            if (gain["value"] > 0) == measure.higher_is_better
            else "worse"
        ].append(measure.brief)
    return "; ".join(f"{how} {', '.join(names)}" for how, names in found.items() if names)
