"""Ways to ask a teacher with experts, held against each other at equal student tokens: of finished runs.

Runs that lie beside each other and differ in nothing but `teacher.experts`, in how hidden states are matched,
and in their seed.  Each is measured by what 03_compare found: the teacher of a comparison is asked as it was
made, so that none of them wins by moving the goal.
"""

import statistics
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import nn

from kdlib.config.run import BESIDE, Config
from kdlib.config.sections import flow
from kdlib.config.terms import FEATURE_TERMS, ROUTE_WEIGHTS
from kdlib.errors import KdlibError, ModelError
from kdlib.metrics.means import averaged
from kdlib.metrics.names import MEASURES, is_better, student_of, three_digits, with_interval
from kdlib.models.loading import parameters
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.axes import COLOURS, INK, SOFT, intervals, panels, titled, upper
from kdlib.routing.experts import routers_of
from kdlib.routing.figures import FILE, FOLDER
from kdlib.routing.use import facts_of
from kdlib.runs.files import read_json, write_text, writing
from kdlib.runs.folder import Run, all_runs
from kdlib.runs.log import training_table

PLAIN = "top-k, as it was made"
KL, SHOWN = "kl_to_teacher", ("kl_to_teacher", "bits_per_byte")
LOOK = {True: (COLOURS["distilled"], "o"), False: ("#d55e00", "X"), None: ("#8a939b", "o")}
GOAL = 0.97  # of plain top-k's KL, that a student-aware router should reach


def of_run(
    run: Run, teacher: LiveTeacher | None, student: Callable[[], nn.Module]
) -> tuple[pd.DataFrame, str]:
    """`ablation_table` of a run and those beside it, and what it says; figure and table go into experts/.

    Args:
        student: makes the run's, to count its weights.
    """
    if not facts_of(teacher):
        return pd.DataFrame(), "the teacher has no experts, so it is asked in one way alone"
    table = ablation_table(run, partial(teacher_flops, teacher.model, student=student()))
    if table.empty:
        do = "`kd sweep` over teacher.experts and seed makes some (guides/experts.md)"
        return table, f"no finished runs beside this one ask its teacher plainly and in another way: {do}"
    with writing(folder := run.path / FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
        ablation_figure(table).savefig(folder / "ablation.png", dpi=130)
        write_text(folder / "ablation.csv", table.to_csv(index_label="asked"))
    caution = "" if table["same_rows"].all() else "Caution: not all had the same rows; set data.split_seed\n"
    return table, caution + message(table) + reason(read_json(run.path / FILE, {}), table[KL].iloc[0])


def variants(run: Run) -> dict[str, dict[int, Run]]:
    """How the teacher was asked → seed → the newest such run that is done, plain top-k first."""
    common, found = _common(run.config), {}
    for other in reversed(all_runs(run.path.parent)):
        try:
            config, is_compared = other.config, bool(other.comparison)
            is_whole = other.path == run.path or other.status["state"] == "done"
        except KdlibError:  # of another version, no training at all, or broken
            continue
        if is_whole and is_compared and _common(config) == common:
            found.setdefault(named(config), {})[config.seed] = other
    return dict(sorted(found.items(), key=lambda pair: (pair[0] != PLAIN, pair[0])))


def named(config: Config) -> str:
    """How a config asks its teacher, in words."""
    experts, features = config.teacher.experts, _features(config)
    if isinstance(experts, Mapping):
        ((name, given),) = experts.items()
        asks = f"{given} draws of k (KA)"
        if name == "student_aware":
            said = ", ".join(f"{what.replace('_', ' ')} {worth:g}" for what, worth in given.items())
            asks = f"student-aware router (SAR): {said}"
    else:
        asks = PLAIN if experts == "topk" else "all experts"
    return f"{asks}; {features}" if features else asks


def ablation_table(run: Run, cost: Callable[[Any], float]) -> pd.DataFrame:
    """A row for each way: means over seeds, the paired difference to plain top-k, and what it costs.

    Args:
        cost: of `teacher.experts`: the teacher's operations for each token that the student learns from.

    Returns:
        Indexed by the way.  `n` seeds; of each measure its mean and, with `_low` and `_high`, Student's 95 %
        interval over the seeds, of one seed that over held-out units; `difference` of the KL to plain top-k
        with the same seed, whose interval needs two seeds; `ratio` of the mean KLs; `gflops`; `tokens_per_s`
        of the training, median of its log, mean over seeds; `steps`; `same_rows` as plain top-k's.  Empty
        unless there are two ways.
    """
    every = variants(run)
    if len(every) < 2 or PLAIN not in every:
        return pd.DataFrame()
    plain = every[PLAIN]
    return pd.DataFrame.from_dict({name: _row(seeds, plain, cost) for name, seeds in every.items()}, "index")


def _row(seeds: Mapping[int, Run], plain: Mapping[int, Run], cost: Callable[[Any], float]) -> dict[str, Any]:
    first, row = next(iter(seeds.values())), {"n": len(seeds)}
    for measure in SHOWN:
        each = [_of(run)[measure] for run in seeds.values() if measure in _of(run)]
        if each:
            mean = averaged(each, MEASURES[measure].within)
            row |= {measure: mean["value"], f"{measure}_low": mean["low"], f"{measure}_high": mean["high"]}
    both = [_of(seeds[seed])[KL]["value"] - _of(plain[seed])[KL]["value"] for seed in seeds if seed in plain]
    if both and seeds is not plain:
        unknown = {"low": float("nan"), "high": float("nan")}
        apart = averaged([{"value": value, **unknown} for value in both])
        row |= {
            "difference": apart["value"],
            "difference_low": apart["low"],
            "difference_high": apart["high"],
        }
        row |= {"pairs": len(both), "better_in": sum(value < 0 for value in both)}
    logs = [training_table(run) for run in seeds.values()]
    rates = [float(log["tokens_per_s"].median()) for log in logs if "tokens_per_s" in log]
    known = {run.manifest.get("data", {}).get("fingerprint") for run in [*seeds.values(), *plain.values()]}
    return {
        **row,
        "ratio": row[KL] / statistics.fmean(_of(run)[KL]["value"] for run in plain.values()),
        "gflops": cost(first.config.teacher.experts) / 1e9,
        "tokens_per_s": statistics.fmean(rates) if rates else float("nan"),
        "steps": int(logs[0]["step"].max()),
        "same_rows": len(known) == 1,
        "runs": ", ".join(run.name for run in seeds.values()),
    }


def teacher_flops(teacher: nn.Module, experts: Any, student: nn.Module) -> float:
    """Floating-point operations for each token that the student learns from, beside its own step.

    Two for each weight that a token meets in a forward pass (Kaplan et al. 2020, which leaves out attention
    over the tokens before), head included; as many again for a backward pass that only passes gradients on,
    as experts and head are frozen.  `all`: every expert; `augment`: a pass for each draw, of as many experts
    as the router asks by itself; `student_aware`: a pass to teach, and before it one forward and backward of
    the teacher and one forward of the student, all experts asked.  A gate's own work is left out.
    """
    routers, whole = routers_of(teacher), _met(teacher)
    if experts == "topk" or not routers:
        idle = sum(_idle(teacher, name, int(each.top_k)) for name, each in routers.items())
        return 2.0 * (whole - idle)
    if experts == "all":
        return 2.0 * whole
    if "augment" in experts:
        return experts["augment"] * teacher_flops(teacher, "topk", student)
    return 3 * 2.0 * whole + 2.0 * _met(student)


def _met(model: nn.Module) -> int:
    """Weights that take part in a product: all but an embedding, which is looked up."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding
    return parameters(model) - (0 if is_tied else embedding.numel())


def _idle(model: nn.Module, router: str, asked: int) -> int:
    """Weights of the experts beside a router that a token does not ask."""
    count = int(model.get_submodule(router).num_experts)
    if (held := getattr(model.get_submodule(router.rpartition(".")[0]), "experts", None)) is None:
        found = f"found no experts beside its router {router}, so what they cost is not known"
        raise ModelError(f"{type(model).__name__}: {found}")
    return parameters(held) * (count - asked) // count


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """For reading."""
    rows = {}
    for name, row in table.iterrows():
        line = {"seeds": row["n"]}
        for measure in SHOWN:
            if measure in row and pd.notna(row[measure]):
                line[MEASURES[measure].name] = with_interval(_interval(row, measure))
        line["− top-k's KL"] = _difference(row)
        line["of top-k's KL"] = f"{row['ratio']:.3f}"
        line["teacher, GFLOPs per token"] = three_digits(row["gflops"])
        line["training, tokens/s"] = three_digits(row["tokens_per_s"])
        rows[name] = line
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def message(table: pd.DataFrame) -> str:
    """What came of each way but plain top-k, a sentence each; whether a router that learns is worth it."""
    said = []
    for name, row in table.iloc[1:].iterrows():
        better = _better(row)
        verdict = {True: "better", False: "worse", None: "open"}[better]
        goal = ""
        if "student-aware" in str(name):
            goal = f"; the goal, {GOAL:g} or less, is {'reached' if row['ratio'] <= GOAL else 'not reached'}"
        said.append(f"{upper(str(name))}: {row['ratio']:.3f} of plain top-k's KL, {verdict}{goal}")
    return "\n".join(said)


def reason(experts: Mapping[str, Any], apart: float) -> str:
    """How much there was to be won: what another routing changes, beside what the student is `apart`."""
    moves = [each["moved_by"] for each in experts.get("routings", {}).values() if "moved_by" in each]
    other = f"asked otherwise, the teacher is {three_digits(max(moves, default=0))} nats (KL) from itself"
    return f"\nWhat could be won: {other}, and plain top-k's student {three_digits(apart)}" if moves else ""


def ablation_figure(table: pd.DataFrame) -> Figure:
    """The difference in KL of each way to plain top-k, with its interval, and what it costs the teacher."""
    others, names = table.iloc[1:], [str(name) for name in table.index[1:]]
    figure, (axes, beside) = panels(10, 1.5 + 0.42 * len(others), 2, sharey=True, width_ratios=[3, 2])
    axes.axvline(0, color=INK, linewidth=0.8)
    for at, (_, row) in enumerate(others.iterrows()):
        colour, marker = LOOK[_better(row)]
        found = _interval(row, "difference")
        if pd.isna(found["low"]):  # one seed
            found |= dict.fromkeys(("low", "high"), found["value"])
        intervals(axes, at, found, lying=True, color=colour, fmt=marker, markersize=7)
        beside.barh(at, row["gflops"], height=0.5, color=SOFT)
        text = f" {three_digits(row['gflops'])}, {row['gflops'] / table['gflops'].iloc[0]:.3g} ×"
        beside.text(row["gflops"], at, text, va="center", fontsize=8)
    labels = [name.replace("; ", "\n").replace(": ", ":\n") for name in names]
    axes.set_yticks(range(len(others)), labels, fontsize=8)
    axes.set_ylim(len(others) - 0.4, -0.6)
    beside.axvline(table["gflops"].iloc[0], color=INK, linewidth=0.8)
    beside.set_xlim(0, table["gflops"].max() * 1.4)
    over = "95 % over seeds, paired" if others["n"].max() > 1 else "one seed: no interval"
    axes.set_xlabel(f"KL to the teacher as it was made, minus plain top-k's,\nnats ({over})", fontsize=8)
    beside.set_xlabel("the teacher's GFLOPs for each token\nof the student's; line: plain top-k", fontsize=8)
    for each in (axes, beside):
        each.tick_params(labelsize=8)
    best = others["ratio"].idxmin()
    ratio, verdict = others.loc[best, "ratio"], _better(others.loc[best])
    name, words = str(best).partition(":")[0], "which may be chance" if verdict is None else "beyond chance"
    title = f"{upper(name)} is nearest to the teacher, at {ratio:.3f} of plain top-k's KL, {words},"
    if ratio >= 1:
        title = f"Plain top-k is nearest to the teacher; next is {name}, at {ratio:.3f} of its KL, {words},"
    return titled(figure, f"{title}\nafter {int(table['steps'].iloc[0]):,} steps each")


def _common(config: Config) -> dict[str, Any]:
    """A config without what may differ between the ways, and without what changes no student."""
    plain = deepcopy(config.without(*BESIDE))
    if not config.teacher:
        return plain
    plain["teacher"].pop("experts", None)
    for name in ("seed", "baseline"):
        plain.pop(name, None)
    plain["loss"].pop("features", None)
    weights = plain["loss"].get("weights") or {}
    inside = (*FEATURE_TERMS, *ROUTE_WEIGHTS)
    plain["loss"]["weights"] = {name: spec for name, spec in weights.items() if name not in inside}
    return plain


def _features(config: Config) -> str:
    """How hidden states are matched, in words; "" where they are not."""
    terms = [name for name in config.loss.weights or {} if name in FEATURE_TERMS]
    layers = config.as_dict()["loss"].get("features", {}).get("layers")
    if not terms:
        return ""
    if isinstance(layers, Mapping) and "route" in layers:
        return f"{' and '.join(terms)} routed: top k {flow(layers['route'].get('top_k'))}"
    return f"{' and '.join(terms)} by a fixed map: {flow(layers)}"


def _of(run: Run) -> Mapping[str, Any]:
    """What the comparison of a run found of its student."""
    results = run.comparison
    return results["models"][student_of(results)]


def _interval(row: pd.Series, name: str) -> dict[str, float]:
    return {"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}


def _better(row: pd.Series) -> bool | None:
    """Whether a way is better than plain top-k or worse, beyond the interval."""
    if pd.isna(row.get("difference_low", float("nan"))):
        return None
    return is_better(_interval(row, "difference"), KL)


def _difference(row: pd.Series) -> str:
    if pd.isna(row.get("difference", float("nan"))):
        return ""
    if pd.isna(row["difference_low"]):
        return f"{three_digits(row['difference'], '+')} (one seed)"
    said = with_interval(_interval(row, "difference"), "+")
    return f"{said}, better in {row['better_in']:.0f} of {row['pairs']:.0f}"
