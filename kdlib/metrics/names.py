"""What is measured of a model: how each measure is called, its unit, whether more is better.

Every difference is a model's figure minus that of the model it is held against: distilled − baseline.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """What a figure can be."""

    low: float = -math.inf
    high: float = math.inf
    share: float = 0.0  # what all units together amount to, where each counts or does not: 1, or 100 (%)

    @property
    def of_differences(self) -> "Range":
        """Of one figure minus another."""
        return Range(self.low - self.high, self.high - self.low, self.share)


UNBOUNDED, POSITIVE = Range(), Range(0.0)
SHARE, PERCENT = Range(0.0, 1.0, share=1.0), Range(0.0, share=100.0)  # of the teacher's, which may be less


@dataclass(frozen=True)
class Measure:
    """One figure of a comparison; `{item}` in its unit is what the task predicts: a token, a row."""

    name: str  # at the head of a column
    unit: str
    words: str  # within a sentence
    higher_is_better: bool
    within: Range = UNBOUNDED

    @property
    def brief(self) -> str:
        """The words that tell it from the others: KL to the teacher, agreement."""
        return self.words.removesuffix(" with the teacher").removeprefix("top-1 ")

    @property
    def best(self) -> str:
        return "highest" if self.higher_is_better else "lowest"

    def label(self, item: str) -> str:
        """Name and unit, a line each; `item` is what the task predicts."""
        return f"{self.name}\n{self.unit.format(item=item)}"


MEASURES = {
    "kl_to_teacher": Measure("KL to teacher", "nats per {item}, T = 1", "KL to the teacher", False, POSITIVE),
    "agreement": Measure(
        "top-1 agreement", "with the teacher", "top-1 agreement with the teacher", True, SHARE
    ),
    "perplexity": Measure("perplexity", "per token", "perplexity", False, Range(1.0)),
    "bits_per_byte": Measure("bits per byte", "", "bits per byte", False, POSITIVE),
    "accuracy": Measure("accuracy", "share of {item}s", "accuracy", True, SHARE),
    "macro_f1": Measure("macro-F1", "mean over the classes", "macro-F1", True, SHARE),
    "log_loss": Measure("log-loss", "nats per {item}", "log-loss", False, POSITIVE),
    "ece": Measure("calibration error", "expected; 15 bins", "calibration error", False, Range(0.0, 1.0)),
    "retention": Measure(
        "retention, %", "of the teacher's accuracy", "retention of the teacher's accuracy", True, PERCENT
    ),
    "choice_accuracy": Measure("right choices", "likeliest per character", "right choices", True, SHARE),
    "choice_accuracy_raw": Measure(
        "right choices, raw", "likeliest as a whole", "right choices by raw likelihood", True, SHARE
    ),
    "choice_agreement": Measure(
        "the teacher's choices", "right or wrong", "agreement on choices", True, SHARE
    ),
    "choice_retention": Measure(
        "retention, %",
        "of the teacher's right choices",
        "retention of the teacher's right choices",
        True,
        PERCENT,
    ),
}
# of no meaning for the teacher itself
TO_TEACHER = ("kl_to_teacher", "agreement", "retention", "choice_agreement", "choice_retention")
DRAWN = 4


def called_student(teacher: Any) -> str:
    """By which name a run's results have its student: without a teacher nothing is distilled."""
    return "distilled" if teacher else "trained"


def student_of(results: Mapping[str, Any]) -> str:
    """Whom the comparison is about."""
    return results.get("student", "distilled")


def rivals_of(results: Mapping[str, Any]) -> list[str]:
    """Whom that student is held against, the hardest first: other students, the untrained, the teacher."""
    rivals = [name for name in results["models"] if name != student_of(results)]
    return sorted(rivals, key=lambda name: {"untrained": 1, "teacher": 2}.get(name, 0))


def is_comparison(results: Any) -> bool:
    """Whether a comparison left this: of a student and another model, with their differences."""
    if not (isinstance(results, dict) and all(results.get(name) for name in ("models", "differences"))):
        return False
    return student_of(results) in results["models"] and bool(rivals_of(results))


def difference(results: Mapping[str, Any], model: str, against: str, metric: str) -> dict[str, Any]:
    """The paired difference of two models in one metric, with its interval.

    Raises:
        LookupError: the comparison has none of these.
    """
    asked = {"model": model, "against": against, "metric": metric}
    for each in results["differences"]:
        if asked.items() <= each.items():
            return each
    do = "it was made of other models or measures; compare them again"
    raise LookupError(f"comparison: found no difference of {model} and {against} in {metric}; {do}")


def is_better(found: Mapping[str, float], metric: str) -> bool | None:
    """Whether a difference is for the better or for the worse; None where its interval leaves that open."""
    if found["low"] <= 0 <= found["high"]:
        return None
    return (found["value"] > 0) == MEASURES[metric].higher_is_better


def three_digits(value: float, sign: str = "") -> str:
    """0.420, 12.3; whole numbers from 1,000 on."""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}#.3g}".rstrip(".")


def with_interval(figures: Mapping[str, float], sign: str = "") -> str:
    """`1.22 [1.13, 1.33]`: three digits each, whole numbers from 1,000 on; `sign` is + for differences."""
    value, low, high = (three_digits(figures[name], sign) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
