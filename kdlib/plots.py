"""Figures from a run's files: one message each, stated in the title from the figures themselves.

Figures are made from `training_table`, `eval_table` and comparison_results.json; nothing here imports torch.
Teacher hatched grey, distilled student blue, baseline thin orange, untrained student light grey; safe for colour-blind eyes.
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.runs import Run, StudentFolder, read_json, read_metrics

COLOURS = {"teacher": "#6e6e6e", "untrained": "#bdbdbd", "baseline": "#e69f00", "distilled": "#0072b2"}
LABELS = {"teacher": "teacher", "untrained": "untrained student", "baseline": "CE-only baseline", "distilled": "distilled student"}
TERM_COLOURS = {"kd": "#0072b2", "ce": "#e69f00", "hidden": "#009e73", "attention": "#cc79a7"}
METRIC_LABELS = {
    "kl_to_teacher": "KL to teacher\nnats per token, T = 1", "agreement": "top-1 agreement\nwith the teacher",
    "perplexity": "perplexity\nper token", "bits_per_byte": "bits per byte",
}


def training_table(folder: StudentFolder) -> pd.DataFrame:
    """The training lines of metrics.jsonl, one row per log, without the train/ prefix."""
    return _lines(folder, "train/loss", "train/")


def eval_table(folder: StudentFolder) -> pd.DataFrame:
    """The evaluation lines of metrics.jsonl, with step and epoch, without the eval/ prefix."""
    return _lines(folder, "eval/loss", "eval/")


def plan_table(folder: StudentFolder) -> pd.DataFrame:
    """Learning rate, weights and temperatures over the whole training as plan.json has them: columns as of `training_table`."""
    return pd.DataFrame(read_json(folder.plan, []))


def terms_in(table: pd.DataFrame) -> list[str]:
    """The loss terms that a training or evaluation table has."""
    return [name.removesuffix("_weight") for name in table.columns if name.endswith("_weight")]


def component_values(table: pd.DataFrame) -> Figure:
    """Each term's unweighted value against the optimizer step, on a log scale."""
    figure, axes = _figure()
    for term in terms_in(table):
        axes.plot(table["step"], table[f"{term}_loss"], color=_colour(term), label=term)
    if (table[[f"{t}_loss" for t in terms_in(table)]] > 0).all(axis=None):
        axes.set_yscale("log")
    lead = "kd" if "kd" in terms_in(table) else terms_in(table)[0]
    axes.set_title(_course(f"{lead} loss", table[f"{lead}_loss"], table["step"]), loc="left")
    return _labelled(figure, axes, "raw value, nats per token")


def component_shares(table: pd.DataFrame) -> Figure:
    """What the optimizer sees: weight x value of each term, stacked to the loss."""
    figure, axes = _figure()
    terms = terms_in(table)
    shares = {term: table[f"{term}_weight"] * table[f"{term}_loss"] for term in terms}
    axes.stackplot(table["step"], *shares.values(), labels=terms, colors=[_colour(t) for t in terms], alpha=0.7)
    axes.plot(table["step"], table["loss"], color="black", linewidth=1, label="loss, as back-propagated")
    part = {term: share.mean() / table["loss"].mean() for term, share in shares.items()}
    lead = max(part, key=part.get)
    axes.set_title(f"{lead} makes up {part[lead]:.0%} of what the optimizer sees", loc="left")
    return _labelled(figure, axes, "weight × value, nats per token")


def schedules(table: pd.DataFrame) -> Figure:
    """Learning rate, weights and temperature against the optimizer step."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(table["step"], table["learning_rate"], color="black")
    upper.set(ylabel="learning rate")
    upper.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    peak = table["learning_rate"].idxmax()
    upper.set_title(
        f"The learning rate peaks at {table['learning_rate'][peak]:.1e} and ends at {table['learning_rate'].iloc[-1]:.1e}", loc="left"
    )
    for term in terms_in(table):
        lower.plot(table["step"], table[f"{term}_weight"], color=_colour(term), label=f"weight of {term}")
    lower.plot(table["step"], table["temperature"], color="#cc79a7", linestyle=":", label="temperature")
    lower.set_ylim(bottom=0)
    return _labelled(figure, lower, "weight, temperature")


def train_against_eval(train: pd.DataFrame, evaluation: pd.DataFrame) -> Figure:
    """The same objective, same weights, on training and held-out text."""
    figure, axes = _figure()
    axes.plot(train["step"], train["loss"], color=COLOURS["distilled"], alpha=0.6, label="training batches")
    axes.plot(evaluation["step"], evaluation["loss"], color="black", marker="o", label="held-out text")
    near = train.loc[train["step"] >= evaluation["step"].iloc[-1] - 0.2 * train["step"].iloc[-1], "loss"].mean()
    axes.set_title(f"At the end the held-out loss is {evaluation['loss'].iloc[-1] / near:.2f} × the training loss", loc="left")
    return _labelled(figure, axes, "loss, nats per token")


def closeness(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """KL to the teacher on held-out text while training: independent of weights, so comparable between students."""
    figure, axes = _figure()
    for name, table in tables.items():
        axes.plot(table["step"], table["kl_to_teacher"], color=COLOURS[name], marker="o", label=LABELS[name],
                  linewidth=1 if name == "baseline" else 2)
    last = {name: table["kl_to_teacher"].iloc[-1] for name, table in tables.items()}
    axes.set_title("Held-out KL to the teacher: " + ", ".join(f"{LABELS[n]} {v:.2f}" for n, v in last.items()), loc="left")
    axes.set_ylim(bottom=0)
    return _labelled(figure, axes, "KL(teacher ‖ student), nats per token")


def comparison_bars(results: Mapping[str, Any]) -> Figure:
    """All models on the same tokens, with 95 % intervals."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, len(METRIC_LABELS)), METRIC_LABELS.items(), strict=True):
        models = list(results["models"])
        for position, name in enumerate(models):
            figures = results["models"][name][metric]
            low, high = figures["value"] - figures["low"], figures["high"] - figures["value"]
            axes.bar(position, figures["value"], color=COLOURS[name], hatch="//" if name == "teacher" else None,
                     edgecolor="white", yerr=[[max(low, 0)], [max(high, 0)]], capsize=3)
            axes.text(position, figures["high"], f" {figures['value']:.3g}", ha="center", va="bottom", fontsize=8)
        if metric == "perplexity":
            axes.set_yscale("log")
        axes.set_xticks(range(len(models)), [LABELS[m].replace(" ", "\n") for m in models], fontsize=8)
        axes.set_title(label, fontsize=9, loc="left")
        axes.margins(y=0.15)
        _plain_spines(axes)
    message = comparison_message(results).replace(": ", ":\n", 1).replace("; ", ",\n")
    sample = f"n = {results['rows']} blocks, {results['tokens']:,} tokens; {results['interval']}"
    figure.suptitle(f"{message}\n{sample}", fontsize=10, x=0.01, ha="left")
    return figure


def comparison_message(results: Mapping[str, Any]) -> str:
    """What the comparison found, in a sentence; says so where an interval overlaps zero."""
    rival = "baseline" if "baseline" in results["models"] else "untrained"
    parts = []
    for metric, words, good in (("kl_to_teacher", "KL to the teacher", -1), ("agreement", "agreement", 1),
                                ("perplexity", "perplexity", -1)):
        d = difference(results, "distilled", rival, metric)
        verdict = "no clear difference in" if d["low"] <= 0 <= d["high"] else "better" if d["value"] * good > 0 else "worse"
        parts.append(f"{verdict} {words} ({with_interval(d, '+')})")
    return f"Against the {LABELS[rival]}, the distilled student shows: {'; '.join(parts)}"


def difference(results: Mapping[str, Any], model: str, against: str, metric: str) -> dict[str, Any]:
    """The paired difference of two models in one metric, with its interval."""
    return next(d for d in results["differences"] if (d["model"], d["against"], d["metric"]) == (model, against, metric))


def quality_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: each metric with its 95 % interval."""
    rows = {LABELS[name]: {METRIC_LABELS[m].split("\n")[0]: with_interval(facts[m]) for m in METRIC_LABELS}
            for name, facts in results["models"].items()}
    return pd.DataFrame(rows).T


def cost_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row per model: size, speed and memory, as measured in this comparison."""
    rows = {
        LABELS[name]: {"parameters": f"{facts['parameters'] / 1e6:.1f} M", "as safetensors, GiB": f"{facts['size_on_disk_gib']:.2f}",
                       "forward, tokens/s": f"{facts['forward_tokens_per_s']:.0f}", "peak memory, GiB": f"{facts['peak_memory_gib']:.2f}"}
        for name, facts in results["models"].items()
    }
    return pd.DataFrame(rows).T


def difference_table(results: Mapping[str, Any]) -> pd.DataFrame:
    """The distilled student's paired differences, the hardest rival first, and whether the interval excludes zero."""
    rivals = [name for name in ("baseline", "untrained", "teacher") if name in results["models"]]
    rows = []
    for rival in rivals:
        for metric, label in METRIC_LABELS.items():
            d = difference(results, "distilled", rival, metric)
            rows.append({
                "distilled student against": LABELS[rival], "metric": label.split("\n")[0],
                "difference and 95 % interval": with_interval(d, "+"), "excludes zero": "yes" if d["low"] > 0 or d["high"] < 0 else "no",
            })
    return pd.DataFrame(rows).set_index("distilled student against")


def with_interval(figures: Mapping[str, float], sign: str = "") -> str:
    """`1.22 [1.13, 1.33]`: three digits each, whole numbers from 1,000 on; `sign` is + for differences."""
    three = [f"{x:{sign},.0f}" if abs(x) >= 1000 else f"{x:{sign}#.3g}".rstrip(".") for x in map(figures.get, ("value", "low", "high"))]
    return "{} [{}, {}]".format(*three)


def run_figures(run: Run, results: Mapping[str, Any] | None) -> dict[str, Figure]:
    """Every figure that the files of a run allow, by name: for notebook and report alike."""
    train, evaluation, baseline = training_table(run), eval_table(run), eval_table(run.baseline)
    figures = {"teacher_student_comparison": comparison_bars(results)} if results else {}
    if len(train):
        figures |= {"component_values": component_values(train), "component_shares": component_shares(train), "schedules": schedules(train)}
    if len(train) and len(evaluation):
        figures["train_against_eval"] = train_against_eval(train, evaluation)
    if len(evaluation) and "kl_to_teacher" in evaluation:
        figures["closeness"] = closeness({"distilled": evaluation} | ({"baseline": baseline} if len(baseline) else {}))
    return figures


def _lines(folder: StudentFolder, mark: str, prefix: str) -> pd.DataFrame:
    lines = [line for line in read_metrics(folder) if mark in line]
    table = pd.DataFrame(lines)
    return table.rename(columns=lambda name: name.removeprefix(prefix).removeprefix("train/"))


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    return figure, figure.subplots()


def _labelled(figure: Figure, axes: Axes, ylabel: str) -> Figure:
    axes.set(xlabel="optimizer step", ylabel=ylabel)
    axes.legend(frameon=False, fontsize=8)
    for each in figure.axes:
        each.title.set_fontsize(10)
        _plain_spines(each)
    return figure


def _plain_spines(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _course(what: str, values: pd.Series, steps: pd.Series) -> str:
    first, last = values.iloc[0], values.iloc[-1]
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    return f"The {what} {verb} from {first:.2f} to {last:.2f} nats per token in {steps.iloc[-1]} steps"


def _colour(term: str) -> str:
    return TERM_COLOURS.get(term, "#56b4e9")
