"""A benchmark's results as tables: medians and spreads, ratios formed within a round, targets.  Imports no
torch.

benchmark_results.json:  machine,  heads.<dtype>.{tokens, vocabulary, rounds, agreement, memory, skipped},
steps.<precision>.{tokens, rounds, flops, flops_per_s, skipped},  dashboard.{steps, rounds}
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from kdlib.benchmarks.settings import CASES, CONTENDERS
from kdlib.metrics.names import with_interval
from kdlib.runs.files import read_json
from kdlib.runs.folder import Run

RESULTS = "benchmark_results.json"
MB = 1e6
Lines = Sequence[Mapping[str, Any]]


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
    """One name's time over another's (or over the sum of others'), within each round; None where one was
    not measured.
    """
    parts = [to] if isinstance(to, str) else list(to)
    times = {
        each: {line["round"]: line[clock] for line in lines if line["name"] == each}
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
            columns["peak, GiB"] = spread([line["peak_bytes"] / 2**30 for line in own])
        rows[CONTENDERS[name]] = _flat(columns)
    floor = floor_s(part)
    rows["KD's matrix products at the measured peak"] = {
        "s per step": floor,
        "tokens per s": part["tokens"] / floor,
    }
    return pd.DataFrame(rows).T


def floor_s(part: Mapping[str, Any], name: str = "ours_kd") -> float:
    """Seconds that a contender's matrix products take at the fastest product's speed: nobody can be below."""
    models = {"teacher": "teacher"}.get(name, "student" if name.endswith("sft") else ("teacher", "student"))
    return (
        sum(flops for what, flops in part["flops"].items() if what.startswith(models)) / part["flops_per_s"]
    )


def dashboard_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """Seconds from a metrics file to the picture of it, and from one more line to the next picture."""
    lines = results["dashboard"]["rounds"]
    rows = {
        name: _flat({"wall s": spread([line[key] for line in lines])})
        for key, name in (("first_s", "first drawing"), ("update_s", "update by one line"))
    }
    return pd.DataFrame(rows).T


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
    """Every table of measurements that the results allow, by name; a figure's table has its name."""
    makers = {
        "rounds": ("time", time_table),
        "memory": ("memory", memory_table),
        "agreement": ("agreement", agreement_table),
    }
    tables = {
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
    return tables | ({"dashboard": dashboard_table(results)} if results.get("dashboard") else {})


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
