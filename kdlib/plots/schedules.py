"""What a config's schedules do while a student learns: learning rate, weights, temperatures; as a table and a
figure.

Works from the config alone, in fractions of training; `kdlib.plots.comparison.schedules` draws what a run's
own plan says.  Imports no torch.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.config.run import Config
from kdlib.plots.axes import TERM_COLOURS
from kdlib.schedulers import Spec, breakpoints, from_spec

LEARNING_RATE = 5e-5  # TrainingArguments' own, where a config is silent
# the Trainer's courses that kdlib.schedulers has words for
NAMED = ("cosine", "linear", "constant", "constant_with_warmup")


def warmed(warm_up: float, course: str, last: float = 0.0) -> Spec:
    """A straight line from 0 over the warm-up, a fraction of training; then `course` from 1 to `last`."""
    main = 1.0 if course == "constant" else {course: [1.0, last]}
    if warm_up:
        return {"joined": [[warm_up, {"linear": [0.0, 1.0]}], [1.0, main]]}
    return {"linear": [1.0, 1.0]} if main == 1.0 else main


def rate_course(config: Config, steps: int | None = None) -> Spec | None:
    """The multiple of `learning_rate` over the whole training; None for a course that kdlib.schedulers has no
    words for.

    Args:
        steps: optimizer steps of the training: a warm-up is a whole number of them.
    """
    training = config.training
    course = training.get("lr_scheduler_type", "linear")
    if isinstance(course, Mapping):
        return course
    if training.get("lr_scheduler_kwargs") or course not in NAMED:
        return None
    warm_up = warm_up_of(config, steps) if course != "constant" else 0.0
    if warm_up is None or warm_up > 1:
        return None
    if warm_up == 1:
        return {"linear": [0.0, 1.0]}
    return warmed(warm_up, course.removesuffix("_with_warmup"))


def warm_up_of(config: Config, steps: int | None) -> float | None:
    """The warm-up as a fraction of training, rounded to whole steps as the Trainer does; None where that
    needs `steps`.
    """
    given = config.training.get("warmup_steps") or 0
    if given < 1:
        return math.ceil(steps * given) / steps if steps else float(given)
    return int(given) / steps if steps else None


def curves(config: Config, steps: int | None = None, plan: pd.DataFrame | None = None) -> pd.DataFrame:
    """Learning rate, weights and temperatures over training: columns as of `metrics.plan_table`, `fraction`
    in place of step.

    Args:
        plan: of a run, whose learning rate stands in where the config's course has no words in
            kdlib.schedulers.
    """
    loss = config.loss
    specs = {f"{name}_weight": spec for name, spec in loss.schedules.items()}
    temperatures = {
        name: spec for name, spec in loss.temperatures(loss.schedules).items() if name != "contrastive"
    }
    one = (
        {"temperature": next(iter(temperatures.values()))}
        if len({str(spec) for spec in temperatures.values()}) == 1
        else {}
    )
    specs |= one or {f"{name}_temperature": spec for name, spec in temperatures.items()}
    course = rate_course(config, steps)
    when = breakpoints(*specs.values(), *[] if course is None else [course])
    table = {
        "fraction": when,
        **{name: [from_spec(spec)(moment) for moment in when] for name, spec in specs.items()},
    }
    if course is not None:
        peak, schedule = config.training.get("learning_rate", LEARNING_RATE), from_spec(course)
        table["learning_rate"] = [peak * schedule(moment) for moment in when]
    elif plan is not None and "learning_rate" in plan:
        known = plan.assign(fraction=(plan["step"] - 1) / plan["step"].max())
        rates = pd.Series(known["learning_rate"].values, index=known["fraction"])
        table["learning_rate"] = (
            rates.reindex(rates.index.union(when)).interpolate("index").loc[when].tolist()
        )
    return pd.DataFrame(table)


def course_figure(table: pd.DataFrame, ends: Sequence[float] = (), steps: int | None = None) -> Figure:
    """Learning rate, weights and temperature, one below the other, over the fraction of training and its
    steps.

    Args:
        table: by `curves`.
        ends: of the curriculum's phases.
    """
    figure = Figure(figsize=(9, 5.4))
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1.3, 1))
    figure.subplots_adjust(left=0.1, right=0.88, bottom=0.12, top=0.95, hspace=0.36)
    when = 100 * table["fraction"]
    if "learning_rate" in table:
        upper.plot(when, table["learning_rate"], color="black")
        upper.yaxis.set_major_formatter(lambda rate, _: f"{rate:.1e}")
    for name in (name for name in table if name.endswith("_weight")):
        term = name.removesuffix("_weight")
        middle.plot(when, table[name], color=TERM_COLOURS.get(term, "#56b4e9"), label=term)
    _shade(middle, ends)
    for number, name in enumerate(name for name in table if name.endswith("temperature")):
        lower.plot(
            when,
            table[name],
            color="#cc79a7",
            linestyle=("-", "--", ":", "-.")[number % 4],
            label="all terms" if name == "temperature" else name.removesuffix("_temperature"),
        )
    for axes, ylabel, title in (
        (upper, "learning rate", _rate_title(table)),
        (middle, "weight", _weights_title(table)),
        (lower, "temperature", _temperature_title(table)),
    ):
        _panel(axes, ylabel, title)
    lower.set(xlim=(0, 100), xlabel="training done" + ", and optimizer steps" * bool(steps))
    lower.set_xticks(
        range(0, 101, 10),
        [f"{share} %" + (f"\n{share * steps / 100:.0f}" if steps else "") for share in range(0, 101, 10)],
    )
    return figure


def _shade(axes: Axes, ends: Sequence[float]) -> None:
    for number, (start, end) in enumerate(zip([0.0, *ends[:-1]], ends, strict=True) if ends else []):
        axes.axvspan(100 * start, 100 * end, color="#6e6e6e", alpha=0.12 if number % 2 else 0.04, linewidth=0)
        axes.text(
            50 * (start + end),
            0.97,
            f"phase {number + 1}",
            ha="center",
            va="top",
            fontsize=8,
            color="#6e6e6e",
            transform=axes.get_xaxis_transform(),
        )


def _panel(axes: Axes, ylabel: str, title: str) -> None:
    axes.set_ylabel(ylabel, fontsize=9)
    axes.set_title(title, loc="left", fontsize=9.5, y=1.03)
    axes.set_ylim(0, 1.15 * max([1e-12, *(max(line.get_ydata()) for line in axes.lines)]))
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines and axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _rate_title(table: pd.DataFrame) -> str:
    if "learning_rate" not in table:
        return (
            "The learning rate follows a course of the Trainer's own, known once the dry run has planned it"
        )
    return (
        f"The learning rate peaks at {table['learning_rate'].max():.1e} and ends at "
        f"{table['learning_rate'].iloc[-1]:.1e}"
    )


def _weights_title(table: pd.DataFrame) -> str:
    return "Weights: " + ", ".join(
        f"{name.removesuffix('_weight')} {_turns(table[name])}" for name in table if name.endswith("_weight")
    )


def _turns(values: pd.Series) -> str:
    """`1 → 0.2`, by way of the highest or lowest where that is not an end; one number where nothing moves."""
    start, end = values.iloc[0], values.iloc[-1]
    far = next(
        (value for value in (values.max(), values.min()) if not min(start, end) <= value <= max(start, end)),
        end,
    )
    way = [f"{value:.3g}" for value in (start, far, end)]
    return " → ".join(each for number, each in enumerate(way) if number == 0 or each != way[number - 1])


def _temperature_title(table: pd.DataFrame) -> str:
    courses = [table[name] for name in table if name.endswith("temperature")]
    if not courses:
        return "No term has a temperature"
    return f"Temperature: {_turns(courses[0])}"
