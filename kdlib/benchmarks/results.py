"""A benchmark's results as tables: medians and spreads, ratios formed within a round, and targets.

benchmark_results.json:  machine,  heads.<dtype>.{tokens, vocabulary, rounds, agreement, memory, skipped},
steps.<precision>.{tokens, rounds, flops, flops_per_s, skipped}
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kdlib.benchmarks.settings import CASES, CONTENDERS
from kdlib.metrics.names import with_interval
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run

RESULTS = "benchmark_results.json"
MB = 1e6
Lines = Sequence[Mapping[str, Any]]
VARIANTS = ("ours_eager", "ours_top_k", "ours_half_masked")
OTHERS = [name for name in CASES if name.startswith("ours_") and name not in VARIANTS]  # other divergences


def results_of(run: Run) -> dict[str, Any] | None:
    """What a run's benchmark found; None where it made none."""
    return read_json(run.path / RESULTS)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def clock_of(lines: Lines) -> str:
    """CPU time where there is one: it suffers less from neighbours; on a GPU wall time."""
    return "wall_s" if any(line["cpu_s"] is None for line in lines) else "cpu_s"


def ratio(lines: Lines, name: str, to: str | Sequence[str], clock: str) -> dict[str, float] | None:
    """One name's time, or memory, over another's or the sum of others', in each round; None where unknown."""
    parts = [to] if isinstance(to, str) else list(to)
    times = {
        each: {line["round"]: line[clock] for line in lines if line["name"] == each and clock in line}
        for each in (name, *parts)
    }
    common = set.intersection(*(set(each) for each in times.values()))
    return (
        spread([times[name][i] / sum(times[part][i] for part in parts) for i in common]) if common else None
    )


def share(lines: Lines, name: str, part: str) -> dict[str, float] | None:
    """A part's seconds over the whole wall time of the same line; None where it was not measured."""
    found = [line[part] / line["wall_s"] for line in lines if line["name"] == name and part in line]
    return spread(found) if found else None


def time_table(results: Mapping[str, Any], dtype: str) -> pd.DataFrame:
    """One row per case: seconds, and its time over naive's and over the floor's."""
    lines = results["heads"][dtype]["rounds"]
    clock, rows = clock_of(lines), {}
    for name in _names(lines):
        columns = {
            f"{key[:-2].upper() if key == 'cpu_s' else 'wall'} s": spread(values)
            for key in ("cpu_s", "wall_s")
            if None not in (values := [x[key] for x in lines if x["name"] == name])
        }
        columns |= {f"÷ {to}": found for to in ("naive", "floor") if (found := ratio(lines, name, to, clock))}
        rows[CASES[name]] = _flat(columns)
    return pd.DataFrame(rows).T


def memory_table(results: Mapping[str, Any], dtype: str) -> pd.DataFrame:
    """One row per case: peak above the inputs, the same without the gradients' own size, and over naive's."""
    lines = results["heads"][dtype]["memory"]
    naive = next((line["peak_bytes"] for line in lines if line["name"] == "naive"), None)
    rows = {}
    for line in lines:
        more = "" if line["tokens"] == lines[0]["tokens"] else f", {line['tokens']:,} tokens"
        rows[CASES[line["name"]] + more] = {
            "above inputs, MB": line["peak_bytes"] / MB,
            "above inputs and gradients, MB": above_gradients(line) / MB,
            **({"÷ naive": line["peak_bytes"] / naive} if naive and not more else {}),
        }
    return pd.DataFrame(rows).T


def above_gradients(line: Mapping[str, Any]) -> float:
    """Bytes of a case's peak that are neither inputs nor gradients."""
    return line["peak_bytes"] - line["gradient_bytes"]


def agreement_table(results: Mapping[str, Any], dtype: str) -> pd.DataFrame:
    """One row per case: the largest difference from float64 over the largest value, of the loss and of
    both gradients.
    """
    rows = {CASES[name]: figures for name, figures in results["heads"][dtype]["agreement"].items()}
    return pd.DataFrame(rows).T


def step_table(results: Mapping[str, Any], precision: str) -> pd.DataFrame:
    """One row per contender: seconds per step, tokens per second, its time over our KD step's, and its MFU;
    the floor last.

    MFU: the time that its own part of the matrix products takes at the speed measured, over its time.
    """
    part = results["steps"][precision]
    rows = {}
    for name in _names(part["rounds"]):
        own = [line for line in part["rounds"] if line["name"] == name]
        walls = [line["wall_s"] for line in own]
        columns = {
            "s per step": spread(walls),
            "tokens per s": spread([part["tokens"] / wall for wall in walls]),
        }
        if found := ratio(part["rounds"], name, "ours_kd", "wall_s"):
            columns["÷ ours, KD + CE"] = found
        columns["MFU"] = spread([floor_s(part, name) / wall for wall in walls])
        if "peak_bytes" in own[0]:
            columns["peak beside the teacher, GiB"] = spread([line["peak_bytes"] / 2**30 for line in own])
        rows[CONTENDERS[name]] = _flat(columns)
    floor = floor_s(part)
    rows["KD's matrix products at the measured peak"] = {
        "s per step": floor,
        "tokens per s": part["tokens"] / floor,
    }
    return pd.DataFrame(rows).T


def floor_s(part: Mapping[str, Any], name: str = "ours_kd") -> float:
    """Seconds that a contender's matrix products take at the fastest product's speed: nobody can be below."""
    alone = name.endswith("sft") or name.startswith("ours_from")  # whose teacher, if any, is on a disk
    models = "teacher" if name == "teacher" else "student" if alone else ("teacher", "student")
    flops = sum(flops for what, flops in part["flops"].items() if what.startswith(models))
    return flops / part["flops_per_s"]


def flops_table(results: Mapping[str, Any], precision: str) -> pd.DataFrame:
    """What a KD step's matrix products consist of, and what each part takes at the measured speed."""
    part = results["steps"][precision]
    rows = {
        name: {"GFLOP": flops / 1e9, "s at the measured speed": flops / part["flops_per_s"]}
        for name, flops in part["flops"].items()
    }
    rows["together"] = {"GFLOP": sum(part["flops"].values()) / 1e9, "s at the measured speed": floor_s(part)}
    return pd.DataFrame(rows).T


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """For reading: `0.92 [0.90, 0.95]` in place of three columns."""
    columns = {}
    for name in table.columns:
        if f"{name}, low" in table:
            columns[name] = [
                with_interval({"value": row[name], "low": row[f"{name}, low"], "high": row[f"{name}, high"]})
                if pd.notna(row[f"{name}, low"])
                else _three(row[name])
                for _, row in table.iterrows()
            ]
        elif not name.endswith((", low", ", high")):
            columns[name] = [_three(value) for value in table[name]]
    return pd.DataFrame(columns, index=table.index)


def run_tables(results: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Every table that the results allow, by name; a figure's table has its name."""
    makers = {
        "rounds": ("time", time_table),
        "memory": ("memory", memory_table),
        "agreement": ("agreement", agreement_table),
    }
    tables = {"targets": target_table(results)} | {
        f"{name}_{dtype}": make(results, dtype)
        for dtype, part in results["heads"].items()
        for key, (name, make) in makers.items()
        if part.get(key)
    }
    for precision in results["steps"]:
        tables |= {
            f"steps_{precision}": step_table(results, precision),
            f"flops_{precision}": flops_table(results, precision),
        }
    return tables


def _names(lines: Lines) -> list[str]:
    """In the order of the first round."""
    return list(dict.fromkeys(line["name"] for line in lines))


def _flat(columns: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    ends = {"value": "", "low": ", low", "high": ", high"}
    return {name + end: figures[key] for name, figures in columns.items() for key, end in ends.items()}


def _three(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# what was promised for the sizes of configs/benchmark.yaml


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
        row = {"target": self.what, "needed": need}
        if self.found is None:
            return {**row, "met": "not measured"}
        met = self.found["value"] >= self.limit if self.at_least else self.found["value"] <= self.limit
        return {**row, **_flat({"measured": self.found}), "met": "yes" if met else "no"}


def target_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Target, measured, met: a row each, for whatever was measured."""
    rows = [target.row for target in (*_head_targets(results), *_step_targets(results))]
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


def _head_targets(results: Mapping[str, Any]) -> Iterator[Target]:
    full, half = (results["heads"].get(dtype, {}) for dtype in ("float32", "bfloat16"))
    yield Target("KD + CE, float32: time ÷ naive", 0.80, _time(full, "ours", "naive"))
    yield Target("KD + CE, float32: time ÷ matrix products alone", 1.2, _time(full, "ours", "floor"))
    yield Target("KD + CE, float32: peak memory ÷ naive", 0.15, _memory(full, "ours", "naive"))
    yield Target("KD + CE, bfloat16: time ÷ matrix products alone", 1.4, _time(half, "ours", "floor"))
    yield Target("KD + CE, bfloat16: time ÷ TRL's forward KL", 0.75, _time(half, "ours", "trl_forward_kl"))
    for name in OTHERS:
        yield Target(f"{CASES[name]}, float32: time ÷ forward KL", 1.5, _time(full, name, "ours"))
    yield Target("JSD(0.5), float32: time ÷ TRL", 0.6, _time(full, "ours_generalized_jsd", "trl_jsd"))
    least = _memory(full, "ours_generalized_jsd", "trl_jsd")
    yield Target("JSD(0.5), float32: peak memory ÷ TRL", 0.1, least)
    yield Target("part masked, float32: time ÷ unmasked", 0.6, _time(full, "ours_half_masked", "ours"))
    yield Target("peak memory above inputs and gradients with more tokens: change", 0.1, _growth(full))


def _step_targets(results: Mapping[str, Any]) -> Iterator[Target]:
    for precision, part in results["steps"].items():
        lines = part["rounds"]
        both = ratio(lines, "ours_kd", ("teacher", "trainer_sft"), "wall_s")
        what = "time ÷ (teacher's forward pass + Trainer's SFT step)"
        yield Target(f"KD step, {precision}: {what}", 0.95, both)
        faster = ratio(lines, "trl_gkd", "ours_kd", "wall_s")
        yield Target(f"KD step, {precision}: tokens per s ÷ TRL's GKDTrainer", 1.5, faster, at_least=True)
        lora = ratio(lines, "ours_lora", "ours_kd", "peak_bytes")
        yield Target(f"KD step of an adapter, {precision}: peak memory ÷ in full", 0.7, lora)
        for form in ("hidden", "top_k", "samples"):
            cached = ratio(lines, f"ours_from_{form}", "ours_sft", "wall_s")
            yield Target(f"KD step from a disk, {form}, {precision}: time ÷ CE alone", 1.05, cached)
        routed = ratio(lines, "ours_routed", "ours_hidden", "wall_s")
        yield Target(f"hidden term routed, {precision}: time ÷ layers even", 1.1, routed)
        books = f"KD step, {precision}: ledger and guard, share of the step, a log every 10 steps"
        yield Target(books, 0.01, share(lines, "ours_kd", "ledger_s"))


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
