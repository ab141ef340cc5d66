"""The doctor: six configs that are known to fail are named and mended; one that is well is left alone."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import sentences, tiny_model, tiny_tokenizer
from datasets import Dataset, DatasetDict
from tiny_training import pieces

from kdlib import cli
from kdlib.config import load, parse
from kdlib.diagnostics import doctor
from kdlib.runs import StudentFolder, project_root
from kdlib.training import train

SICK = Path(__file__).parent / "sick"
CULPRITS = {  # config → (setting, severity, a figure in the finding, what --fix writes)
    "steps_counted_in_batches": ("training.warmup_steps", "critical", "500 optimizer steps in a training of 12", 0.1),
    "feature_term_from_the_start": ("loss.curriculum.0.weights.hidden", "warning", "comes in with phase 2, at 0.5", 0),
    "weights_of_a_batchmean": ("loss.weights.kd", "warning", "times as much as kd", None),
    "float16_overflow": ("precision", "critical", "float16", "auto"),
    "rows_without_a_target": ("data.text", "warning", "shorter than two tokens", "text"),
    "temperature_that_teaches_nothing": ("loss.temperature", "critical", "T = 200", 4.0),
}


@pytest.fixture(scope="session")
def patients(tmp_path_factory) -> dict[str, Path]:
    """Two teachers that are sure of themselves, one of them beyond float16; and a text with a column of answers."""
    folder, found = tmp_path_factory.mktemp("patients"), {}
    for name, scale in (("sharp", 6.0), ("hot", 1e5)):
        model = tiny_model()
        torch.nn.init.constant_(model.model.norm.weight, scale)
        model.save_pretrained(folder / name)
        tiny_tokenizer(sentences(200)).save_pretrained(folder / name)
        found[name] = folder / name
    found["text"] = folder / "text.jsonl"
    found["text"].write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(700, seed=1)))
    found["answers"] = folder / "answers"
    answers = ["ABCD"[i % 4] if i % 8 else f"all but {i}" for i in range(700)]
    rows = [{"text": text, "answer": answer} for text, answer in zip(sentences(700, seed=1), answers, strict=True)]
    DatasetDict(train=Dataset.from_list(rows[:600]), validation=Dataset.from_list(rows[600:])).save_to_disk(folder / "answers")
    return found


@pytest.fixture
def sick(patients, tmp_path):
    """Writes a sick config with its models and text, and returns the file."""

    def write(name: str) -> Path:
        text = (SICK / f"{name}.yaml").read_text()
        teacher = patients["hot" if name == "float16_overflow" else "sharp"]
        file = tmp_path / f"{name}.yaml"
        source = patients["answers" if name == "rows_without_a_target" else "text"]
        file.write_text(text.replace("$TEACHER", str(teacher)).replace("$DATA", str(source)))
        return file

    return write


@pytest.fixture
def well(patients) -> dict:
    """The quickstart with a tiny teacher and text, as plain data."""
    tiny = {"teacher.model": str(patients["sharp"]), "student.layers": 2, "data.source": str(patients["text"]), "data.max_length": 32,
            "data.max_eval_rows": 40, "training.per_device_train_batch_size": 8, "training.use_cpu": True, "precision": "float32"}
    return load(project_root() / "configs" / "quickstart.yaml", tiny).as_dict()


@pytest.fixture
def kd_doctor(tmp_path, monkeypatch, capsys):
    """Runs `kd doctor …` here: (exit status, standard output, standard error)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kd", "doctor", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    return call


def found(raw: dict, *, quick: bool = True, **changes) -> dict[str, str]:
    """{where: severity} of the findings on a config, without notes."""
    raw = {**raw, **{section: {**raw[section], **values} if isinstance(values, dict) else values for section, values in changes.items()}}
    return {each.where: each.severity for each in doctor.diagnose(parse(raw), quick=quick) if each.severity != "note"}


@pytest.mark.parametrize("name", CULPRITS)
def test_the_doctor_names_the_culprit_and_its_fix_trains(name, sick, tmp_path):
    where, severity, words, written = CULPRITS[name]
    file = sick(name)
    visit = doctor.visit(file, fix=True)
    named = [each for each in visit.found if each.where == where]
    assert [(each.severity, words in each.what) for each in named][:1] == [(severity, True)], visit.found
    assert where in visit.changes
    assert written is None or visit.changes[where] == written
    assert not [each for each in visit.left if each.change or each.severity == "critical"], visit.left
    assert where not in {each.where for each in visit.left}

    before, after = file.read_text().splitlines(), visit.text.splitlines()
    touched = [line for line in after if line not in before]
    assert len(after) - len(before) <= len(touched) <= len(visit.changes)  # every other line is as it was, comments and all
    assert [line for line in after if line in before] == [line for line in before if line in after]

    config = parse(yaml.safe_load(visit.text))
    trainer = train(config, StudentFolder(tmp_path / "run"), label="mended", stop_after=6, **pieces(config))
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert all(math.isfinite(line["loss"]) for line in logged)
    assert max(line["learning_rate"] for line in logged) > 0.1 * config.training["learning_rate"]
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_a_config_that_is_well_has_no_findings(well):
    assert found(well, quick=False) == {}


def test_the_quickstart_itself_has_no_warnings_before_its_models_are_loaded():
    config = load(project_root() / "configs" / "quickstart.yaml")
    assert {each.severity for each in doctor.diagnose(config, quick=True)} == {"note"}
