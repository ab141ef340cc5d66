"""What a config's task makes of its data and models; everything above asks here and need not know which
task it is.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.config.run import Config
from kdlib.data import classification as classes, qa as questions, text as data
from kdlib.data.batches import Prepared, calibration_rows
from kdlib.errors import ConfigError
from kdlib.hardware import precision_of
from kdlib.models.classifier import load_classifier, named_classes
from kdlib.models.loading import device_of, load_config, load_model, load_tokenizer
from kdlib.models.student import chosen_layers, shallower
from kdlib.models.teacher import LiveTeacher


def prepare(config: Config, tokenizer: PreTrainedTokenizerBase, *, new_head: bool = False) -> Prepared:
    """The rows of a config; `tokenizer` as `kdlib.models.student.tokenizer_of` gives it.

    Args:
        new_head: whatever classes the teacher has are not asked for: it is to learn those of the data.

    Raises:
        DataError: nothing to read, not the named columns, or rows that the task can do nothing with, named
            one by one.
        ConfigError: the best model is to be chosen by a metric that these rows have not.
    """
    if config.task == "sequence-classification":
        known = None if new_head or config.teacher_stage else named_classes(load_config(config.teacher.model))
        return classes.prepare(
            config.data, tokenizer, teacher=_teachers_own(config, tokenizer), seed=config.seed, known=known
        )
    prepare_rows = questions.prepare if config.task == "question-answering" else data.prepare
    prepared = prepare_rows(config.data, tokenizer, seed=config.seed)
    if (
        config.training["metric_for_best_model"].removeprefix("eval_") == "choice_accuracy"
        and not prepared.choices
    ):
        raise ConfigError(
            f"training.metric_for_best_model: found eval_choice_accuracy, but {config.data.source} has no "
            "choices "
            f"({prepared.notes['form']}); write eval_perplexity or eval_kl_to_teacher"
        )
    return prepared


def load(
    source: str, prepared: Prepared, dtype: torch.dtype = torch.float32, *, untrained: bool = False
) -> PreTrainedModel:
    """A model for the task; a classifier without a trained head is refused unless it may be `untrained`."""
    return (
        load_classifier(source, prepared.labels, dtype, untrained=untrained)
        if prepared.labels
        else load_model(source, dtype)
    )


def load_teacher(config: Config, prepared: Prepared, dtype: torch.dtype | None = None) -> LiveTeacher:
    """The teacher, in the precision of the run unless told otherwise."""
    dtype = dtype or precision_of(config.precision, device_of(config.wanted_device))[0]
    return teacher_of(_teacher_model(config, prepared, dtype), prepared)


def _teacher_model(config: Config, prepared: Prepared, dtype: torch.dtype) -> PreTrainedModel:
    """Before its own stage its head says nothing so far, and may be missing."""
    return load(config.teacher.model, prepared, dtype, untrained=config.teacher_stage is not None)


def teacher_of(model: PreTrainedModel, prepared: Prepared) -> LiveTeacher:
    """A loaded model as the teacher of these rows."""
    reads = "teacher_" if "teacher_input_ids" in prepared.train.column_names else ""
    return LiveTeacher(model, prepared.vocabulary, reads)


def voice_of(model: PreTrainedModel, prepared: Prepared) -> LiveTeacher:
    """A loaded student, asked as a teacher is."""
    return LiveTeacher(model, prepared.vocabulary)


def untrained_student(config: Config, prepared: Prepared, keep: Sequence[int] | None) -> PreTrainedModel:
    """The student as its training starts with it, the same each time: the teacher's layers `keep`, or a model
    of its own.

    In float32 from float32, whatever the teacher's precision in training: these are the weights that will be
    trained.
    """
    torch.manual_seed(config.seed)  # for a head that is made anew
    if config.student.source == "teacher":
        return shallower(_teacher_model(config, prepared, torch.float32), keep)
    return load(config.student.source, prepared, untrained=True)


def layers_for_student(config: Config, teacher: PreTrainedModel, prepared: Prepared) -> list[int] | None:
    """Which of the teacher's layers the student keeps; None where it is not made from the teacher."""
    return chosen_layers(config, teacher, calibration_rows(prepared.train))


def _teachers_own(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer, where it reads otherwise than the student's."""
    if config.student.source == "teacher":
        return None
    other = load_tokenizer(config.teacher.model)
    sample = "Déjà vu:  two\nlines."
    alike = (
        other.get_vocab() == tokenizer.get_vocab()
        and other(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    )
    return None if alike else other
