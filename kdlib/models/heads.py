"""What a language model's logits follow from, seen as it runs: what its head reads, and which tokens."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from kdlib.errors import ModelError
from kdlib.losses.signals import Form, LinearSignal
from kdlib.models.hooks import as_evaluated

# the largest product of each of the probe's tokens: trained heads make some tens, and soft caps bind there
SIZES = (1.0, 10.0, 50.0, 200.0)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # in models' configs
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of a head that is a plain matrix
ROW = 16  # tokens of the row whose end is changed
ENDS = 3  # in how many ways
# settings by which models of these names look ahead, and what they have where they do not
SETTINGS = {
    "is_decoder": True,
    "use_bidirectional_attention": False,
    "causal": True,
    "is_causal": True,
}

FOUND = "another last token changes what it says before that token, by {:.2g} of its logits' spread"
WHY = "it reads the token that it is to predict, so its figures would mean nothing"


@contextmanager
def head_inputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the head reads, [B, T, H], of each forward pass made inside; the head makes no logits."""
    states: list[Tensor] = []

    def take(head: nn.Module, given: tuple) -> tuple:
        states.append(given[0])
        return given[0][:, :0], *given[1:]

    with model.get_output_embeddings().register_forward_pre_hook(take):
        yield states


def head_form(model: PreTrainedModel) -> Form | None:
    """How logits follow from what the head reads; seen on four tokens, at the sizes of trained logits.

    None for a model whose logits are made otherwise: then they are taken as they are, all at once.
    """
    if (stated := stated_form(model)) is None:
        return None
    logits = _seen(model)  # some scale what the head reads, not what it makes
    return next((form for form in dict.fromkeys((stated, Form())) if logits and logits.follow(form)), None)


def stated_form(model: PreTrainedModel) -> Form | None:
    """What a model's structure and config say of `head_form`; loads no weights."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.dtype not in DTYPES:
        return None
    if is_traceable_wrapper_subclass(head.weight.data) and not isinstance(head.weight.data, DTensor):
        return None  # quantised
    if head.weight.shape != (head.out_features, head.in_features):  # packed
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    caps = (getattr(config, name, None) for name in CAPS)
    return Form(float(scale), next(filter(None, caps), None))


def rounding(dtype: torch.dtype) -> float:
    """What logits made in two ways may differ by in this dtype, relative to the largest."""
    return max(1e-3, 4 * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class _Logits:
    """What a model made of states that its head was given."""

    states: Tensor  # [n, H]
    values: Tensor  # [n, V]
    head: nn.Linear

    def follow(self, form: Form) -> bool:
        """Whether they are what `form` makes of the same states."""
        made = LinearSignal(self.states, whole(self.head.weight), whole(self.head.bias), form).logits()
        return _alike(made, self.values, self.head.weight.dtype)


def whole(parameter: Tensor | None) -> Tensor | None:
    """All of it, where ranks have parts of it (FSDP2); its gradient is averaged, as theirs is."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter


@torch.no_grad()
def _seen(model: PreTrainedModel) -> _Logits | None:
    """The model run with states that make products of the SIZES; None where the head does not read them so.

    It must read [B, T, H] once, and the same where its own product is left out.
    """
    head, given, made = model.get_output_embeddings(), [], []
    ids = torch.arange(len(SIZES), device=model.device)[None]

    def enlarge(head: nn.Linear, args: tuple) -> tuple | None:
        given.append(args[0])
        if args[0].shape[:-1] != ids.shape:
            return None
        largest = (
            nn.functional.linear(args[0].to(head.weight.dtype), head.weight).abs().amax(-1).clamp(min=1e-6)
        )
        made.append(args[0] * (largest.new_tensor(SIZES) / largest).to(args[0].dtype)[..., None])
        return made[-1], *args[1:]

    with as_evaluated(model):
        with head.register_forward_pre_hook(enlarge):
            logits = model(input_ids=ids, use_cache=False).logits
        if len(made) != 1 or len(given) != 1 or logits.shape != (*ids.shape, head.out_features):
            return None
        with head_inputs(model) as states:
            model(input_ids=ids, use_cache=False)
    return _Logits(made[0][0], logits[0], head) if _alike(states[0], given[0], head.weight.dtype) else None


def _alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by no more than rounding in this dtype, relative to each token's largest value."""
    one, other = one.float(), other.float()
    return bool(((one - other).abs().amax(-1) <= rounding(dtype) * other.abs().amax(-1)).all())


@torch.no_grad()
def look_ahead(model: PreTrainedModel, ids: Tensor) -> float:
    """How much logits change with a token that comes after them, relative to their spread; 0 if causal.

    One forward pass of a row with several last tokens.  A position's change is the least that any of them
    made: what rounding does to some experts' products depends on the token, what attention shows does not.

    Args:
        ids: [1, T] of a row as the model reads it.
    """
    row = (ids if ids.shape[1] > 1 else ids.repeat(1, 2))[0, :ROW].to(model.device)
    others = [token for token in row.unique().tolist() if token != row[-1]][:ENDS] or [int(row[-1] == 0)]
    rows = row.repeat(1 + len(others), 1)
    rows[1:, -1] = torch.tensor(others, device=row.device)
    with as_evaluated(model):
        output = model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
    logits = output.logits[:, :-1].float()
    changes = (logits[1:] - logits[0]).square().mean(-1).sqrt().amin(0)  # [T - 1]
    return float(changes.amax() / logits[0].std().clamp(min=1e-30))


def ahead_by_rounding(model: PreTrainedModel) -> float:
    """What `look_ahead` may give of a causal model; experts' products were seen to do 2e-7.

    An untrained BERT, which hardly attends, gives 5e-3 in bfloat16.
    """
    return 1e-4 if torch.finfo(model.dtype).eps < 1e-6 else 2e-3


def check_causal(name: str, model: PreTrainedModel, ids: Tensor) -> float:
    """`look_ahead`, where it is no more than rounding.

    Args:
        name: whose, for the message.

    Raises:
        ModelError: the model reads the token that it is to predict.
    """
    if (found := look_ahead(model, ids)) > ahead_by_rounding(model):
        raise ModelError(f"{name} looks ahead: {FOUND.format(found)}; {WHY}: {remedy(model)}")
    return found


def remedy(model: PreTrainedModel) -> str:
    """What to do about a model that looks ahead."""
    config = model.config.get_text_config()
    settings = [name for name, causal in SETTINGS.items() if getattr(config, name, causal) != causal]
    if not settings:
        return "name a causal language model"
    written = ", ".join(f'"{name}": {json.dumps(SETTINGS[name])}' for name in settings)
    return f"name a checkpoint that was trained as a causal language model, with {written} in its config.json"
