"""What a benchmark must show at the sizes of configs/benchmark.yaml, and whether it did.  Imports no
torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdlib.benchmarks.reading import above_gradients, clock_of, ratio, share, spread
from kdlib.benchmarks.settings import CASES

OTHERS = [
    name
    for name in CASES
    if name.startswith("ours_") and name not in ("ours_eager", "ours_top_k", "ours_half_masked")
]


@dataclass(frozen=True)
class Target:
    """One figure that was promised."""

    what: str
    limit: float
    found: Mapping[str, float] | None  # value, low, high
    at_least: bool = False

    @property
    def row(self) -> dict[str, Any]:
        """The median decides; low and high are the rounds' extremes."""
        need = f"{'≥' if self.at_least else '≤'} {self.limit:g}"
        if self.found is None:
            return {"target": self.what, "needed": need, "met": "not measured"}
        met = self.found["value"] >= self.limit if self.at_least else self.found["value"] <= self.limit
        return {
            "target": self.what,
            "needed": need,
            "measured": self.found["value"],
            "measured, low": self.found["low"],
            "measured, high": self.found["high"],
            "met": "yes" if met else "no",
        }


def target_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Target, measured, met: a row each, for whatever was measured."""
    rows = [target.row for target in (*_heads(results), *_steps(results), *_dashboard(results))]
    return pd.DataFrame(
        rows, columns=["target", "needed", "measured", "measured, low", "measured, high", "met"]
    )


def verdict(results: Mapping[str, Any]) -> str:
    """`14 of the 16 targets that were measured are met (float32: 2,048 tokens, V = 49,152; …)`"""
    met = target_table(results)["met"]
    sizes = "; ".join(
        f"{dtype}: {part['tokens']:,} tokens, V = {part['vocabulary']:,}"
        for dtype, part in results["heads"].items()
    )
    return (
        f"{(met == 'yes').sum()} of the {(met != 'not measured').sum()} targets that were measured are "
        f"met ({sizes or 'steps only'})"
    )


def _heads(results: Mapping[str, Any]) -> Iterator[Target]:
    full, half = (results["heads"].get(dtype, {}) for dtype in ("float32", "bfloat16"))
    yield Target("KD + CE, float32: time ÷ naive", 0.80, _time(full, "ours", "naive"))
    yield Target("KD + CE, float32: time ÷ matrix products alone", 1.2, _time(full, "ours", "floor"))
    yield Target("KD + CE, float32: peak memory ÷ naive", 0.15, _memory(full, "ours", "naive"))
    yield Target("KD + CE, bfloat16: time ÷ matrix products alone", 1.4, _time(half, "ours", "floor"))
    yield Target("KD + CE, bfloat16: time ÷ TRL's forward KL", 0.75, _time(half, "ours", "trl_forward_kl"))
    for name in OTHERS:
        yield Target(f"{CASES[name]}, float32: time ÷ forward KL", 1.5, _time(full, name, "ours"))
    yield Target("JSD(0.5), float32: time ÷ TRL", 0.6, _time(full, "ours_generalized_jsd", "trl_jsd"))
    yield Target(
        "JSD(0.5), float32: peak memory ÷ TRL", 0.1, _memory(full, "ours_generalized_jsd", "trl_jsd")
    )
    yield Target("part masked, float32: time ÷ unmasked", 0.6, _time(full, "ours_half_masked", "ours"))
    yield Target("peak memory above inputs and gradients with more tokens: change", 0.1, _growth(full))


def _steps(results: Mapping[str, Any]) -> Iterator[Target]:
    for precision, part in results["steps"].items():
        lines = part["rounds"]
        together = ratio(lines, "ours_kd", ("teacher", "trainer_sft"), "wall_s")
        yield Target(
            f"KD step, {precision}: time ÷ (teacher's forward pass + Trainer's SFT step)", 0.95, together
        )
        faster = ratio(lines, "trl_gkd", "ours_kd", "wall_s")
        yield Target(f"KD step, {precision}: tokens per s ÷ TRL's GKDTrainer", 1.5, faster, at_least=True)
        books = share(lines, "ours_kd", "ledger_s")
        yield Target(
            f"KD step, {precision}: ledger and guard, share of the step, a log every 10 steps", 0.01, books
        )


def _dashboard(results: Mapping[str, Any]) -> Iterator[Target]:
    if part := results.get("dashboard"):
        for key, what, limit in (
            ("first_s", "first drawing", 2.0),
            ("update_s", "an update by one line", 0.2),
        ):
            yield Target(
                f"dashboard of {part['steps']:,} steps: {what}, s",
                limit,
                spread([line[key] for line in part["rounds"]]),
            )


def _time(part: Mapping[str, Any], name: str, to: str) -> dict[str, float] | None:
    lines = part.get("rounds", [])
    return ratio(lines, name, to, clock_of(lines))


def _memory(part: Mapping[str, Any], name: str, to: str) -> dict[str, float] | None:
    # the first of a name wins
    peaks = {line["name"]: line["peak_bytes"] for line in reversed(part.get("memory", []))}
    return _single(peaks[name] / peaks[to]) if name in peaks and to in peaks else None


def _growth(part: Mapping[str, Any]) -> dict[str, float] | None:
    peaks = [above_gradients(line) for line in part.get("memory", []) if line["name"] == "ours"]
    return _single(abs(peaks[1] / peaks[0] - 1)) if len(peaks) == 2 else None


def _single(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value}
