"""A teacher on a device of its own: what it says comes to where the student is.

Run: pytest tests/test_models_teacher_device.py
"""

from copy import deepcopy

import pytest
import torch
from conftest import tiny_model

from kdlib.losses.signals import kept
from kdlib.models.teacher import Inside, LiveTeacher

IDS = torch.randint(300, (3, 9), generator=torch.Generator().manual_seed(0))


def compared(here: str, there: str) -> list[float]:
    """How far two batches' logits and hidden states are from those of a teacher that is here."""
    model, far = tiny_model(320), []
    apart = LiveTeacher(deepcopy(model), 300, own_device=torch.device(there))
    beside = LiveTeacher(model, 300)
    ids = IDS.to(here)
    for teacher in (apart, beside):
        teacher.to(ids.device)
    for rows in (ids, ids.flip(1)):
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
        one, other = (each(batch, kept(rows), Inside((1,), hidden=True)) for each in (apart, beside))
        assert one.device == other.device
        far.append(float((one.logits() - other.logits()).abs().max()))
        far.append(float((one.features.hidden[0] - other.features.hidden[0]).abs().max()))
    assert len(apart.heads) == 1  # its head came once
    return far


def test_a_teacher_elsewhere_says_the_same_here():
    """cpu:0 is another device than cpu to look at, and the same memory."""
    assert compared("cpu", "cpu:0") == [0.0] * 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_teacher_on_the_second_gpu_says_the_same_on_the_first():
    assert max(compared("cuda:0", "cuda:1")) < 1e-4
