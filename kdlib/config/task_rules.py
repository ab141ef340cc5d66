"""Which settings go with which task.  Imports no torch."""

from collections.abc import Iterator
from typing import Any

from kdlib.metrics.names import MEASURES

TASKS = ("causal-lm", "sequence-classification", "question-answering")
METRICS = {
    "causal-lm": ("perplexity", "kl_to_teacher", "agreement", "accuracy"),
    "sequence-classification": ("accuracy", "macro_f1", "log_loss", "kl_to_teacher", "agreement"),
    "question-answering": ("perplexity", "kl_to_teacher", "agreement", "accuracy", "choice_accuracy"),
}
"""The metrics of an evaluation that may choose the best model, the usual one first: none depends on the
loss's weights.
"""
HIGHER_IS_BETTER = {name: MEASURES[name].higher_is_better for metrics in METRICS.values() for name in metrics}
READ_BY = {  # settings of `data:` that not every task reads
    "label": ("sequence-classification",),
    "labels": ("sequence-classification",),
    "group": ("sequence-classification",),
    "question": ("question-answering",),
    "choices": ("question-answering",),
    "answer": ("question-answering",),
    "test": ("sequence-classification", "question-answering"),
    "packing": ("causal-lm",),
    "text": ("causal-lm", "sequence-classification"),
}
# terms that compare the two models token by token
OF_TOKENS = ("hidden", "attention", "relational", "contrastive")


def misfits(config: Any) -> list[str]:
    """What does not go together in a config whose sections are sound one by one, a line each: `path:
    found, needed, do`.
    """
    return [*_unread(config), *_of_classes(config), *_of_stops(config)]


def _unread(config: Any) -> Iterator[str]:
    """Settings that this task would pass over in silence."""
    for name, tasks in READ_BY.items():
        value, usual = getattr(config.data, name), type(config.data).model_fields[name].default
        if config.task not in tasks and value != usual:
            yield (
                f"data.{name}: found {value!r}, which {config.task} does not read; leave it out, or set "
                f"task: {' or '.join(tasks)}"
            )
    if config.task == "causal-lm" and isinstance(config.data.text, list):
        yield f"data.text: found {config.data.text}; causal-lm reads one column: name it"
    if config.task == "causal-lm" and isinstance(config.data.validation, str):
        yield (
            f"data.validation: found {config.data.validation!r}; causal-lm takes the source's split of the "
            "name validation, "
            "or a share of the documents: write 0.1"
        )
    if config.task != "sequence-classification" and config.teacher_stage is not None:
        yield (
            "teacher_stage: it trains a classifier's head, so it goes with task: sequence-classification; "
            "leave it out"
        )


def _of_classes(config: Any) -> Iterator[str]:
    if config.task != "sequence-classification":
        return
    for weights, where in (
        (config.loss.schedules, "loss"),
        (config.baseline.weights if config.baseline else {}, "baseline"),
    ):
        for name in weights:
            if name in OF_TOKENS:
                yield (
                    f"{where}.weights.{name}: it compares the models token by token, and rows are classified "
                    "here, which the two "
                    "may read with different tokenizers; leave it out"
                )


def _of_stops(config: Any) -> Iterator[str]:
    stage = config.teacher_stage
    for where, stops, training in (
        ("", config.early_stopping, config.training),
        *([("teacher_stage.", stage.early_stopping, stage.training)] if stage else []),
    ):
        if stops is not None and training.get("eval_strategy", "no") == "no":
            yield (
                f"{where}early_stopping: needs evaluations to judge by; set {where}training.eval_strategy: "
                "epoch "
                "(or steps, with eval_steps)"
            )
