"""How much memory a training will take, moment by moment and part by part, known before a weight is
loaded.

The step is rehearsed without data (kdlib.diagnostics.fake_step) and every tensor of it counted
(kdlib.diagnostics.charges).
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdlib.config.run import Config
from kdlib.diagnostics.charges import GIB, Charges, RehearsedWorkspace, spread
from kdlib.diagnostics.fake_step import outline
from kdlib.hardware import device_memory, precision_of, product_dtype
from kdlib.losses.buffers import chunk_tokens
from kdlib.models.loading import device_of, parameters, stated_form
from kdlib.training.plan import training_arguments, workspace_of

MARGIN = 0.15  # of the forecast: what it may be wrong by


@dataclass(frozen=True)
class Forecast:
    """Bytes on one device at each moment of an optimizer step, and of an evaluation."""

    device: str
    precision: str
    moments: Mapping[str, Mapping[str, int]]  # moment -> part -> bytes
    total: int  # bytes of the device
    free: int  # of these, now
    devices: int
    chunk: int | None  # tokens whose logits exist at a time; None: all
    compiled: bool  # the row arithmetic between the products with the heads
    flops: float  # multiplications and additions of the matrix products of an optimizer step
    parameters: Mapping[str, int]  # of student and teacher
    notes: tuple[str, ...] = ()

    @property
    def moment(self) -> str:
        """At which most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Bytes held then."""
        return sum(self.moments[self.moment].values())

    @property
    def peak_in_training(self) -> int:
        """Bytes held at the highest point of an optimizer step, without what the process itself takes: as
        one measures it.
        """
        return max(
            sum(parts.values()) - parts["framework"]
            for name, parts in self.moments.items()
            if name != "evaluation"
        )

    @property
    def verdict(self) -> str:
        return verdict(self.peak, self.free)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        derived = {name: getattr(self, name) for name in ("moment", "peak", "peak_in_training", "verdict")}
        return {**asdict(self), **derived}


def verdict(peak: float, memory: float) -> str:
    """`fits`, `tight` (within what the forecast may be wrong by) or `does not fit`."""
    return "fits" if peak * (1 + MARGIN) <= memory else "tight" if peak <= memory else "does not fit"


def forecast(
    config: Config,
    *,
    memory: float | None = None,
    device: str | None = None,
    devices: int | None = None,
    rows: int | None = None,
    classes: int | None = None,
    dense: bool = False,
    every_layer: bool = False,
) -> Forecast:
    """What a config's training will hold in memory, per device.

    Args:
        memory: GiB of the device; what the present one has, and has free, where None.
        device: cpu or cuda; where the config would run here, where None.  On another device `precision: auto`
            is bfloat16.
        devices: over which the training is spread; torchrun's WORLD_SIZE where None.
        rows: of the training data: the choice of compiling depends on it.
        classes: of the data, where rows are classified; what the config or the teacher says of it where None.
        dense: all logits at once, whatever the models' heads.
        every_layer: rehearse all layers, where a few alike would tell: the slow reference.

    Raises:
        ModelError, ConfigError: models that do not exist or fit each other, arguments that transformers
            refuses.
    """
    present = device_of(config.wanted_device)
    here = "cuda" if present.type == "cuda" else "cpu"
    kind = device or here
    known = kind == here or config.precision != "auto"
    dtype = precision_of(config.precision, present)[0] if known else torch.bfloat16
    total, free = (round(memory * GIB),) * 2 if memory else device_memory(torch.device(kind))
    args = training_arguments(config, Path("unused"))
    plan, devices = outline(config, classes), devices or int(os.environ.get("WORLD_SIZE", 1))
    compiled = workspace_of(config, args, rows or 0, plan.vocabulary).compiled
    chunk = config.loss.chunk
    if chunk == "auto":
        chunk = chunk_tokens(
            plan.vocabulary, product_dtype(dtype, torch.device(kind)).itemsize, torch.device(kind), free=free
        )
    charges = Charges(
        plan, args, kind, dtype, RehearsedWorkspace(chunk, compiled=compiled, kind=kind), dense, every_layer
    )
    moments = charges.moments()
    return Forecast(
        device=kind,
        precision=str(dtype).removeprefix("torch."),
        total=total,
        free=free,
        devices=devices,
        moments={name: spread(parts, charges, devices) for name, parts in moments.items()},
        compiled=compiled,
        chunk=None if dense or stated_form(charges.student) is None else chunk,
        flops=charges.flops,
        notes=(*plan.notes, *charges.notes),
        parameters={"student": parameters(charges.student), "teacher": parameters(charges.teacher)},
    )
