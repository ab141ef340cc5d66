import numpy as np
import pytest
import torch
from made_predictions import models, rows, softmax

from kdlib.config.run import parse
from kdlib.evaluation import predictions as evaluation
from kdlib.plots.softening import (
    TEMPERATURES,
    Predictions,
    sizes,
)
from kdlib.runs import folder as runs
from kdlib.tasks.language_modeling import beginnings


@pytest.fixture(name="models")
def _models():
    return models()


@pytest.fixture(name="rows")
def _rows():
    return rows()


@pytest.fixture
def run(raw_config, predictions, tmp_path):
    run = runs.create(tmp_path / "runs", "one", parse(raw_config))
    evaluation.write(run, predictions)
    return run


def test_predictions_hold_what_each_model_says_of_each_token(predictions, models, rows):
    n = 0
    for row in beginnings(rows, 40):
        ids = torch.tensor([row["input_ids"]])
        for name, model in models.items():
            with torch.no_grad():
                expected = model(input_ids=ids).logits[0, :-1, :300].numpy()
            assert predictions.logits[name][n : n + len(expected)] == pytest.approx(expected, abs=1e-4)
        assert predictions.targets[n : n + ids.shape[1] - 1].tolist() == ids[0, 1:].tolist()
        assert "".join(predictions.texts[n : n + ids.shape[1] - 1]) == text_of(row, predictions)
        assert predictions.before[n] == predictions.decode(ids[0, 0].item())
        assert set(predictions.before[n + 1 : n + ids.shape[1] - 1]) <= {""}
        n += ids.shape[1] - 1
    assert n == len(predictions.texts) == 40


def text_of(row, predictions):
    return "".join(predictions.decode(token) for token in row["input_ids"][1:])


def test_rows_are_taken_until_there_are_enough_tokens():
    rows = [{"input_ids": list(range(11))}] * 3
    assert [len(row["input_ids"]) for row in beginnings(rows, 5)] == [6]
    assert [len(row["input_ids"]) for row in beginnings(rows, 19)] == [11, 10]
    assert [len(row["input_ids"]) for row in beginnings(rows, 12)] == [11]
    assert [len(row["input_ids"]) for row in beginnings(rows, 500)] == [11, 11, 11]


def test_a_summary_has_each_token_s_figures(predictions, facts):
    teacher, student = (softmax(predictions.logits[name]) for name in ("teacher", "distilled"))
    each, said = np.arange(len(predictions.targets)), facts["students"]["distilled"]
    assert said["kl"] == pytest.approx((teacher * np.log(teacher / student)).sum(-1), abs=2e-5)
    assert said["ce"] == pytest.approx(-np.log(student[each, predictions.targets]), abs=2e-5)
    assert facts["teacher"]["ce"] == pytest.approx(-np.log(teacher[each, predictions.targets]), abs=2e-5)
    assert said["agrees"] == (teacher.argmax(-1) == student.argmax(-1)).tolist()
    order = np.argsort(-student[7])[:5]
    assert said["top"][7] == [
        [predictions.decode(token), pytest.approx(student[7, token], abs=1e-5)] for token in order.tolist()
    ]
    assert facts["softening"]["sizes"] == sizes(300, 16)
    assert [row["temperature"] for row in facts["softening"]["rows"]] == sorted([*TEMPERATURES, 2.5])


def test_students_of_the_same_text_stay_together(run, predictions):
    untrained = Predictions(
        predictions.texts,
        predictions.before,
        predictions.targets,
        {"teacher": predictions.logits["teacher"], "untrained": predictions.logits["baseline"]},
        predictions.decode,
    )
    evaluation.write(run, untrained)
    found = runs.read_json(run.path / "explorers.json")
    assert list(found["students"]) == ["untrained", "distilled", "baseline"]
    other = Predictions(
        ["x", *predictions.texts[1:]],
        predictions.before,
        predictions.targets,
        untrained.logits,
        predictions.decode,
    )
    evaluation.write(run, other)
    assert list(runs.read_json(run.path / "explorers.json")["students"]) == ["untrained"]
