"""What the doctor asks of questions: are the held-out ones new, and are there enough to tell models apart?"""

import math
from collections.abc import Iterator

from kdlib.diagnostics.context import Subject
from kdlib.diagnostics.findings import Finding

FEW_QUESTIONS = 100  # held out
REPEATED = 0.01  # of the held-out questions


def held_out_questions_are_new(subject: Subject) -> Iterator[Finding]:
    """No held-out question is trained on; where kdlib splits, it sees to that."""
    trained = set(subject.prepared.train["text"])
    for split, rows in (("validation", subject.prepared.validation), ("test", subject.prepared.test)):
        repeated = sum(text in trained for text in rows["text"]) if rows is not None else 0
        if repeated > REPEATED * len(rows or ()):
            yield Finding(
                "warning",
                "data.source",
                f"{repeated} of the {len(rows)} {split} questions are training questions too",
                "held-out figures then tell what was learned by heart",
                "leave them out of one side, or give the source without its own split",
            )


def enough_questions_are_held_out(subject: Subject) -> Iterator[Finding]:
    """An accuracy over few questions tells nothing."""
    count = len(subject.prepared.validation)
    if count < FEW_QUESTIONS:
        where = "data.max_eval_rows" if subject.config.data.max_eval_rows == count else "data.validation"
        half = 1.96 * math.sqrt(0.25 / count)
        yield Finding(
            "warning",
            where,
            f"{count} questions are held out",
            (
                "an accuracy near one half is then known within "
                f"±{half:.0%} only, which tells few students apart"
            ),
            "hold out more, or give more questions",
        )


QUESTION_CHECKS = (held_out_questions_are_new, enough_questions_are_held_out)
