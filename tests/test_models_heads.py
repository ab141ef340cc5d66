"""What the head reads and makes of it is seen, so that logits by the chunk are the model's own."""

import pytest
import torch
from conftest import tiny_model
from tiny_architectures import tiny
from torch import nn

from kdlib.losses.signals import Form, kept
from kdlib.models.heads import head_form
from kdlib.models.hooks import as_evaluated
from kdlib.models.teacher import form_error, signal_of

HEADS = {  # of each kind that transformers has: what is read lies in places of many names
    "llama": ({}, Form()),
    "bert": ({}, Form()),  # a layer of its own before the head
    "rembert": ({}, Form()),
    "opt": ({}, Form()),  # hidden states are projected down before the head
    "llama4_text": ({}, Form()),
    "openai-gpt": ({}, Form()),
    "mpt": ({}, Form()),
    "gptj": ({}, Form()),  # with a bias
    "mamba": ({}, Form()),
    "minicpm3": (
        {"dim_model_base": 4, "num_key_value_heads": 4},
        Form(),
    ),  # scales what the head reads, by a name of those that follow
    "cohere": ({"logit_scale": 0.25}, Form(scale=0.25)),
    "granite": ({"logits_scaling": 8.0}, Form(scale=0.125)),
    "gemma2": ({}, Form(softcap=30.0)),
    "recurrent_gemma": ({}, Form(softcap=30.0)),
    "nanochat": ({}, Form(softcap=15.0)),
    "prophetnet": ({}, None),
}
IDS = torch.arange(3, 15).reshape(2, 6)
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_logits_by_the_form_are_the_models_own_where_a_cap_binds_too(name, dtype):
    settings, form = HEADS[name]
    model = tiny(name, **settings).to(dtype)
    assert head_form(model) == form
    if form is None:
        return
    model.get_output_embeddings().weight.data *= 500  # a trained head's logits, and more
    assert form_error(model, BATCH, vocabulary=90, form=form) < 1
    assert (form.softcap is None) or form_error(model, BATCH, vocabulary=90, form=Form()) > 1


def test_a_cap_that_no_setting_names_is_seen_where_it_binds(monkeypatch):
    monkeypatch.setattr("kdlib.models.heads.CAPS", ())
    assert head_form(tiny("recurrent_gemma")) is None


def test_a_head_whose_logits_are_made_otherwise_is_not_taken_for_a_plain_one():
    model = tiny_model()
    original = model.forward

    def forward(input_ids, **options):
        output = original(input_ids=input_ids, **options)
        output.logits = 2 * output.logits
        return output

    model.forward = forward
    assert head_form(model) is None


def test_a_head_of_packed_weights_is_no_plain_one():
    model = tiny_model()
    model.lm_head.weight = nn.Parameter(torch.zeros(2400, 1, dtype=torch.uint8), requires_grad=False)
    assert head_form(model) is None


def test_looking_at_a_head_leaves_every_modules_mode():
    model = tiny_model().train()
    model.lm_head.eval()
    head_form(model)
    assert model.model.training
    assert not model.lm_head.training
    with pytest.raises(KeyError), as_evaluated(model):
        raise KeyError
    assert model.model.training


@pytest.mark.parametrize("form", [Form(), None], ids=["linear", "dense"])
def test_a_padded_head_is_cut_to_the_tokenizers_size(form):
    model = tiny_model(vocabulary=320).eval()
    batch = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    tokens = kept(batch["input_ids"])
    signal = signal_of(model, batch, tokens, vocabulary=300, form=form)
    expected = model(**batch).logits[0, :-1, :300]
    torch.testing.assert_close(signal.logits(), expected, rtol=1e-5, atol=1e-5)
