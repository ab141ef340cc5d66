"""One step of a student sharded by FSDP2 over two processes, against the same step in one process;
tests/ranks.py calls it.
"""

import torch
import torch.distributed as dist
from conftest import tiny_model
from torch.distributed.fsdp import fully_shard

from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import Objective, ledger
from kdlib.losses.signals import kept
from kdlib.models.heads import head_form
from kdlib.models.teacher import LiveTeacher, signal_of
from kdlib.schedulers import constant

AT = Objective({"kd": constant(0.7), "ce": constant(0.3)}).at(0)


def student(tied: bool):
    model = tiny_model(layers=2, seed=1)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


def step(model, form, ids, count: int, scale: int) -> None:
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens = kept(ids)
    ours = signal_of(model, batch, tokens, vocabulary=300, form=form)
    theirs = LiveTeacher(tiny_model(), vocabulary=300)(batch, tokens)
    (
        ledger(ours, theirs, tokens.targets, at=AT, count=count, workspace=Workspace(5)).total * scale
    ).backward()


def differences() -> dict[str, float]:
    """{which head: the largest relative difference of any parameter's gradient}."""
    found = {}
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = torch.randint(300, (4, 9), generator=torch.Generator().manual_seed(0))
    for tied in (True, False):
        whole, sharded = student(tied), student(tied)
        form = head_form(whole)
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        for _ in range(2):  # gradients add up over two micro-batches
            step(whole, form, ids, 2 * 4 * 8, 1)
            step(sharded, form, ids[rank::world], 2 * 4 * 8, world)
        worst = 0.0
        for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert other.grad is not None, name
            worst = max(worst, float((other.grad.full_tensor() - one.grad).norm() / one.grad.norm()))
        found["tied" if tied else "untied"] = worst
    return found
