"""Figures and tables of a run that makes rows, from its files alone: its log, its rows, progress.json."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.metrics.bootstrap import Bootstrap, interval
from kdlib.metrics.names import SHARE, three_digits, with_interval
from kdlib.plots.axes import legend, panels, shortened, thinned, titled
from kdlib.runs.files import json_lines, read_json
from kdlib.runs.folder import Run
from kdlib.runs.log import duration

ENDS = ("kept", "rejected", "failed")
LEFT = "not answered"
COLOURS = {"kept": "#0072b2", "rejected": "#e69f00", "failed": "#d55e00"}
COLOURS |= {"answered": "#56b4e9", LEFT: "#d9d9d9"}  # before the answers are sifted
UNITS = (
    (100.0, 1.0, "s"),
    (6000.0, 60.0, "min"),
    (float("inf"), 3600.0, "h"),
)  # up to, its seconds, its name
COSTS = ["seconds", "answers", "usd", "input", "output"]
SMALL = {"fontsize": 8}


@dataclass(frozen=True)
class Generated:
    """What a run's files say of it."""

    run: Run
    rows: Mapping[str, Sequence[Mapping[str, Any]]]  # kept, rejected, failed
    progress: Mapping[str, Any]  # of the stage that asks, or asked last
    costs: pd.DataFrame  # as `costs_over_time`

    @property
    def is_sifted(self) -> bool:
        """Whether its rows are those of all its answers; not so while it asks."""
        return "kept" in self.progress

    @property
    def spent(self) -> str:
        """`$1.20 of $20.00`; nothing where no price is known."""
        spent, budget = self.progress.get("spent_usd", 0.0), self.progress.get("budget_usd")
        return f"{dollars(spent)}{f' of {dollars(budget)}' if budget else ''}" if spent or budget else ""

    @property
    def by_category(self) -> pd.DataFrame:
        """A row a category, a column an end: how many of its prompts came to it, and how many to none."""
        if self.progress and not self.is_sifted:
            table = pd.DataFrame(self.progress["by_category"]).T
            table[LEFT] = table.pop("prompts") - table.sum(axis=1)
            return table
        found = {end: Counter(row["category"] for row in self.rows[end]) for end in ENDS}
        seen = {_asked(row) for end in ENDS for row in self.rows[end]}
        every = json_lines(self.run.path / "prompts.jsonl")
        found[LEFT] = Counter(row["category"] for row in every if _asked(row) not in seen)
        names = dict.fromkeys(row["category"] for row in every)
        return pd.DataFrame({end: [of[n] for n in names] for end, of in found.items()}, index=[*names])

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts came to which end."""
        return {str(end): int(count) for end, count in self.by_category.sum().items()}


def generated(run: Run) -> Generated:
    """What there is of a run so far."""
    rows = {end: json_lines(run.path / f"{end}.jsonl") for end in ENDS}
    progress = read_json(run.path / "progress.json", {})
    costs = costs_over_time(run.path / "answers.jsonl", is_over=run.status["state"] != "running")
    return Generated(run, rows, progress, costs)


def costs_over_time(log: Path, *, is_over: bool = True) -> pd.DataFrame:
    """A line an event of answers.jsonl: seconds since the first, and answers, dollars and tokens up to it.

    What was under way when a process died counts when it is asked again, or when all is over.
    """
    every, found, pending = json_lines(log), [], {}
    for at, entry in zip(_seconds(every), every, strict=True):
        event, answer = entry["event"], entry.get("answer") or {}
        usd = entry.get("usd", 0.0) + (entry["at_most"] if event == "lost" else 0.0)
        usd += answer.get("cost") or (entry.get("failure") or {}).get("cost") or 0.0
        before = pending.pop(entry.get("key"), 0.0) if event != "lost" else 0.0
        if event == "asked":
            usd, pending[entry["key"]] = usd + before, entry["at_most"]
        usage = answer.get("usage") or {}
        found.append((at, event == "answered", usd, usage.get("input", 0), usage.get("output", 0)))
    if is_over and pending:
        found.append((found[-1][0], 0, sum(pending.values()), 0, 0))
    table = pd.DataFrame(found, columns=COSTS).astype(float)
    return table.assign(**{name: table[name].cumsum() for name in COSTS[1:]})


def dollars(usd: float) -> str:
    """$12.30; below a dollar three digits, so that a row's cost is seen."""
    return f"${usd:,.2f}" if usd >= 1 or not usd else f"${three_digits(usd)}"


def yield_table(found: Generated) -> pd.DataFrame:
    """A row a category: how many prompts came to which end, and the share that is kept, with its interval."""
    table = found.by_category
    if not found.is_sifted:
        return table
    asked = table[[*ENDS]].sum(axis=1)
    shares = [_share(*counts) for counts in zip(table["kept"], asked, strict=True)]
    return table.assign(**{"share kept of those asked, 95 %": shares})


def reasons_table(found: Generated) -> pd.DataFrame:
    """A row a kind of reason, the most frequent first."""
    kinds = Counter(
        (row["reason"].partition(":")[0], end) for end in ENDS[1:] for row in found.rows[end]
    ).most_common()
    return pd.DataFrame(
        [(kind, end, count) for (kind, end), count in kinds], columns=["reason", "end", "rows"]
    )


def figures_of(found: Generated) -> dict[str, Figure]:
    """All that there is something to draw for, by name."""
    drawn = {
        "yield": (yield_figure, found.progress),
        "reasons": (reasons_figure, found.rows["rejected"] or found.rows["failed"]),
        "cost": (cost_figure, found.costs["answers"].any()),
        "lengths": (lengths_figure, found.rows["kept"] or found.rows["rejected"]),
    }
    return {name: draw(found) for name, (draw, has_any) in drawn.items() if has_any}


def yield_figure(found: Generated) -> Figure:
    """What came of each category's prompts."""
    table, counts = found.by_category, found.counts
    figure, (axes,) = panels(9, 1.6 + 0.32 * len(table))
    _draw_ends(axes, table)
    if not found.is_sifted:
        said = f"{counts['answered']:,} of {sum(counts.values()):,} prompts are answered, and not sifted yet"
        return titled(figure, said)
    asked = table[[*ENDS]].sum(axis=1)
    said = f"{counts['kept']:,} of {int(asked.sum()):,} prompts that were asked gave a row that is kept"
    if len(table) > 1 and asked.all():
        least = (table["kept"] / asked).idxmin()
        said += f", the smallest share of {_brief(least)}: {table['kept'][least]:,} of {asked[least]:,}"
    return titled(figure, said)


def reasons_figure(found: Generated) -> Figure:
    """Why prompts gave no row, each kind of reason with its count."""
    table = reasons_table(found)
    counts = {end: len(rows) for end, rows in found.rows.items()}
    figure, (axes,) = panels(9, 1.2 + 0.3 * len(table))
    colours = [COLOURS[end] for end in table["end"]]
    bars = axes.barh(range(len(table)), table["rows"], color=colours, height=0.7)
    axes.bar_label(bars, padding=3, **SMALL)
    names = [_brief(each.reason) + " (failed)" * (each.end == "failed") for each in table.itertuples()]
    _name_bars(axes, names)
    axes.margins(x=0.08)
    said = f"{counts['rejected']:,} are rejected and {counts['failed']:,} failed"
    return titled(figure, f"{said}, most often for: {names[0]}")


def cost_figure(found: Generated) -> Figure:
    """Dollars and tokens over time, everything counted."""
    is_priced, last = found.costs["usd"].max() > 0, found.costs.iloc[-1]
    figure, every = panels(9, 3.2, 1 + is_priced)
    _draw_costs(found, every)
    said = f"{last['answers']:,.0f} answers in {duration(last['seconds'])}"
    if not is_priced:
        return titled(figure, f"{said} have {last['output']:,.0f} tokens; no price is known")
    kept = len(found.rows["kept"]) if found.is_sifted else 0
    each = f": {dollars(last['usd'] / kept)} for each row that is kept" if kept else ""
    return titled(figure, f"{said} cost {dollars(last['usd'])}{each}")


def lengths_figure(found: Generated) -> Figure:
    """How long answers are, those that are kept and those that are not."""
    every = {end: [len(row.get("response", "")) for row in found.rows[end]] for end in ENDS[:2]}
    lengths = {end: of for end, of in every.items() if of}
    figure, (axes,) = panels(9, 3)
    bins = np.histogram_bin_edges(np.concatenate([*lengths.values()]), bins=40)
    look = {
        "color": [COLOURS[end] for end in lengths],
        "label": [f"{n}, {len(of):,}" for n, of in lengths.items()],
    }
    axes.hist([*lengths.values()], bins=bins, stacked=True, **look)
    axes.set_xlabel("characters of an answer", **SMALL)
    axes.set_ylabel("answers", **SMALL)
    axes.yaxis.get_major_locator().set_params(integer=True)
    legend(axes)
    if not (kept := every["kept"]):
        return titled(figure, "No answer is kept, of whatever length")
    said = f"Half of the answers that are kept have {np.median(kept):,.0f} characters or more"
    return titled(figure, f"{said}, the longest {max(kept):,}")


def live_figure(found: Generated) -> Figure:
    """How far a run is, and what it has cost, as the notebook shows it while it asks."""
    figure, (left, *every) = panels(12, 3.4, 2 + (found.costs["usd"].max() > 0))
    if found.progress:
        _draw_ends(left, found.by_category)
    _draw_costs(found, every)
    return titled(figure, headline(found))


def headline(found: Generated) -> str:
    """Which run, how it stands, how far it is, and what was spent."""
    progress, state = found.progress, found.run.status["state"]
    if not progress:
        return f"{found.run.name}  ·  nothing asked yet"
    counts = ", ".join(f"{count:,} {end}" for end, count in found.counts.items() if count)
    under_way = progress.get("under_way") if state == "running" else 0
    stage = "" if found.is_sifted else f"{progress['stage']}: "
    parts = [found.run.name, state, stage + counts, f"{under_way} under way" * bool(under_way), found.spent]
    return "  ·  ".join(filter(None, parts))


def _draw_ends(axes: Axes, table: pd.DataFrame) -> None:
    """Stacked bars, a category each, every part with its count where there is room."""
    left, widest = np.zeros(len(table)), table.sum(axis=1).max()
    for end in (end for end in table if table[end].any()):
        bars = axes.barh(range(len(table)), table[end], left=left, color=COLOURS[end], label=end, height=0.7)
        counts = [f"{count:,}" if count > 0.04 * widest else "" for count in table[end]]
        ink = "white" if end in ("kept", "failed") else "black"
        axes.bar_label(bars, counts, label_type="center", color=ink, fontsize=7)
        left += table[end].to_numpy()
    _name_bars(axes, [_brief(name) for name in table.index])
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0)


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, **SMALL, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("prompts", **SMALL)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_costs(found: Generated, every: Sequence[Axes]) -> None:
    """Tokens on the last axes; dollars, where there are two, on the first, with a budget that is near."""
    costs, budget = found.costs, found.progress.get("budget_usd")
    shown = costs.iloc[thinned(costs[COSTS[2:]].to_numpy().T)] if len(costs) else costs
    _, per, unit = next(each for each in UNITS if not costs["seconds"].max() >= each[0])
    look = {"where": "post", "linewidth": 1.8}
    if len(every) > 1:
        every[0].step(shown["seconds"] / per, shown["usd"], color=COLOURS["kept"], **look)
        every[0].set_ylabel("dollars", **SMALL)
        if budget and costs["usd"].max() > budget / 4:
            every[0].axhline(budget, color="#6e6e6e", linestyle="--", linewidth=1, label="budget")
            legend(every[0])
    for tokens, of, colour in (("output", "answers", COLOURS["kept"]), ("input", "prompts", "#6e6e6e")):
        every[-1].step(shown["seconds"] / per, shown[tokens], color=colour, label=f"of {of}", **look)
    every[-1].set_ylabel("tokens", **SMALL)
    every[-1].yaxis.set_major_formatter("{x:,.0f}")
    legend(every[-1])
    for axes in every:
        axes.set_xlabel(f"{unit} of asking, pauses left out", **SMALL)
        axes.set_xlim(0, max(costs["seconds"].max(), 1) / per if len(costs) else 1)
        axes.tick_params(labelsize=8)
        axes.set_ylim(bottom=0)


def _seconds(every: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """When each event was, in seconds since the first, without what lies between two askings."""
    times = pd.to_datetime([entry["at"] for entry in every], utc=True).as_unit("s").astype("int64").to_numpy()
    gaps = np.diff(times, prepend=times[:1]).clip(min=0)
    gaps[np.array([entry["event"] == "began" for entry in every], bool)] = 0
    return np.cumsum(gaps)


def _share(kept: int, asked: int) -> str:
    """`0.800 [0.51, 0.94]`, over prompts."""
    if not asked:
        return "–"
    drawn = Bootstrap(asked, resamples=1000).sums(np.repeat([1.0, 0.0], [kept, asked - kept])[:, None])
    return with_interval(interval(kept / asked, drawn[:, 0] / asked, asked, SHARE))


def _asked(row: Mapping[str, Any]) -> str:
    """What was asked, as one text."""
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    return json.dumps(messages[:-1] if messages[-1]["role"] == "assistant" else messages)


def _brief(text: str) -> str:
    return shortened(" ".join(text.split()), 40)
