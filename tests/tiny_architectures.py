"""Tiny causal language models of the architectures that transformers knows, with random weights.

python tiny_architectures.py   lists those that cannot be made so, and why
"""

from collections.abc import Iterator

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

LAYERS = 4
SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "dim_ff"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_groups", "encoder_layers", "index_n_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "index_topk"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "query_pre_attn_scalar", "d_head"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "laurel_rank", "chunk_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "altup_num_inputs"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "global_attn_every_n_layers"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), 16),
    **dict.fromkeys(("kv_lora_rank", "mamba_d_head", "mamba_head_dim", "embedding_size"), 16),
    **dict.fromkeys(("index_head_dim", "expert_ffn_hidden_size", "num_hash_buckets"), 16),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size"), 24),
    "attention_hidden_size": 64,  # Zamba attends to a layer's input beside the embeddings
    "attention_head_dim": 16,
    "axial_pos_shape": [8, 8],
    "axial_pos_embds_dim": [16, 16],
    "attn_layers": ["local"] * LAYERS,
    "moe_layers": None,
    "num_kv_shared_layers": 0,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERWISE = ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "num_experts_per_tok": 1})
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
LARGE = {
    "blt",
    "phi4_multimodal",
    "git",
    "roc_bert",
    "musicgen",
    "musicgen_melody",
}  # by settings of their own


def tiny(name: str, **settings: object) -> PreTrainedModel:
    """One of this model type, with these settings; in evaluation mode.

    Raises:
        RuntimeError, …: whatever transformers says where it is not made of such sizes.
    """
    whole = AutoConfig.for_model(name)
    text = whole.get_text_config()
    stated = text.to_dict()
    kinds = {key: list(dict.fromkeys(stated[key])) for key in PER_LAYER if isinstance(stated.get(key), list)}
    per_layer = {key: [each[i % len(each)] for i in range(LAYERS)] for key, each in kinds.items()}
    of_other_name = {theirs for ours, theirs in text.attribute_map.items() if ours in SMALL}
    known = {key: value for key, value in SMALL.items() if key in stated or key in text.attribute_map}
    known = {key: value for key, value in known.items() if key not in of_other_name}
    torch.manual_seed(0)
    config = type(text)(**{**known, **per_layer, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def every() -> Iterator[tuple[str, PreTrainedModel | Exception]]:
    """All that can be made so and asked, by name; else what came in between."""
    logging.set_verbosity_error()
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - LARGE):
        found: PreTrainedModel | Exception = RuntimeError("untried")
        for settings in OTHERWISE:
            try:
                found = tiny(name, **settings)
                with torch.no_grad():
                    found(input_ids=torch.arange(3, 15)[None], use_cache=False)
                break
            except Exception as error:
                found = error
        yield name, found


if __name__ == "__main__":
    for name, made in every():
        if isinstance(made, Exception):
            print(f"{name}: {type(made).__name__}: {str(made)[:120]}")
