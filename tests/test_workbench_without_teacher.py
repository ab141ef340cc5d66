"""`teacher: null`: a student learns from text alone, as what a teacher wrote, and nobody is asked."""

import json

import pytest

from kdlib.config.run import parse
from kdlib.errors import ConfigError
from kdlib.reports.run import render
from kdlib.runs import folder as runs
from kdlib.runs.log import eval_table
from kdlib.tasks import base as tasks
from kdlib.workbench import explorers
from kdlib.workbench.session import Workbench

SHAPE = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}


@pytest.fixture
def alone(raw_config, teacher_folder, tmp_path):
    rows = tmp_path / "answers.jsonl"
    lines = [{"prompt": f"What comes after {n}?", "response": f"{n + 1} comes."} for n in range(80)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    raw = {**raw_config, "task": "question-answering", "teacher": None}
    raw["student"] = {"from": "config", "shape": SHAPE, "tokenizer": str(teacher_folder)}
    raw["data"] = {"source": str(rows), "validation": 0.2, "max_length": 96}
    raw["loss"] = {"weights": {"ce": 1.0}}
    raw["training"] = {**raw["training"], "metric_for_best_model": "eval_perplexity", "learning_rate": 1e-2}
    del raw["baseline"]
    return raw


def test_a_student_learns_from_text_alone_from_setup_to_report(alone, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "_teacher_model", lambda *args, **kwargs: pytest.fail("a teacher was loaded"))
    bench = Workbench(runs.create(tmp_path / "runs", "alone", parse(alone)))
    facts = bench.setup()[""]
    assert facts["teacher"] == "none: text alone"
    assert facts["objective"] == "loss = 1·CE"
    bench.doctor()
    assert not [each for each in bench.run.manifest["doctor"] if each["severity"] == "critical"]
    assert list(bench.shapes()) == ["student"]
    assert "learned: 6" in str(bench.example())
    results = bench.selftest().set_index("compared")["result"]
    assert set(results) == {"pass", "left out"}
    assert list(results[results == "left out"].index) == ["student = teacher: 0 in every divergence, nats"]
    bench.dry_run()
    bench.forecast()
    assert "teacher" not in capsys.readouterr().out.partition("forecast for")[2]
    assert explorers.temperature_and_top_k(bench.explore("untrained"), bench.config) is None
    bench.train()
    bench.train_baseline()
    table = eval_table(bench.run)
    assert table["perplexity"].iloc[-1] < table["perplexity"].iloc[0]
    assert not {"kl_to_teacher", "agreement"} & {*table}
    found = bench.compare()
    assert list(found["models"]) == ["untrained", "trained"]
    assert {each["metric"] for each in found["differences"]} == {"perplexity", "bits_per_byte", "accuracy"}
    assert explorers.token_heat_map(bench.run) is None
    page = render(bench.run, tmp_path / "reports").read_text()
    assert "better perplexity" in page
    assert "the teacher's forward passes" not in page
    assert "distilled" not in page.partition("<body")[2]
    assert "the student shows" in page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"loss": {"weights": {"ce": 0.5, "kd": 0.5}}},
            "loss.weights.kd: needs a teacher, and",
        ),
        ({"student": {"from": "teacher", "layers": 2}}, "student.from: found teacher, and there is none"),
        ({"student": {"from": "config", "shape": "100m"}}, "student.tokenizer: missing"),
        ({"baseline": {"weights": {"ce": 1.0}}}, "baseline: it is a student without a teacher"),
        ({"training": {"metric_for_best_model": "eval_kl_to_teacher"}}, "metric_for_best_model"),
    ],
)
def test_what_needs_a_teacher_is_refused_without_one(alone, changes, words):
    with pytest.raises(ConfigError, match=words):
        parse({**alone, **changes})


def test_no_teacher_is_said_and_not_forgotten(alone):
    del alone["teacher"]
    with pytest.raises(ConfigError, match="teacher: missing; it must be given"):
        parse(alone)
