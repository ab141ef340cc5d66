"""What a quantised teacher has lost, said before it teaches."""

import math

import torch
from torch import Tensor

from kdlib.config.run import Config
from kdlib.data.batches import Prepared, calibration_rows
from kdlib.hardware import GIB, device_memory
from kdlib.losses.divergences import forward_kl
from kdlib.models.loading import device_of, load_model
from kdlib.models.teacher import LiveTeacher
from kdlib.students.student import outline
from kdlib.tasks.base import task_of

ROWS = 16  # held-out ones
SPARE = 1.2  # of the whole model's weights: what must be free for it to be asked as well


@torch.no_grad()
def lost_by(config: Config, prepared: Prepared, teacher: LiveTeacher) -> str:
    """KL(whole || quantised), nats per token of a few held-out rows, and both perplexities, in words.

    Where memory does not do for the whole teacher too, the quantised one's perplexity alone.
    """
    device, dtype = teacher.own_device or device_of(config.wanted_device), teacher.model.dtype
    teacher.to(device)
    rows = calibration_rows(prepared.validation, ROWS).to(device)

    def said(model) -> Tensor:
        logits = [model(input_ids=row[None, :-1], use_cache=False).logits[0] for row in rows]
        return torch.cat(logits)[:, : teacher.vocabulary].float().log_softmax(-1)

    def perplexity(log_probs: Tensor) -> float:
        return math.exp(-log_probs.gather(-1, rows[:, 1:].reshape(-1, 1)).mean())

    ours = said(teacher.model)
    found = f"perplexity {perplexity(ours):.2f} on {len(rows)} held-out rows"
    with torch.device("meta"):
        blank = outline(config, task_of(config)).blank_teacher(dtype)
    needed = SPARE * sum(each.nbytes for each in blank.parameters())
    if needed > device_memory(device)[1]:
        return f"{found}; the whole one was not asked: {needed / GIB:.1f} GiB would have to be free"
    theirs = said(load_model(config.teacher.model, dtype).to(device))
    lost, own = float(forward_kl(ours, theirs).mean()), f"{found}, the whole one's {perplexity(theirs):.2f}"
    return f"KL(whole ‖ quantised) {lost:.4f} nats per token; {own}"
