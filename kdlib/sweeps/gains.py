"""What the teacher adds: every model of a setting over its seeds, and the distilled student against the one trained alone.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kdlib.canvas import LABELS, label_of
from kdlib.measures import MEASURES, difference, shown_in, with_interval
from kdlib.runs import read_json
from kdlib.sweeps.reading import Sweep, averaged

STUDENT, ALONE = "distilled", "baseline"
MODELS = ("teacher", STUDENT, ALONE, "untrained")  # in the order of the table
DIFFERENCE = f"{LABELS[STUDENT]} − {LABELS[ALONE]}"


def gain_table(sweep: Sweep, settings: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, as `settings` has them: the distilled student's metric minus that of the student trained alone.

    Each seed's two students are a pair: the interval is Student's over the seeds' differences; of one seed, its comparison's own.
    What has no baseline is left out.

    Returns:
        The settings' own columns with value, low, high, n, values of the difference, and clear: how many seeds are beyond chance
        by themselves, by the paired bootstrap over held-out rows.
    """
    rows = []
    for _, setting in settings.iterrows():
        found = [difference(each, STUDENT, ALONE, sweep.facts["metric"]) for each in _results(sweep, setting["runs"])
                 if ALONE in each["models"]]
        if found:
            clear = sum(each["low"] > 0 or each["high"] < 0 for each in found)
            rows.append({**setting, **averaged(found), "clear": clear})
    return pd.DataFrame(rows, columns=[*settings.columns, "clear"]).reset_index(drop=True)


def model_table(sweep: Sweep, runs: Sequence[str]) -> pd.DataFrame:
    """For reading: a row per model and one of the difference, a column per measure; mean and interval over the runs."""
    results = _results(sweep, runs)
    shown = [name for name in shown_in(results[0]) if all(name in shown_in(each) for each in results)] if results else []
    rows = {label_of(name): {m: with_interval(averaged([each["models"][name][m] for each in results])) for m in shown}
            for name in MODELS if all(name in each["models"] for each in results)}
    if LABELS[ALONE] in rows:
        rows[DIFFERENCE] = {m: with_interval(averaged([difference(each, STUDENT, ALONE, m) for each in results]), "+") for m in shown}
    return pd.DataFrame.from_dict(rows, orient="index", columns=shown).rename(columns={name: MEASURES[name].name for name in shown})


def gain_words(gain: Mapping[str, Any], metric: str) -> str:
    """Whether the teacher helps, in a sentence; says so where chance may have done it."""
    measure = MEASURES[metric]
    over = f"over {gain['n']} seeds" if gain["n"] > 1 else "in one training"
    how = "paired by seed" if gain["n"] > 1 else "over the same held-out rows"
    if gain["low"] <= 0 <= gain["high"]:
        found = "no difference beyond chance"
    else:
        found = "the teacher helps" if (gain["value"] > 0) == measure.higher_is_better else "the teacher harms"
    alone = f"; {gain['clear']} of the {gain['n']} by themselves, over held-out rows" if gain["n"] > 1 else ""
    return (f"Against the same student trained without a teacher, {over}: {measure.words} {with_interval(gain, '+')}, {how}: "
            f"{found}{alone}")


def _results(sweep: Sweep, runs: Sequence[str]) -> list[dict[str, Any]]:
    return [found for name in runs if (found := read_json(sweep.run(name).path / "comparison_results.json"))]
