"""The doctor outlives its patients: whatever a folder or a file holds is a finding, never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import sentences, tiny_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from kdlib.config.run import parse
from kdlib.diagnostics import doctor, model_checks
from kdlib.diagnostics.context import Context, as_text


def edited(**changes) -> Callable[[Path], None]:
    """Other values in the model's config.json; None takes a key away."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        kept = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))

    return damage


def written(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    """Another content of a file; None takes it away."""

    def damage(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def replaced(make: Callable[[], torch.nn.Module]) -> Callable[[Path], None]:
    """A model of another kind, with the same tokenizer."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make().save_pretrained(folder)

    return damage


def torn(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def without_special_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer(sentences(200))
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


MODELS = {
    "an empty config.json": written("config.json", ""),
    "a config.json that is a list": written("config.json", "[]"),
    "a config.json that is no JSON": written("config.json", "{'model_type': llama"),
    "no config.json": written("config.json", None),
    "a model type that nobody knows": edited(model_type="gizmo"),
    "a model type that is a number": edited(model_type=7),
    "no model type": edited(model_type=None),
    "a text for the number of layers": edited(num_hidden_layers="four"),
    "heads that do not divide the states": edited(num_attention_heads=5),
    "a size below 0": edited(hidden_size=-32),
    "no vocabulary": edited(vocab_size=0),
    "an activation that nobody knows": edited(hidden_act="wiggle"),
    "no weights": written("model.safetensors", None),
    "torn weights": torn,
    "weights that are none": written("model.safetensors", b"\x00" * 64),
    "weights of other shapes": edited(intermediate_size=100),
    "more layers than weights": edited(num_hidden_layers=6),
    "no tokenizer": written("tokenizer.json", None),
    "a tokenizer that is no JSON": written("tokenizer.json", "{"),
    "a tokenizer that is a list": written("tokenizer.json", "[]"),
    "a tokenizer config that is a list": written("tokenizer_config.json", "[]"),
    "an empty folder": emptied,
    "an encoder with a decoder": replaced(
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=300, d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2)
        )
    ),
}
OTHERS = {  # what transformers itself takes, or another check judges: only outlived
    "a tokenizer without pad and end": without_special_tokens,
    "a tokenizer class that nobody knows": written("tokenizer_config.json", '{"tokenizer_class": "Gizmo"}'),
    "a rotation that nobody knows": edited(rope_parameters={"rope_type": "spiral"}),
    "no layer": edited(num_hidden_layers=0),
}
ROWS = {
    "an empty file": ("a.jsonl", b""),
    "a blank line": ("a.jsonl", b"\n"),
    "no JSON": ("a.jsonl", b"{'text': 1"),
    "lists": ("a.jsonl", b"[1, 2]\n[3]\n"),
    "a number": ("a.jsonl", b"7\n"),
    "null": ("a.jsonl", b"null\n"),
    "numbers for texts": ("a.jsonl", b'{"text": 1}\n{"text": 2}\n'),
    "lists for texts": ("a.jsonl", b'{"text": ["a"]}\n{"text": ["b"]}\n'),
    "texts and numbers": ("a.jsonl", b'{"text": "a b c"}\n{"text": 2}\n'),
    "no text in a row": ("a.jsonl", b'{"text": "a b c"}\n{"other": "x"}\n'),
    "empty texts": ("a.jsonl", b'{"text": ""}\n{"text": ""}\n'),
    "one row": ("a.jsonl", b'{"text": "the student learns"}\n'),
    "two rows of one token": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n'),
    "the same row": ("a.jsonl", b'{"text": "the teacher says"}\n' * 50),
    "another column": ("a.csv", b"name,age\nx,1\ny,2\n"),
    "a head without rows": ("a.csv", b"text\n"),
    "more cells than heads": ("a.csv", b"text\na,b,c\nd\n"),
    "no table": ("a.parquet", b"PAR1 and no more"),
    "an empty table": ("a.parquet", b""),
    "no UTF-8": ("a.txt", b"\xff\xfe\x00\xd8" * 20),
    "blank lines": ("a.txt", b"\n\n\n"),
    "zeros": ("a.txt", b"\x00" * 100),
    "a type that nobody reads": ("a.docx", b"PK"),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in sentences(200, seed=1)))
    return str(file)


@pytest.fixture
def patient(teacher_folder, text, tmp_path) -> dict:
    shutil.copytree(teacher_folder, tmp_path / "model")
    return {
        "teacher": {"model": str(teacher_folder)},
        "student": {"from": "teacher", "layers": 2, "keep": "even"},
        "data": {"source": text, "max_length": 16},
        "loss": {"weights": {"kd": 0.7, "ce": 0.3}},
        "training": {"max_steps": 20, "per_device_train_batch_size": 32, "use_cpu": True},
    }


@pytest.fixture(autouse=True)
def no_forecast(monkeypatch):
    monkeypatch.setattr(doctor, "memory_suffices", lambda context, forecast: iter(()))


def some(cases: dict) -> list:
    """Every third at any time, all of them among the slow tests."""
    return [
        pytest.param(name, marks=() if number % 3 == 0 else pytest.mark.slow)
        for number, name in enumerate(cases)
    ]


def blamed(raw: dict) -> set[str]:
    """The sections in which something critical was found."""
    found = doctor.diagnose(parse(raw))
    print(as_text(found))
    return {each.where.partition(".")[0] for each in found if each.severity == "critical"}


@pytest.mark.parametrize("name", some(MODELS))
def test_a_damaged_teacher_is_a_finding(name, patient, tmp_path):
    MODELS[name](tmp_path / "model")
    assert blamed({**patient, "teacher": {"model": str(tmp_path / "model")}})


@pytest.mark.parametrize("name", list(MODELS)[::6])
def test_a_damaged_student_is_a_finding(name, patient, tmp_path):
    MODELS[name](tmp_path / "model")
    assert blamed({**patient, "student": {"from": str(tmp_path / "model")}}) - {"doctor"} == {"student"}


@pytest.mark.parametrize("name", some(OTHERS))
def test_an_odd_teacher_is_outlived(name, patient, tmp_path):
    OTHERS[name](tmp_path / "model")
    blamed({**patient, "teacher": {"model": str(tmp_path / "model")}})


@pytest.mark.parametrize("name", some(ROWS))
def test_a_damaged_source_is_a_finding(name, patient, tmp_path):
    file, content = ROWS[name]
    (tmp_path / file).write_bytes(content)
    assert blamed({**patient, "data": {"source": str(tmp_path / file), "max_length": 16}}) == {"data"}


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(patient, monkeypatch):
    def rows_fit_the_positions(context):
        yield from {}["no such key"]

    broken = [
        rows_fit_the_positions if c is model_checks.rows_fit_the_positions else c for c in doctor.CHECKS
    ]
    monkeypatch.setattr(doctor, "CHECKS", tuple(broken))
    patient["training"]["warmup_steps"] = 900  # found by a check before it
    patient["student"]["keep"] = "influence"
    found = doctor.diagnose(parse(patient))
    said = {each.where: each for each in found if each.severity == "critical"}
    assert set(said) == {"doctor", "training.warmup_steps"}
    assert said["doctor"].what == "this check failed: rows fit the positions: KeyError: 'no such key'"
    assert "--anyway" in said["doctor"].fix
    assert doctor.Visit(found, found, {}, None).exit_status(strict=False) == 2


def test_a_part_that_fails_as_nobody_foresaw_is_one_finding_however_many_checks_ask(patient, monkeypatch):
    calls = []

    def prepare(*given):
        calls.append(given)
        raise RuntimeError("a\nlong story " * 100)

    monkeypatch.setattr("kdlib.tasks.base.prepare", prepare)
    found = [each for each in doctor.diagnose(parse(patient)) if each.severity == "critical"]
    assert [each.where for each in found] == ["data.source"]
    assert found[0].what.startswith("this check failed: prepared: RuntimeError: a long story")
    assert len(found[0].what) < 400
    assert len(calls) == 1


def test_an_interrupt_is_no_finding(patient, monkeypatch):
    def stopped(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Context, "objective", property(stopped))
    with pytest.raises(KeyboardInterrupt):
        doctor.diagnose(parse(patient))
