"""Whether a training may begin, and whether a student learned: what dashboard, scorecard and report agree on.

What each held-out unit contributed to each evaluation is kept in evaluations/<step>.npz, beside the log: from
two of them a change has an interval.  Units are documents, groups or rows, whichever was drawn independently.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.config.run import Config
from kdlib.errors import RunError
from kdlib.metrics.means import ratio_of_sums
from kdlib.metrics.names import MEASURES, UNBOUNDED
from kdlib.runs.files import StudentFolder, writing
from kdlib.schedulers import sampled

MOST = 2000  # units that are kept; of more, neighbours are joined
SUMS = {  # what a measure is the mean of
    **{"perplexity": "ce", "log_loss": "ce", "kl_to_teacher": "kl_to_teacher", "agreement": "agreement"},
    **{"accuracy": "accuracy", "macro_f1": "accuracy"},
    **{"choice_accuracy": "choice_accuracy", "chance": "chance"},  # a guess among each question's choices
}
COUNTS = {  # else tokens, or rows with a class; spans of one token where the teacher's tokenizer is its own
    **dict.fromkeys(("choice_accuracy", "chance"), "questions"),
    **dict.fromkeys(("kl_to_teacher", "agreement"), "single"),
}
ENDS = 0.2  # share of a training's lines, at its beginning and its end, whose means are compared
FEWEST = 4  # lines at each end, with fewer there is no trend
CHANCE = 0.05


@dataclass(frozen=True)
class Best:
    """The evaluation whose student best_model/ is, by the measure that chooses it."""

    measure: str
    step: int
    value: float
    first_step: int
    last_step: int
    count: int  # evaluations that it was chosen from

    @property
    def is_untrained(self) -> bool:
        return self.step == 0

    @property
    def is_last(self) -> bool:
        return self.step == self.last_step


def best_by(evaluation: pd.DataFrame, measure: str) -> Best | None:
    """The first of the best; None where the measure was not evaluated, or was never finite."""
    values = evaluation[measure].to_numpy(dtype=float) if measure in evaluation else np.empty(0)
    if not (is_finite := np.isfinite(values)).any():
        return None
    values, steps = values[is_finite], evaluation["step"].to_numpy()[is_finite]
    at = values.argmax() if MEASURES[measure].higher_is_better else values.argmin()
    return Best(measure, int(steps[at]), float(values[at]), int(steps[0]), int(steps[-1]), len(steps))


def value_at(evaluation: pd.DataFrame, measure: str, step: int) -> float:
    """A measure at an evaluation."""
    return float(evaluation[measure].to_numpy()[evaluation["step"].to_numpy() == step][-1])


@dataclass(frozen=True)
class Trend:
    """How a logged term moved: the means of the training's first and last fifth, and if by more than chance.

    Their ranks tell, since losses fall steeply and have spikes (Mann & Whitney 1947, two-sided).
    """

    term: str
    first: float
    last: float
    p_value: float | None  # None of too few lines
    moving: tuple[str, ...]  # the settings that change its size while it trains

    @property
    def falls(self) -> bool | None:
        """Clearly; None where it cannot be told."""
        if self.p_value is None or self.moving:
            return None
        return self.p_value < CHANCE and self.last < self.first

    def words(self, unit: str) -> str:
        """In a sentence, for the head of a picture."""
        way = f"from {self.first:.3g} to {self.last:.3g} nats per {unit}"
        if self.moving:
            be = "move" if len(self.moving) > 1 else "moves"
            return f"The {self.term} loss goes {way}, but its {' and '.join(self.moving)} {be} too"
        if self.p_value is None:
            return f"The {self.term} loss goes {way}: too few lines for a trend"
        chance = f"p = {self.p_value:.2g}"
        if self.p_value >= CHANCE:
            return f"The {self.term} loss shows no clear change, {way} ({chance})"
        return f"The {self.term} loss {'falls' if self.last < self.first else 'rises'} {way} ({chance})"


def trend(values: pd.Series, term: str, moving: Mapping[str, tuple[str, ...]]) -> Trend | None:
    """Of the finite values of a term's loss; None where there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    moves = moving.get(term, ())
    if len(values) < 2 * FEWEST:
        return Trend(term, float(values.iloc[0]), float(values.iloc[-1]), None, moves)
    count = max(round(ENDS * len(values)), FEWEST)
    first, last = values.iloc[:count].to_numpy(), values.iloc[-count:].to_numpy()
    return Trend(term, float(first.mean()), float(last.mean()), _p_of_ranks(first, last), moves)


def _p_of_ranks(first: np.ndarray, last: np.ndarray) -> float:
    """Mann & Whitney's U by its normal approximation, as in scipy.stats, which takes a second to load."""
    ranks = pd.Series(np.concatenate([first, last])).rank()
    n, m, ties = len(first), len(last), ranks.value_counts()
    spread = n * m / 12 * (n + m + 1 - (ties**3 - ties).sum() / ((n + m) * (n + m - 1)))
    off = abs(ranks[:n].sum() - n * (n + m + 1) / 2) - 0.5  # continuity
    return math.erfc(max(off, 0.0) / math.sqrt(2 * spread)) if spread else 1.0


def moving_settings(config: Config, *, is_baseline: bool = False) -> dict[str, tuple[str, ...]]:
    """Term → which of its weight, temperature and top k change while it trains."""
    loss = config.loss
    weights = config.baseline.weights if is_baseline and config.baseline else loss.schedules
    temperatures, found = loss.temperatures(weights), {}
    for term, weight in weights.items():
        specs: dict[str, Any] = {"weight": weight, "temperature": temperatures.get(term, 1.0)}
        if term == "kd" and loss.top_k is not None:
            specs["top k"] = loss.top_k
        if term == "hidden" and (route := loss.features.route):
            specs |= {"top k": route.top_k, "temperature": route.temperature}
        found[term] = tuple(name for name, spec in specs.items() if len(set(sampled(spec))) > 1)
    return found


def keep_units(
    folder: StudentFolder,
    step: int,
    sums: Mapping[str, Any],
    units: np.ndarray | None = None,
    *,
    writes: bool = True,
) -> None:
    """Write an evaluation's sums over each row, or what rows belong to, beside those that it has already.

    Args:
        sums: term → [N], and under "tokens", "questions" or "single" how many there are in each.
        units: [N] what each row belongs to; the row itself where None.
        writes: whether this process is the one that writes.
    """
    if not writes:
        return
    sums = {name: np.asarray(each, dtype=float) for name, each in sums.items()}
    rows = np.arange(len(next(iter(sums.values())))) if units is None else units
    numbers = np.unique(rows, return_inverse=True)[1]
    if (count := int(numbers.max(initial=0)) + 1) > MOST:
        numbers = numbers * MOST // count
    file = _file(folder, step)
    half_made = file.with_suffix(".tmp.npz")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            half_made, **_units(folder, step) | {n: np.bincount(numbers, each) for n, each in sums.items()}
        )
        half_made.replace(file)


def cut_units(folder: StudentFolder, step: int) -> None:
    """Delete those of evaluations after a step, which a training that goes on from there makes again."""
    for file in (folder.path / "evaluations").glob("*.npz"):
        if not file.stem.isdigit() or int(file.stem) > step:
            file.unlink()


def mean_at(folder: StudentFolder, measure: str, step: int) -> dict[str, float] | None:
    """A measure at an evaluation with its 95 % interval, within its range; None where units were not kept."""
    found, column = _units(folder, step), SUMS.get(measure, "")
    if column not in found or measure == "macro_f1":
        return None
    mean = ratio_of_sums(found[column], found[_count(measure, found)])
    if measure == "perplexity":
        mean = {name: float(np.exp(min(x, 700.0))) for name, x in mean.items()}
    within = MEASURES[measure].within if measure in MEASURES else UNBOUNDED
    return {name: float(np.clip(x, within.low, within.high)) for name, x in mean.items()}


def change(
    folder: StudentFolder, measure: str, before: int, after: int, *, looks: int = 1
) -> dict[str, float] | None:
    """How a measure moved between two evaluations, on the same units: later minus earlier, with interval.

    Of perplexity in nats of cross-entropy, of macro-F1 in accuracy.

    Args:
        looks: how many evaluations the later one was chosen from: the interval is wider for it (Bonferroni).

    Returns:
        {"value", "low", "high"}, or None where the units of one were not kept, or are others.
    """
    first, later = _units(folder, before), _units(folder, after)
    column, count = SUMS.get(measure, ""), _count(measure, first)
    if column not in first or column not in later or len(first[count]) != len(later[count]):
        return None
    return ratio_of_sums(later[column] - first[column], first[count], level=1 - 0.05 / max(looks, 1))


def _count(measure: str, found: Mapping[str, np.ndarray]) -> str:
    """Under which name units say how many there are of what a measure is the mean over."""
    name = COUNTS.get(measure, "tokens")
    return name if name in found else "tokens"


def _file(folder: StudentFolder, step: int) -> Path:
    return folder.path / "evaluations" / f"{step}.npz"


def _units(folder: StudentFolder, step: int) -> dict[str, np.ndarray]:
    file = _file(folder, step)
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def critical_findings(manifest: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What the doctor found before a run's training that it calls critical; None where it was not asked."""
    found = manifest.get("doctor")
    return None if found is None else [each for each in found if each["severity"] == "critical"]


def refuse_unsound(manifest: Mapping[str, Any]) -> None:
    """Raise where the doctor's critical findings speak against a run's training, unless `anyway` was said.

    Raises:
        RunError: there are such findings; the message lists what to do about each.
    """
    found = critical_findings(manifest) or []
    if not found or manifest.get("anyway"):
        return
    lines = "".join(f"\n  {each['where']}: {each['what']}; {each['fix']}" for each in found)
    many = f"{len(found)} critical findings" if len(found) > 1 else "critical finding"
    raise RunError(
        f"the doctor's {many} stopped this run before it trains:{lines}\n"
        "mend the config (kd doctor CONFIG --fix --output FILE writes what is unambiguous), start a new run; "
        f"to train all the same: kd run CONFIG --resume {manifest.get('run')} --anyway, in a notebook "
        "bench.train(anyway=True)"
    )
