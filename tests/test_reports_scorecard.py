import json

import numpy as np
import pytest
from made_runs import interval
from scipy.stats import mannwhitneyu

from kdlib.config.run import parse
from kdlib.plots.training import run_figures
from kdlib.reports.scorecard import counted, scorecard, scorecard_table
from kdlib.reports.summary import summary
from kdlib.runs import folder as runs, log as metrics
from kdlib.runs.files import StudentFolder
from kdlib.runs.verdict import _p_of_ranks, keep_units, mean_at

FINE = {"kd": lambda step: 4 * 0.97**step, "ce": lambda step: 3 * 0.99**step}
FALLS = {0: 4.0, 10: 2.5, 20: 2.0}
UNITS = 24


@pytest.fixture
def folder(raw_config, tmp_path):
    """Writes what a training of 20 steps, two epochs, leaves, healthy unless told otherwise."""

    def write(
        *,
        values=FINE,
        rate=lambda step: 1e-3,
        used=None,
        held_out=1.05,
        kl=FALLS,
        cross_entropy=None,
        noise=0.01,
        units=True,
        memory=2.0,
        logged=range(1, 21),
        epochs=2.0,
        config=None,
        doctor=(),
        against=-0.3,
        trained=True,
        **manifest,
    ):
        raw = {**raw_config, "baseline": {"weights": {"ce": 1.0}}, **(config or {})}
        raw["training"] = {**raw["training"], "metric_for_best_model": "eval_kl_to_teacher"}
        run = runs.create(tmp_path, "card", parse(raw), **manifest)
        run.add_to_manifest(machine={"memory_gib": 16.0}, doctor=list(doctor))
        runs.write_json(run.plan, [{"step": step, "learning_rate": rate(step)} for step in range(1, 21)])
        generator = np.random.default_rng(0)
        sizes, apart = generator.integers(20, 60, UNITS), generator.normal(0, 1, UNITS)
        for step in sorted({*logged, *kl}):
            if step in logged:
                terms = {f"train/{name}_loss": value(step) for name, value in values.items()}
                weights = {f"train/{name}_weight": 0.5 for name in values}
                rest = {
                    "train/learning_rate": (used or rate)(step),
                    "train/memory_gib": memory,
                    "train/loss": sum(terms.values()) / 2,
                }
                at = {"train/step": step, "train/epoch": epochs * step / 20}
                metrics.append_metrics(run, {**at, **terms, **weights, **rest})
            if step in kl and (step in logged or step == 0):
                terms = {f"eval/{name}_loss": held_out * value(step) for name, value in values.items()}
                weights = {f"eval/{name}_weight": 0.5 for name in values}
                ce = (cross_entropy or kl)[step]
                moved = generator.normal(0, noise, UNITS)
                moved -= (moved * sizes).sum() / sizes.sum()
                level = apart - (apart * sizes).sum() / sizes.sum()
                sums = {"kl_to_teacher": kl[step], "ce": ce}
                if units:
                    sums = {name: (value + level + moved) * sizes for name, value in sums.items()}
                    keep_units(run, step, {**sums, "tokens": sizes.astype(float)})
                figures = {
                    "eval/loss": 1.0,
                    "eval/perplexity": np.exp(min(ce, 50.0)),
                    "eval/kl_to_teacher": kl[step],
                }
                at = {"train/step": step, "train/epoch": epochs * step / 20}
                metrics.append_metrics(run, {**at, **figures, **terms, **weights})
        if against is not None:
            runs.write_json(run.path / "comparison_results.json", compared(against))
        if trained:
            runs.write_json(run.history, [])
        return run

    return write


def compared(against: float) -> dict:
    models = {name: {"kl_to_teacher": interval(2.0)} for name in ("teacher", "baseline", "distilled")}
    gain = {"value": against, "low": against - 0.1, "high": against + 0.1}
    differences = [{"model": "distilled", "against": "baseline", "metric": "kl_to_teacher", **gain}]
    return {"models": models, "differences": differences, "rows": 8, "interval": "95 %"}


def results(run) -> list[str]:
    return [line.result for line in scorecard(run)]


def failed(run) -> list[str]:
    return [line.check for line in scorecard(run) if line.passed is False]


LEARNS, KEPT = "the model learns (KL to the teacher)", "what it learned is kept to the end"
BASELINE, DOCTOR, SEEN = (
    "better than the baseline",
    "the doctor had no objection",
    "it trained for an epoch, or for as long as it should",
)
HOT = {
    "severity": "critical",
    "where": "training.learning_rate",
    "what": "a peak of 1.0e+03",
    "why": "it diverges",
    "fix": "try 0.008",
}


def test_a_healthy_run_passes_every_line(folder):
    lines = scorecard(folder())
    assert [line.result for line in lines] == ["pass"] * 10
    assert counted(lines) == "10 of 10 pass"
    assert [line.do for line in lines] == [""] * 10


SICK = {
    "nothing moves": ({"kl": {0: 5.256, 10: 5.254, 20: 5.253}, "noise": 0.02}, LEARNS),
    "better by no more than chance": ({"kl": {0: 4.0, 10: 3.99, 20: 3.985}, "noise": 0.2}, LEARNS),
    "a KL that grows five-fold again": ({"kl": {0: 4.0, 10: 0.3, 20: 1.5}}, KEPT),
    "worse than the baseline": ({"against": 0.3}, BASELINE),
    "no clear difference to the baseline": ({"against": 0.05}, BASELINE),
    "the doctor's objection": ({"doctor": [HOT], "anyway": True}, DOCTOR),
    "half the text": (
        {"epochs": 0.5, "logged": range(1, 15), "config": {"early_stopping": {"patience": 1}}},
        SEEN,
    ),
    "held-out rows far worse": (
        {"held_out": 6.0},
        "training and held-out loss are near, under the same weights",
    ),
    "a rate that never gets up": ({"rate": lambda step: 1e-5 * step / 20}, "the learning rate is as planned"),
    "a rate off its plan": ({"used": lambda step: 0.9e-3}, "the learning rate is as planned"),
    "a nan": (
        {"values": FINE | {"ce": lambda step: float("nan") if step == 7 else 3.0}},
        "every figure is finite",
    ),
    "a term without a say": ({"values": FINE | {"hidden": lambda step: 0.002}}, "the terms are balanced"),
    "a full memory": ({"memory": 15.5}, "memory suffices"),
}


@pytest.mark.parametrize("name", SICK)
def test_each_sickness_fails_its_own_line_alone_and_says_what_to_do(folder, name):
    changes, check = SICK[name]
    lines = scorecard(folder(**changes))
    assert [line.check for line in lines if line.passed is False] == [check]
    assert all(line.do for line in lines if not line.passed)
    assert ", 1 fails" in counted(lines)


def test_one_logged_line_tells_too_that_a_training_was_stopped_early(folder):
    assert SEEN in failed(folder(epochs=0.5, logged=[6], config={"early_stopping": {"patience": 1}}))


def test_less_than_an_epoch_is_no_fault_where_the_config_says_so(folder):
    (line,) = (line for line in scorecard(folder(epochs=0.5)) if line.check == SEEN)
    assert line.passed
    assert line.found == "0.50 epochs: training.max_steps is 12, and an epoch takes 40 steps"


def test_a_ruined_and_a_good_run_get_opposite_verdicts_with_their_advice(folder, raw_config):
    """With T 4 -> 1 the raw kd term falls by itself; by a rate of 1e3 it is hidden what was ruined."""
    loss = {**raw_config["loss"], "temperature": {"linear": [4, 1]}}
    rising = {"kd": lambda step: 0.4 + 0.1 * step, "ce": lambda step: 3.0 + 0 * step}  # as T falls
    good = folder(values=rising, kl={0: 3.61, 10: 3.3, 20: 3.15}, config={"loss": loss})
    assert failed(good) == []
    shown = run_figures(good, None)["dashboard"].axes[0].get_title(loc="left")
    assert "but its temperature moves too" in shown
    (good.path).rename(good.path.with_name("good"))
    hot = {"kd": lambda step: 4.0 if step < 3 else 2e7, "ce": lambda step: 4.0 if step < 3 else 2e7}
    ruined = folder(values=hot, kl={0: 5.256, 10: 2e7, 20: 2e7}, against=2e7, doctor=[HOT], anyway=True)
    assert failed(ruined) == [DOCTOR, LEARNS, KEPT, BASELINE]
    by_check = {line.check: line for line in scorecard(ruined)}
    assert "5.256 at step 0 → 5.256 at best (step 0) → 2e+07 at the end" in by_check[LEARNS].found
    assert by_check[LEARNS].do == "training.learning_rate: try 0.008"


def test_one_estimate_stands_in_dashboard_and_scorecard_where_nothing_was_evaluated(folder):
    noisy = {"kd": lambda step: 0.9 + 0.1 * (-1) ** step, "ce": lambda step: 3.0}
    run = folder(values=noisy, kl={}, against=None)
    line = next(line for line in scorecard(run) if line.check.startswith("the model learns"))
    title = run_figures(run, None)["dashboard"].axes[0].get_title(loc="left")
    assert line.result == "fail"
    assert "no clear change" in title
    assert title in line.found


def test_without_units_the_comparison_with_the_untrained_student_decides(folder):
    run = folder(kl={10: 2.5, 20: 2.0}, units=False)
    assert "not measured" in results(run)
    found = compared(-0.3)
    found["models"]["untrained"] = {"kl_to_teacher": interval(4.0)}
    gain = {"value": -2.0, "low": -2.1, "high": -1.9}
    found["differences"].append(
        {"model": "distilled", "against": "untrained", "metric": "kl_to_teacher", **gain}
    )
    runs.write_json(run.path / "comparison_results.json", found)
    line = next(line for line in scorecard(run) if line.check == LEARNS)
    assert (line.result, line.found) == (
        "pass",
        "4.00 untrained → 2.00, as compared; change -2.00 [-2.10, -1.90]",
    )


def test_a_baseline_is_judged_by_the_text_and_not_by_a_teacher_that_it_never_saw(folder):
    run = folder(values={"ce": FINE["ce"]}, kl={0: 1.0, 10: 1.5, 20: 2.0}, cross_entropy=FALLS)
    lines = scorecard(run)
    assert next(line.result for line in lines if line.check == "the model learns (perplexity)") == "pass"


def test_what_cannot_be_measured_is_not_passed(folder):
    run = folder(logged=range(1, 3), kl={0: 4.0}, against=None, trained=False)
    run.plan.unlink()
    run.add_to_manifest(machine={})
    by_check = {line.check: line.result for line in scorecard(run)}
    passed = {check for check, result in by_check.items() if result == "pass"}
    assert passed == {DOCTOR, "every figure is finite", "the terms are balanced"}
    assert set(by_check.values()) == {"pass", "not measured"}


def test_a_class_that_is_always_said_is_no_skill(classes_run):
    run = classes_run(right=0.62)
    line = next(line for line in scorecard(run) if "always saying" in line.check)
    assert (line.check, line.result) == ("it beats always saying 'b'", "fail")
    assert "such a guess 0.600" in line.found


def test_above_the_commonest_class_beyond_chance_passes(classes_run):
    line = next(line for line in scorecard(classes_run(right=0.9)) if "always saying" in line.check)
    assert line.result == "pass"


@pytest.fixture
def classes_run(tmp_path):
    def write(right: float):
        raw = {
            "task": "sequence-classification",
            "teacher": {"model": "a"},
            "student": {"from": "b"},
            "data": {"source": "a-source", "max_length": 16},
            "loss": {"weights": {"kd": 1.0}},
            "training": {"max_steps": 20},
        }
        run = runs.create(tmp_path, "classes", parse(raw))
        run.add_to_manifest(data={"validation_classes": {"a": 40, "b": 60}})
        at = {"train/step": 20, "train/epoch": 2.0}
        train = {"loss": 1.0, "kd_loss": 1.0, "kd_weight": 1.0, "learning_rate": 5e-5}
        metrics.append_metrics(run, {**at, **{f"train/{name}": value for name, value in train.items()}})
        metrics.append_metrics(run, {**at, "eval/loss": 1.0, "eval/accuracy": right})
        hits = (np.arange(100) < 100 * right).astype(float)
        keep_units(run, 20, {"accuracy": hits, "tokens": np.ones(100)})
        return run

    return write


def test_the_headline_is_of_best_model_and_names_the_final_where_that_is_compared(folder):
    run = folder(kl={0: 4.0, 10: 0.3, 20: 1.5})
    brief = summary(run)
    assert brief.key("kl_to_teacher").startswith("0.300 [")
    assert brief.compared["kl_to_teacher"]["value"] == 2.0
    assert brief.about_best == (
        "best_model/ is the student of step 10 of 20, the best by KL to the teacher. "
        "Compared is final_model/, of step 20, in fairness to the baseline."
    )
    assert summary(folder_again(run, kl={0: 0.3, 10: 0.4, 20: 0.5})).about_best.startswith(
        "best_model/ is the untrained student: no evaluation after step 0 was better by KL to the teacher."
    )


def folder_again(run, kl):
    """The same run with other evaluations."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for line in lines:
        if "eval/kl_to_teacher" in line:
            line["eval/kl_to_teacher"] = kl[line["train/step"]]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_report_of_a_non_finite_value_fails_the_line(folder):
    run = folder()
    (run.path / "nan_report").mkdir()
    assert failed(run) == ["every figure is finite"]


def test_nothing_logged_gives_no_scorecard(raw_config, tmp_path):
    assert scorecard(runs.create(tmp_path, "empty", parse(raw_config))) == []


def test_the_table_has_a_row_a_line(folder):
    table = scorecard_table(scorecard(folder()))
    assert list(table.columns) == ["found", "needed", "result", "do"]
    assert np.all(table["result"] == "pass")


@pytest.mark.parametrize("right", [0, 1, 15, 16])
def test_a_share_of_few_rows_has_an_interval_of_shares(tmp_path, right):
    hits = np.arange(16) < right
    keep_units(StudentFolder(tmp_path), 1, {"accuracy": hits, "tokens": np.ones(16)})
    found = mean_at(StudentFolder(tmp_path), "accuracy", 1)
    assert 0 <= found["low"] <= found["value"] == right / 16 <= found["high"] <= 1


@pytest.mark.parametrize("decimals", [0, 1, 12])  # many ties, some, none
def test_the_rank_test_of_a_trend_is_scipys(decimals):
    draws = np.random.default_rng(decimals)
    for count in (4, 9, 200):
        first, last = draws.normal(0.3, 1, count).round(decimals), draws.normal(0, 1, count).round(decimals)
        expected = mannwhitneyu(first, last, method="asymptotic").pvalue
        assert _p_of_ranks(first, last) == pytest.approx(expected, rel=1e-9)
    assert _p_of_ranks(np.ones(5), np.ones(5)) == 1


@pytest.mark.parametrize("experts", ["topk", "all"])
def test_the_gap_says_where_training_asks_the_teachers_experts_otherwise(folder, raw_config, experts):
    teacher = {**raw_config["teacher"], "experts": experts}
    line = next(each for each in scorecard(folder(config={"teacher": teacher})) if "are near" in each.check)
    assert line.passed is True
    assert ("as teacher.experts says, here as it was made" in line.found) == (experts == "all")
