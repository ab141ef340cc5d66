"""The doctor: six configs that are known to fail are named and mended; one that is well is left alone."""

import json
import math
import sys
from pathlib import Path
from string import ascii_letters

import pytest
import torch
import yaml
from conftest import sentences, tiny_model, tiny_tokenizer
from datasets import Dataset, DatasetDict
from tiny_training import pieces
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kdlib import hardware
from kdlib.config.run import load, parse
from kdlib.data.batches import collate
from kdlib.diagnostics import config_checks, doctor, model_checks
from kdlib.diagnostics.context import Context, Finding, as_text, ordered
from kdlib.diagnostics.doctor import Visit, rewritten
from kdlib.diagnostics.memory import forecast
from kdlib.losses.objective import ledger
from kdlib.losses.signals import kept
from kdlib.models.teacher import Inside, signal_of
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import project_root
from kdlib.training.run import train
from kdlib.workbench import cli

QUICKSTART = (project_root() / "configs" / "quickstart.yaml").read_text()
FOUR = """# four spaces, and room inside the brackets
loss:
    weights: { kd: 0.7,   ce: 0.3 }     # as ever
    temperature:    200  # hot
    curriculum:
        - until: 0.3     # first
          weights: {}
        - until: 1.0
teacher:  {model: 'quoted',}

# the end
"""
FLAT = """loss:
  curriculum:
  - {until: 0.3}
  # between
  - until: 1.0
    weights: {hidden: 0.5}
  weights:
    kd: 1e-4   # the last, and then

# another section's comment
training:
  subset: null
  empty:
  flag: yes
"""
SICK = Path(__file__).parent / "sick"
CULPRITS = {  # config → (setting, severity, a figure in the finding, what --fix writes)
    "steps_counted_in_batches": (
        "training.warmup_steps",
        "critical",
        "500 optimizer steps in a training of 12",
        0.1,
    ),
    "feature_term_from_the_start": (
        "loss.curriculum.0.weights.hidden",
        "warning",
        "comes in with phase 2, at 0.5",
        0,
    ),
    "weights_of_a_batchmean": ("loss.weights.kd", "warning", "times as much as kd", None),
    "float16_overflow": ("precision", "critical", "float16", "auto"),
    "rows_without_a_target": ("data.text", "warning", "shorter than two tokens", "text"),
    "temperature_that_teaches_nothing": ("loss.temperature", "critical", "T = 100", 4.0),
}


@pytest.fixture(scope="session")
def patients(tmp_path_factory) -> dict[str, Path]:
    """Two teachers that are sure of themselves, one of them beyond float16; and a text with a column of
    answers.
    """
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
    rows = [
        {"text": text, "answer": answer} for text, answer in zip(sentences(700, seed=1), answers, strict=True)
    ]
    DatasetDict(train=Dataset.from_list(rows[:600]), validation=Dataset.from_list(rows[600:])).save_to_disk(
        folder / "answers"
    )
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


@pytest.fixture(scope="session")
def well(patients) -> dict:
    """The quickstart with a tiny teacher and text, as plain data."""
    tiny = {
        "teacher.model": str(patients["sharp"]),
        "student.layers": 2,
        "data.source": str(patients["text"]),
        "data.max_length": 32,
        "data.max_eval_rows": 40,
        "training.per_device_train_batch_size": 8,
        "training.use_cpu": True,
        "precision": "float32",
    }
    return load(project_root() / "configs" / "quickstart.yaml", tiny).as_dict()


@pytest.fixture(scope="session")
def made(well) -> dict:
    """What does not depend on training and loss, made once for all tests."""
    context = Context(parse(well))
    return {
        name: getattr(context, name)
        for name in ("tokenizer", "configs", "split", "prepared", "teacher", "student")
    }


@pytest.fixture(scope="session")
def usual_forecast(well):
    return forecast(parse(well))


@pytest.fixture(autouse=True)
def forecast_made_once(monkeypatch, usual_forecast):
    """A second for each of some seventy visits would tell nothing more: tests/test_diagnostics_memory.py
    asks about forecasts.
    """
    monkeypatch.setattr(doctor, "forecast", lambda config, **options: usual_forecast)


@pytest.fixture
def kd_doctor(tmp_path, monkeypatch, capsys):
    """Runs `kd doctor …` here: (exit status, standard output, standard error)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kd", "doctor", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    return call


def named(findings: list[Finding]) -> dict[str, str]:
    """{where: severity}, without notes."""
    return {each.where: each.severity for each in findings if each.severity != "note"}


@pytest.mark.parametrize("name", CULPRITS)
def test_the_doctor_names_the_culprit_and_its_fix_trains(name, sick, tmp_path):
    where, severity, words, written = CULPRITS[name]
    file = sick(name)
    visit = doctor.visit(file, fix=True)
    blamed = [each for each in visit.found if each.where == where]
    assert [(each.severity, words in each.what) for each in blamed][:1] == [(severity, True)], visit.found
    assert where in visit.changes
    assert written is None or visit.changes[where] == written
    assert not [each for each in visit.left if each.change or each.severity == "critical"], visit.left
    assert where not in {each.where for each in visit.left}

    before, after = file.read_text().splitlines(), visit.text.splitlines()
    touched = [line for line in after if line not in before]
    # every other line is as it was, comments and all
    assert len(after) - len(before) <= len(touched) <= len(visit.changes)
    assert [line for line in after if line in before] == [line for line in before if line in after]

    config = parse(yaml.safe_load(visit.text))
    trainer = train(config, StudentFolder(tmp_path / "run"), label="mended", stop_after=6, **pieces(config))
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert all(math.isfinite(line["loss"]) for line in logged)
    assert max(line["learning_rate"] for line in logged) > 0.1 * config.training["learning_rate"]
    assert logged[-1]["loss"] < logged[0]["loss"]


def test_a_config_that_is_well_has_no_findings(well):
    assert named(doctor.diagnose(parse(well))) == {}


@pytest.mark.slow
def test_the_quickstart_itself_has_no_findings(kd_doctor):
    status, said, _ = kd_doctor("configs/quickstart.yaml", "--strict", "--json")
    assert (status, json.loads(said)["found"]) == (0, [])


TRAINING = {  # what is changed in training → the findings; 476 rows of 32 tokens, batches of 8
    "warm-up of most steps": ({"warmup_steps": 20}, {"warmup_steps": "warning"}),
    "warm-up as long as the training, of a schedule without one": (
        {"warmup_steps": 36, "lr_scheduler_type": "constant"},
        {},
    ),
    "the schedule's own steps": (
        {"lr_scheduler_kwargs": {"num_training_steps": 4000}},
        {"lr_scheduler_kwargs": "critical"},
    ),
    "a word that the schedule does not know": (
        {"lr_scheduler_kwargs": {"cycles": 2}},
        {"lr_scheduler_kwargs": "critical"},
    ),
    "a word that is read after the warm-up": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "many"}},
        {"lr_scheduler_kwargs": "critical"},
    ),
    "a plateau, whose course nobody knows": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {}),
    "a course that ends too early": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 8}},
        {"lr_scheduler_type": "warning"},
    ),
    "flat near zero": (
        {"lr_scheduler_type": {"steps": {0: 1.0, 0.2: 0.01}}, "warmup_steps": 0},
        {"lr_scheduler_type": "warning"},
    ),
    "no learning rate": ({"learning_rate": 0}, {"learning_rate": "critical"}),
    "high": ({"learning_rate": 0.2}, {"learning_rate": "warning"}),
    "far too high": ({"learning_rate": 10}, {"learning_rate": "critical"}),
    "low by its schedule": (
        {"lr_scheduler_type": {"linear": [0.01, 0.01]}, "warmup_steps": 0},
        {"learning_rate": "warning"},
    ),
    "far too low": ({"learning_rate": 1e-8}, {"learning_rate": "critical"}),
    "what is low for AdamW is low for SGD": (
        {"optim": "sgd", "learning_rate": 2e-5},
        {"learning_rate": "warning"},
    ),
    "what is high for AdamW is not for SGD": ({"optim": "sgd", "learning_rate": 0.5}, {}),
    "an optimizer without a rule": ({"optim": "rmsprop", "learning_rate": 1e-7}, {}),
    "batches for steps": (
        {"gradient_accumulation_steps": 4, "max_steps": "batches"},
        {"max_steps": "warning"},
    ),
    "logged too seldom": ({"logging_steps": 100, "eval_steps": 10}, {"logging_steps": "warning"}),
    "evaluated too seldom": ({"eval_steps": 500}, {"eval_steps": "warning"}),
    "never evaluated": ({"eval_strategy": "no", "eval_steps": 500}, {}),
    "few tokens": ({"per_device_train_batch_size": 1}, {"gradient_accumulation_steps": "warning"}),
    "more rows than there are": (
        {"gradient_accumulation_steps": 100},
        {"gradient_accumulation_steps": "warning"},
    ),
    "no whole batch": (
        {"max_steps": -1, "per_device_train_batch_size": 1000, "dataloader_drop_last": True},
        {"": "critical"},
    ),
    "by epochs": ({"max_steps": -1, "num_train_epochs": 2}, {}),
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_that_cannot_go_well_is_named(name, well, made):
    changes, expected = TRAINING[name]
    if changes.get("max_steps") == "batches":
        changes = {**changes, "max_steps": -(-len(made["prepared"].train) // 8)}
    config = parse({**well, "training": {**well["training"], **changes}})
    expected = {f"training.{key}".rstrip("."): severity for key, severity in expected.items()}
    assert named(doctor.diagnose(config, quick=True, made=made)) == expected


LOSS = {
    "a phase without a step": (
        {"curriculum": [{"until": 0.51}, {"until": 0.52, "weights": {"kd": 1.0}}, {"until": 1.0}]},
        {"curriculum.1.until": "warning"},
    ),
    "a feature term that fades": (
        {
            "weights": {"kd": 0.7, "hidden": 0.5},
            "curriculum": [{"until": 0.5}, {"until": 1.0, "weights": {"hidden": 0}}],
        },
        {},
    ),
    "a feature term alone at first": (
        {"weights": {"hidden": 0.5}, "curriculum": [{"until": 0.5}, {"until": 1, "weights": {"hidden": 1}}]},
        {"curriculum.0.weights.hidden": "warning"},
    ),
    "top k without kd": ({"weights": {"ce": 1.0, "reverse_kl": 1.0}, "top_k": 8}, {"top_k": "warning"}),
    "attention": ({"weights": {"kd": 0.7, "attention": 0.5}}, {}),
    "no such layers": (
        {"weights": {"kd": 0.7, "hidden": 0.5}, "features": {"layers": [[0, 9]]}},
        {"features.layers": "critical"},
    ),
    "hot at first": ({"temperature": {"linear": [100, 1]}}, {"temperature": "warning"}),
    "hot by term": ({"temperature": {"kd": 100}}, {"temperature.kd": "critical"}),
    "warm, which teaches all the same": ({"temperature": 16.0}, {"temperature": "warning"}),
    "a feature term a thousand times too large": (
        {"weights": {"kd": 0.7, "ce": 0.3, "hidden": 1e5}},
        {"weights.hidden": "warning"},
    ),
    "a weight that is never there": ({"weights": {"kd": 0.7, "ce": 0.3, "hidden": 0}}, {}),
}


@pytest.mark.parametrize("name", LOSS)
def test_a_loss_that_cannot_go_well_is_named(name, well, made):
    changes, expected = LOSS[name]
    findings = doctor.diagnose(parse({**well, "loss": {**well["loss"], **changes}}), made=made)
    assert named(findings) == {f"loss.{key}": severity for key, severity in expected.items()}, findings
    if name == "a feature term alone at first":
        # a weight of 0 would leave phase 1 with nothing to learn
        assert not any(each.change for each in findings)
    if name == "attention":
        assert "eager" in next(each.what for each in findings if each.where == "loss.weights.attention")


ADVICE = {  # a sick loss or training → the advice's own words, and what it says done by hand
    "top k beside another divergence": (
        {"loss": {"weights": {"reverse_kl": 0.7, "ce": 0.3}, "top_k": 8}},
        "write kd in place of reverse_kl among the weights, and divergence: reverse_kl",
        {"loss": {"weights": {"kd": 0.7, "ce": 0.3}, "divergence": "reverse_kl", "top_k": 8}},
    ),
    "samples beside another divergence": (
        {"loss": {"weights": {"reverse_kl": 1.0}, "samples": 8}},
        "or leave samples out",
        {"loss": {"weights": {"reverse_kl": 1.0}}},
    ),
    "a divergence that stands there twice": (
        {"loss": {"weights": {"reverse_kl": 1.0}, "divergence": "reverse_kl"}},
        "leave it out: reverse_kl is a term by itself",
        {"loss": {"weights": {"reverse_kl": 1.0}}},
    ),
    "top k beside ce alone": (
        {"loss": {"weights": {"ce": 1.0}, "top_k": 8}},
        "give kd a weight, or leave top_k out",
        {"loss": {"weights": {"ce": 1.0}}},
    ),
    "hot at first": ({"loss": {"temperature": {"linear": [80, 1]}}}, "write {linear: [4.0, 1.0]}", None),
    "hot at last": ({"loss": {"temperature": {"cosine": [1, 80]}}}, "write {cosine: [1.0, 4.0]}", None),
    "hot in a table": (
        {"loss": {"temperature": {"steps": {0: 80, 0.5: 2}}}},
        "write {steps: {0.0: 4.0, 0.5: 2.0}}",
        None,
    ),
    "no learning rate": ({"training": {"learning_rate": 0}}, "try 0.0", None),
    "few tokens": (
        {"training": {"per_device_train_batch_size": 1}},
        "by 8 times",
        {"training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}},
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_advice_that_is_followed_ends_its_finding_and_brings_no_other(name, well, made):
    changes, words, by_hand = ADVICE[name]
    raw = {**well, **{section: {**well[section], **values} for section, values in changes.items()}}
    (finding,) = [each for each in doctor.diagnose(parse(raw), made=made) if each.severity != "note"]
    assert words in finding.fix
    mended = parse(raw, finding.change or {})
    if by_hand:
        mended = parse(
            {**well, **{section: {**well[section], **values} for section, values in by_hand.items()}}
        )
    assert named(doctor.diagnose(mended, made=made)) == {}


def test_what_is_measured_is_what_a_training_begins_with(well, made, tmp_path):
    """The first batch of the doctor, in the order of the rows, through the trainer's own objective."""
    config = parse({**well, "loss": {**well["loss"], "weights": {"kd": 0.7, "ce": 0.3, "hidden": 0.5}}})
    context = Context(config, made)
    at = context.objective.at(0.0)
    batch = collate([made["prepared"].train[i] for i in range(8)], pad_id=0)
    tokens = kept(batch["labels"])
    inside = {"hidden": True, "attention": False}
    with torch.no_grad():
        student = signal_of(
            made["student"], batch, tokens, vocabulary=300, form=None, inside=Inside((0, 1), **inside)
        )
        teacher = made["teacher"](batch, tokens, Inside((1, 3), **inside))
        book = ledger(student, teacher, tokens.targets, at=at, count=len(tokens.targets))
    assert context.batch.means(at) == pytest.approx(
        {name: entry.mean.item() for name, entry in book.entries.items()}, rel=1e-4
    )


def test_a_proposed_weight_makes_shares_equal(well, made):
    raw = {**well, "loss": {**well["loss"], "weights": {"kd": 1e-4, "ce": 0.3}}}
    (finding,) = [each for each in doctor.diagnose(parse(raw), made=made) if each.severity == "warning"]
    context = Context(parse(raw, finding.change), made)
    at = context.objective.at(0.0)
    shares = {name: at.weights[name] * mean for name, mean in context.batch.means(at).items()}
    assert shares["kd"] == pytest.approx(shares["ce"], rel=0.05)


PRECISIONS = {
    "float16 on a CPU": ("float16", "cpu", (0, 0), (), "critical"),
    "float16 where there is bfloat16": ("float16", "cuda", (8, 0), None, "warning"),
    "float16 on an old GPU": ("float16", "cuda", (7, 0), None, None),
    "bfloat16 on an old GPU": ("bfloat16", "cuda", (7, 5), None, "warning"),
    "bfloat16 on a new one": ("bfloat16", "cuda", (9, 0), None, None),
    "bfloat16 on a CPU without it": ("bfloat16", "cpu", (0, 0), (), "warning"),
    "bfloat16 on a CPU with it": ("bfloat16", "cpu", (0, 0), ("amx_bf16",), None),
    "bfloat16 on a CPU that does not say": ("bfloat16", "cpu", (0, 0), None, None),
    "float32": ("float32", "cpu", (0, 0), (), None),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_dtype_that_the_machine_is_bad_at_is_named(name, well, monkeypatch):
    precision, device, capability, instructions, severity = PRECISIONS[name]
    monkeypatch.setattr(model_checks, "device_of", lambda config: torch.device(device))
    monkeypatch.setattr(hardware, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    findings = list(model_checks.device_has_the_dtype(Context(parse({**well, "precision": precision}))))
    assert [(each.severity, each.change) for each in findings] == [(severity, {"precision": "auto"})] * bool(
        severity
    )


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_reentrant_checkpointing_beside_a_feature_term_is_mended(well, made, kind):
    training = {
        **well["training"],
        f"{kind}_checkpointing": True,
        f"{kind}_checkpointing_kwargs": {"use_reentrant": True},
    }
    raw = {**well, "training": training}
    assert list(config_checks.checkpointing_lets_gradients_through(Context(parse(raw), made))) == []
    raw = {**raw, "loss": {**well["loss"], "weights": {"kd": 0.7, "hidden": 0.5}}}
    (finding,) = config_checks.checkpointing_lets_gradients_through(Context(parse(raw), made))
    assert finding.change == {f"training.{kind}_checkpointing_kwargs.use_reentrant": False}
    assert (
        list(config_checks.checkpointing_lets_gradients_through(Context(parse(raw, finding.change), made)))
        == []
    )


def texts(folder: Path, train: list[str], validation: list[str]) -> str:
    DatasetDict(
        train=Dataset.from_dict({"text": train}), validation=Dataset.from_dict({"text": validation})
    ).save_to_disk(folder)
    return str(folder)


LONG = [" ".join(sentences(4, seed=i)) for i in range(60)]  # of some 80 tokens
DATA = {  # training text, validation text, settings → findings
    "well": (sentences(300), sentences(60, seed=5), {}, {}),
    "long texts are cut": (LONG, sentences(60, seed=5), {"packing": False}, {"data.max_length": "warning"}),
    "long texts are packed": (sentences(300) + LONG, sentences(60, seed=5), {}, {}),
    "held-out texts stand in train": (sentences(300), sentences(60), {}, {}),  # a note: they are left out
    "train is mostly repetition": (sentences(200) * 3, sentences(60, seed=5), {}, {"data.source": "warning"}),
    "little is held out": (sentences(300), sentences(60, seed=5)[:3], {}, {"data.validation": "warning"}),
    "few rows are taken": (
        sentences(300),
        sentences(60, seed=5),
        {"max_eval_rows": 4},
        {"data.max_eval_rows": "warning"},
    ),
    "nothing to predict": (["a"] * 300, ["b"] * 60, {}, {"data.text": "critical", "data.source": "critical"}),
    "all is held out": (sentences(60), sentences(60), {}, {"data.source": "critical"}),
    "some say nothing": (
        [*sentences(300), *ascii_letters[:30]],
        sentences(60, seed=5),
        {},
        {"data.text": "warning"},
    ),
    "rows beyond the positions": (
        sentences(300),
        sentences(60, seed=5),
        {"max_length": 100},
        {"data.max_length": "critical"},
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_a_text_from_which_little_can_be_learned_is_named(name, well, made, tmp_path):
    train_texts, validation, settings, expected = DATA[name]
    source = {"source": texts(tmp_path / "texts", train_texts, validation), **settings}
    reused = {key: made[key] for key in ("tokenizer", "configs")}
    findings = doctor.diagnose(
        parse({**well, "data": {**well["data"], "max_eval_rows": None, **source}}), quick=True, made=reused
    )
    assert named(findings) == expected, findings


def test_texts_that_come_twice_hint_at_the_wrong_column(well, made, tmp_path):
    source = tmp_path / "twice.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(600) * 3))
    reused = {key: made[key] for key in ("tokenizer", "configs")}
    raw = {**well, "data": {**well["data"], "source": str(source)}}
    assert named(doctor.diagnose(parse(raw), quick=True, made=reused)) == {"data.text": "warning"}


def test_what_cannot_be_had_is_named_once_and_the_other_checks_go_on(well):
    raw = {
        **well,
        "data": {**well["data"], "source": "missing.jsonl"},
        "training": {**well["training"], "warmup_steps": 900},
    }
    findings = doctor.diagnose(parse(raw))
    assert named(findings) == {"data.source": "critical", "training.warmup_steps": "critical"}
    assert len([each for each in findings if each.where == "data.source"]) == 1
    raw = {**well, "teacher": {"model": "./nowhere"}}
    findings = [each for each in doctor.diagnose(parse(raw)) if each.severity == "critical"]
    assert [(each.where, "no such folder" in each.what) for each in findings] == [("teacher.model", True)]


def test_a_student_of_its_own_is_held_against_the_teacher(well, made, tmp_path, patients):
    tokenizer = AutoTokenizer.from_pretrained(patients["sharp"])
    tokenizer.add_special_tokens({"eos_token": "a"})
    tokenizer.chat_template = "{{ messages }}"
    small = LlamaConfig(
        vocab_size=304, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    for part in (LlamaForCausalLM(small), tokenizer):
        part.save_pretrained(tmp_path / "student")
    raw = {
        **well,
        "student": {"from": str(tmp_path / "student")},
        "loss": {**well["loss"], "weights": {"kd": 0.7, "hidden": 0.5}},
    }
    findings = doctor.diagnose(
        parse(raw), made={name: made[name] for name in ("tokenizer", "split", "prepared", "teacher")}
    )
    said = {
        (each.severity, each.where, word)
        for each in findings
        for word in ("eos_token", "chat_template", "304 rows", "projection")
        if word in each.what + each.why
    }
    assert said == {
        ("warning", "student.from", "eos_token"),
        ("note", "student.from", "chat_template"),
        ("note", "student.from", "304 rows"),
        ("note", "loss.weights.hidden", "projection"),
    }

    tiny_tokenizer(sentences(50, seed=9), size=290).save_pretrained(tmp_path / "student")
    findings = doctor.diagnose(
        parse(raw), made={name: made[name] for name in ("split", "prepared", "teacher")}
    )
    assert ("student", "critical") in named(findings).items()
    assert "different vocabularies" in next(each.what for each in findings if each.where == "student")
    assert any("was not measured" in each.what for each in findings)


def test_a_teacher_that_says_nan_is_named(well, made, patients, tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer(sentences(200)).save_pretrained(tmp_path / "broken")
    raw = {
        **well,
        "teacher": {"model": str(tmp_path / "broken")},
        "student": {"from": "teacher", "layers": 2, "keep": "even"},
    }
    assert named(doctor.diagnose(parse(raw))) == {"teacher.model": "critical"}


def test_an_untrained_teacher_is_named_and_no_temperature_is_proposed(well, made, tmp_path):
    tiny_model().save_pretrained(tmp_path / "flat")
    tiny_tokenizer(sentences(200)).save_pretrained(tmp_path / "flat")
    raw = {**well, "teacher": {"model": str(tmp_path / "flat")}}
    (finding,) = [each for each in doctor.diagnose(parse(raw)) if each.severity != "note"]
    assert (finding.where, finding.severity, finding.change) == ("loss.temperature", "warning", None)


def test_the_command_says_what_is_wrong_by_its_exit_status(kd_doctor, sick, tmp_path):
    file = sick("feature_term_from_the_start")
    assert [
        kd_doctor(file, "--quick", *words)[0] for words in ((), ("--strict",), ("-o", "precision=float16"))
    ] == [0, 1, 2]
    status, said, err = kd_doctor(file, "--quick", "-o", "loss.temprature=3", "-o", "data.max_length=1")
    assert status == 2
    assert "CRITICAL  loss.temprature" in said
    assert "CRITICAL  data.max_length" in said
    assert "did you mean 'temperature'?" in said
    assert "Traceback" not in said + err
    assert kd_doctor(tmp_path / "absent.yaml")[0] == 2
    assert (tmp_path / "broken.yaml").write_text("a: [1, 2")
    status, said, _ = kd_doctor(tmp_path / "broken.yaml")
    assert (status, "not valid YAML" in said) == (2, True)


def test_the_command_mends_into_another_file_and_says_what_it_changed(kd_doctor, sick, tmp_path):
    file, target = sick("steps_counted_in_batches"), tmp_path / "mended.yaml"
    before = file.read_text()
    for words in (("--fix",), ("--output", target)):
        status, _, err = kd_doctor(file, *words)
        assert (status, "--fix and --output go together" in err, target.exists()) == (1, True, False)
    status, said, _ = kd_doctor(file, "--quick", "--fix", "--output", target, "-o", "seed=7")
    assert (status, file.read_text() == before) == (0, True)
    assert "changed:\n  seed: 7\n  training.warmup_steps: 0.1" in said
    assert "left to you" in said
    changed = target.read_text()
    assert (
        changed.replace("warmup_steps: 0.1                #", "warmup_steps: 500                #").replace(
            "seed: 7\n", ""
        )
        == before
    )
    assert load(target).seed == 7
    status, said, _ = kd_doctor(target, "--quick", "--json", "--strict")
    assert status == 0
    assert {each["severity"] for each in json.loads(said)["found"]} == {"note"}
    assert kd_doctor(file, "-o", "seed=x", "--fix", "--output", tmp_path / "none.yaml")[0] == 2
    assert not (tmp_path / "none.yaml").exists()


@pytest.mark.parametrize(("gib", "severity"), [(0.01, "critical"), (64, None)])
def test_a_training_that_does_not_fit_the_device_is_named_with_the_forecast(
    well, made, monkeypatch, gib, severity
):
    monkeypatch.setattr(doctor, "forecast", forecast)
    monkeypatch.setattr("kdlib.diagnostics.memory.device_memory", lambda device: (int(gib * 2**30),) * 2)
    found = {each.where: each for each in doctor.diagnose(parse(well), quick=True, made=made)}
    assert getattr(found.get("training.per_device_train_batch_size"), "severity", None) == severity
    if severity:
        assert "and the device has 0.0" in found["training.per_device_train_batch_size"].what


@pytest.mark.parametrize(
    ("text", "changes", "lines"),
    [
        (QUICKSTART, {"training.warmup_steps": 0.2}, 1),
        (QUICKSTART, {"loss.weights.kd": 0.5, "teacher.model": "another"}, 2),
        (QUICKSTART, {"loss.temperature": 2, "training.optim": "sgd"}, 2),
        (QUICKSTART, {"data.subset": None}, 0),
        (QUICKSTART, {}, 0),
        (FOUR, {"loss.temperature": 2}, 1),
        (FOUR, {"loss.weights.hidden": 0.1}, 1),
        (FOUR, {"loss.curriculum.0.weights.hidden": 0, "loss.curriculum.1.weights.kd": 1}, 2),
        (FLAT, {"loss.curriculum.0.weights.hidden": 0}, 1),
        (FLAT, {"loss.weights.ce": 0.3, "training.empty": 3}, 2),
        (FLAT, {"training.activation_checkpointing_kwargs.use_reentrant": False, "seed": 3}, 2),
    ],
)
def test_only_the_lines_that_change_are_written_anew(text, changes, lines):
    after = rewritten(text, changes)
    before, now = text.splitlines(), after.splitlines()
    assert len([line for line in now if line not in before]) == lines
    assert [line for line in now if line in before] == [line for line in before if line in now]
    assert len([line for line in before if line not in now]) <= lines
    assert all(comment in after for comment in [line.split("#")[1] for line in before if "#" in line])
    assert yaml.safe_load(after) == _changed(yaml.safe_load(text), changes)


def _changed(raw, changes):
    """The same by plain dictionaries and lists."""
    for path, value in changes.items():
        *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        section = raw
        for key in way:
            section = section[key] if isinstance(key, int) else section.setdefault(key, {})
        section[last] = value
    return raw


def test_a_new_key_does_not_come_between_a_comment_and_its_section():
    after = rewritten(FLAT, {"loss.features": {"layers": "even"}, "training.optim": "sgd"})
    assert after.replace("  features: {layers: even}\n", "").replace("  optim: sgd\n", "") == FLAT
    assert after.index("features:") < after.index("  weights:\n    kd")


def test_findings_are_ordered_and_counted():
    some = [
        Finding(severity, f"a.{severity}", "what", "why", "fix")
        for severity in ("note", "warning", "critical", "warning")
    ]
    found = ordered([*some, Finding("warning", "b", "what", "why", "fix", {"b": 1})])
    assert [each.severity for each in found] == ["critical", "warning", "warning", "note"]
    assert as_text(found).startswith("1 critical, 2 warnings, 1 note")
    assert "--fix  b: 1" in as_text(found)
    assert as_text([]) == "no findings"
    assert Visit(found, [], {}, None).as_data()["found"][2]["change"] == {"b": 1}


@pytest.mark.parametrize(
    ("severities", "usual", "strict"),
    [([], 0, 0), (["note"], 0, 0), (["note", "warning"], 0, 1), (["warning", "critical"], 2, 2)],
)
def test_the_exit_status_goes_by_the_gravest(severities, usual, strict):
    some = [Finding(severity, "a", "what", "why", "fix") for severity in severities]
    visit = Visit(some, some, {}, None)
    assert (visit.exit_status(strict=False), visit.exit_status(strict=True)) == (usual, strict)
