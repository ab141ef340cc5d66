"""What the doctor asks of a classification: has the teacher a head for these classes, does it know them,
is enough held out?
"""

import math
from collections import Counter
from collections.abc import Iterator

import torch

from kdlib.diagnostics.context import Subject, Unavailable
from kdlib.diagnostics.findings import Finding
from kdlib.errors import ModelError
from kdlib.losses.signals import kept
from kdlib.models import classifier as classifiers
from kdlib.models.loading import load_tokenizer

LOOKED_AT, AT_ONCE = 128, 16  # training rows that the teacher is asked about
FEWEST = 8  # rows, below which an accuracy tells nothing
FEW_HELD_OUT = 100  # rows
CONFLICTING = 0.01  # of the texts
RARE, FEW_TRAINED = 0.01, 10  # of a class: a share of the training rows, and rows
FEW_OF_A_CLASS = 5  # held-out rows, below which its F1 moves by a tenth and more with each
NAMED = 5  # classes


def teacher_has_a_head(subject: Subject) -> Iterator[Finding]:
    """The teacher was trained for as many classes as the data has, of the same names; or a stage of its
    own will train it.
    """
    config = subject.config
    if config.teacher_stage is not None:
        return
    stated, labels = subject.configs["teacher"], subject.prepared.labels
    try:
        order = classifiers.class_order(config.teacher.model, stated, labels)
    except ModelError as error:
        raise Unavailable("teacher.model", error) from error
    kinds = getattr(stated, "architectures", None) or []
    if order is not None and (not kinds or any("Classification" in kind for kind in kinds)):
        if classifiers.named_classes(stated) is None:
            yield Finding(
                "note",
                "teacher.model",
                f"its {len(labels)} classes have no names (LABEL_0, …)",
                (
                    f"they are taken in the order of the data's ({', '.join(labels[:3])}, …); in another it "
                    "would teach nonsense"
                ),
                "see that its accuracy is far above chance; or give data.labels in the teacher's order",
            )
        return
    found = (
        f"a head for {stated.num_labels} classes"
        if any("Classification" in kind for kind in kinds)
        else "no head for classes"
    )
    yield Finding(
        "critical",
        "teacher.model",
        f"{config.teacher.model} has {found}; the data has {len(labels)}",
        "a head that was never trained says nothing, so there is nothing to teach",
        "train it first with a stage of its own (teacher_stage: {training: {num_train_epochs: 3, "
        "learning_rate: 2e-5}}), or name a teacher "
        "that was trained on these classes",
    )


def both_models_read_their_tokens(subject: Subject) -> Iterator[Finding]:
    """Each model has a row for every token of its own tokenizer; what the two need not share is a
    vocabulary.
    """
    config = subject.config
    for name, stated in subject.configs.items():
        source = config.teacher.model if name == "teacher" else config.student.source
        rows, tokens = stated.get_text_config().vocab_size, len(load_tokenizer(source))
        if rows < tokens:
            yield Finding(
                "critical",
                "teacher.model" if name == "teacher" else "student.from",
                f"the {name}'s embedding has {rows} rows, but its tokenizer {tokens} tokens",
                "the tokens beyond have no row to be looked up in",
                "take the tokenizer that belongs to the model",
            )


def enough_rows_are_held_out(subject: Subject) -> Iterator[Finding]:
    """An accuracy from few rows tells no models apart; texts with two classes teach none."""
    notes = subject.prepared.notes
    rows, conflicting = notes["validation_rows"], notes.get("conflicting_documents_left_out", 0)
    if rows < FEW_HELD_OUT:
        limit = subject.config.data.max_eval_rows
        where = "data.validation" if limit is None or rows < limit else "data.max_eval_rows"
        yield Finding(
            "warning",
            where,
            f"{rows} rows are held out",
            f"the accuracy of so few has a 95 % interval of up to ± {98 / math.sqrt(rows):.0f} points",
            "hold out more",
        )
    if conflicting > CONFLICTING * (notes["train_documents"] + notes["validation_documents"]):
        yield Finding(
            "warning",
            "data.label",
            f"{conflicting} texts stand there with two classes, and were left out",
            "what is labelled by chance cannot be learned",
            f"look at the column {subject.config.data.label!r}",
        )


def held_out_groups_are_new(subject: Subject) -> Iterator[Finding]:
    """What belongs together is on one side; where kdlib splits, it sees to that."""
    if count := subject.prepared.notes.get("groups_on_two_sides", 0):
        yield Finding(
            "warning",
            "data.group",
            f"{count} groups of held-out rows are trained on as well",
            "what is learned of a group is asked again, so the held-out figures read too high",
            "mend the source's splits, or leave them out of it: kdlib's own keep groups whole",
        )


def classes_are_large_enough(subject: Subject) -> Iterator[Finding]:
    """Each class has rows to learn it from, is no small minority, and has held-out rows enough for a
    figure of its own.
    """
    data, notes = subject.config.data, subject.prepared.notes
    for name in ("train", "validation", "test"):
        counts, rows = notes.get(f"{name}_classes", {}), notes.get(f"{name}_rows", 0)
        least = max(FEW_TRAINED, RARE * rows) if name == "train" else FEW_OF_A_CLASS
        if not (few := {label: count for label, count in counts.items() if count < least}):
            continue
        setting, limit = (
            ("max_train_rows", data.max_train_rows)
            if name == "train"
            else ("max_eval_rows", data.max_eval_rows)
        )
        limited, smallest = (
            limit is not None and rows < notes[f"{name}_documents"],
            sorted(few.items(), key=lambda item: item[1]),
        )
        yield Finding(
            "warning",
            f"data.{setting}" if limited else "data.label" if name == "train" else f"data.{name}",
            f"{len(few)} of {len(counts)} classes have fewer than {least:.0f} of the {rows} {name} rows: "
            + ", ".join(f"{label} {count}" for label, count in smallest[:NAMED])
            + ", …" * (len(few) > NAMED),
            "the student hardly sees them, and accuracy hardly counts them: read macro-F1"
            if name == "train"
            else "one row then moves a class's F1 by a tenth or more, and macro-F1 with it",
            "take more rows"
            if limited
            else "give more rows of them, join them with others, or leave them out"
            if name == "train"
            else "hold out more, or give more rows of them",
        )


def teacher_knows_the_classes(subject: Subject) -> Iterator[Finding]:
    """Its accuracy on the first training rows is above that of always saying the commonest class."""
    said, came = _asked(subject)
    if len(came) < FEWEST:
        return
    right = sum(a == b for a, b in zip(said, came, strict=True)) / len(came)
    chance = Counter(came).most_common(1)[0][1] / len(came)
    most = chance + 1.96 * math.sqrt(chance * (1 - chance) / len(came))
    if right > most:
        return
    yield Finding(
        "critical" if right <= chance else "warning",
        "teacher.model",
        (
            f"its accuracy on {len(came)} training rows is {right:.0%}, and always saying the commonest "
            "class "
            f"gives {chance:.0%}"
        ),
        (
            "such a teacher was not trained for this, or its classes stand in another order: its soft labels "
            "are "
            "noise"
        ),
        "train it first (teacher_stage), or give data.labels in the order of the teacher's classes",
    )


@torch.no_grad()
def _asked(subject: Subject) -> tuple[list[int], list[int]]:
    """The teacher's first choice for the first training rows, and their classes."""
    rows, teacher, said, came = subject.prepared.train, subject.teacher, [], []
    for start in range(0, min(LOOKED_AT, len(rows)), AT_ONCE):
        some = [rows[i] for i in range(start, min(start + AT_ONCE, LOOKED_AT, len(rows)))]
        batch = {
            name: values.to(teacher.model.device) for name, values in subject.prepared.collate(some).items()
        }
        tokens = kept(batch["labels"])
        said += teacher(batch, tokens).logits().argmax(-1).tolist()
        came += tokens.targets.tolist()
    return said, came


CLASS_CHECKS = (
    teacher_has_a_head,
    both_models_read_their_tokens,
    enough_rows_are_held_out,
    held_out_groups_are_new,
    classes_are_large_enough,
)
CLASS_BATCH_CHECKS = (teacher_knows_the_classes,)
