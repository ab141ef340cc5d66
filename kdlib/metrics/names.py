"""What is measured of a model: how each measure is called, its unit, whether more is better.

Every difference is a model's figure minus that of the model it is held against: distilled − baseline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One figure of a comparison; `{item}` in its unit is what the task predicts: a token, a row."""

    name: str  # at the head of a column
    unit: str
    words: str  # within a sentence
    higher_is_better: bool

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
    "kl_to_teacher": Measure("KL to teacher", "nats per {item}, T = 1", "KL to the teacher", False),
    "agreement": Measure("top-1 agreement", "with the teacher", "top-1 agreement with the teacher", True),
    "perplexity": Measure("perplexity", "per token", "perplexity", False),
    "bits_per_byte": Measure("bits per byte", "", "bits per byte", False),
    "accuracy": Measure("accuracy", "share of {item}s", "accuracy", True),
    "macro_f1": Measure("macro-F1", "mean over the classes", "macro-F1", True),
    "log_loss": Measure("log-loss", "nats per {item}", "log-loss", False),
    "ece": Measure("calibration error", "expected; 15 bins", "calibration error", False),
    "retention": Measure(
        "retention, %", "of the teacher's accuracy", "retention of the teacher's accuracy", True
    ),
    "choice_accuracy": Measure("right choices", "likeliest per character", "right choices", True),
    "choice_accuracy_raw": Measure(
        "right choices, raw", "likeliest as a whole", "right choices by raw likelihood", True
    ),
    "choice_agreement": Measure("the teacher's choices", "right or wrong", "agreement on choices", True),
    "choice_retention": Measure(
        "retention, %", "of the teacher's right choices", "retention of the teacher's right choices", True
    ),
}
# of no meaning for the teacher itself
TO_TEACHER = ("kl_to_teacher", "agreement", "retention", "choice_agreement", "choice_retention")
DRAWN = 4


def student_of(results: Mapping[str, Any]) -> str:
    """Whom the comparison is about."""
    return results.get("student", "distilled")


def rivals_of(results: Mapping[str, Any]) -> list[str]:
    """Whom that student is held against, the hardest first: other students, the untrained, the teacher."""
    rivals = [name for name in results["models"] if name != student_of(results)]
    return sorted(rivals, key=lambda name: {"untrained": 1, "teacher": 2}.get(name, 0))


def difference(results: Mapping[str, Any], model: str, against: str, metric: str) -> dict[str, Any]:
    """The paired difference of two models in one metric, with its interval."""
    asked = {"model": model, "against": against, "metric": metric}
    return next(each for each in results["differences"] if asked.items() <= each.items())


def three_digits(value: float, sign: str = "") -> str:
    """0.420, 12.3; whole numbers from 1,000 on."""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}#.3g}".rstrip(".")


def with_interval(figures: Mapping[str, float], sign: str = "") -> str:
    """`1.22 [1.13, 1.33]`: three digits each, whole numbers from 1,000 on; `sign` is + for differences."""
    value, low, high = (three_digits(figures[name], sign) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
