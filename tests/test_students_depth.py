import json
import os
from contextlib import ExitStack

import pytest
import torch
from conftest import tiny_model
from tiny_architectures import LARGE, tiny
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kdlib.errors import ModelError
from kdlib.models.hooks import layers_of
from kdlib.students.depth import shallower, with_layers

IDS = torch.tensor([[(7 * n + 5) % 60 + 3 for n in range(24)]])
SOME = [[0, 2], [0, 3], [1, 3]]
NOT_KEPT = {"gemma3n_text": [[0, 3]]}  # keys of a layer that is gone
GEMMA_3N = {"layer_types": ["full_attention", "sliding_attention"] * 2, "intermediate_size": [32] * 4}
OWN = {  # of each its own way to say which layer is of which kind
    "cohere2": {},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma2": {},
    "gemma3n_text": {**GEMMA_3N, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0, 1]},
    "qwen2_moe": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [0, 2]},
    "recurrent_gemma": {},
}
ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - OWN.keys() - LARGE)  # ARCHITECTURES=all: 10 minutes
SHORT = ("deepseek_v3", "gemma3n_text", "gpt_neo", "jamba", "llama4_text", "qwen2_moe")


def trained(name: str, **settings: object):
    """One of this model type, its weights far from those of a start."""
    model = tiny(name, **settings)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def said(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def passing_over(teacher, keep) -> torch.Tensor:
    """What the teacher says when each layer but these hands on what it was given."""

    def pass_over(layer, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return given if isinstance(output, torch.Tensor) else type(output)([given, *output[1:]])

    with ExitStack() as hooks:
        for number, layer in enumerate(layers_of(teacher)):
            if number not in keep:
                hooks.enter_context(layer.register_forward_hook(pass_over, with_kwargs=True))
        return said(teacher)


def computes_as_the_teacher(teacher, keep, folder) -> bool:
    """Whether a student of these layers could be made; one that was, is read again from its files."""
    try:
        shallower(teacher, keep).save_pretrained(folder)
    except ModelError as error:
        assert any(way in str(error) for way in ("smaller model of its family", "found no list"))  # noqa: PT017
        return False
    saved, expected = AutoModelForCausalLM.from_pretrained(folder).eval(), passing_over(teacher, keep)
    torch.testing.assert_close(said(saved), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    return True


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.slow) for name in OWN]
)
def test_a_student_of_some_layers_computes_what_they_do_in_the_teacher(name, tmp_path):
    teacher = trained(name, **OWN[name])
    torch.testing.assert_close(said(shallower(teacher, range(4))), said(teacher), rtol=0, atol=0)
    made = [keep for keep in SOME if computes_as_the_teacher(teacher, keep, tmp_path / str(keep))]
    assert made == [keep for keep in SOME if keep not in NOT_KEPT.get(name, [])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL if os.environ.get("ARCHITECTURES") == "all" else ALL[::8])
def test_so_it_is_with_every_architecture_or_an_error_says_why_not(name, tmp_path):
    try:
        teacher = trained(name)
        said(teacher)
    except Exception as error:  # noqa: BLE001 — of whatever kind: it is transformers' own
        pytest.skip(f"cannot be built tiny: {error}")
    for keep in SOME:
        computes_as_the_teacher(teacher, keep, tmp_path / str(keep))


def test_what_is_numbered_as_layers_are_by_chance_stays_whole():
    config = tiny_model().config
    config.eos_token_id, config.id2label = [1, 2, 3, 4], {0: "no", 1: "yes"}
    made = with_layers(config, [0, 3])
    assert made.eos_token_id == [1, 2, 3, 4]
    assert made.id2label == {0: "no", 1: "yes"}


def test_what_cannot_be_kept_is_named():
    teacher = tiny("diffllama")
    with pytest.raises(ModelError, match=r"layer 2 as its layer 1 would have self_attn.lambda_init: 0"):
        shallower(teacher, [0, 2])


def test_attention_that_is_scaled_by_a_layers_place_is_refused():
    settings = {"vocab_size": 64, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
    teacher = GPT2LMHeadModel(GPT2Config(**settings, scale_attn_by_inverse_layer_idx=True)).eval()
    with pytest.raises(ModelError, match=r"layer 3 as its layer 1 would have attn\.scaling"):
        shallower(teacher, [0, 3])
    assert len(shallower(teacher, [0, 1]).transformer.h) == 2


def test_a_layer_that_uses_what_another_hands_on_is_refused():
    with pytest.raises(ModelError, match="does not compute what they do in the teacher"):
        shallower(trained("hy_v4", index_topk=4), [0, 2])


def test_a_student_of_all_layers_is_the_teacher():
    teacher = tiny_model().eval()
    student = shallower(teacher, range(4))
    torch.testing.assert_close(said(student), said(teacher), rtol=0, atol=0)
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_students_config_can_be_written():
    made = with_layers(tiny("jamba").config, [1, 3])
    assert json.loads(made.to_json_string())["num_hidden_layers"] == 2
