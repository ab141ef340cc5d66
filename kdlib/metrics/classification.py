"""What a model answered, as probabilities, and how good that is: by itself, and beside its teacher.

Axes: N items, C classes, or choices of an item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kdlib.metrics.calibration import calibration_gaps, reliability

# a probability below it counts as this, as scikit-learn's log_loss has it: 36 nats at most
SMALLEST = np.finfo(float).eps


@dataclass(frozen=True)
class Answers:
    """What one model said about N items: a distribution over the choices of each, and which of them is right.

    Args:
        probabilities: [N, C], every row sums to 1; 0 for choices that an item has not.
        labels: [N] the right one of each.

    Raises:
        ValueError: a row is no distribution, or its label none of its choices.
    """

    probabilities: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        probabilities = np.asarray(self.probabilities, dtype=float)
        labels = np.asarray(self.labels, dtype=int)
        if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
            raise ValueError(
                f"answers: found probabilities {probabilities.shape} and labels {labels.shape}; needed [N, "
                "C] and [N], N > 0"
            )
        sums = probabilities.sum(axis=1)
        broken = np.flatnonzero(~(np.abs(sums - 1) < 1e-3) | (probabilities < 0).any(axis=1))
        outside = np.flatnonzero((labels < 0) | (labels >= probabilities.shape[1]))
        if len(broken):
            first = f"first {broken[0]}: {probabilities[broken[0]]}"
            raise ValueError(f"answers: {len(broken)} rows are no distribution, {first}")
        if len(outside):
            needed = f"it must be 0 to {probabilities.shape[1] - 1}"
            raise ValueError(f"answers: row {outside[0]} has the label {labels[outside[0]]}; {needed}")
        object.__setattr__(self, "probabilities", probabilities / sums[:, None])
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def said(self) -> np.ndarray:
        """[N] the likeliest choice of each."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def right(self) -> np.ndarray:
        """[N] whether that is the right one."""
        return self.said == self.labels

    @cached_property
    def confidence(self) -> np.ndarray:
        """[N] its probability."""
        return self.probabilities.max(axis=1)

    @cached_property
    def nats(self) -> np.ndarray:
        """[N] -log p(the right one)."""
        return -np.log(np.maximum(self.probabilities[np.arange(len(self)), self.labels], SMALLEST))

    def kl_from(self, teacher: "Answers") -> np.ndarray:
        """[N] KL(teacher || this one), nats at T = 1; 0 exactly where the two say the same."""
        theirs, ours = teacher.probabilities, np.maximum(self.probabilities, np.finfo(float).tiny)
        ratio = np.log(theirs, where=theirs > 0, out=np.zeros_like(theirs)) - np.log(ours)
        return np.maximum((theirs * ratio).sum(axis=1), 0.0)


def class_figures(means: Mapping[str, float], answers: np.ndarray) -> dict[str, float]:
    """What an evaluation tells beside its mean measures; `answers` [N, 2]: what was said, what was right."""
    from sklearn.metrics import f1_score  # as in `details`

    macro_f1 = f1_score(answers[:, 1], answers[:, 0], average="macro", zero_division=0.0)
    return {"log_loss": means["ce"], "macro_f1": float(macro_f1)}


def details(answers: Answers, labels: Sequence[str]) -> dict[str, Any]:
    """What lies behind the measures: reliability bins; of named classes precision, recall, F1, confusion."""
    bins = reliability(answers.confidence, answers.right)
    found: dict[str, Any] = {"reliability": bins, "confidence": float(answers.confidence.mean())}
    if labels:
        # takes two seconds, and not every process compares
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        asked = {"y_true": answers.labels, "y_pred": answers.said, "labels": range(len(labels))}
        columns = precision_recall_fscore_support(**asked, zero_division=0.0)
        names = ("precision", "recall", "f1", "support")
        found["per_class"] = [
            {"class": label, **{name: each.item() for name, each in zip(names, row, strict=True)}}
            for label, *row in zip(labels, *columns, strict=True)
        ]
        found["confusion"] = confusion_matrix(**asked).tolist()
    return found


def item_figures(answers: Answers, teacher: Answers, *, classes: bool) -> dict[str, np.ndarray]:
    """What the measures are made of, item by item, so that resampled items make them too: name → [N, K].

    Args:
        classes: the choices mean the same for every item, so that F1 means something.
    """
    agrees, missed = answers.said == teacher.said, ~teacher.right
    single = {
        "one": np.ones(len(answers)),
        "right": answers.right,
        "nats": answers.nats,
        "kl": answers.kl_from(teacher),
        "agrees": agrees,
        "teacher_right": teacher.right,
        "missed": missed,
        "repeated": missed & agrees,
        "mended": missed & answers.right,
    }
    columns = {name: column[:, None].astype(float) for name, column in single.items()}
    columns["gaps"] = calibration_gaps(answers.confidence, answers.right)
    if classes:
        every = np.arange(answers.probabilities.shape[1])
        true, said = (np.equal.outer(each, every).astype(float) for each in (answers.labels, answers.said))
        columns |= {"true": true, "said": said, "hit": true * said}
    return columns


def measures(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """[R, K] sums of `item_figures` over R draws of items to each measure, [R]; nan where nothing makes it.

    Beside those that are told: `repeated` and `mended`, shares of the teacher's mistakes; `f1`, [R, C].
    """
    one = {name: column[:, 0] for name, column in sums.items()}
    count = one["one"]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"accuracy": one["right"] / count}
        if "hit" in sums:
            f1 = 2 * sums["hit"] / (sums["true"] + sums["said"])
            found |= {"macro_f1": np.nanmean(f1, axis=1), "f1": f1}  # over the classes that occur
        return found | {
            "log_loss": one["nats"] / count,
            "ece": np.abs(sums["gaps"]).sum(axis=1) / count,
            "kl_to_teacher": one["kl"] / count,
            "agreement": one["agrees"] / count,
            "retention": 100 * one["right"] / np.where(one["teacher_right"], one["teacher_right"], np.nan),
            "repeated": one["repeated"] / one["missed"],
            "mended": one["mended"] / one["missed"],
        }
