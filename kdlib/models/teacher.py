"""Where signals come from: a model, student or teacher, run on a batch."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from kdlib.errors import ModelError
from kdlib.losses.alignment import SPANS, Alignment, SpanSignal, TeacherSignal, spans_in
from kdlib.losses.features import LayerPairs
from kdlib.losses.signals import (
    FOUND,
    DenseSignal,
    Features,
    Form,
    Kept,
    LinearSignal,
    Signal,
    kept,
    mean_of,
    moved,
)
from kdlib.models.heads import head_form, head_inputs, rounding, whole
from kdlib.models.hooks import Captured, attend_eagerly, captured_layers, captured_sources
from kdlib.tokens.vocabulary import Vocabularies

LET_GO = (
    "logits made by the chunk are not the model's own, which are taken from here on, all at once; what was "
    "trained before followed wrong ones"
)
FEW = 32  # tokens on which a form is held against the model's own logits
BESIDE = "distillation_"  # how submodules of the student begin that are trained with it and never saved in it
PROJECTIONS = f"{BESIDE}projections"  # its hidden states to the teacher's size
GATE = f"{BESIDE}gate"  # which of the teacher's states its own are to match


class Needs(Protocol):
    """What terms ask of the models' inside: an ObjectiveAt, without its import."""

    @property
    def needs_hidden(self) -> bool: ...
    @property
    def needs_attention(self) -> bool: ...
    @property
    def needs_projection(self) -> bool: ...
    @property
    def needs_router(self) -> bool: ...
    @property
    def needs_gate(self) -> bool: ...


@dataclass(frozen=True)
class Inside:
    """Which layers are looked into, one for each pair, and what for."""

    layers: Sequence[int] = ()
    hidden: bool = False
    attention: bool = False
    projections: nn.ModuleList | None = None  # the student's, to the teacher's size
    router: bool = False  # the auxiliary loss of its router
    routed: Sequence[int | str] = ()  # what a gate looks at: layers, and experts
    gate: Any = None  # the student's

    @property
    def is_looked_at(self) -> bool:
        return self.hidden or self.attention or self.router or bool(self.routed)


def insides(needs: Needs, pairs: LayerPairs, student: PreTrainedModel) -> tuple[Inside, Inside]:
    """What is looked at inside student and teacher; the student's with its projections and gate."""
    ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())
    made = getattr(student, PROJECTIONS, None) if needs.needs_projection else None
    gate = getattr(student, GATE) if needs.needs_gate else None
    routed, sources = (gate.layers, gate.sources) if gate else ((), ())
    hidden, attention = needs.needs_hidden, needs.needs_attention
    return (
        Inside(ours, hidden, attention, made, needs.needs_router, routed, gate),
        Inside(theirs, hidden, attention, routed=sources),
    )


def idle(needs: Needs, student: PreTrainedModel) -> Tensor | int:
    """0, made of what is trained beside the student and not asked for now: DDP waits for its gradients."""
    asked = {PROJECTIONS: needs.needs_projection, GATE: needs.needs_gate}
    modules = [getattr(student, name, nn.Module()) for name, needed in asked.items() if not needed]
    return sum(0 * each.sum() for module in modules for each in module.parameters())


def signal_of(
    model,
    batch: Mapping[str, Tensor],
    kept: Kept,
    *,
    vocabulary: int,
    form: Form | None,
    unwrapped: PreTrainedModel | None = None,
    inside: Inside | None = None,
    reads: str = "",
) -> DenseSignal | LinearSignal:
    """What a model says about the kept tokens of a batch.

    Args:
        model: called once with input_ids and attention_mask; may be a wrapper (DDP) of `unwrapped`.
        vocabulary: the tokenizer's size, or the number of classes; the head's rows beyond it are left out.
        form: the model's `head_form`, for a LinearSignal (the head is applied chunk by chunk); else Dense.
        reads: what its inputs' names begin with: "teacher_" for a teacher with a tokenizer of its own.
    """
    unwrapped, inside = unwrapped or model, inside or Inside()
    attend_eagerly(unwrapped, inside.attention)
    inputs = {name: batch[reads + name] for name in ("input_ids", "attention_mask")}
    inputs |= {"output_router_logits": True} if inside.router else {}
    looked_at = captured_layers(unwrapped, inside.layers, hidden=inside.hidden, attention=inside.attention)
    routed = captured_sources(unwrapped, inside.routed) if inside.routed else nullcontext()
    # with a form the model's own head is left out: our signal applies it, chunk by chunk
    read_by_head = nullcontext([]) if form is None else head_inputs(unwrapped)
    with read_by_head as states, looked_at as captured, routed as between:
        output = model(**inputs, use_cache=False)
    router = _router_loss(unwrapped, output) if inside.router else None
    seen = between(kept.select) if between else []
    features = _features(captured, kept, inside, router, seen) if inside.is_looked_at else None
    if form is None:
        return DenseSignal(kept.select(output.logits)[:, :vocabulary], features)
    head = unwrapped.get_output_embeddings()
    weight, bias = (_rows(whole(parameter), vocabulary) for parameter in (head.weight, head.bias))
    return LinearSignal(kept.select(states[-1]), weight, bias, form, features)


@torch.no_grad()
def form_error(model: PreTrainedModel, batch: Mapping[str, Tensor], *, vocabulary: int, form: Form) -> float:
    """How far logits made by the form are from the model's own on a batch's first tokens.

    Relative to the largest, in units of what rounding may do: above 1 they are not the same.
    """
    few = {name: batch[name][:1, :FEW] for name in ("input_ids", "attention_mask")}
    if not len((tokens := kept(few["input_ids"])).targets):
        return 0.0
    made, own = (signal_of(model, few, tokens, vocabulary=vocabulary, form=each) for each in (form, None))
    apart = (made.logits().float() - own.logits().float()).abs().amax() / own.logits().abs().amax()
    kind = model.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return float(apart) / rounding(computed)


class Routing(Protocol):
    """How experts are asked while a model teaches: see kdlib.routing."""

    draws: int

    def asked(self, tokens: Tensor) -> AbstractContextManager[None]: ...


@dataclass
class LiveTeacher:
    """A frozen model that is asked about each batch as it comes."""

    model: PreTrainedModel
    vocabulary: int
    reads: str = ""  # see signal_of
    own_device: torch.device | None = None  # another than the student's
    vocabularies: Vocabularies | None = None  # of a tokenizer of its own, where tokens are predicted
    routing: Routing | None = None  # of a model with experts

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.form = head_form(self.model)
        self.heads: dict[torch.device, tuple[Tensor, Tensor | None]] = {}  # its head where it is applied

    def to(self, device: torch.device) -> None:
        """Put the model there, or on its own device; one that ranks share lies where it was loaded."""
        if not isinstance(self.model, FSDPModule):
            self.model.to(self.own_device or device)
        self.vocabularies = moved(self.vocabularies, device)

    @torch.no_grad()
    def __call__(
        self, batch: Mapping[str, Any], kept: Kept, inside: Inside | None = None, *, teaches: bool = False
    ) -> TeacherSignal:
        """The teacher's signal for the kept tokens, on their device; without gradient.

        Of a teacher with its own tokenizer, one for its tokens in the spans that they are part of.

        Args:
            teaches: its experts are asked as `routing` says; else as the model was made.
        """
        return self.ask(batch, kept, inside, teaches=teaches)

    def ask(
        self, batch: Mapping[str, Any], kept: Kept, inside: Inside | None = None, *, teaches: bool = False
    ) -> TeacherSignal:
        """The same, with gradient for what in it has one: a router that learns."""
        if self.vocabularies is None:
            return self._said(batch, kept, inside, teaches)
        return beside(batch, self.vocabularies, lambda theirs: self._said(batch, theirs, inside, teaches))

    def _said(self, batch: Mapping[str, Any], kept: Kept, inside: Inside | None, teaches: bool) -> Signal:
        """In one pass, or in as many as its routing draws."""
        if not teaches or self.routing is None:
            return self._once(batch, kept, inside)
        draws = []
        for _ in range(self.routing.draws):
            with self.routing.asked(self._read(batch, kept)):
                draws.append(self._once(batch, kept, inside))
        return mean_of(draws)

    def _read(self, batch: Mapping[str, Any], kept: Kept) -> Tensor:
        """[N] the places of the kept among its B·T; all that is read where rows are classified."""
        per_token = batch["labels"].ndim == 2
        read = batch[self.reads + "attention_mask"].flatten()
        return (kept.positions if per_token else read.nonzero()[:, 0]).to(self.model.device)

    def _once(
        self, batch: Mapping[str, Any], kept: Kept, inside: Inside | None
    ) -> DenseSignal | LinearSignal:
        how = {"vocabulary": self.vocabulary, "form": self.form, "reads": self.reads, "inside": inside}
        here, there = kept.positions.device, self.own_device
        if there in (None, here):
            return signal_of(self.model, batch, kept, **how)
        read = {name: batch[self.reads + name].to(there) for name in ("input_ids", "attention_mask")}
        signal = signal_of(self.model, read, moved(kept, there), **{**how, "reads": ""})
        if isinstance(signal, LinearSignal):  # the head is moved once, what it reads each time
            if here not in self.heads:
                self.heads[here] = moved((signal.weight, signal.bias), here)
            weight, bias = self.heads[here]
            signal = replace(signal, weight=weight, bias=bias)
        return moved(signal, here)


def beside(batch: Mapping[str, Any], vocabularies: Vocabularies, ask: Callable[[Kept], Signal]) -> SpanSignal:
    """What a teacher with its own tokenizer says of its tokens in a batch's spans, `ask`ed of them."""
    lines, own = (batch.get(FOUND) or {}).get(SPANS) or spans_in(batch)
    theirs = Kept(**own)
    return SpanSignal(ask(theirs), theirs, Alignment(**lines), vocabularies)


def named_device(name: str) -> torch.device:
    """The device of a teacher that has one of its own.

    Raises:
        ModelError: it is not there; names those that are.
    """
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if name not in ("cpu", *found):
        there = ", ".join([*found, "cpu"])
        raise ModelError(f"teacher.device: found {name}, but this machine has {there}; name one of them")
    return torch.device(name)


def router_weight(student: PreTrainedModel) -> float | None:
    """The weight of its router's auxiliary loss, where transformers adds one: `output_router_logits`."""
    config = student.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    names = ("router_aux_loss_coef", "aux_loss_coef")  # JetMoe's is the second
    return next((float(getattr(config, name)) for name in names if hasattr(config, name)), None)


def _router_loss(model: PreTrainedModel, output: Any) -> Tensor:
    """As transformers makes it, of every token that is attended to."""
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise ModelError(
            f"{type(model).__name__} gives no auxiliary loss of a router, which loss.weights.router_aux "
            "needs: it is for students with experts (Mixtral, Qwen-MoE, …); leave it out"
        )
    return loss


def _features(
    captured: Captured, kept: Kept, inside: Inside, router: Tensor | None, seen: Sequence[Tensor]
) -> Features:
    layers, rows = inside.layers, kept.rows if kept.counts is None else kept.counts
    hidden = [kept.select(captured.hidden[n]) for n in layers] if inside.hidden else []
    # [B, A, T, T] to [N, A, T]
    maps = [kept.select(captured.attention[n].transpose(1, 2)) for n in layers] if inside.attention else []
    looked_at = [*hidden, *maps, *seen, *([] if router is None else [router])]
    if torch.is_grad_enabled() and not all(state.requires_grad for state in looked_at):
        raise RuntimeError(
            "the student's inner states carry no gradient, so feature terms would teach nothing; with "
            "gradient checkpointing use `activation_checkpointing_kwargs: {use_reentrant: false}`"
        )
    projected = hidden if inside.projections is None else _through(inside.projections, hidden)
    seen = _through(inside.gate.projections, seen) if inside.gate and inside.gate.projections else seen
    routed = torch.stack(seen, dim=1) if seen else None
    return Features(rows, hidden, maps, projected, router, routed, inside.gate)


def _through(projections: nn.ModuleList, states: Sequence[Tensor]) -> list[Tensor]:
    """Each state through its own matrix."""
    pairs = zip(projections, states, strict=True)
    return [matrix(state.to(matrix.weight.dtype)) for matrix, state in pairs]


def _rows(parameter: Tensor | None, vocabulary: int) -> Tensor | None:
    """The first `vocabulary`."""
    return parameter if parameter is None or len(parameter) == vocabulary else parameter[:vocabulary]
