"""Tables of what was answered, by classifiers or of multiple choice, for notebook and report.  Imports no
torch.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from kdlib.metrics.names import rivals_of, student_of, with_interval
from kdlib.plots.axes import called, label_of

TITLES = {
    "mcnemar": "McNemar's test",
    "on_teachers_mistakes": "On the teacher's mistakes",
    "f1_per_class": "F1 by class",
    "worst": "Worst examples",
}


def answer_tables(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Every table of these that the results allow, by the name of its file; none where tokens were
    predicted.
    """
    found = {}
    if results.get("mcnemar"):
        found["mcnemar"] = mcnemar_table(results)
    if any("on_teachers_mistakes" in facts for facts in results["models"].values()):
        found["on_teachers_mistakes"] = mistakes_table(results)
    if results.get("labels"):
        found["f1_per_class"] = class_table(results)
    if results.get("worst"):
        found["worst"] = worst_table(results)
    return found


def mcnemar_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The student against each other model: the rows that only one of the two has right, and how likely
    that is between equals.
    """
    student = student_of(results)
    rows = {}
    for rival in rivals_of(results):
        test = next(t for t in results["mcnemar"] if {t["model"], t["against"]} == {student, rival})
        ours, theirs = test["only_model_right"], test["only_other_right"]
        if test["model"] == rival:
            ours, theirs = theirs, ours
        rows[label_of(rival)] = {
            f"only {called(student)} is right": ours,
            "only the other is right": theirs,
            "p": f"{test['p_value']:.2g}",
            "test": test["test"],
        }
    return _titled(rows, "McNemar's test against")


def mistakes_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """What becomes of the rows that the teacher gets wrong: its mistake repeated, or the right answer."""
    rows = {
        label_of(name): {
            "the teacher's mistakes": facts["on_teachers_mistakes"]["rows"],
            "repeated": with_interval(facts["on_teachers_mistakes"]["repeated"]),
            "answered rightly": with_interval(facts["on_teachers_mistakes"]["mended"]),
        }
        for name, facts in results["models"].items()
        if name != "teacher" and "on_teachers_mistakes" in facts
    }
    return _titled(rows, "share, with 95 % interval")


def class_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """F1 of each class by model, and how many rows it has."""
    models = results["models"]
    rows = {}
    for number, label in enumerate(results["labels"]):
        entries = {name: facts["per_class"][number] for name, facts in models.items()}
        rows[label] = {
            "rows": next(iter(entries.values()))["support"],
            **{
                label_of(name): with_interval(entry["f1"]) if entry["support"] else "—"
                for name, entry in entries.items()
            },
        }
    return _titled(rows, "F1 of the class")


def worst_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The rows on which the student is most wrong or furthest from the teacher, with the likeliest
    classes of both.
    """
    shown = ("teacher", student_of(results))
    lines = [
        {
            "why": row["why"],
            "text": " ".join(row["text"].split()),
            "right": row["label"],
            **{
                label_of(name): ", ".join(
                    f"{label} {probability:.0%}" for label, probability in row["said"][name]
                )
                for name in shown
            },
        }
        for row in results["worst"]
    ]
    return pd.DataFrame(lines).set_index("why")


def _titled(rows: Mapping[str, Mapping[str, Any]], title: str) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = title
    return table
