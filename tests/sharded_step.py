"""What ranks that share models say and learn, against a process that holds them whole; see tests/ranks.py."""

from pathlib import Path

import torch
import torch.distributed as dist
from conftest import tiny_model
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import Objective, ledger
from kdlib.losses.signals import kept
from kdlib.models.heads import head_form
from kdlib.models.hooks import layers_of
from kdlib.models.loading import load_model
from kdlib.models.sharing import sharded
from kdlib.models.teacher import Inside, LiveTeacher, signal_of
from kdlib.schedulers import constant

AT = Objective({"kd": constant(0.7), "ce": constant(0.3)}).at(0)


def untied(model):
    model.lm_head.weight = torch.nn.Parameter(1.1 * model.lm_head.weight.detach())
    model.config.tie_word_embeddings = False
    return model


def soft_capped():
    torch.manual_seed(0)
    sizes = {"vocab_size": 301, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    limits = {"final_logit_softcapping": 3.0, "initializer_range": 0.3, "max_position_embeddings": 64}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **limits))


def of_other_names():
    torch.manual_seed(0)
    sizes = {"vocab_size": 301, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3))


TEACHERS = {
    "tied": lambda: tiny_model(301),
    "untied": lambda: untied(tiny_model(301)),
    "soft-capped": soft_capped,
    "GPT-2": of_other_names,
}


def batch_of(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def step(model, form, ids, count: int, scale: int) -> None:
    batch, tokens = batch_of(ids), kept(ids)
    ours = signal_of(model, batch, tokens, vocabulary=300, form=form)
    theirs = LiveTeacher(tiny_model(), vocabulary=300)(batch, tokens)
    (
        ledger(ours, theirs, tokens.targets, at=AT, count=count, workspace=Workspace(5)).total * scale
    ).backward()


def gradients() -> dict[str, float]:
    """{which head: the largest relative difference of any parameter's gradient}."""
    found = {}
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(300, (4, 9), generator=torch.Generator().manual_seed(0))
    for tied in (True, False):
        whole, shared = (tiny_model(layers=2, seed=1) for _ in range(2))
        if not tied:
            whole, shared = untied(whole), untied(shared)
        form = head_form(whole)
        for layer in shared.model.layers:
            fully_shard(layer)
        fully_shard(shared)
        for _ in range(2):  # gradients add up over two micro-batches
            step(whole, form, ids, 2 * 4 * 8, 1)
            step(shared, form, ids[rank::world], 2 * 4 * 8, world)
        worst = 0.0
        for (name, one), other in zip(whole.named_parameters(), shared.parameters(), strict=True):
            assert other.grad is not None, name
            worst = max(worst, float((other.grad.full_tensor() - one.grad).norm() / one.grad.norm()))
        found["tied" if tied else "untied"] = worst
    return found


def teachers(folder: Path) -> dict[str, dict[str, float]]:
    """Of each kind of teacher, read in parts: how far logits and hidden states are from the whole one's, and
    the share of its weights that a rank holds.
    """
    found, rank = {}, dist.get_rank()
    for name, made in TEACHERS.items():
        if rank == 0:
            made().save_pretrained(folder / name)
        dist.barrier()
        whole = LiveTeacher(load_model(str(folder / name)), 300)
        with sharded(str(folder / name), offload=name == "untied") as options:
            ours = LiveTeacher(load_model(str(folder / name), **options), 300)
        ids = torch.randint(
            300, (3, 7), generator=torch.Generator().manual_seed(rank)
        )  # each has its own rows
        assert ours.form == whole.form
        assert all(isinstance(layer, FSDPModule) for layer in layers_of(ours.model))
        said, expected = (
            each(batch_of(ids), kept(ids), Inside((0, 1), hidden=True)) for each in (ours, whole)
        )
        held = {n: p.to_local() for n, p in ours.model.named_parameters() if hasattr(p, "to_local")}
        size = dict(whole.model.named_parameters())
        found[name] = {
            "logits": float((said.logits() - expected.logits()).abs().max()),
            "hidden": max(
                float((one - other).abs().max())
                for one, other in zip(said.features.hidden, expected.features.hidden, strict=True)
            ),
            "held": sum(each.numel() for each in held.values()) / sum(each.numel() for each in size.values()),
        }
    return found
