"""What the doctor asks of settings that are judged by themselves and by the machine: precision,
checkpointing, idle settings.
"""

from collections.abc import Iterator

import torch

from kdlib import hardware as cpu
from kdlib.config.loss import LossConfig
from kdlib.diagnostics.context import Subject
from kdlib.diagnostics.findings import Finding
from kdlib.losses.features import feature_terms
from kdlib.models.loading import device_of

AUTO = {"precision": "auto"}


def device_has_the_dtype(subject: Subject) -> Iterator[Finding]:
    """The machine computes in the config's dtype, and gains by it."""
    precision, device = subject.config.precision, device_of(subject.config.wanted_device).type
    if precision == "float16" and device == "cpu":
        yield Finding(
            "critical",
            "precision",
            "float16 on a CPU",
            (
                "most CPUs emulate its products, 60 times slower than float32's; and it ends at 65,504, "
                "which "
                "logits pass"
            ),
            "write auto",
            AUTO,
        )
    elif precision == "float16" and device == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
        yield Finding(
            "warning",
            "precision",
            f"float16 on {torch.cuda.get_device_name()}, which has bfloat16",
            (
                "float16 ends at 65,504, which logits and gradients pass; bfloat16 has float32's range at "
                "the "
                "same speed"
            ),
            "write auto",
            AUTO,
        )
    elif precision == "bfloat16" and device == "cpu" and cpu.emulates_bf16():
        yield Finding(
            "warning",
            "precision",
            "bfloat16 on a CPU without avx512_bf16 or amx_bf16",
            "its products are then emulated, 4 to 100 times slower than float32's",
            "write auto",
            AUTO,
        )
    elif precision == "bfloat16" and device == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        yield Finding(
            "warning",
            "precision",
            f"bfloat16 on {torch.cuda.get_device_name()}, which has no instructions for it",
            "its products are then emulated, slower than float32's",
            "write auto",
            AUTO,
        )


def checkpointing_lets_gradients_through(subject: Subject) -> Iterator[Finding]:
    """Feature terms look inside layers, where re-entrant checkpointing keeps no gradient."""
    training = subject.config.training
    # its deprecated name
    kind = "activation" if training.get("activation_checkpointing") is not None else "gradient"
    options = training.get(f"{kind}_checkpointing_kwargs")
    reentrant = isinstance(options, dict) and options.get("use_reentrant")
    if training.get(f"{kind}_checkpointing") and reentrant and feature_terms(subject.active):
        where = f"training.{kind}_checkpointing_kwargs.use_reentrant"
        yield Finding(
            "critical",
            where,
            "true beside a term that looks inside the layers",
            (
                "re-entrant checkpointing runs a layer without gradient first, "
                "so such a term would teach nothing"
            ),
            "write false",
            {where: False},
        )


def settings_are_used(subject: Subject) -> Iterator[Finding]:
    """What shapes the kd term stands beside a kd weight."""
    loss = subject.config.loss
    if "kd" in subject.active:
        return
    for name in ("divergence", "top_k", "samples"):
        if getattr(loss, name) != LossConfig.model_fields[name].default:
            yield Finding(
                "warning",
                f"loss.{name}",
                f"{getattr(loss, name)}, but no weight for kd, the term that it shapes",
                f"only kd reads it; {', '.join(subject.active)} do not",
                "give kd a weight, or leave it out",
            )


CONFIG_CHECKS = (device_has_the_dtype, checkpointing_lets_gradients_through, settings_are_used)
