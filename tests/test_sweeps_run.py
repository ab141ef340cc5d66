"""A sweep runs what its file lists, once each; what fails stops nothing, what was killed goes on; its
report has the right figures.
"""

import json
import statistics
import sys
from itertools import combinations
from pathlib import Path

import made_answers
import matplotlib.figure
import pandas as pd
import pytest
from made_log import stands
from matplotlib.axis import Axis
from matplotlib.transforms import Bbox

from kdlib.config import run as configs
from kdlib.errors import ConfigError
from kdlib.metrics.means import averaged
from kdlib.metrics.names import MEASURES
from kdlib.reports import run as reports
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.sweeps import figures, report, results, run as sweep_run
from kdlib.sweeps.cautions import at_the_edge, few_seeds, findings
from kdlib.sweeps.config import SweepConfig
from kdlib.sweeps.figures import variance_shares
from kdlib.sweeps.results import Sweep
from kdlib.sweeps.trials import Base, expanded
from kdlib.workbench import cli

GRID = {"loss.temperature": [1, 2], "loss.weights.kd:ce": [0.5, 0.9]}
EVIL = "<script>alert(1)</script> $x_1$"


@pytest.fixture
def settings(config_file):
    """Reads a sweep over the tiny config: settings(grid=…, jobs=…)."""

    def read(**sections) -> SweepConfig:
        return configs.parse(
            {"base": str(config_file), **(sections or {"grid": GRID})}, name="sweep", kind=SweepConfig
        )

    return read


@pytest.fixture
def trials_of(settings, tmp_path):
    """Expands it: (base, trials, repetitions)."""

    def expand(**sections):
        found = settings(**sections)
        base = Base(found, "s", tmp_path)
        return base, *expanded(found, base)

    return expand


# settings


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, "found none of grid, list, random, search"),
        ({"grid": GRID, "list": [{"seed": 1}]}, "found grid and list of grid, list, random, search"),
        ({"gird": GRID}, "gird: unknown key; did you mean 'grid'"),
        ({"grid": {}}, "needs a setting with its values"),
        ({"grid": {"seed": []}}, "seed: the list is empty"),
        ({"grid": {"loss.weights.kd:de": [0.5]}}, "only two weights can be named, as loss.weights.kd:ce"),
        ({"grid": {"loss.temperature:x": [0.5]}}, "only two weights can be named"),
        ({"grid": {"a..b": [1]}}, "write its dotted name"),
        ({"list": []}, "needs a trial at least"),
        ({"random": {"trials": 2, "from": {"seed": {"unifrom": [0, 1]}}}}, "did you mean 'uniform'"),
        (
            {"random": {"trials": 2, "from": {"seed": {"uniform": [2, 1]}}}},
            "needs two numbers, the lower first",
        ),
        ({"random": {"trials": 2, "from": {"seed": {"log_uniform": [0, 1]}}}}, "both must be above 0"),
        ({"random": {"trials": 2, "from": {"seed": {"integer": [0, 1.5]}}}}, "both must be whole numbers"),
        ({"random": {"trials": 2, "from": {"seed": {"choice": []}}}}, "choice is empty"),
        ({"search": {"trials": 0, "from": {"seed": {"choice": [1]}}}}, "search.trials: found 0"),
        ({"grid": GRID, "metric": "perplexty"}, "did you mean 'perplexity'"),
        ({"grid": GRID, "jobs": 0}, "jobs: found 0"),
        ({"grid": GRID, "timeout_minutes": -1}, "timeout_minutes: found -1"),
        ({"grid": GRID, "overrides": {"loss.temperature": 2}}, "loss.temperature: both in `overrides`"),
    ],
)
def test_a_bad_sweep_is_refused_with_what_is_wrong(config_file, sections, expected):
    with pytest.raises(ConfigError) as caught:
        configs.parse({"base": str(config_file), **sections}, kind=SweepConfig)
    assert expected in str(caught.value)


def test_all_faults_of_a_sweep_come_at_once(config_file):
    with pytest.raises(
        ConfigError, match=r"(?s)3 faults.*base: missing.*grid: seed: the list is empty.*metric: found 'x'"
    ):
        configs.parse({"grid": {"seed": []}, "metric": "x"}, kind=SweepConfig)


def test_all_trials_that_make_no_sound_config_are_named_at_once(trials_of):
    with pytest.raises(
        ConfigError, match=r"(?s)2 of the trials cannot be run.*ature=-1: .*must stay .*ature=0"
    ):
        trials_of(grid={"loss.temperature": [-1, 0, 2]})
    with pytest.raises(ConfigError, match=r"loss.temprature=1.*\n.*did you mean 'temperature'"):
        trials_of(list=[{"loss.temprature": 1}])
    with pytest.raises(ConfigError, match=r"student.layers=-3: "):
        trials_of(search={"trials": 2, "from": {"student.layers": {"integer": [-3, 4]}}})


def test_the_shipped_sweep_is_complete_and_short():
    found = configs.load("configs/sweep_temperature_alpha.yaml", kind=SweepConfig)
    trials, repeated = expanded(found, Base(found, "s", Path.cwd()))
    assert (len(trials), repeated) == (9, [])
    assert {trial.config.loss.weights["kd"] + trial.config.loss.weights["ce"] for trial in trials} == {1.0}
    assert len(Path("configs/sweep_temperature_alpha.yaml").read_text().splitlines()) <= 60


# trials


def test_a_grid_is_every_combination_and_a_pair_of_weights_moves_both(trials_of):
    _, trials, _ = trials_of(grid=GRID)
    assert [(t.config.loss.temperature, t.config.loss.weights) for t in trials] == [
        (1.0, {"kd": 0.5, "ce": 0.5}),
        (1.0, {"kd": 0.9, "ce": 0.1}),
        (2.0, {"kd": 0.5, "ce": 0.5}),
        (2.0, {"kd": 0.9, "ce": 0.1}),
    ]


def test_a_list_shows_what_its_trials_leave_as_it_is(trials_of):
    _, trials, _ = trials_of(list=[{"seed": 3}, {"loss.temperature": 4, "training.weight_decay": 0.1}])
    assert [dict(trial.parameters) for trial in trials] == [
        {"seed": 3, "loss.temperature": 2.0, "training.weight_decay": None},
        {"seed": 0, "loss.temperature": 4, "training.weight_decay": 0.1},
    ]


def test_random_trials_are_the_same_each_time_and_lie_in_their_ranges(trials_of):
    space = {
        "loss.temperature": {"uniform": [1, 6]},
        "training.learning_rate": {"log_uniform": ["1e-5", "1e-3"]},
        "student.layers": {"integer": [1, 3]},
        "loss.divergence": {"choice": ["forward_kl", "reverse_kl"]},
    }
    _, first, _ = trials_of(random={"trials": 20, "seed": 1, "from": space})
    _, again, _ = trials_of(random={"trials": 20, "seed": 1, "from": space})
    _, more, _ = trials_of(random={"trials": 25, "seed": 1, "from": space})
    _, other, _ = trials_of(random={"trials": 20, "seed": 2, "from": space})
    assert first == again == more[:20]
    assert {trial.run for trial in first}.isdisjoint(trial.run for trial in other)
    for trial in first:
        assert 1 <= trial.parameters["loss.temperature"] <= 6
        assert 1e-5 <= trial.config.training["learning_rate"] <= 1e-3
        assert trial.config.student.layers in (1, 2, 3)
    small = sum(trial.parameters["training.learning_rate"] < 1e-4 for trial in first)
    assert 5 <= small <= 15  # half of a log-uniform range, a tenth of a uniform one


def test_a_runs_name_follows_from_its_settings_alone(trials_of):
    _, by_grid, _ = trials_of(grid={"loss.temperature": ["1e0", 2]})
    _, by_list, _ = trials_of(list=[{"loss.temperature": 2.0}])
    assert by_grid[1].run == by_list[0].run
    assert by_grid[0].run != by_grid[1].run
    assert by_grid[0].parameters == {"loss.temperature": 1.0}


def test_the_same_config_is_run_once_and_said(trials_of):
    _, trials, repeated = trials_of(
        list=[{"loss.temperature": 2}, {"loss.weights": {"kd": 0.7, "ce": 0.3}}, {"seed": 1}]
    )
    assert len(trials) == 2
    assert len(repeated) == 1
    assert "the same config as" in repeated[0]


def test_overrides_of_the_sweep_and_smoke_reach_every_trial(settings, tmp_path):
    found = settings(grid={"seed": [0, 1]}, overrides={"baseline": None}, smoke=True)
    base = Base(found, "s", tmp_path, overrides={"loss.temperature": 5})
    trials, _ = expanded(found, base)
    for trial in trials:
        assert (trial.config.baseline, trial.config.loss.temperature, trial.config.training["max_steps"]) == (
            None,
            5.0,
            4,
        )
    assert base.command({"seed": 1}).endswith("--smoke -o baseline=null -o loss.temperature=5 -o seed=1")


# reading


def finished(root: Path, trial, value: float, *, spread: float = 0.05, minutes: float = 2.0, **facts) -> Run:
    """A trial that is done, with this KL to the teacher."""
    run = runs.create(root, trial.run, trial.config)
    metric = {"value": value, "low": value - spread, "high": value + spread}
    distilled = {
        "kl_to_teacher": metric,
        "agreement": metric,
        "parameters": 10**6,
        "forward_tokens_per_s": {"value": 100.0, "low": 90.0, "high": 105.0},
        **facts,
    }
    difference = {"model": "distilled", "against": "teacher", "metric": "kl_to_teacher", **metric}
    found = {"models": {"teacher": distilled, "distilled": distilled}, "differences": [difference]}
    runs.write_json(run.path / "comparison_results.json", found)
    run.add_to_manifest(minutes=minutes)
    stands(run, "done")
    return run


@pytest.fixture
def swept(trials_of, settings, tmp_path):
    """A sweep on disk whose trials have these values; None: failed.  swept([…], grid=…)"""

    def make(values, *, name="s", costs=None, **sections) -> Sweep:
        found = settings(**sections)
        base = Base(found, name, tmp_path)
        trials, _ = expanded(found, base)
        sweep = Sweep(tmp_path / "runs" / name)
        sweep_run.begin(
            sweep,
            found,
            trials,
            file="sweep.yaml",
            base="tiny.yaml",
            command="kd sweep sweep.yaml",
            repeated=[],
            forecast="",
        )
        for number, (trial, value) in enumerate(zip(trials, values, strict=False)):
            if value is None:
                failed = runs.create(sweep.path.parent, trial.run, trial.config)
                stands(failed, "failed", f"02_train: {EVIL}")
            else:
                finished(sweep.path.parent, trial, value, **(costs[number] if costs else {}))
        stands(sweep, "done")
        return sweep

    return make


def tables(sweep: Sweep) -> tuple[pd.DataFrame, pd.DataFrame]:
    trials = results.trial_table(sweep)
    return trials, results.setting_table(sweep, trials)


def test_every_trial_is_a_row_with_its_metric_and_state(swept):
    trials, settings = tables(swept([1.0, 0.8, None], grid=GRID))
    assert trials["state"].tolist() == ["done", "done", "failed", "waiting"]
    assert trials["value"].tolist()[:2] == [1.0, 0.8]
    assert trials["loss.weights.kd:ce"].tolist() == [0.5, 0.9, 0.5, 0.9]
    assert settings["value"].tolist() == [0.8, 1.0]


def test_runs_whose_time_nobody_took_are_shown_without(swept):
    """As those that went on after their worker was killed."""
    sweep = swept([1.0, 0.8], grid={"seed": [0, 1]})
    for trial in sweep.facts["trials"]:
        sweep.run(trial["run"]).add_to_manifest(minutes=None)
    assert results.shown_trials(sweep, tables(sweep)[0])["minutes"].tolist() == ["", ""]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            [1.0, 0.8, 0.95, 0.97],
            (
                "[0.750, 0.850]; the next, loss.temperature=2, loss.weights.kd:ce=0.5, is worse beyond the "
                "intervals"
            ),
        ),
        (
            [1.0, 0.8, 0.84, 0.97],
            "but the next does as well within the intervals, so there is no clear winner",
        ),
        ([0.86, 0.8, 0.84, 0.97], "but 2 others do as well"),
        ([None, 0.8], "the only setting that is done"),
        ([], "No run is done yet"),
    ],
)
def test_the_verdict_says_whether_the_best_is_better_beyond_the_intervals(swept, values, expected):
    sweep = swept(values, grid=GRID)
    assert expected in results.verdict(sweep, tables(sweep)[1])


def test_where_more_is_better_the_highest_is_the_best(swept):
    sweep = swept([0.2, 0.6, 0.4, 0.3], grid=GRID, metric="agreement")
    _, settings = tables(sweep)
    assert settings["value"].tolist() == [0.6, 0.4, 0.3, 0.2]
    assert "teacher is highest with loss.temperature=1, loss.weights.kd:ce=0.9" in results.verdict(
        sweep, settings
    )


def test_seeds_are_averaged_with_students_interval(swept):
    sweep = swept([1.0, 1.2, 1.4, 2.0, 2.0, 2.0], grid={"loss.temperature": [1, 2], "seed": [0, 1, 2]})
    _, settings = tables(sweep)
    best = settings.iloc[0]
    assert (best["n"], best["value"]) == (3, pytest.approx(1.2))
    assert best["high"] - best["value"] == pytest.approx(4.30265 * 0.2 / 3**0.5)
    # no two differ: the interval over held-out rows
    assert settings.iloc[1][["low", "high"]].tolist() == [1.95, 2.05]


def test_students_t_is_that_of_the_tables():
    for freedom, known in {1: 12.706, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 1000: 1.962}.items():
        values = [0.0] * freedom + [1.0]
        seeds = [{"value": value, "low": value, "high": value} for value in values]
        found = averaged(seeds)
        deviation = statistics.stdev(values) / (freedom + 1) ** 0.5
        assert (found["high"] - found["value"]) / deviation == pytest.approx(known, rel=2e-3)


def test_the_front_holds_what_nothing_beats_in_both(swept):
    costs = [
        {"parameters": p * 10**6, "forward_tokens_per_s": {"value": s, "low": s - 9, "high": s + 5}}
        for p, s in ((1, 400.0), (2, 300.0), (3, 200.0), (4, 100.0))
    ]
    trials, settings = tables(swept([1.0, 0.8, 0.9, 0.7], costs=costs, grid=GRID))
    assert results.pareto(settings, "parameters", MEASURES["kl_to_teacher"])["value"].tolist() == [
        1.0,
        0.8,
        0.7,
    ]
    assert results.pareto(settings, "tokens_per_s", MEASURES["kl_to_teacher"])["value"].tolist() == [
        1.0,
        0.8,
        0.7,
    ]
    assert results.compared_costs(trials) == ["parameters", "tokens_per_s"]


def test_training_time_leaves_out_the_break_before_a_resume(swept):
    sweep = swept([1.0], grid={"seed": [0]})
    run = sweep.run(sweep.facts["trials"][0]["run"])
    for step, at in enumerate(["10:00:00", "10:00:10", "10:00:20", "12:00:00", "12:00:11"]):
        with run.metrics.open("a") as file:
            file.write(
                json.dumps(
                    {
                        "train/step": step,
                        "train/epoch": 0.1,
                        "train/loss": 1.0,
                        "time": f"2026-01-01T{at}+00:00",
                    }
                )
                + "\n"
            )
    assert results.trial_table(sweep)["training_s"].tolist() == [41.0]  # the usual 10 s stand for the break


def test_the_parameter_that_explains_most_comes_first(swept):
    _, settings = tables(swept([1.0, 1.1, 2.0, 2.1], grid=GRID))
    shares = variance_shares(settings, list(reversed(GRID)))
    assert list(shares) == list(GRID)
    assert shares["loss.temperature"] == pytest.approx(1 - 0.01 / 1.01 * 3 / 2)
    assert shares["loss.weights.kd:ce"] == 0.0


def test_a_parameter_drawn_from_a_range_does_not_explain_everything_because_no_value_comes_twice(swept):
    space = {
        "loss.temperature": {"uniform": [1, 6]},
        "loss.divergence": {"choice": ["forward_kl", "reverse_kl"]},
    }
    sweep = swept([1.0, 2.0] * 8, random={"trials": 16, "from": space})
    trials, settings = tables(sweep)
    settings["value"] = [1.0 if value == "forward_kl" else 2.0 for value in settings["loss.divergence"]]
    shares = variance_shares(settings, list(space))
    assert list(shares)[0] == "loss.divergence"
    assert shares["loss.divergence"] == pytest.approx(1.0)
    assert shares["loss.temperature"] < 0.7


# what the teacher adds


def held_against_the_baseline(sweep: Sweep, differences, spread: float = 0.02) -> None:
    """Give every trial a comparison of classifiers whose distilled student is so much better than its
    baseline.
    """
    for number, (trial, difference) in enumerate(zip(sweep.facts["trials"], differences, strict=True)):
        values = {
            "teacher": 0.8,
            "baseline": 0.5 + number / 100,
            "distilled": 0.5 + number / 100 + difference,
        }
        models = {
            name: {
                metric: {"value": value, "low": value - 0.1, "high": value + 0.1}
                for metric in ("accuracy", "kl_to_teacher")
            }
            for name, value in values.items()
        }
        models["distilled"]["parameters"] = 10**6
        pair = {"value": difference, "low": difference - spread, "high": difference + spread}
        runs.write_json(
            sweep.run(trial["run"]).path / "comparison_results.json",
            {
                "task": "sequence-classification",
                "models": models,
                "differences": [
                    {"model": "distilled", "against": "baseline", "metric": m, **pair}
                    for m in ("accuracy", "kl_to_teacher")
                ],
            },
        )


@pytest.mark.parametrize(
    ("differences", "metric", "found"),
    [
        (
            [0.03, 0.04, 0.05],
            "accuracy",
            "3 seeds: accuracy +0.0400 [+0.0152, +0.0648], paired by seed: the teacher helps; 3 of the 3",
        ),
        ([0.03, 0.04, 0.05], "kl_to_teacher", "the teacher harms"),
        ([-0.03, -0.04, -0.05], "kl_to_teacher", "the teacher helps"),
        ([-0.01, 0.04, 0.05], "accuracy", "no difference beyond chance; 2 of the 3 by themselves"),
    ],
)
def test_seeds_that_differ_in_nothing_else_are_one_setting_held_against_the_baseline(
    swept, tmp_path, differences, metric, found
):
    sweep = swept([1.0, 1.0, 1.0], grid={"seed": [0, 1, 2]}, metric=metric)
    held_against_the_baseline(sweep, differences)
    _, settings = tables(sweep)
    tables_of_gains = results.gain_tables(sweep, settings)
    assert list(tables_of_gains) == list(dict.fromkeys([metric, "accuracy"]))
    gain = tables_of_gains[metric].iloc[0]
    assert (len(settings), gain["n"], gain["values"]) == (1, 3, pytest.approx(differences))
    spread = 4.3027 * pd.Series(differences).std() / 3**0.5
    assert gain["high"] - gain["value"] == pytest.approx(spread, rel=1e-4)
    text = report.render(sweep, tmp_path / "reports").read_text()
    assert found in text
    words = MEASURES[metric].words
    assert f"{words[0].upper()}{words[1:]} is " in text
    assert "over 3 seeds." in text
    assert {path.stem for path in (tmp_path / "reports" / "s" / "figures").iterdir()} == {"gains"}


def test_the_models_of_a_setting_are_averaged_and_a_teacher_shared_by_all_keeps_its_interval(swept):
    sweep = swept([1.0, 1.0, 1.0], grid={"seed": [0, 1, 2]}, metric="accuracy")
    held_against_the_baseline(sweep, [0.03, 0.04, 0.05])
    found = results.results_of(sweep, [trial["run"] for trial in sweep.facts["trials"]])
    table = results.model_table(found)
    assert table.index.tolist() == ["teacher", "distilled student", "CE-only baseline", results.DIFFERENCE]
    assert table.loc["teacher", "accuracy"] == "0.800 [0.700, 0.900]"
    assert table.loc["CE-only baseline", "accuracy"] == "0.510 [0.485, 0.535]"
    assert table.loc[results.DIFFERENCE, "KL to teacher"] == "+0.0400 [+0.0152, +0.0648]"


def test_each_setting_has_a_gain_of_its_own_and_one_seed_keeps_its_own_interval(swept):
    sweep = swept([1.0] * 4, grid=GRID, metric="accuracy")
    held_against_the_baseline(sweep, [0.01, 0.03, 0.0, -0.05])
    _, settings = tables(sweep)
    found = results.gain_tables(sweep, settings)["accuracy"]
    assert found["runs"].tolist() == settings["runs"].tolist()
    by_run = {row["runs"][0]: (row["value"], row["clear"]) for _, row in found.iterrows()}
    assert [by_run[trial["run"]] for trial in sweep.facts["trials"]] == [
        (0.01, 0),
        (0.03, 1),
        (0.0, 0),
        (-0.05, 1),
    ]
    assert " ".join(title(figures_of(sweep)["gains"]).split()) == (
        "In accuracy the teacher helps in 1 of 4 settings, harms in 1, open in 2"
    )
    assert (
        "in one training: accuracy +0.0300 [+0.0100, +0.0500], over the same held-out rows: the teacher helps"
        in (results.gain_words(found[found["value"] == 0.03].iloc[0], "accuracy"))
    )


def test_harm_is_drawn_and_told_as_plainly_as_gain(swept, tmp_path):
    sweep = swept([1.0, 1.0], grid={"loss.temperature": [1, 2]}, metric="accuracy")
    held_against_the_baseline(sweep, [-0.2, -0.25], spread=0.05)
    _, settings = tables(sweep)
    gains = results.gain_tables(sweep, settings)
    figure = figures_of(sweep)["gains"]
    assert title(figure) == "In accuracy the teacher helps in 0 of 2 settings, harms in 2, open in 0"
    drawn = [line for line in figure.axes[0].lines if line.get_marker() == "X"]
    assert [line.get_color() for line in drawn] == [figures.FOUND["harms"][0]] * 2
    assert "helps 0, harms 2, open 0" in figure.axes[0].get_title(loc="left")
    counted = results.counts_table(gains)
    assert counted.loc["accuracy"].to_dict() == {"helps": 0, "harms": 2, "open": 0}
    page = report.render(sweep, tmp_path / "reports")
    table = pd.read_csv(page.parent / "tables" / "gains.csv")
    assert table[table["metric"] == "accuracy"]["found"].tolist() == ["harms", "harms"]
    assert "about one in twenty does so by chance" in page.read_text()


@pytest.mark.parametrize(
    ("differences", "metric", "expected"),
    [
        ([-0.2], "accuracy", "The teacher harms in accuracy"),
        ([0.036], "ece", "The teacher harms in calibration error"),
        ([-0.2], "ece", "The teacher helps in calibration error"),
        ([0.01], "accuracy", "What the teacher does to accuracy is open"),
    ],
)
def test_a_single_setting_says_which_way_the_teacher_moved_it(swept, differences, metric, expected):
    sweep = swept([1.0], grid={"seed": [0]}, metric="kl_to_teacher")
    held_against_the_baseline(sweep, differences)
    found = results.gain_tables(sweep, tables(sweep)[1])["kl_to_teacher"]
    found["found"] = results.FOUND[results.is_better(found.iloc[0], metric)]
    assert title(figures.gains_by_setting({metric: found}, [])) == expected


@pytest.mark.parametrize("scale", [2e-4, 3e-7, 0.13])
def test_no_two_labels_of_ticks_lie_on_each_other_however_small_the_differences(swept, scale):
    sweep = swept([1.0] * 4, grid=GRID, metric="accuracy")
    held_against_the_baseline(sweep, [scale * x for x in (-1.3, 0.7, 2.1, 0.0)], spread=scale)
    _, settings = tables(sweep)
    gains = results.gain_tables(sweep, settings)["accuracy"]
    many = dict.fromkeys(list(MEASURES)[:6], gains)
    figure = figures.gains_by_setting(many, list(GRID))
    figure.draw_without_rendering()
    for way in ("xaxis", "yaxis"):
        boxes = [box for axes in figure.axes for box in drawn_labels(getattr(axes, way))]
        assert len(boxes) >= 4
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])], way


def drawn_labels(axis: Axis) -> list[Bbox]:
    """Where the labels stand of those ticks that lie on the axis, and are drawn."""
    low, high = sorted(axis.get_view_interval())
    labels = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label.get_window_extent() for label in labels if label.get_visible()]


# what the figures do not show


@pytest.mark.parametrize(
    ("metric", "values", "within"),
    [("agreement", [0.6, 0.664], (0.0, 1.0)), ("kl_to_teacher", [0.01, 0.2], (0.0, 1.4))],
)
def test_an_interval_over_two_seeds_stays_in_its_measures_range_and_warns(
    swept, tmp_path, metric, values, within
):
    sweep = swept(values, grid={"seed": [0, 1]}, metric=metric)
    trials, settings = tables(sweep)
    best = settings.iloc[0]
    assert within[0] <= best["low"] < best["value"] < best["high"] <= within[1]
    assert within[0] in (best["low"], None) or best["high"] == within[1]
    assert any("two seeds only" in line for line in findings(sweep, trials, settings))
    assert "Caution: there are two seeds only" in report.render(sweep, tmp_path / "reports").read_text()


def test_a_difference_over_two_seeds_stays_between_its_bounds():
    found = [
        {"metric": "agreement", "model": "distilled", "against": "baseline", "value": value}
        for value in (0.5, -0.4)
    ]
    gain = results.gain_of([{"differences": [{**each, "low": -1, "high": 1}]} for each in found], "agreement")
    assert (gain["low"], gain["high"], gain["found"]) == (-1, 1, "open")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        ([1, 1], []),
        ([3, 3], []),
        ([2, 3], ["1 of 2 settings has two seeds only"]),
        ([2, 2], ["2 of 2 settings have two seeds only"]),
        ([1, 3], ["1 of 2 settings has one seed"]),
        ([1, 2], ["1 of 2 settings has two seeds only", "1 of 2 settings has one seed"]),
    ],
)
def test_few_seeds_are_said(count, expected):
    said = list(few_seeds(pd.DataFrame({"n": count})))
    assert len(said) == len(expected)
    assert all(words in line for words, line in zip(expected, said, strict=True))


@pytest.mark.parametrize(
    ("grid", "values", "expected"),
    [
        (
            {"loss.temperature": [1, 2, 4]},
            [3.0, 2.0, 1.0],
            "loss.temperature 4 is the highest of 3 tried, so",
        ),
        ({"loss.temperature": [1, 2, 4]}, [3.0, 2.0, 1.0], "; try 8 as well"),
        ({"loss.temperature": [1, 2, 3]}, [3.0, 2.0, 1.0], "; try 4 as well"),
        ({"loss.temperature": [1, 2, 4]}, [1.0, 2.0, 3.0], "temperature 1 is the lowest of 3 tried"),
        ({"loss.temperature": [1, 2, 4]}, [3.0, 1.0, 2.0], None),
        ({"training.learning_rate": ["1e-5", "1e-4"]}, [3.0, 1.0], "try 0.001 as well"),
        ({"loss.weights.kd:ce": [0.5, 0.7, 0.9]}, [3.0, 2.0, 1.0], "try 1 as well"),
        ({"loss.weights.kd:ce": [0.5, 0.75, 1.0]}, [3.0, 2.0, 1.0], None),  # no weight lies beyond
        ({"student.layers": [1, 2]}, [1.0, 2.0], None),  # nor fewer layers
        ({"loss.divergence": ["forward_kl", "reverse_kl"]}, [1.0, 2.0], None),
        ({"loss.temperature": [2]}, [1.0], None),
        ({"loss.temperature": [1, 2], "seed": [0, 1]}, [1.0, 1.1, 2.0, 2.1], "temperature 1 is the lowest"),
        ({"loss.temperature": [1, 2, 4]}, [3.0, 1.0, None], None),  # what failed was tried
    ],
)
def test_a_best_at_the_edge_of_what_was_tried_says_what_to_try(swept, grid, values, expected):
    sweep = swept(values, grid=grid)
    said = " ".join(at_the_edge(sweep, *tables(sweep)))
    assert expected in said if expected else said == ""
    assert "seed " not in said


@pytest.mark.parametrize(
    ("value", "expected"), [(5.9, "near the highest of its range"), (3.0, ""), (1.05, "lowest")]
)
def test_a_best_near_the_end_of_a_range_says_what_to_try(swept, value, expected):
    space = {"loss.temperature": {"uniform": [1, 6]}}
    sweep = swept([1.0, 2.0], random={"trials": 2, "from": space})
    trials, settings = tables(sweep)
    settings.loc[0, "loss.temperature"] = value
    said = " ".join(at_the_edge(sweep, trials, settings))
    assert expected in said
    assert bool(said) == bool(expected)


def test_a_speed_has_its_spread_and_a_time_of_one_training_is_not_compared(swept):
    costs = [{"parameters": p * 10**6} for p in (1, 2)]
    trials, settings = tables(swept([1.0, 0.8], costs=costs, grid={"loss.temperature": [1, 2]}))
    assert (
        settings[["tokens_per_s", "tokens_per_s_low", "tokens_per_s_high"]].to_numpy().tolist()
        == [[100, 90, 105]] * 2
    )
    assert settings["training_s"].isna().all()
    old = swept([1.0], name="old", costs=[{"forward_tokens_per_s": 1455.0}], grid={"seed": [0]})
    assert tables(old)[1]["tokens_per_s"].isna().all()


def test_without_baselines_there_is_no_gain_to_show(swept):
    sweep = swept([1.0, 0.8], grid={"seed": [0, 1]})
    assert results.gain_tables(sweep, tables(sweep)[1]) == {}


# figures


def figures_of(sweep: Sweep) -> dict[str, matplotlib.figure.Figure]:
    trials, settings = tables(sweep)
    return figures.run_figures(sweep, trials, settings, results.gain_tables(sweep, settings))


def test_the_heat_map_has_the_means_and_leaves_failed_cells_out(swept):
    sweep = swept([1.0, 3.0, 2.0, 4.0, 5.0, 6.0, None, None], grid={**GRID, "seed": [0, 1]})
    trials, _ = tables(sweep)
    mean, count = figures.cells(trials, "loss.temperature", "loss.weights.kd:ce")
    assert mean[:, 0].tolist() == [2.0, 3.0]
    assert mean[0, 1] == 5.5
    assert pd.isna(mean[1, 1])
    assert count.tolist() == [[2, 2], [2, 0]]
    figure = figures.heat_map(trials, "loss.temperature", "loss.weights.kd:ce", MEASURES["kl_to_teacher"])
    assert "best at temperature 1, kd:ce 0.5:\n2 (a cell is the mean of its runs)" in title(figure)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "5.5\nn = 2" in texts
    assert "no result" in texts


def title(figure: matplotlib.figure.Figure) -> str:
    return figure.get_suptitle()


def test_figures_follow_from_what_differs(swept):
    def made(values, **sections):
        sweep = swept(values, name=f"s{len(list(swept_names))}", **sections)
        swept_names.append(sweep.name)
        return set(figures_of(sweep))

    swept_names: list[str] = []
    assert made([], grid=GRID) == set()
    assert made([1.0, 2.0], grid={"loss.temperature": [1, 4]}) == {"ranking", "course"}
    assert made([1.0, 0.8, 0.9, 0.7], grid=GRID) == {"ranking", "map", "parameters"}
    assert made([1.0, 2.0], grid={"seed": [1, 4]}) == set()
    space = {"loss.temperature": {"uniform": [1, 6]}, "training.learning_rate": {"log_uniform": [1e-5, 1e-3]}}
    assert made([float(i) for i in range(14)], random={"trials": 14, "from": space}) == {
        "ranking",
        "parameters",
    }


def test_the_titles_say_what_the_figures_hold(swept):
    sweep = swept([1.0, 0.8, 0.84, 0.97], grid=GRID)
    made = figures_of(sweep)
    assert (
        title(made["ranking"])
        == "KL to the teacher is lowest with temperature 1, kd:ce 0.9,\nwith 1 of 3 others within the "
        "intervals"
    )
    assert "alone explains" in title(made["parameters"])


def test_values_stand_on_an_axis_by_size_or_side_by_side(swept):
    space = {"training.learning_rate": [1e-5, 1e-4, 1e-3], "loss.divergence": ["reverse_kl", "forward_kl"]}
    rates, divergences = figures_of(swept([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], grid=space))["parameters"].axes
    assert rates.get_xscale() == "log"
    assert set(rates.lines[0].get_xdata()) == {1e-5, 1e-4, 1e-3}
    assert [label.get_text() for label in divergences.get_xticklabels()] == ["reverse_kl", "forward_kl"]
    assert set(divergences.lines[0].get_xdata()) == {0, 1}


def test_the_report_shows_every_trial_escaped_and_asks_for_nothing(swept, tmp_path):
    sweep = swept([1.0, 0.8, None, 0.97], grid=GRID)
    reports.render(Run(sweep.path.parent / results.trial_table(sweep)["run"][2]), tmp_path / "reports")
    text = report.render(sweep, tmp_path / "reports").read_text()
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert "02_train: &lt;script&gt;" in text
    assert text.count('class="state done"') == 3 + 1
    assert text.count('class="state failed"') == 1 + 1
    assert "0.800 [0.750, 0.850]" in text
    links = [line for line in text.split('href="') if "/report.html" in line[:120]]
    assert sum("_" in link[:20] for link in links) == 1  # of the trials one has a report
    folder = tmp_path / "reports" / "s"
    assert {path.stem for path in (folder / "figures").iterdir()} == {
        "ranking",
        "map",
        "parameters",
    }
    trials = pd.read_csv(folder / "tables" / "trials.csv")
    assert trials["value"].tolist()[:2] == [1.0, 0.8]
    assert pd.read_csv(folder / "tables" / "settings.csv")["value"].tolist() == [0.8, 0.97, 1.0]


def test_kd_report_renders_a_sweep_as_it_renders_a_run(swept, tmp_path, monkeypatch, capsys):
    swept([1.0, 0.8], grid={"seed": [0, 1]})
    folders = ["--runs", str(tmp_path / "runs"), "--reports", str(tmp_path / "reports")]
    monkeypatch.setattr(sys, "argv", ["kd", "report", "s", *folders])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert capsys.readouterr().out.strip().endswith("s/report.html")
    assert "KL to the teacher is 0.900 [" in (tmp_path / "reports" / "s" / "report.html").read_text()


def test_text_that_looks_like_mathematics_is_no_mathematics_in_a_figure(swept, tmp_path):
    sweep = swept([1.0, 2.0], list=[{"data.text": "$x$ and $\\bad{"}, {"data.text": EVIL}])
    report.render(sweep, tmp_path / "reports")
    assert (tmp_path / "reports" / "s" / "figures" / "course.png").exists()


def test_a_sweep_of_classifiers_is_read_by_its_own_measures_and_speed(swept, tmp_path):
    sweep = swept([1.0, 0.8], grid={"loss.temperature": [1, 2]}, metric="accuracy")
    for number, trial in enumerate(sweep.facts["trials"]):
        made = made_answers.results(count=100, classes=("a", "b", "c"))
        accuracy = {"value": (0.7, 0.9)[number], "low": 0.6, "high": 0.95}
        made["models"]["distilled"] |= {"parameters": (number + 1) * 10**6, "accuracy": accuracy}
        runs.write_json(sweep.run(trial["run"]).path / "comparison_results.json", made)
    trials, settings = tables(sweep)
    assert trials["rows_per_s"].tolist() == [1234.0, 1234.0]
    assert trials["tokens_per_s"].isna().all()
    assert results.compared_costs(trials) == ["parameters", "rows_per_s"]
    assert settings["value"].tolist() == [0.9, 0.7]  # more is better
    shown = report.render(sweep, tmp_path / "reports").read_text()
    assert "Accuracy is highest with loss.temperature=2" in shown
    assert not (tmp_path / "reports" / sweep.name / "tables" / "pareto_tokens_per_s.csv").exists()


def test_a_metric_that_the_task_does_not_measure_is_refused_before_a_run(trials_of):
    with pytest.raises(
        ConfigError,
        match=r"metric: found macro_f1, which a comparison of causal-lm has not; it is one of .*perplexity",
    ):
        trials_of(grid={"seed": [0]}, metric="macro_f1")
