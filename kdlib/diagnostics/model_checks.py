"""What the doctor asks of teacher and student before their weights are loaded: do they fit each other,
the text and the terms?
"""

from collections.abc import Iterator
from functools import partial

from kdlib.diagnostics.charges import GIB
from kdlib.diagnostics.context import Subject, Unavailable
from kdlib.diagnostics.findings import Finding
from kdlib.diagnostics.memory import forecast, verdict
from kdlib.diagnostics.remedies import remedies
from kdlib.errors import ModelError
from kdlib.losses.features import feature_terms
from kdlib.models.student import check_pair

# with it `check_pair` looks at everything but positions, which have a check of their own
NO_LENGTH = {"max_length": 2}


def rows_fit_the_positions(subject: Subject) -> Iterator[Finding]:
    """No row is longer than a model has positions."""
    length = subject.config.data.max_length
    limits = {
        name: limit
        for name, each in subject.configs.items()
        if (limit := getattr(each, "max_position_embeddings", None))
    }
    if limits and (least := min(limits.values())) < length:
        yield Finding(
            "critical",
            "data.max_length",
            f"{length}; the {min(limits, key=limits.get)} has {least} positions",
            "beyond them a model fails, or says nothing that it has learned",
            f"write {least}",
            {"data.max_length": least},
        )


def models_are_a_pair(subject: Subject) -> Iterator[Finding]:
    """The student has layers that the teacher has, or a tokenizer whose ids mean the same."""
    config = subject.config
    try:
        check_pair(
            config.model_copy(update={"data": config.data.model_copy(update=NO_LENGTH)}), subject.tokenizer
        )
    except ModelError as error:
        raise Unavailable("student", error) from error
    # each reads in its own tokens; kdlib.diagnostics.class_checks
    if config.task == "sequence-classification":
        return
    for name, each in subject.configs.items():
        rows, tokens = each.get_text_config().vocab_size, len(subject.tokenizer)
        if rows < tokens:
            yield Finding(
                "critical",
                f"{name}.model" if name == "teacher" else "student.from",
                f"the {name}'s head has {rows} rows, but the tokenizer {tokens} tokens",
                "the tokens beyond have no row to be looked up in",
                "take the tokenizer that belongs to the model",
            )
        elif rows > tokens:
            yield Finding(
                "note",
                "teacher.model" if name == "teacher" else "student.from",
                f"the {name}'s head is padded from {tokens} tokens to {rows} rows",
                "rows beyond the tokenizer mean nothing",
                "nothing: they are left out on both sides",
            )


def tokenizers_agree(subject: Subject) -> Iterator[Finding]:
    """A student of its own is trained and saved with the teacher's tokenizer; what that changes for it is
    named.
    """
    if subject.config.student.source == "teacher" or subject.config.task == "sequence-classification":
        return
    ours, theirs = subject.student_tokenizer, subject.tokenizer
    for name in ("bos_token", "eos_token"):
        if getattr(ours, name) != getattr(theirs, name):
            yield Finding(
                "warning",
                "student.from",
                f"its {name} is {getattr(ours, name)!r}, the teacher's {getattr(theirs, name)!r}",
                "the text is made with the teacher's, which the student has not met in this place",
                "train long enough for it to learn, or take a student of the teacher's family",
            )
    for name in ("chat_template", "padding_side", "pad_token"):
        if getattr(ours, name) != getattr(theirs, name):
            shown = (
                ""
                if name == "chat_template"
                else f": {getattr(ours, name)!r}, the teacher's {getattr(theirs, name)!r}"
            )
            yield Finding(
                "note",
                "student.from",
                f"its {name} differs from the teacher's{shown}",
                "the trained student is saved with the teacher's tokenizer, whose template is the one that "
                "is used; padding "
                "is masked",
                "use the saved tokenizer with the trained student",
            )


def terms_have_a_source(subject: Subject) -> Iterator[Finding]:
    """What feature terms need is there, or made, and what that costs."""
    configs = [
        each.get_text_config()
        for each in (subject.configs.get("student", subject.configs["teacher"]), subject.configs["teacher"])
    ]
    sizes = [each.hidden_size for each in configs]
    for name in subject.active:
        (term,) = feature_terms([name]) or [None]
        if term and term.projected and sizes[0] != sizes[1]:
            yield Finding(
                "note",
                f"loss.weights.{name}",
                f"the student's states have {sizes[0]} dimensions, the teacher's {sizes[1]}",
                "they are compared through a projection, trained with the student and not saved in it",
                "nothing",
            )
        if term and term.attention:
            yield Finding(
                "note",
                f"loss.weights.{name}",
                "both models switch to eager attention while this term has a weight",
                (
                    "SDPA and flash attention make no maps; eager attention is slower and keeps [B, A, T, T] "
                    "for "
                    "each layer"
                ),
                "nothing, or compare hidden states instead",
            )


def memory_suffices(subject: Subject) -> Iterator[Finding]:
    """The forecast of the training's peak lies within what the device has; by how much, `kd forecast`
    says part by part.
    """
    config, rows = subject.config, len(subject.prepared.train)
    here = partial(forecast, rows=rows, classes=len(subject.prepared.labels) or None)
    found = here(config)
    judged = verdict(found.peak, found.total)
    if judged == "fits":
        return
    changes = [each for each in remedies(config, found, found.total, here) if each.peak <= found.total]
    yield Finding(
        "critical" if judged == "does not fit" else "warning",
        "training.per_device_train_batch_size",
        (
            f"the training is forecast to take {found.peak / GIB:.1f} GiB, {found.moment}, and the device "
            "has "
            f"{found.total / GIB:.1f}"
        ),
        "a training that runs out of memory ends without a word, on a CPU even with the whole machine",
        "; or ".join(f"{each.overrides} ({each.what}): {each.peak / GIB:.1f} GiB" for each in changes)
        or "see `kd forecast`; take smaller models, shorter rows, or more memory",
    )


MODEL_CHECKS = (rows_fit_the_positions, models_are_a_pair, tokenizers_agree, terms_have_a_source)
