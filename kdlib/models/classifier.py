"""Models that classify rows, their outputs in the order of the data's classes, matched by name."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from kdlib.errors import ModelError
from kdlib.models.loading import load_config, load_tokenizer, load_weights


def load_classifier(
    model: str, labels: Sequence[str], dtype: torch.dtype = torch.float32, *, untrained: bool = False
) -> PreTrainedModel:
    """A classifier of rows, named as in `load_model`, whose outputs stand in the order of `labels`.

    Args:
        untrained: a head may be made anew where the model has none for these classes.

    Raises:
        ModelError: there is no such model, or it has no trained head for these classes.
    """
    stated, other_classes = load_config(model), False
    try:
        order = class_order(model, stated, labels)
    except ModelError:
        if not untrained:
            raise
        order, other_classes = None, True  # as many, but not these
    numbers = {label: number for number, label in enumerate(labels)}
    names = {"id2label": dict(enumerate(labels)), "label2id": numbers}
    options = {} if order else {**names, "ignore_mismatched_sizes": True}
    with _no_report() if untrained else nullcontext():
        made, info = load_weights(AutoModelForSequenceClassification, model, dtype, **options)
    fresh = bool(info["missing_keys"] or info["mismatched_keys"]) or other_classes
    if fresh and not untrained:
        raise ModelError(
            f"{model} has no trained head for the {len(labels)} classes ({', '.join(labels[:3])}, …); name "
            "one that was trained on them, or let `teacher_stage:` train it first"
        )
    if other_classes:
        _renew_head(model, made, len(labels))
    if order and not fresh and order != list(range(len(labels))):
        _reorder_head(model, made, order)
    made.config.id2label, made.config.label2id = names["id2label"], names["label2id"]
    made.config.problem_type = "single_label_classification"
    # a decoder's head reads the last token that is no padding: of what rows are padded with
    if (padding := load_tokenizer(model).pad_token_id) is not None:
        made.config.get_text_config().pad_token_id = padding
    return made.eval()


@contextmanager
def _no_report() -> Iterator[None]:
    """Without transformers' report of missing weights: no news of a head that is to be made."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def class_order(name: str, config: PreTrainedConfig, labels: Sequence[str]) -> list[int] | None:
    """Which output of a model stands for each of these classes; None where the model has no such head.

    Heads whose classes have no names (LABEL_0, …) are taken as they stand, where there are as many.

    Raises:
        ModelError: it has as many classes, by other names.
    """
    if config.num_labels != len(labels):
        return None
    if (theirs := named_classes(config)) is None:
        return list(range(len(labels)))
    place = {label.casefold(): number for number, label in enumerate(theirs)}
    if missing := [label for label in labels if label.casefold() not in place]:
        verb = "is" if len(missing) == 1 else "are"
        raise ModelError(
            f"{name}: its classes are {', '.join(theirs)}; the data's {', '.join(missing)} {verb} not among "
            "them: rename those of the data (data.labels), or take a model trained on them"
        )
    return [place[label.casefold()] for label in labels]


def named_classes(config: PreTrainedConfig) -> list[str] | None:
    """A model's classes in the order of its outputs; None where they have no names (LABEL_0, …)."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    return None if all(name == f"LABEL_{number}" for number, name in enumerate(names)) else names


@torch.no_grad()
def _reorder_head(name: str, model: PreTrainedModel, order: Sequence[int]) -> None:
    """Puts a classifier's outputs into this order; seen on four tokens, not guessed from a name."""
    ids = torch.arange(1, 5, device=model.device)[None]
    before = model(input_ids=ids).logits[:, list(order)]
    head = _head(model, len(order))
    for parameter in head.parameters() if head else ():
        parameter.copy_(parameter[list(order)].clone())
    if not head or not torch.allclose(model(input_ids=ids).logits, before, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{name}: its classes stand in another order than the data's, and its head is no single matrix; "
            "give data.labels in the model's order"
        )


@torch.no_grad()
def _renew_head(name: str, model: PreTrainedModel, classes: int) -> None:
    """Random weights for a head of as many classes by other names."""
    if not (head := _head(model, classes)):
        raise ModelError(
            f"{name}: it knows as many classes by other names, and its head is no single matrix; name the "
            "model it was trained from"
        )
    nn.init.normal_(head.weight, std=getattr(model.config.get_text_config(), "initializer_range", 0.02))
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _head(model: PreTrainedModel, classes: int) -> nn.Linear | None:
    """What most likely makes a model's outputs: the last matrix with as many."""
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == classes]
    return found[-1] if found else None
