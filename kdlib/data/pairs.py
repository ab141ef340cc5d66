"""Rows that two tokenizers read: texts, answers, and what the two vocabularies have in common."""

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.data.batches import Batch, Prepared, learned, runs, spans_of
from kdlib.data.blocks import BATCH, TOGETHER
from kdlib.errors import ModelError
from kdlib.losses.alignment import SPANS, is_single, spans_in
from kdlib.losses.signals import IGNORED
from kdlib.sources.progress import Told
from kdlib.tokens.answers import Encoded, roles
from kdlib.tokens.spans import Answer, Pair, PairReader, agreed, apart, edges_of, joined
from kdlib.tokens.vocabulary import Vocabularies, pieces, token_bytes, token_of_bytes

IDS, NUMBER = datasets.List(datasets.Value("int32")), datasets.Value("int32")
BOTH = {"input_ids": IDS, "teacher_input_ids": IDS, "spans": IDS}
WHOLE = datasets.Features({**BOTH, "document": NUMBER, "tokens": NUMBER})
ROWS = datasets.Features({**BOTH, "documents": IDS})
UNBOUNDED = 2**31  # tokens in a row; `transformers` says 1e30 where a tokenizer knows no end


def vocabularies(student: Tokenizer, teacher: Tokenizer) -> Vocabularies:
    """What the tokens of two tokenizers have in common: those of the same bytes, and by role special ones.

    Where both have the same tokens, in whatever order, each stands for its namesake.

    Raises:
        ModelError: no token of one stands for the same bytes as one of the other; or as `token_bytes`.
    """
    ours, theirs = token_bytes(student), token_bytes(teacher)
    names, their_names = student.get_vocab(), teacher.get_vocab()
    if names.keys() == their_names.keys():
        same = {number: their_names[name] for name, number in names.items()}
    else:
        known, their_known = token_of_bytes(student, ours), token_of_bytes(teacher, theirs)
        same = {number: their_known[piece] for piece, number in known.items() if piece in their_known}
        if not same:
            raise ModelError(
                f"{student.name_or_path} and {teacher.name_or_path}: found {len(ours):,} and {len(theirs):,} "
                "tokens of which no two stand for the same text; needed are some; use a student or a teacher "
                "whose vocabulary covers the same script"
            )
        for number, their_number in reversed(roles(student, teacher).items()):
            if their_number not in same.values():
                same[number] = their_number
    if len(theirs) >= len(ours):
        cut, pinned = pieces(theirs, ours, student, {}), {other: one for one, other in same.items()}
    else:
        cut, pinned = pieces(ours, theirs, teacher, {}), same
    first = [pinned.get(number, each[0] if each else -1) for number, each in enumerate(cut)]
    shared = torch.tensor([same.get(number, -1) for number in range(len(ours))])
    return Vocabularies(len(ours), len(theirs), shared, torch.tensor(first))


def within(known: Vocabularies, student_rows: int, teacher_rows: int) -> Vocabularies:
    """The same for heads of so many rows: a token beyond is said by none, and stands for none.

    Raises:
        ModelError: the head of the larger vocabulary has fewer rows than that of the smaller.
    """
    rows = min(known.student_size, student_rows), min(known.teacher_size, teacher_rows)
    larger, smaller = rows[::-1] if known.onto_student else rows
    if larger < smaller:
        raise ModelError(
            f"found {known.student_size:,} tokens of the student and {known.teacher_size:,} of the teacher, "
            f"and heads of {rows[0]:,} and {rows[1]:,} rows for them; needed is a row for each token; take "
            "tokenizers that belong to the models"
        )
    shared, cut = known.shared[: rows[0]], known.pieces[:larger]
    return Vocabularies(*rows, shared.where(shared < rows[1], -1), cut.where(cut < smaller, -1))


CLASSES = ("latin letters", "other scripts", "digits", "punctuation", "white space", "special")


def class_of(piece: bytes | None) -> str:
    """Which of `CLASSES` a token is of, by its bytes; part of a character is of another script."""
    if piece is None:
        return "special"
    if not piece.strip():
        return "white space"
    text = piece.decode(errors="ignore").strip()
    letters = [each for each in text if each.isalpha()]
    if letters or not text:
        is_latin = letters and all(unicodedata.name(each, "").startswith("LATIN") for each in letters)
        return "latin letters" if is_latin else "other scripts"
    return "digits" if any(map(str.isnumeric, text)) else "punctuation"


def coverage(prepared: Prepared, tokenizer: Tokenizer, rows: int = 2000) -> pd.DataFrame:
    """What of the student's learned tokens the teacher says in one token too, by class of token.

    Args:
        tokenizer: the student's.
        rows: of train, spread over all.

    Returns:
        A row for each class, and "all"; `tokens` and `bytes` that are learned, and of each the share in spans
        of one token on both sides, `one_to_one` and `one_to_one_bytes`; `in_spans`, the share of tokens in
        any span; `shared`, the share of the vocabulary's tokens of this class that the teacher's has.
    """
    every, found = token_bytes(tokenizer), []
    for number in np.unique(np.linspace(0, len(prepared.train) - 1, rows).astype(int)).tolist():
        row = prepared.train[number]
        ids, spans = np.array(row["input_ids"]), spans_of([row], len(row["input_ids"]), 0)
        firsts, sizes = spans["starts"] + 1, spans["sizes"]
        single = is_single(spans)
        inside = _marked(firsts, sizes, len(ids)), _marked(firsts[single], sizes[single], len(ids))
        found.append(np.vstack([ids, *inside])[:, learned([row], len(ids))[0]])
    ids, in_spans, one_to_one = np.hstack(found)
    of_tokens = pd.DataFrame({"class": map(class_of, every), "bytes": [len(each or b"") for each in every]})
    of_tokens["shared"] = of_tokens.index.isin(np.flatnonzero(prepared.vocabularies.shared >= 0))
    seen = of_tokens.iloc[ids].assign(tokens=1, in_spans=in_spans, one_to_one=one_to_one)
    seen["one_to_one_bytes"] = seen["bytes"] * seen["one_to_one"]
    everything = pd.concat([seen, seen.assign(**{"class": "all"})]).groupby("class")
    counted = everything[["tokens", "bytes"]].sum()
    counted[["one_to_one", "in_spans"]] = everything[["one_to_one", "in_spans"]].mean()
    counted["one_to_one_bytes"] = everything["one_to_one_bytes"].sum() / counted["bytes"]
    counted["shared"] = of_tokens.groupby("class")["shared"].mean()
    counted.loc["all", "shared"] = of_tokens["shared"].mean()
    return counted.reindex([each for each in (*CLASSES, "all") if each in counted.index])


def _marked(firsts: np.ndarray, sizes: np.ndarray, length: int) -> np.ndarray:
    """[length] which places lie in one of the stretches that begin there and are so long."""
    change = np.zeros(length + 1, np.int64)
    np.add.at(change, firsts, 1)
    np.add.at(change, firsts + sizes, -1)
    return change[:-1].cumsum() > 0


def limits(teacher: Tokenizer, length: int) -> tuple[int, int]:
    """How many tokens a row may have: the student's, and the teacher's, whose tokenizer may set an end."""
    return length, int(min(teacher.model_max_length, UNBOUNDED))


def tokenized(
    documents: Dataset, column: str, reader: PairReader, numbers: np.ndarray, most: tuple[int, int]
) -> tuple[Dataset, dict[str, Any]]:
    """Each document's tokens for both models, with beginning and end, and the stretches of both.

    Args:
        numbers: what each is called in "document".
        most: tokens of a row; a document in which no common cut comes within them is left out.

    Returns:
        The documents of two tokens or more; and how many were left out, the first of them by name.
    """

    tell = Told("tokenizing for both", len(documents), "documents", has_bar=True)

    def read(batch, places):
        rows = []
        for pair, place in zip(reader(batch[column]), places, strict=True):
            whole = pair and joined([reader.first, pair, reader.last])
            is_read = whole is not None and whole.fits(most)
            row = whole.row() if is_read else dict.fromkeys(BOTH, [])
            rows.append(row | {"document": numbers[place], "tokens": len(pair.input_ids) if is_read else -1})
        tell(places[-1] + 1)
        return {name: [row[name] for row in rows] for name in WHOLE}

    options = {"batched": True, "with_indices": True, "remove_columns": documents.column_names}
    made = documents.map(read, features=WHOLE, **options)
    tokens = np.array(made["tokens"][:])
    lost = np.flatnonzero(tokens < 0)
    shown = [f"{place}: {documents[place][column][:60]!r}" for place in lost[:3].tolist()]
    kept = made.select(np.flatnonzero(tokens > 1)).remove_columns("tokens")
    return kept, {"documents_not_aligned": len(lost), "first_not_aligned": shown}


def cut(documents: Dataset, most: tuple[int, int], *, is_packed: bool) -> Dataset:
    """Rows of so many tokens at most, cut where both do: documents end to end, or of each the first.

    Returns:
        {"input_ids", "teacher_input_ids", "spans", "documents": [start, number, …]}; of `TOGETHER` packed
        documents the last row goes, unless the student's tokens fill it.
    """
    begun, owned, total = [], np.zeros(0, int), len(documents)  # of a row that what comes may fill

    def blocks(batch, places):
        nonlocal begun, owned
        parts = [_pair(*each) for each in zip(*(batch[name] for name in BOTH), strict=True)]
        if not is_packed:
            each = zip(parts, batch["document"], strict=True)
            rows = [part.row(*part.cuts(most)[:2]) | {"documents": [0, owner]} for part, owner in each]
            return {name: [row[name] for row in rows] for name in ROWS}
        if places[0] % TOGETHER == 0:
            begun, owned = [], owned[:0]
        whole = joined([*begun, *parts])
        owners = np.append(owned, np.repeat(batch["document"], [len(each.input_ids) for each in parts]))
        cuts, ends = whole.cuts(most), whole.edges[:, 0]
        rows = [whole.row(*cut) | {"documents": runs(owners[slice(*ends[[*cut]])])} for cut in pairwise(cuts)]
        is_last = places[-1] + 1 == total or (places[-1] + 1) % TOGETHER == 0
        if rows and not (is_last and len(rows[-1]["input_ids"]) == most[0]):
            rows.pop()
        last = cuts[-2] if len(cuts) > 1 else 0
        begun, owned = [_pair(*whole.row(last).values())], owners[ends[last] :]
        return {name: [row[name] for row in rows] for name in ROWS}

    options = {"batched": True, "batch_size": BATCH, "with_indices": True}
    return documents.map(blocks, features=ROWS, remove_columns=documents.column_names, **options)


def _pair(ours: Sequence[int], theirs: Sequence[int], ends: Sequence[int]) -> Pair:
    return Pair(ours, theirs, edges_of(np.array(ends).reshape(-1, 2)))


def with_teacher(
    rows: Dataset, ours: Sequence[Encoded], theirs: Sequence[Encoded], reader: PairReader
) -> tuple[Dataset, list[int]]:
    """The same rows with the teacher's tokens and the spans, which are found in answers that both show.

    Returns:
        The rows, and the numbers of those that have no spans: one of the two does not give its text back.
    """
    sides = list(zip((ours, theirs), reader.readers, strict=True))
    ends = [[each for _, each in read([row.text for row in side])] for side, read in sides]
    lost = [number for number, each in enumerate(zip(*ends, strict=True)) if any(x is None for x in each)]
    answers = [
        [() if x is None else _answers(row, x, read.special) for row, x in zip(side, every, strict=True)]
        for (side, read), every in zip(sides, ends, strict=True)
    ]
    made = [_paired(*each).row() for each in zip(ours, theirs, *answers, strict=True)]
    columns = {name: [row[name] for row in made] for name in ("teacher_input_ids", "spans")}
    columns["teacher_prompt_tokens"] = [row.prompt_tokens for row in theirs]
    for name, values in columns.items():
        rows = rows.add_column(name, values, feature=NUMBER if name == "teacher_prompt_tokens" else IDS)
    return rows, lost


def first_of(row: Mapping[str, Any], tokens: int, prompt: int = 1) -> dict[str, Any]:
    """So many of the student's learned tokens of a row, and what the teacher reads of it.

    It is cut between stretches, the first of which stays whole; of a prompt its last tokens are left.
    """
    given = np.array([row.get("prompt_tokens", 0), row.get("teacher_prompt_tokens", 0)])
    edges = edges_of(np.array(row["spans"]).reshape(-1, 2))
    after = edges[(edges >= given).all(1)] - given
    after = after[: max(int((after[:, 0] <= tokens).sum()), 3)]
    left = given.clip(max=prompt)
    (first, other), (last, other_last) = given - left, given + after[-1]
    begun = [left] if left.any() else []
    return {
        **({"prompt_tokens": int(left[0])} if "prompt_tokens" in row else {}),
        "input_ids": row["input_ids"][first:last],
        "teacher_input_ids": row["teacher_input_ids"][other:other_last],
        "spans": np.vstack([*begun, after[1:] + left]).flatten().tolist(),
    }


def of_teacher(batch: Batch) -> Batch:
    """A batch of two tokenizers, all of it the teacher's: of its tokens is learned what lies in spans."""
    spans, tokens = batch[SPANS], spans_in(batch)[1]
    labels = torch.full_like(batch["teacher_input_ids"], IGNORED)
    labels.view(-1)[tokens["positions"] + 1] = tokens["targets"]
    theirs = {name: batch[f"teacher_{name}"] for name in ("input_ids", "attention_mask")}
    both = theirs | {f"teacher_{name}": each for name, each in theirs.items()}
    same = {name: spans[f"teacher_{name}"] for name in ("starts", "sizes")}
    return {**both, "labels": labels, SPANS: {**spans, **same}}


def _answers(row: Encoded, ends: np.ndarray, special: Collection[int]) -> list[Answer | None]:
    """A row's answers, by the bytes at which its text's tokens end; None where one is not shown."""
    text, after = row.text.encode(), len(row.input_ids) - row.before - len(ends)
    edges = np.concatenate([np.zeros(1 + row.before, np.int64), ends, np.full(after, len(text) + 1)])
    found: list[Answer | None] = []
    for answer in row.answers:
        start, first, last = answer or (0, 0, 0)
        ids, begins = row.input_ids[first:last], len(row.text[:start].encode())
        found.append(
            Answer(ids, edges[first : last + 1], text, begins, ids[-1] in special) if answer else None
        )
    return found


def _paired(
    student: Encoded, teacher: Encoded, ours: Sequence[Answer | None], theirs: Sequence[Answer | None]
) -> Pair:
    """A row of both: what they agree on in each answer, and apart all around."""
    parts, before = [], (0, 0)
    for answer, other, one, another in zip(student.answers, teacher.answers, ours, theirs, strict=False):
        if one and another:
            (_, first, last), (_, their_first, their_last) = answer, other
            given = student.input_ids[before[0] : first], teacher.input_ids[before[1] : their_first]
            parts += [apart(*given), agreed(one, another)]
            before = last, their_last
    return joined([*parts, apart(student.input_ids[before[0] :], teacher.input_ids[before[1] :])])
