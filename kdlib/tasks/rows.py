"""Rows and their models: whether both can read them, no token beyond what they know; some rows of many."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.run import Config
from kdlib.data.batches import Prepared, largest_id
from kdlib.data.pairs import within
from kdlib.errors import ModelError
from kdlib.models.loading import load_config
from kdlib.students.student import sources


def rows_of(source: str, tokenizer: Tokenizer, parts: Sequence[Dataset], column: str = "input_ids") -> int:
    """How many tokens a model knows: the rows of its embedding; `parts` are what it is to read.

    Raises:
        ModelError: a token among them has no row; says which.
    """
    rows = load_config(source).get_text_config().vocab_size
    if (most := max(largest_id(part, column) for part in parts if len(part))) >= rows:
        raise ModelError(
            f"{source}: the data has the token {tokenizer.decode([most])!r}, whose id is {most}, but the "
            f"model's embedding has {rows} rows; take the tokenizer that belongs to the model, or the rows "
            "with this token out of the data"
        )
    return rows


def within_heads(
    config: Config, prepared: Prepared, tokenizer: Tokenizer, teacher: Tokenizer | None
) -> Prepared:
    """The same rows, whose vocabularies end where the models' heads do; a token beyond is refused.

    Args:
        teacher: its tokenizer, where it has rows of its own.
    """
    parts = [prepared.train, prepared.validation, prepared.test, *prepared.choices.values()]
    every = [part for part in parts if part is not None]
    if teacher is None or prepared.vocabularies is None:
        heads = [rows_of(source, tokenizer, every) for source in sources(config)]
        return replace(prepared, vocabulary=min([prepared.vocabulary, *heads]))
    student, taught = config.student, config.teacher.model
    head = student.source if student.is_own else None if student.own_tokens else taught
    own = rows_of(head, tokenizer, every) if head else prepared.vocabulary  # made for its tokenizer
    known = within(prepared.vocabularies, own, rows_of(taught, teacher, every, "teacher_input_ids"))
    return replace(prepared, vocabulary=known.student_size, vocabularies=known)


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """So many of the rows, where there are so many, from the first towards the last."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
