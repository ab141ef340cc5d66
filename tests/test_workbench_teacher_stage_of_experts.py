"""A mixture of experts that are copies is trained first, in a run of its own, for students of any kind."""

import random

import pytest
import torch
import yaml
from conftest import sentences, tiny_experiment, tiny_model, tiny_tokenizer
from made_log import read_metrics

from kdlib.config.run import parse
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.routing import upcycle
from kdlib.routing.experts import watched
from kdlib.runs import folder as runs
from kdlib.workbench import session, teacher_stage

KINDS = (["red", "green", "blue", "white", "black"], ["one", "two", "three", "four", "five"])
STAGE = {"training": {"max_steps": 6, "learning_rate": 3e-3, "use_cpu": True, "logging_steps": 1}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model, its mixture, and a small one with another tokenizer."""
    place = tmp_path_factory.mktemp("models")
    for name, layers, size, seed in (("dense", 2, 300, 0), ("other", 1, 280, 9)):
        tiny_model(size, layers, seed).save_pretrained(place / name)
        tiny_tokenizer(sentences(80, seed=seed), size=size).save_pretrained(place / name)
    upcycle.make(str(place / "dense"), place / "mixture", 4, 2)
    return place


@pytest.fixture
def raw(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a trained teacher is named from here
    plain = tiny_experiment(models / "mixture", tmp_path)
    plain["data"]["split_seed"] = 0
    return {**plain, "student": {"from": str(models / "dense")}, "teacher_stage": STAGE}


def taught(raw, tmp_path, name="run"):
    config = parse(raw)
    return teacher_stage.taught(config, runs.create(tmp_path / "runs", name, config))


def test_it_learns_from_text_and_its_routers_own_loss_and_is_used_again(raw, models, tmp_path, capsys):
    made = taught(raw, tmp_path)
    run = teacher_stage.run_of(parse(raw), tmp_path / "runs")
    assert run.manifest["formula"] == "loss = 1·CE + 0.01·router_aux"
    assert {"train/ce_loss", "train/router_aux_loss"} <= read_metrics(run)[0].keys()
    before, after = load_model(str(models / "mixture")), load_model(made.teacher.model)
    changed = {name for name, each in after.state_dict().items() if not each.equal(before.state_dict()[name])}
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj"} <= changed
    experts = after.model.layers[0].mlp.experts.down_proj
    assert not torch.allclose(experts[0], experts[1])  # copies no more
    assert load_tokenizer(made.teacher.model).get_vocab() == load_tokenizer(str(models / "dense")).get_vocab()
    again = taught({**raw, "seed": 3, "loss": {"weights": {"kd": 1.0}}}, tmp_path, "again")
    assert (again.teacher.model, again.teacher_stage) == (made.teacher.model, None)
    assert "the teacher was trained before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"from": "teacher", "layers": 1}},
        {"student": "other", "loss": {"weights": {"ce": 1.0, "span_kl": 1.0}}},
        {
            "student": {"from": "teacher", "layers": 1, "tokenizer": "other"},
            "loss": {"weights": {"alm": 1.0}},
        },
    ],
    ids=["of the teacher", "of another tokenizer", "of the teacher's layers with another tokenizer"],
)
def test_whose_student_it_is_changes_nothing_of_it(raw, models, tmp_path, changes):
    text = yaml.safe_dump({**raw, **changes}).replace("student: other", "student: {from: other}")
    other = yaml.safe_load(text.replace("other", str(models / "other")))
    own = teacher_stage.own_config(parse(other))
    assert own.student.source == str(models / "mixture")
    assert own.student.tokenizer is None
    assert own.terms == {"ce"}
    ours, theirs = (teacher_stage.run_of(parse(each), tmp_path) for each in (raw, other))
    assert ours == theirs


@pytest.mark.parametrize(
    "student", [{"from": "teacher", "layers": 1}, {"from": "dense"}, {"from": "other"}], ids=str
)
def test_a_whole_run_trains_it_first_and_then_a_student_of_any_kind(raw, models, tmp_path, student):
    source = student["from"]
    raw["student"] = student if source == "teacher" else {"from": str(models / source)}
    if source == "other":
        raw["loss"] = {"weights": {"ce": 1.0, "span_kl": 1.0}}
    config = parse({**raw, "baseline": None})
    bench = session.Workbench(runs.create(tmp_path / "runs", "run", config))
    facts = bench.setup()
    assert "teacher_mixture_" in facts.loc["teacher", ""]
    made = bench.student()
    if source == "teacher":
        theirs = load_model(bench.config.teacher.model).state_dict()
        name = "model.layers.0.mlp.gate.weight"
        assert made.state_dict()[name].equal(theirs[name])  # the trained one's
    bench.train()
    results = bench.compare()
    assert results["models"]["teacher"]["perplexity" if source != "other" else "bits_per_byte"]["value"] > 0
    assert read_metrics(bench.run)[-1]["train/step"] == 12


def test_questions_have_a_stage_too():
    raw = {
        "task": "question-answering",
        "teacher": {"model": "experts"},
        "student": {"from": "small"},
        "data": {"source": "rows"},
        "loss": {"weights": {"kd": 1.0}},
        "training": {"max_steps": 2},
        "teacher_stage": {"training": {"metric_for_best_model": "choice_accuracy"}},
    }
    own = teacher_stage.own_config(parse(raw))
    assert (own.task, own.training["metric_for_best_model"]) == ("question-answering", "choice_accuracy")


def use_of(model, rows) -> torch.Tensor:
    """[rows, routers, experts] shares of the weights given."""
    found = []
    with torch.no_grad():
        for row in rows:
            with watched(model) as given:
                model(row[None])
            found.append(torch.stack([each.mean(0) for each in given.values()]))
    return torch.stack(found)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Total variation between the mean loads of two sets of rows, over all routers."""
    return float((one.mean(0) - other.mean(0)).abs().sum(-1).mean() / 2)


def test_after_its_stage_experts_are_used_by_kind_of_text(raw, tmp_path):
    draw = random.Random(0)
    texts = [[" ".join(draw.choices(words, k=40)) for _ in range(60)] for words in KINDS]
    lines = [f'{{"text": "{text}"}}' for pair in zip(*texts, strict=True) for text in pair]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    raw["data"] = {**raw["data"], "packing": False, "max_length": 32}
    stage = {**STAGE["training"], "max_steps": 60, "logging_steps": 20}
    made = taught({**raw, "teacher_stage": {"training": stage}}, tmp_path)
    model, tokenizer = load_model(made.teacher.model), load_tokenizer(made.teacher.model)
    fresh = [[" ".join(draw.choices(words, k=40)) for _ in range(24)] for words in KINDS]
    one, other = (
        use_of(model, [torch.tensor(tokenizer(text)["input_ids"][:32]) for text in each]) for each in fresh
    )
    halves = [distance(each[::2], each[1::2]) for each in (one, other)]
    assert distance(one, other) > 5 * max(halves)
