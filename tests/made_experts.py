"""Tiny teachers with experts, of each class; random routers, so that tokens ask for different experts."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

KINDS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, {"num_experts": 4, "norm_topk_prob": False}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, "norm_topk_prob": True}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4, "norm_topk_prob": False}),
}
OTHERS = {  # of the same form, without a test of every term
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "rope_parameters": None}),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {"head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
        | {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
}
MODES = ("topk", "all", {"augment": 2}, {"student_aware": {"learning_rate": 0.01}})


def model_with_experts(kind: str = "mixtral", *, asks: int = 2, layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    model, config, own = {**KINDS, **OTHERS}[kind]
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 24,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts_per_tok": asks,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "experts_implementation": "eager",  # grouped products take no float64
    }
    return model(config(**sizes | own)).eval()


def folder_of_experts(tokens: Path, folder: Path, kind: str = "mixtral") -> str:
    """Such a teacher in a folder, with the tokenizer of another model."""
    model_with_experts(kind).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokens).save_pretrained(folder)
    return str(folder)
