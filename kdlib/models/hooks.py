"""What passes inside a model while it runs.

Hooks rather than `output_hidden_states`, so that they work through DDP, keep no other layer, and leave states
in the dtype in which the model computed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib.errors import ModelError


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode; afterwards in its own."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@dataclass(frozen=True)
class Captured:
    """What chosen layers gave in one forward pass, by layer."""

    hidden: dict[int, Tensor] = field(default_factory=dict)  # [B, T, H]: the layer's output
    attention: dict[int, Tensor] = field(default_factory=dict)  # [B, A, T, T] probabilities


@contextmanager
def captured_layers(
    model: PreTrainedModel, numbers: Sequence[int], *, hidden: bool, attention: bool
) -> Iterator[Captured]:
    """Collects these layers' outputs and attention maps of one forward pass made inside.

    Raises:
        ModelError: a layer showed no attention map (see `attend_eagerly`).
    """
    captured = Captured()

    def keep_output(number: int, module, args, output) -> None:
        captured.hidden[number] = output[0] if isinstance(output, tuple) else output

    def keep_map(
        number: int, module, args, output
    ) -> None:  # of the innermost that gives it beside its states
        second = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(second, Tensor) and second.ndim == 4:
            captured.attention.setdefault(number, second)

    with ExitStack() as hooks:
        layers = layers_of(model) if hidden or attention else nn.ModuleList()
        for number in dict.fromkeys(numbers) if len(layers) else ():
            layer, *parts = layers[number].modules()
            if hidden:
                hooks.enter_context(layer.register_forward_hook(partial(keep_output, number)))
            for part in parts if attention else ():
                hooks.enter_context(part.register_forward_hook(partial(keep_map, number)))
        yield captured
    if attention and (silent := [number for number in numbers if number not in captured.attention]):
        raise ModelError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention shows no attention "
            f"maps in layers {silent}; leave the attention term out"
        )


@contextmanager
def captured_sources(
    model: PreTrainedModel, sources: Sequence[int | str]
) -> Iterator[Callable[[Callable[[Tensor], Tensor]], list[Tensor]]]:
    """What a gate may choose among, of one forward pass made inside: given to whoever says which tokens.

    Args:
        sources: layers, by number; and modules of experts, by name: each expert is a source of its own, the
            state after its layer had it alone spoken, with the weight that the token's experts had together.

    Yields:
        (select: [B, T, H] or [B·T, H] → [N, H]) → [N, H] of each source.
    """
    groups = [name for name in sources if isinstance(name, str)]
    numbers = [number for number in sources if not isinstance(number, str)]
    within = {name: int(name.removeprefix(f"{layers_name(model)}.").split(".")[0]) for name in groups}
    heard: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    with ExitStack() as hooks:
        every = captured_layers(model, [*numbers, *within.values()], hidden=True, attention=False)
        captured = hooks.enter_context(every)
        for name in groups:
            note = partial(lambda name, module, args, output: heard.update({name: (args, output)}), name)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(note))

        def states(select: Callable[[Tensor], Tensor]) -> list[Tensor]:
            found = [select(captured.hidden[number]) for number in numbers]
            for name in groups:
                (read, _, weights), together = heard[name]
                rest = select(captured.hidden[within[name]]) - select(together)
                alone = _alone(model.get_submodule(name), select(read), select(weights))
                found += [rest + each for each in alone]
            return found

        yield states


def _alone(experts: nn.Module, states: Tensor, weights: Tensor) -> list[Tensor]:
    """[N, H] of each expert, asked by every token with the weight that all that it asked had together."""
    whole = weights.sum(-1, keepdim=True)
    chosen = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
    return [experts(states, chosen + number, whole) for number in range(int(experts.num_experts))]


@contextmanager
def instead(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Inside, each (object, attribute, value) holds; afterwards what was before."""
    usual = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in usual:
            setattr(owner, name, value)


def without_dropout(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Dropout and layer drop off inside, in every module and the config, whichever the forward pass reads."""

    def drops(owner: Any, name: str) -> bool:
        return "drop" in name or (name == "p" and "Dropout" in type(owner).__name__)

    every = [(owner, *item) for owner in (*model.modules(), model.config) for item in vars(owner).items()]
    rates = [(owner, name) for owner, name, value in every if type(value) is float and drops(owner, name)]
    return instead(*((owner, name, 0.0) for owner, name in rates))


def attend_eagerly(model: PreTrainedModel, eager: bool) -> None:
    """Let the model make its attention maps, or go back to what it was loaded with.

    Eager attention is slower than SDPA, and its memory, [B, A, T, T] per layer, grows with T squared.
    """
    if not hasattr(model, "_loaded_attention"):
        model._loaded_attention = model.config._attn_implementation
    wanted = "eager" if eager else model._loaded_attention
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of layers."""
    return model.get_submodule(layers_name(model))


def layers_name(model: PreTrainedModel) -> str:
    """The dotted name of the list of layers: `model.layers`, `transformer.h`, …"""
    text = model.config.get_text_config()
    count, other = text.num_hidden_layers, ()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and type(module.config) not in (
            type(model.config),
            type(text),
        ):
            other = (*other, name + ".")  # what reads images, or sounds
        if isinstance(module, nn.ModuleList) and len(module) == count and not name.startswith(other):
            return name
    raise ModelError(f"{type(model).__name__}: found no list of {count} layers to choose from")


def layers_are_alike(model: PreTrainedModel) -> bool:
    """Whether all have the same matrices, and are of one kind."""
    shapes = {tuple(sorted(tuple(p.shape) for p in layer.parameters())) for layer in layers_of(model)}
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return len(kinds) < 2 and len(shapes) < 2
