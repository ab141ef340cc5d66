"""Adapters, by peft: low-rank matrices beside a model's frozen weights; made, switched off, saved, joined.

The change of a matrix W is lora_alpha / r * B A, with A of r rows and B, at first 0, of r columns (Hu et al.
2021, LoRA, https://arxiv.org/abs/2106.09685).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib.config.models import AdapterConfig
from kdlib.errors import ModelError, nearest
from kdlib.models.hooks import as_evaluated, instead
from kdlib.models.loading import needs_peft

TRAINED = "model.safetensors"  # of a checkpoint: the weights that are trained
NAME = "default"


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter lies beside its weights."""
    return hasattr(model, "peft_config")


def adapted(model: PreTrainedModel, how: AdapterConfig) -> PreTrainedModel:
    """The same model with an adapter that changes nothing yet; what else it has is frozen.

    The adapter is in float32, whatever the model's dtype.  What makes a classifier's answer of its last state
    is trained whole.

    Raises:
        ModelError: peft is not there, or no part of the model has such a name, or one that cannot be changed.
    """
    needs_peft()
    from peft import LoraConfig  # 2 s

    heads = [] if model.get_output_embeddings() else _heads(model)
    saved = [*how.modules_to_save, *heads]
    _check_names(model, "target_modules", how.target_modules)
    _check_names(model, "modules_to_save", how.modules_to_save)
    asked = how.model_dump(exclude={"merge", "modules_to_save"})
    whole = {"modules_to_save": saved, "exclude_modules": rf"({'|'.join(saved)})(\..*)?"} if saved else {}
    kind = "SEQ_CLS" if heads else "CAUSAL_LM"
    try:
        model.add_adapter(LoraConfig(**asked, **whole, task_type=kind), NAME)
    except (ValueError, TypeError) as error:
        raise ModelError(f"student.adapter: peft makes none of this for {_kind(model)}: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    base = Path(model.name_or_path)
    model.peft_config[NAME].base_model_name_or_path = str(base.resolve() if base.is_dir() else base)
    model._joins_when_saved = how.merge
    return model


def _heads(model: PreTrainedModel) -> list[str]:
    """What of a classifier stands outside the model that it is made from, and is trained for its classes."""
    parts = model.named_children()
    return [name for name, part in parts if name != model.base_model_prefix and [*part.parameters()]]


def _check_names(model: PreTrainedModel, field: str, names: str | Sequence[str]) -> None:
    """Refuse what no part is called, and what is one matrix with another; peft passes over the first."""
    parts = {name: part for name, part in model.named_modules() if name}
    if names == "all-linear":
        return
    pattern, found = isinstance(names, str), []
    for name in [names] if pattern else names:
        those = [n for n in parts if (re.fullmatch(name, n) if pattern else f".{n}".endswith(f".{name}"))]
        if not those:
            known = dict.fromkeys(n.split(".")[-1] for n, part in parts.items() if hasattr(part, "weight"))
            there = f"{_kind(model)} has {', '.join(known)}"
            raise ModelError(
                f"student.adapter.{field}: found {name!r}, which no part of the student is called"
                f"{nearest(name, known)}; {there}: name some of these, or all-linear"
            )
        found += those
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    if tied and (at := [name for name in found if parts[name] in ends]):
        raise ModelError(
            f"student.adapter.{field}: {at[0]} of {_kind(model)} is embedding and head at once (tied), so a "
            "change of one would untie them; leave it out, or train without an adapter"
        )


def _kind(model: PreTrainedModel) -> str:
    return f"a {model.config.model_type} model"


@contextmanager
def off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is its base, and evaluated: the weights that it was made with, nothing dropped."""
    parts = changed_parts(model)
    for part in parts.values():
        part.enable_adapters(False)
    try:
        with as_evaluated(model):
            yield
    finally:
        for part in parts.values():
            part.enable_adapters(True)


def changed_parts(model: PreTrainedModel) -> dict[str, Any]:
    """peft's parts, in each of which one of the model's own lies beside what is trained."""
    every = model.named_modules()
    kinds = {name: part for name, part in every if not isinstance(part, PreTrainedModel)}
    return {name: part for name, part in kinds.items() if hasattr(part, "enable_adapters")}


def save_trained(model: PreTrainedModel, checkpoint: Path) -> None:
    """What is trained, into a checkpoint; the rest is as it was made."""
    named = model.named_parameters()
    state = {name: each.detach().contiguous() for name, each in named if each.requires_grad}
    save_file(state, checkpoint / TRAINED, metadata={"format": "pt"})


def load_trained(model: PreTrainedModel, checkpoint: Path) -> None:
    """What `save_trained` saved; a ModelError where another adapter was trained."""
    state = load_file(checkpoint / TRAINED)
    wanted = {name: each.shape for name, each in model.named_parameters() if each.requires_grad}
    if wanted != {name: each.shape for name, each in state.items()}:
        raise ModelError(
            f"{checkpoint}: its adapter is not the one of this config; train anew, in another run"
        )
    model.load_state_dict(state, strict=False)


def save(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor]) -> None:
    """A model as `from_pretrained` loads it; an adapter as peft does, or, where it was asked, joined.

    Args:
        state: its weights.
    """
    joins = is_adapted(model) and model._joins_when_saved
    with instead(*[(model, "_hf_peft_config_loaded", False)] * joins):
        model.save_pretrained(folder, state_dict=joined(model, state) if joins else state)


def joined(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its weights by the names of a model without an adapter, the change added; the model stays as it is.

    One matrix at a time is there twice.
    """
    made = dict(state)
    for name, part in changed_parts(model).items():
        if hasattr(part, "modules_to_save"):
            plain = part.modules_to_save[NAME]
        else:
            (layer := deepcopy(part)).merge()
            plain = layer.get_base_layer()
        made = {key: each for key, each in made.items() if not key.startswith(f"{name}.")}
        made |= {f"{name}.{key}": each for key, each in plain.state_dict().items()}
    return made
