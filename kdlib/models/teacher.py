"""Where signals come from: a model run on a batch, now.  The student's go through the same function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from kdlib.losses.features import LayerPairs
from kdlib.losses.objective import ObjectiveAt
from kdlib.losses.signals import DenseSignal, Features, Form, Kept, LinearSignal, Signal
from kdlib.models.hooks import attend_eagerly, captured_hidden, captured_layers
from kdlib.models.loading import head_form

# the student's submodule that maps its hidden states to the teacher's size
PROJECTIONS = "distillation_projections"


@dataclass(frozen=True)
class Inside:
    """Which layers are listened to, one for each pair, and what for; nothing where neither is wanted."""

    layers: Sequence[int] = ()
    hidden: bool = False
    attention: bool = False
    projections: nn.ModuleList | None = None  # the student's, to the teacher's size


def insides(at: ObjectiveAt, pairs: LayerPairs, student: PreTrainedModel) -> tuple[Inside, Inside]:
    """What student and teacher are listened to for, at a moment of the training; the student with its
    projections.
    """
    ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())
    wanted = {"hidden": at.needs_hidden, "attention": at.needs_attention}
    projections = getattr(student, PROJECTIONS, None) if at.needs_projection else None
    return Inside(ours, **wanted, projections=projections), Inside(theirs, **wanted)


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
) -> Signal:
    """What a model says about the kept tokens of a batch.

    Args:
        model: called once with input_ids and attention_mask; may be a wrapper (DDP) of `unwrapped`.
        vocabulary: the tokenizer's size, or the number of classes; rows that pad the head beyond it are left
            out.
        form: `head_form` of the model gives a LinearSignal (the head is applied later, chunk by chunk), None
            a DenseSignal.
        inside: what the features are made of, where a term needs them.
        reads: "teacher_" for a model that reads those of the batch's inputs.
    """
    unwrapped, inside = unwrapped or model, inside or Inside()
    attend_eagerly(unwrapped, inside.attention)
    inputs = {name: batch[reads + name] for name in ("input_ids", "attention_mask")}
    none = batch["input_ids"].new_empty(0)  # of the positions: the head is applied here, not there
    inputs |= {"use_cache": False} | ({} if form is None else {"logits_to_keep": none})
    with (
        captured_hidden(unwrapped) as last,
        captured_layers(
            unwrapped, inside.layers, hidden=inside.hidden, attention=inside.attention
        ) as captured,
    ):
        output = model(**inputs)
    features = _features(captured, kept, inside) if inside.hidden or inside.attention else None
    if form is None:
        return DenseSignal(kept.select(output.logits)[:, :vocabulary], features)
    weight, bias = (_whole(parameter, vocabulary) for parameter in head_of(unwrapped))
    return LinearSignal(kept.select(last[-1]), weight, bias, form, features)


def head_of(model: PreTrainedModel) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of the output head."""
    head = model.get_output_embeddings()
    return head.weight, head.bias


@dataclass
class LiveTeacher:
    """A frozen model that is asked about each batch as it comes."""

    model: PreTrainedModel
    vocabulary: int
    reads: str = ""  # see signal_of

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.form = head_form(self.model)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor], kept: Kept, inside: Inside | None = None) -> Signal:
        """The teacher's signal for the kept tokens; without gradient."""
        return signal_of(
            self.model,
            batch,
            kept,
            vocabulary=self.vocabulary,
            form=self.form,
            inside=inside,
            reads=self.reads,
        )


def _features(captured, kept: Kept, inside: Inside) -> Features:
    hidden = [kept.select(captured.hidden[number]) for number in inside.layers] if inside.hidden else []
    maps = (
        [kept.select(captured.attention[number].transpose(1, 2)) for number in inside.layers]
        if inside.attention
        else []
    )
    if torch.is_grad_enabled() and not all(state.requires_grad for state in [*hidden, *maps]):
        raise RuntimeError(
            "the student's inner states carry no gradient, so feature terms would teach nothing; with "
            "gradient checkpointing "
            "use `activation_checkpointing_kwargs: {use_reentrant: false}`"
        )
    matrices = inside.projections or [nn.Identity()] * len(hidden)
    projected = [
        matrix(state.to(getattr(matrix, "weight", state).dtype))
        for matrix, state in zip(matrices, hidden, strict=False)
    ]
    return Features(kept.rows, hidden, maps, projected)


def _whole(parameter: nn.Parameter | None, vocabulary: int) -> Tensor | None:
    """The first `vocabulary` rows; gathered from all ranks where FSDP2 shards them, and the gradient
    averaged as it does.
    """
    if isinstance(parameter, DTensor):
        parameter = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return parameter if parameter is None or len(parameter) == vocabulary else parameter[:vocabulary]
