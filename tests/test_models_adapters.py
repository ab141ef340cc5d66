"""Adapters: what they change and what not, how they are saved, and what is refused of them."""

import json

import pytest
import torch
from conftest import tiny_model
from tiny_architectures import tiny
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from kdlib.config.models import AdapterConfig
from kdlib.errors import ModelError
from kdlib.models import adapters, loading
from kdlib.models.adapters import adapted, joined, off
from kdlib.models.loading import load_config, load_model

pytest.importorskip("peft")
IDS = torch.arange(3, 19)[None]


def trained(model, how=None):
    """The model with an adapter that has learned something."""
    model = adapted(model, AdapterConfig(r=4, **(how or {}))).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def apart(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.fixture
def base(tmp_path):
    """A folder with an untied model."""
    folder = tmp_path / "base"
    tiny("llama", tie_word_embeddings=False).save_pretrained(folder)
    return folder


def test_an_adapter_changes_nothing_at_first_and_alone_is_trained():
    model, before = tiny_model().eval(), logits(tiny_model().eval())
    made = adapted(model, AdapterConfig(r=4))
    assert torch.equal(logits(made), before)
    named = {name: each.requires_grad for name, each in made.named_parameters()}
    assert {name for name, is_trained in named.items() if is_trained} == {n for n in named if ".lora_" in n}
    assert any(named.values())


def test_an_adapter_is_in_float32_on_a_base_of_any_dtype():
    made = adapted(tiny_model().bfloat16(), AdapterConfig(r=4))
    dtypes = {each.dtype for each in made.parameters() if each.requires_grad}
    assert (dtypes, made.dtype) == ({torch.float32}, torch.bfloat16)


@pytest.mark.parametrize("how", [{}, {"lora_dropout": 0.5}, {"modules_to_save": ["norm", "lm_head"]}])
def test_switched_off_it_is_the_base_to_the_last_bit_and_then_as_before(how):
    before = logits(tiny("llama", tie_word_embeddings=False))
    made = trained(tiny("llama", tie_word_embeddings=False), how).train()
    which = [name for name, each in made.named_parameters() if each.requires_grad]
    with off(made):
        assert torch.equal(logits(made), before)
    assert made.training
    assert which == [name for name, each in made.named_parameters() if each.requires_grad]
    assert apart(logits(made.eval()), before) > 0.01


@pytest.mark.parametrize("how", [{}, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}])
def test_joined_with_its_base_it_says_the_same_and_loads_as_any_model(base, tmp_path, how):
    made = trained(load_model(str(base)), {**how, "merge": True})
    state = {name: each.clone() for name, each in made.state_dict().items()}
    adapters.save(made, tmp_path / "saved", made.state_dict())
    assert all(torch.equal(each, state[name]) for name, each in made.state_dict().items())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert not adapters.is_adapted(loaded)
    assert apart(logits(loaded), logits(made)) < 1e-5


def test_saved_as_an_adapter_it_loads_by_peft_by_transformers_and_here(base, tmp_path):
    from peft import AutoPeftModelForCausalLM

    made, folder = trained(load_model(str(base))), tmp_path / "saved"
    made.generation_config.eos_token_id = [2, 5]
    adapters.save(made, folder, made.state_dict())
    expected = logits(made)
    assert not (folder / "model.safetensors").exists()
    assert load_config(str(folder)).hidden_size == made.config.hidden_size
    here = load_model(str(folder))
    assert here.generation_config.eos_token_id == [2, 5]
    assert not adapters.is_adapted(here)
    assert apart(logits(here), expected) < 1e-5
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # peft's, of transformers 5.23
        by_peft = AutoPeftModelForCausalLM.from_pretrained(folder)
    for each in (AutoModelForCausalLM.from_pretrained(folder), by_peft):
        assert torch.equal(logits(each), expected)


def test_a_tied_head_stays_tied_when_it_is_joined(tmp_path):
    made = trained(tiny_model().eval(), {"merge": True})
    adapters.save(made, tmp_path / "saved", made.state_dict())
    loaded = load_model(str(tmp_path / "saved"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert apart(logits(loaded), logits(made)) < 1e-5


def test_a_classifiers_head_is_trained_whole_and_saved():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    made = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, num_labels=3)).eval()
    made = trained(made)
    learns = {name for name, each in made.named_parameters() if each.requires_grad and ".lora_" not in name}
    assert {name.split(".")[0] for name in learns} == {"classifier"}
    plain = BertForSequenceClassification(made.config).eval()
    plain.load_state_dict(joined(made, made.state_dict()))
    assert apart(logits(plain), logits(made)) < 1e-5


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj', which no part .* did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj', which no part"),
        ({"target_modules": r".*\.5\..*_proj"}, "which no part of the student is called"),
        ({"target_modules": ["input_layernorm"]}, "peft makes none of this"),
        ({"modules_to_save": ["score"]}, "modules_to_save: found 'score'"),
        ({"target_modules": ["lm_head"]}, "lm_head of a llama model is embedding and head at once"),
    ],
)
def test_names_of_no_part_or_of_what_cannot_be_changed_are_refused(how, said):
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ModelError, match=said):
        adapted(model, AdapterConfig(**how))


def test_an_adapter_without_safetensors_or_without_its_bases_name_is_refused(base, tmp_path):
    folder = tmp_path / "saved"
    adapters.save(made := trained(load_model(str(base))), folder, made.state_dict())
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    stated = json.loads(file.read_text())
    file.write_text(json.dumps({**stated, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="needs the name of its base"):
        load_config(str(folder))
    file.write_text(json.dumps(stated))
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="adapter_model.safetensors; save it anew"):
        load_model(str(folder))


def test_without_peft_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'kdlib\[adapters\]'"):
        adapted(tiny_model(), AdapterConfig())
