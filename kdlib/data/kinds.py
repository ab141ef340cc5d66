"""Kinds of text: what a held-out token is part of, told by the rows themselves or line by line."""

import re
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.run import Config
from kdlib.data.batches import Prepared, pairwise
from kdlib.sources.documents import SIDES, read_documents, split_documents
from kdlib.sources.rows import group_values
from kdlib.tokens.vocabulary import token_bytes

COLUMNS = ("kind", "section", "category", "source", "label")  # of a source, that say what a document is
MOST = 8  # kinds that can be told apart in a figure
CODE, PROSE = "code", "prose"
SIGNS, FEWEST = 0.1, 2  # of a line's characters, from which on it is code, and how many at least
BY_LINE = (
    f"lines, {CODE} where {SIGNS:.0%} of the characters are brackets and signs, or a prompt >>> begins it"
)
PROMPT, SIGN = (
    re.compile(r"\s*(>>>|\.\.\. |[$#] )"),
    re.compile(r"[][(){}<>=+*/%&|^~@\\;:$#]|(?<=\w)\.(?=\w)"),
)


def kinds_of(
    rows: Dataset, prepared: Prepared, tokenizer: Tokenizer, config: Config | None = None
) -> tuple[list[np.ndarray], list[str], str]:
    """Of some rows: the number of each token's kind, [T] a row; the kinds' names; and how they are told.

    By a column of the source that says what a document is, by the rows' group, or class, where there are two
    to eight of these; else each line of the text is code or prose.

    Args:
        config: of which the rows are; without it its source is not asked.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    mix = [part["source"] for part in prepared.notes.get("mix", ())]
    is_asked = config and not (mix or config.data.streaming)
    if is_asked and "documents" in rows.column_names and (said := _of_documents(config)):
        column, kinds = said
        names, places = np.unique(np.asarray(kinds), return_inverse=True)
        return (
            [
                np.repeat(
                    places[[number for _, number in runs]], np.diff([start for start, _ in runs], append=n)
                )
                for runs, n in zip(map(pairwise, rows["documents"]), lengths, strict=True)
            ],
            names.tolist(),
            f"the {column} of each document",
        )
    for column, names in (("source", mix), ("group", None), ("label", prepared.labels)):
        if column not in rows.column_names:
            continue
        known, places = np.unique(np.asarray(rows[column][:]).astype(str), return_inverse=True)
        if 2 <= len(known) <= MOST:
            called = [names[int(each)] if names else each for each in known.tolist()]
            return [np.full(n, kind) for n, kind in zip(lengths, places, strict=True)], called, column
    spelt = token_bytes(tokenizer)
    return [_by_line(ids, spelt) for ids in rows["input_ids"]], [PROSE, CODE], BY_LINE


def _of_documents(config: Config) -> tuple[str, list[str]] | None:
    """The column that says what a document is, and of each document, by its number in rows, what it says.

    None where there is none, one kind alone, more than eight, or several in a group that has one number.
    """
    seed = config.seed if config.data.split_seed is None else config.data.split_seed
    documents = split_documents(read_documents(config.data), config.data, seed=seed)
    columns = documents["train"].column_names
    if (column := next((each for each in COLUMNS if each in columns), None)) is None:
        return None
    said: list[str] = []
    for side in SIDES:
        rows, feature = documents[side], documents[side].features[column]
        values = [str(feature.int2str(v) if hasattr(feature, "int2str") else v) for v in rows[column][:]]
        if (groups := group_values(config.data, rows, side)) is None:
            said += values
            continue
        kinds = sorted({*zip(groups, values, strict=True)})
        if len(kinds) > len(set(groups)):
            return None
        said += [value for _, value in kinds]
    return (column, said) if 2 <= len(set(said)) <= MOST else None


def _by_line(ids: Sequence[int], spelt: Sequence[bytes | None]) -> np.ndarray:
    """[T] 1 for a token that begins in a line of code; special tokens are as what comes before them."""
    pieces = [spelt[number] or b"" for number in ids]
    lines = b"".join(pieces).split(b"\n")
    ends = np.cumsum([len(line) + 1 for line in lines])
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    codes = np.array([is_code(line.decode(errors="replace")) for line in lines], int)
    return codes[np.minimum(np.searchsorted(ends, starts, side="right"), len(lines) - 1)]


def is_code(line: str) -> bool:
    """Whether a line looks like code: a prompt, or many brackets and signs among its characters."""
    written, signs = re.sub(r"\s", "", line), len(SIGN.findall(line))
    return signs >= max(SIGNS * len(written), FEWEST) or PROMPT.match(line) is not None
