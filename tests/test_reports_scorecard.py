import numpy as np
import pytest

from kdlib.config.run import parse
from kdlib.reports.scorecard import scorecard, scorecard_table
from kdlib.runs import folder as runs, log as metrics

FINE = {"kd": lambda step: 4 * 0.97**step, "ce": lambda step: 3 * 0.99**step}


@pytest.fixture
def folder(raw_config, tmp_path):
    """Writes what a training of 20 steps leaves, healthy unless told otherwise."""

    def write(
        *,
        values=FINE,
        rate=lambda step: 1e-3,
        used=None,
        held_out=1.05,
        still=False,
        memory=2.0,
        logged=range(1, 21),
    ):
        run = runs.create(tmp_path, "card", parse(raw_config))
        run.add_to_manifest(machine={"memory_gib": 16.0})
        runs.write_json(run.plan, [{"step": step, "learning_rate": rate(step)} for step in range(1, 21)])
        for step in logged:
            terms = {f"train/{name}_loss": value(step) for name, value in values.items()}
            weights = {f"train/{name}_weight": 0.5 for name in values}
            rest = {
                "train/learning_rate": (used or rate)(step),
                "train/memory_gib": memory,
                "train/loss": sum(terms.values()) / 2,
            }
            metrics.append_metrics(run, {"train/step": step, "train/epoch": 0.1, **terms, **weights, **rest})
            if step in (10, 20):
                terms = {f"eval/{name}_loss": held_out * value(step) for name, value in values.items()}
                weights = {f"eval/{name}_weight": 0.5 for name in values}
                perplexity = 100.0 if still else 100.0 / step
                metrics.append_metrics(
                    run,
                    {"train/step": step, "eval/loss": 1.0, "eval/perplexity": perplexity, **terms, **weights},
                )
        return run

    return write


def results(run) -> list[str]:
    return [line.result for line in scorecard(run)]


def failed(run) -> list[str]:
    return [line.check.split(" ")[1] for line in scorecard(run) if line.passed is False]


def test_a_healthy_run_passes_every_line(folder):
    assert results(folder()) == ["pass"] * 7


@pytest.mark.parametrize(
    ("sick", "check"),
    [
        ({"values": {"kd": lambda step: 2 + 0.1 * (-1) ** step, "ce": lambda step: 3.0}}, "model"),
        ({"still": True}, "perplexity"),
        ({"held_out": 6.0}, "and"),
        ({"rate": lambda step: 1e-5 * step / 20}, "learning"),
        ({"used": lambda step: 0.9e-3}, "learning"),
        ({"values": FINE | {"ce": lambda step: float("nan") if step == 7 else 3.0}}, "figure"),
        ({"values": FINE | {"hidden": lambda step: 0.002}}, "terms"),
        ({"memory": 15.5}, "suffices"),
    ],
)
def test_each_sickness_fails_its_own_line_alone(folder, sick, check):
    assert failed(folder(**sick)) == [check]


def test_what_cannot_be_measured_is_not_passed(folder):
    run = folder(logged=range(1, 3))
    run.plan.unlink()
    run.add_to_manifest(machine={})
    assert results(run) == ["not measured"] * 4 + ["pass", "pass", "not measured"]


def test_a_report_of_a_non_finite_value_fails_the_line(folder):
    run = folder()
    (run.path / "nan_report").mkdir()
    assert failed(run) == ["figure"]


def test_the_trend_of_an_exact_decay_is_that_decay(folder):
    found = scorecard(folder())[0].found
    assert found.startswith(f"{0.97**19 - 1:+.0%} [{0.97**19 - 1:+.0%}, ")


def test_nothing_logged_gives_no_scorecard(raw_config, tmp_path):
    assert scorecard(runs.create(tmp_path, "empty", parse(raw_config))) == []


def test_the_table_has_a_row_a_line(folder):
    table = scorecard_table(scorecard(folder()))
    assert list(table.columns) == ["found", "needed", "result"]
    assert np.all(table["result"] == "pass")
