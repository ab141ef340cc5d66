"""A model of some of another's layers: a config that says so, seen to be right before it is used.

Configs say in many ways of which kind a layer is: a list with an entry for each, a list of numbers, how many
come first or last, every how many one comes.  So ways are tried, and one is taken when the layers built from
it are, part by part, those that were to be kept.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import combinations, product
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from kdlib.errors import ModelError
from kdlib.models.hooks import layers_name, layers_of
from kdlib.models.loading import blank, plain_config, plain_generation

COUNTS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_blocks")
OF_LAYERS = re.compile(r"layer|block|pattern|moe|sparse|dense|full_attn")
STRIDE = re.compile(r"step|period|offset|interval|freq|every|pattern")
NUMBER = re.compile(r"(layer|block).*(idx|index|id|num|number)$|^(idx|index)$")  # a layer's own, or another's
NOT_OF_IT = ("_", "store_")  # attributes: what is set while it runs, what it keeps for others
TRIES = 200  # configs built; the first fits nearly always
MANY = 1000  # differences: more than a model that can be built has
NO_CONFIG = (  # what a config raises that describes no model
    *(StrictDataclassError, ModelError, NotImplementedError),
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, StopIteration),
)
TOKENS = 32  # on which the student is held against the teacher


def even_layers(count: int, total: int) -> list[int]:
    """`count` of `total` layers, spread evenly from the first to the last."""
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def with_layers(
    config: PreTrainedConfig, keep: Sequence[int], kind: type[PreTrainedModel] | None = None
) -> PreTrainedConfig:
    """A copy of a model's config with only the layers `keep`; `kind`: the model's class, where it is known.

    Raises:
        ModelError: no config of this kind of model describes these layers; names what would be otherwise.
    """
    text = config.get_text_config()
    total, best, nearest, tries = text.num_hidden_layers, math.inf, [], TRIES
    if list(keep) == list(range(total)):
        return plain_config(config)
    teacher = _outline(config, kind)
    kinds = _kinds([_parts(layer, {}) for layer in layers_of(teacher)], keep)
    stated = text.to_dict()  # some configs refuse to be asked for one value of what each layer has its own
    choices = {name: _choices(name, value, keep, total, kinds) for name, value in stated.items()}
    counts = {name: len(keep) for name in COUNTS if getattr(text, name, None) == total}
    ways = iter([counts | {name: of[0] for name, of in choices.items() if of[0] != stated[name]}])
    while tries and (changes := next(ways, None)):
        changed, tries = plain_config(config), tries - 1
        try:
            for name, value in changes.items():
                setattr(changed.get_text_config(), name, value)
            student = _outline(type(changed).from_dict(changed.to_dict()), kind)  # as it will be read again
            found = _differences(student, teacher, keep)
        except NO_CONFIG as error:
            found = [" ".join(str(error).split())] * MANY
        if not found:
            return changed
        if len(found) < best:
            best, nearest, ways = len(found), found, _otherwise(changes, choices)
    shown = "; ".join(list(dict.fromkeys(nearest))[:3])
    raise ModelError(
        f"{config.model_type}: no config describes a student of the teacher's layers {list(keep)}: {shown}. "
        "Keep other layers (student.keep: the first, or whole periods), or take a smaller model of its "
        "family as the student"
    )


@torch.no_grad()
def layer_influence(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """[L] how much each layer turns the residual stream: 1 - mean cosine of input and output, 0 (not) to 2.

    Args:
        input_ids: [B, T] text without padding.

    Reference: Men et al. 2024 (ShortGPT, "block influence"), https://arxiv.org/abs/2403.03853
    """
    influence = []

    def measure(layer, args, kwargs, output):  # `hidden_states` will not do: it ends with the final norm's
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        influence.append(1 - F.cosine_similarity(before.float(), after.float(), dim=-1).mean())

    with ExitStack() as hooks:
        for layer in layers_of(model):
            hooks.enter_context(layer.register_forward_hook(measure, with_kwargs=True))
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    return torch.stack(influence)


def _outline(config: PreTrainedConfig, kind: type[PreTrainedModel] | None) -> PreTrainedModel:
    """The model without any memory; of an unknown class without its head."""
    with torch.device("meta"), no_init_weights():
        if kind:
            return kind(config)
        text = config.get_text_config()
        read = text if type(text) in MODEL_MAPPING else config
        return blank(AutoModel, config.model_type, read, torch.float32)


def _kinds(parts: Sequence[Any], keep: Sequence[int]) -> list[list[int]]:
    """The student's layers by kind, all that are alike in a list."""
    kept = [parts[old] for old in keep]
    every = [[new for new, other in enumerate(kept) if other == each] for each in kept]
    return [numbers for number, numbers in enumerate(every) if numbers not in every[:number]]


def _otherwise(changes: dict[str, Any], choices: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The same changes of a config with one or two settings chosen otherwise, first two of one thing."""
    several = [name for name, values in choices.items() if len(values) > 1]
    pairs = sorted(combinations(several, 2), key=lambda pair: pair[0].split("_")[0] != pair[1].split("_")[0])
    for names in [*((name,) for name in several), *pairs]:
        for values in product(*(choices[name] for name in names)):
            yield changes | dict(zip(names, values, strict=True))


def _choices(name: str, value: Any, keep: Sequence[int], total: int, kinds: Sequence[list[int]]) -> list[Any]:
    """What a setting may have to become, the likeliest first; what stays if that will do comes as it is."""
    is_named, is_stride = OF_LAYERS.search(name), STRIDE.search(name)
    place, every = {old: new for new, old in enumerate(keep)}, [value]
    if isinstance(value, (list, tuple)):
        is_each = len(value) == total or (is_named and len(value))  # named and short: a pattern that recurs
        cut = [value[old % len(value)] for old in keep] if is_each else value
        moved = [place[number] for number in value if number in place] if _is_rising(value, total) else cut
        every = [moved, cut, value] if is_named else [value, moved, cut]
        every += kinds if is_named and moved is not cut or not value else []
    elif isinstance(value, dict) and value and all(_is_rising([_number(key)], total) for key in value):
        cut = {place[_number(key)]: each for key, each in value.items() if _number(key) in place}
        every = [cut, value] if is_named else [value, cut]  # the latter: as a classifier's id2label
    elif (is_named or is_stride) and type(value) is int and 0 <= value <= total:
        every += [sum(old < value for old in keep), sum(old >= total - value for old in keep)]
        every += range(len(keep) + 2) if is_stride else []
    return [each for number, each in enumerate(every) if each not in every[:number]]


def _number(key: Any) -> int:
    """A layer's number as a key, which JSON makes a text; else -1."""
    return int(key) if str(key).isdecimal() else -1


def _is_rising(values: Sequence[Any], total: int) -> bool:
    is_numbers = all(type(each) is int and 0 <= each < total for each in values)
    return bool(values) and is_numbers and sorted(set(values)) == list(values)


def _differences(student: PreTrainedModel, teacher: PreTrainedModel, keep: Sequence[int]) -> list[str]:
    """How the student's layers are other than those that it is to keep, in words."""
    ours, theirs, place = layers_of(student), layers_of(teacher), {old: new for new, old in enumerate(keep)}
    found = []
    for new, old in enumerate(keep):
        is_now, should_be = _parts(ours[new]), _parts(theirs[old], place)
        for part in [*should_be, *(is_now.keys() - should_be)]:
            if is_now.get(part) != should_be.get(part):
                had, has = (each.get(part, "nothing") for each in (should_be, is_now))
                found.append(
                    f"layer {old} as its layer {new} would have {part or 'a whole'}: {has}, not {had}"
                )
    return found


def _parts(layer: nn.Module, place: dict[int, int] | None = None) -> dict[str, Any]:
    """{name of a part or of its plain attribute: what it is}; numbers of layers as `place` has them."""
    parts: dict[str, Any] = {}
    for name, module in layer.named_modules():
        parts[name] = type(module).__name__
        for attribute, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and not attribute.startswith(NOT_OF_IT):
                if place is not None and NUMBER.search(attribute) and not isinstance(value, bool):
                    value = place.get(value, f"layer {value}, which is left out")
                parts[f"{name}.{attribute}".lstrip(".")] = value
    return parts | {name: tuple(value.shape) for name, value in layer.state_dict().items()}


def shallower(teacher: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A float32 copy of the teacher with only the layers `keep`; embeddings, norms and head come along.

    Raises:
        ModelError: it would not compute what the teacher does when its other layers are passed over.
    """
    config = with_layers(teacher.config, keep, type(teacher))
    with no_init_weights():  # every weight is the teacher's; this leaves out the tying too
        student = type(teacher)(config)
    student.tie_weights()
    prefix, place, state = layers_name(teacher) + ".", {str(old): new for new, old in enumerate(keep)}, {}
    wanted, total = student.state_dict(), len(layers_of(teacher))
    for name, value in teacher.state_dict().items():
        if not name.startswith(prefix):
            state[name] = _of_layers(value, wanted[name].shape, keep, total) if name in wanted else value
            continue
        number, rest = name.removeprefix(prefix).split(".", 1)
        if number in place:
            state[f"{prefix}{place[number]}.{rest}"] = value
    shapes = [{name: value.shape for name, value in each.items()} for each in (state, wanted)]
    if odd := sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}):
        raise ModelError(
            f"{type(teacher).__name__}: {odd[0]} (and {len(odd) - 1} other weights) cannot be had from the "
            f"teacher for a student of its layers {list(keep)}; take a smaller model of its family"
        )
    student.load_state_dict(state)
    student.eval()
    _check(student, teacher, keep)
    if student.can_generate():  # without the teacher's sampling habits
        student.generation_config = plain_generation(teacher)
    return student.float()


def _of_layers(value: Tensor, shape: torch.Size, keep: Sequence[int], total: int) -> Tensor:
    """A weight outside the layers; of one that has rows or columns for each layer (Gemma 3n), those kept."""
    for axis, (has, wants) in enumerate(zip(value.shape, shape, strict=True)):
        if has != wants and has * len(keep) == wants * total:
            parts = value.unflatten(axis, (total, -1))
            value = parts.index_select(axis, torch.tensor(keep, device=value.device)).flatten(axis, axis + 1)
    return value


@torch.no_grad()
def _check(student: PreTrainedModel, teacher: PreTrainedModel, keep: Sequence[int]) -> None:
    """Hold the student against the teacher with its other layers passed over, on a few tokens."""

    def pass_over(layer, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        return before if isinstance(output, Tensor) else type(output)([before, *output[1:]])

    ids = torch.randint(teacher.config.get_text_config().vocab_size, (1, TOKENS), generator=torch.Generator())
    try:
        with ExitStack() as hooks:
            for number, layer in enumerate(layers_of(teacher)):
                if number not in keep:
                    hooks.enter_context(layer.register_forward_hook(pass_over, with_kwargs=True))
            expected = teacher(input_ids=ids.to(teacher.device), use_cache=False).logits.float()
        got = student(input_ids=ids.to(student.device), use_cache=False).logits.float().to(expected.device)
        apart = f"logits differ by {(error := _apart(got, expected)):.0%} of the largest"
    except (*NO_CONFIG, RuntimeError) as fault:  # it wants what a layer left out has computed
        error, apart = math.inf, f"it cannot run: {type(fault).__name__}: {fault}"
    if not error <= (1e-3 if teacher.dtype is torch.float32 else 0.1):
        raise ModelError(
            f"{type(teacher).__name__}: a student of the layers {list(keep)} does not compute what they do "
            f"in the teacher ({apart}), as what a layer does depends on where it stands. Keep the first "
            "layers (student.keep: first), or take a smaller model of its family"
        )


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Of the largest logit; 0 where the teacher's are no numbers, which others name."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item() if theirs.isfinite().all() else 0.0
