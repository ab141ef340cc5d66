"""Which weights ranks that share a model gather together; the other ranks are not there."""

from types import SimpleNamespace

import pytest
import torch
from sharded_step import TEACHERS
from torch.distributed.fsdp import FSDPModule

from kdlib.models.hooks import layers_of
from kdlib.models.sharing import fake_ranks, held_here, share, share_teacher


def group(module):
    """The group with which FSDP gathers a module's own weights; None: with what is left over, at the end."""
    return module._get_fsdp_state() if isinstance(module, FSDPModule) else None


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_tied_embedding_and_head_are_gathered_as_one(who, name):
    args = SimpleNamespace(fsdp_plugin_args=None)  # of a config without FSDP
    model = TEACHERS[name]()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    whole, tied = sum(each.numel() for each in model.parameters()), embedding.weight is head.weight
    with fake_ranks(2) as mesh:
        if who == "student":
            share(model, mesh, args, torch.float32)
        else:
            share_teacher(model.requires_grad_(False), mesh)
        assert tied == (name != "untied")
        assert (group(embedding) is group(head)) == tied
        assert (embedding.weight is head.weight) == tied
        assert len({group(each) for each in (embedding, *layers_of(model))}) == 1 + len(layers_of(model))
        assert sum(held_here(each).numel() for each in model.parameters()) < 0.51 * whole
