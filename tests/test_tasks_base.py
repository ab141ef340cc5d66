"""A fourth task, added by one file: this one.  It trains, is examined and compared by the ordinary road."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from made_log import read_metrics
from tiny_classifiers import bert, raw_config
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification

from kdlib.config.run import parse
from kdlib.config.task_rules import RULES, TaskRules
from kdlib.data.batches import Prepared, collate_classes, fingerprint
from kdlib.diagnostics.context import Finding
from kdlib.diagnostics.doctor import diagnose
from kdlib.errors import ConfigError
from kdlib.evaluation.compare import compare_run
from kdlib.losses.signals import kept
from kdlib.metrics.bootstrap import Bootstrap, over
from kdlib.metrics.names import MEASURES, Measure
from kdlib.metrics.paired import differences, intervals
from kdlib.models.classifier import load_classifier
from kdlib.plots.comparison import comparison_bars, comparison_message, quality_table
from kdlib.runs import folder as runs
from kdlib.students.student import tokenizer_of
from kdlib.tasks.base import (
    TASKS,
    Comparison,
    Outline,
    Sample,
    Task,
    load_teacher,
    prepare,
    register,
    task_of,
    untrained_student,
)
from kdlib.training.run import train

SIDES = ("even", "odd")


def texts_have_words(context):
    if min(len(text.split()) for text in context.prepared.train["text"]) < 10:
        yield Finding("note", "data.text", "few words", "there is little to count", "nothing")


class Counting(Task):
    """Whether a text has an even or an odd number of words."""

    rules = TaskRules(
        "counting",
        "row",
        best_by=("accuracy", "kl_to_teacher"),
        measures=("accuracy", "hesitation"),
        told_first=("hesitation",),
        not_shown=(),
        smoke={"max_train_rows": 8},
    )
    kind = "classifier of texts"
    auto = AutoModelForSequenceClassification
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    checks = ("documents_are_not_cut", texts_have_words)

    def prepare(self, config, tokenizer, *, new_head=False):
        texts = load_dataset("json", data_files=config.data.source)["train"]["text"]
        rows = Dataset.from_list(
            [{"input_ids": tokenizer(t)["input_ids"], "label": len(t.split()) % 2, "text": t} for t in texts]
        )
        made = partial(collate_classes, pad_id=tokenizer.pad_token_id, teacher_pad_id=0)
        train, held_out = rows.select(range(16, len(rows))), rows.select(range(16))
        notes = {"fingerprint": fingerprint(rows), "train_tokens": 400, "train_rows": len(train)}
        notes |= {"validation_rows": 16}
        return Prepared(train, held_out, notes, made, 2, figures=lambda means, answers: {"rounds": 1.0})

    def load(self, source, prepared, dtype=torch.float32, *, untrained=False):
        return load_classifier(source, SIDES, dtype, untrained=untrained)

    def outlined(self, config, student, teacher, vocabulary):
        return Outline(config, student, teacher, 2, self)

    def random_batch(self, plan, rows, generator):
        return collate_classes([{"input_ids": [1, 2], "label": 0}] * rows, pad_id=0, teacher_pad_id=0)

    def facts(self, prepared, tokenizer, teacher):
        return {"sides": " or ".join(SIDES)}

    def example(self, prepared, tokenizer, teacher):
        return prepared.train[0]["text"]

    def sample(self, prepared, tokenizer):
        batch = prepared.collate([prepared.validation[0]])
        return Sample(batch, prepared.validation["text"][:1], [""], SIDES.__getitem__)

    def comparison(self, config, prepared, tokenizer, **options):
        return Hesitation(prepared, tokenizer, **options)


class Hesitation(Comparison):
    """How near the two probabilities lie: 0 (sure) to 1."""

    def __init__(self, *rows, **options):
        super().__init__(*rows, **options)
        self.said = {}

    def add(self, name, model, prepared):
        batch = prepared.collate(list(prepared.measured))
        self.said[name] = model(batch, kept(batch["labels"])).logits().softmax(-1).numpy()
        return {"questions_asked": 1}

    def results(self, student):
        draws = Bootstrap(16, 50)
        figures = {}
        for name, said in self.said.items():
            right = (said.argmax(1) == np.array(self.prepared.measured["label"])).astype(float)
            table = np.stack([right, 1 - np.abs(said[:, 0] - said[:, 1])], axis=1)
            means, drawn = table.mean(0), draws.sums(table) / 16
            figures[name] = {m: (means[i], drawn[:, i]) for i, m in enumerate(("accuracy", "hesitation"))}
        models = {name: intervals(found, 16) for name, found in figures.items()}
        different, how = differences(figures, 16), over(16, "rows")
        return {"models": models, "differences": different, "rows": 16, "interval": how}


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(MEASURES, "hesitation", Measure("hesitation", "of a {item}", "hesitation", False))
    yield register(Counting())
    del TASKS["counting"], RULES["counting"]


@pytest.fixture
def config(counting, tmp_path):
    teacher, student = (
        bert(tmp_path / name, labels=SIDES, seed=i) for i, name in enumerate(("teacher", "student"))
    )
    texts = [" ".join(["again"] * (1 + i % 5)) + f" {i}" for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raw = raw_config(teacher, student, tmp_path / "rows.jsonl") | {"task": "counting", "baseline": None}
    raw["data"] = {"source": str(tmp_path / "rows.jsonl"), "max_length": 24}
    raw["training"] |= {"max_steps": 2, "eval_steps": 1, "save_steps": 2, "logging_steps": 1}
    return parse(raw)


def test_a_task_of_one_file_trains_and_is_compared_by_the_ordinary_road(config, counting, tmp_path):
    assert task_of(config) is counting
    tokenizer = tokenizer_of(config)
    prepared = prepare(config, tokenizer)
    run = runs.create(tmp_path / "runs", "one", config)
    run.add_to_manifest(student_layers=None)
    train(
        config,
        run,
        student=untrained_student(config, prepared, None),
        teacher=load_teacher(config, prepared),
        tokenizer=tokenizer,
        prepared=prepared,
    )
    evaluated = [line for line in read_metrics(run) if "eval/loss" in line]
    assert [line["train/step"] for line in evaluated][-1] == 2
    assert all(line["eval/rounds"] == 1.0 and "eval/accuracy" in line for line in evaluated)
    results = compare_run(run, config, tokenizer, prepared)
    assert list(results["models"]) == ["teacher", "untrained", "distilled"]
    assert results["models"]["distilled"]["questions_asked"] == 1
    assert list(quality_table(results).columns) == ["accuracy", "hesitation (primary)"]
    assert "hesitation" in comparison_message(results)
    assert comparison_bars(results).axes[1].get_title(loc="left") == "hesitation (primary)\nof a row"
    assert run.config.task == "counting"


def test_the_doctor_makes_a_task_s_own_checks(config):
    assert "few words" in [each.what for each in diagnose(config, quick=True)]


def test_the_rules_of_a_task_hold_for_its_configs(config):
    with pytest.raises(ConfigError, match=r"data\.label: found 'topic', which counting does not read"):
        parse(config.as_dict(), ["data.label=topic"])
    assert parse(config.as_dict(), smoke=True).data.max_train_rows == 8
    with pytest.raises(ConfigError, match="task: found 'count'; it is one of causal-lm, .*counting"):
        parse(config.as_dict() | {"task": "count"})


def test_what_a_report_does_not_know_of_a_task_it_shows_as_measured():
    figures = {"value": 0.5, "low": 0.4, "high": 0.6}
    models = {name: {"accuracy": figures, "perplexity": figures} for name in ("teacher", "distilled")}
    assert list(quality_table({"task": "of another machine", "models": models}).columns) == [
        "perplexity (primary)",
        "accuracy",
    ]
