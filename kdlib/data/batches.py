"""Prepared rows, and how they become batches: the one thing that all tasks hand to a training.

A row is {"input_ids": […]}, with "prompt_tokens" where its beginning is given and not learned, and
"read_only": [start, end, …] where later parts are given too, and "documents": [start, number, …] or "group"
where it is known to what its tokens belong; of a classification it is {"input_ids": […],
"label": n}, with "teacher_input_ids" where the teacher has a tokenizer of its own.  Of text it then has
"spans" too: [student's end, teacher's end, …] of the stretches of both that kdlib.tokens.spans finds.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.losses.alignment import SPANS
from kdlib.losses.signals import IGNORED
from kdlib.sources.rows import columns_of
from kdlib.tokens.vocabulary import Vocabularies, vocabulary_sizes

Batch = dict[str, Any]  # tensors; under "spans" a dict of them
Collate = Callable[[Sequence[Mapping[str, Any]]], Batch]
# mean measures, and of rows with a class [N, 2] what was said and what was right → {name: figure}
Figures = Callable[[Mapping[str, float], np.ndarray | None], dict[str, float]]


def perplexity(means: Mapping[str, float], answers: np.ndarray | None = None) -> dict[str, float]:
    """exp(cross-entropy)."""
    return {"perplexity": math.exp(min(means["ce"], 700.0))}


@dataclass(frozen=True)
class Prepared:
    """Rows to train and to evaluate on, how they become batches, and what is to be known about them."""

    train: Dataset
    validation: Dataset
    notes: dict[str, Any]  # documents, tokens, dropped rows, fingerprint
    collate: Collate
    vocabulary: int  # what a model chooses among: the tokenizer's tokens, or the classes
    labels: tuple[str, ...] = ()  # the classes by name; none where tokens are predicted
    test: Dataset | None = None  # held out from every choice, where there are such rows
    # split → every choice of every question, a row each (kdlib.data.qa)
    choices: Mapping[str, Dataset] = field(default_factory=dict)
    figures: Figures = perplexity  # what an evaluation tells beside the mean measures
    vocabularies: Vocabularies | None = None  # where student and teacher read other tokens of the same text

    @property
    def teacher_vocabulary(self) -> int:
        """What the teacher chooses among."""
        return vocabulary_sizes(self.vocabulary, self.vocabularies)[1]

    @property
    def largest_vocabulary(self) -> int:
        """Of the two."""
        return max(vocabulary_sizes(self.vocabulary, self.vocabularies))

    @property
    def measured_on(self) -> str:
        """The split on which models are compared: test where there is one."""
        return "test" if self.test is not None and len(self.test) else "validation"

    @property
    def measured(self) -> Dataset:
        """Its rows."""
        return getattr(self, self.measured_on)

    def first_rows(self, count: int = 2) -> Batch:
        """The first training rows."""
        return self.collate([self.train[i] for i in range(min(count, len(self.train)))])


def collate(rows: Sequence[Mapping[str, Any]], *, pad_id: int, teacher_pad_id: int | None = None) -> Batch:
    """Rows to a batch, padded on the right: input_ids, attention_mask, labels, each [B, T].

    Labels are `IGNORED` at padding, in prompts, and at each row's first token, which nothing predicts; so the
    Trainer's own count of labels is the count of kept tokens, for every architecture.

    Args:
        teacher_pad_id: where the teacher has a tokenizer of its own; the batch then has its teacher_input_ids
            and teacher_attention_mask, [B, T'], and the `spans_of` both.
    """
    ids, mask = padded([row["input_ids"] for row in rows], pad_id)
    labels = ids.masked_fill(torch.from_numpy(~learned(rows, ids.shape[1])), IGNORED)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if teacher_pad_id is None:
        return batch
    ids, mask = padded([row["teacher_input_ids"] for row in rows], teacher_pad_id)
    spans = spans_of(rows, labels.shape[1], ids.shape[1])
    spans = {name: torch.from_numpy(each) for name, each in spans.items()}
    return batch | {"teacher_input_ids": ids, "teacher_attention_mask": mask, "spans": spans}


def learned(rows: Sequence[Mapping[str, Any]], width: int) -> np.ndarray:
    """[B, width] whether a token is learned: it is given by no one, and not its row's first."""
    found = np.zeros((len(rows), width), bool)
    for number, row in enumerate(rows):
        found[number, max(row.get("prompt_tokens", 1), 1) : len(row["input_ids"])] = True
        for start, end in pairwise(row.get("read_only") or ()):
            found[number, start:end] = False
    return found


def spans_of(rows: Sequence[Mapping[str, Any]], width: int, teacher_width: int) -> dict[str, np.ndarray]:
    """The spans that are learned, in order, each [S]: where and how long on both sides, in which row.

    A stretch of a row is one where both have tokens in it, all of the student's are learned, and something
    predicts the teacher's first.

    Returns:
        {"starts", "teacher_starts"}: flat positions in [B, width] whose outputs predict the first tokens;
        {"sizes", "teacher_sizes"}: how many tokens; {"rows"}: the row's number.
    """
    found = [np.zeros((0, 5), np.int64)]
    for number, (row, is_learned) in enumerate(zip(rows, learned(rows, width), strict=True)):
        ends = np.array(row["spans"], np.int64).reshape(-1, 2)
        firsts = np.vstack([np.zeros((1, 2), np.int64), ends])[:-1]
        sizes, count = ends - firsts, np.append(0, np.cumsum(is_learned))
        whole = count[ends[:, 0]] - count[firsts[:, 0]] == sizes[:, 0]
        keep = whole & (sizes > 0).all(1) & (firsts[:, 1] > 0)
        starts = firsts - 1 + np.array([width, teacher_width]) * number
        found.append(np.column_stack([starts, sizes, np.full(len(ends), number)])[keep])
    names = ("starts", "teacher_starts", "sizes", "teacher_sizes", "rows")
    return dict(zip(names, np.vstack(found).T.copy(), strict=True))


def row_of(batch: Batch, number: int) -> Batch:
    """One row of a batch, padded as it is there."""
    found = {name: each[number : number + 1] for name, each in batch.items() if isinstance(each, Tensor)}
    if SPANS in batch:
        widths = batch["input_ids"].shape[1], batch["teacher_input_ids"].shape[1]
        before = dict(zip(("rows", "starts", "teacher_starts"), (1, *widths), strict=True))
        here = batch[SPANS]["rows"] == number
        found[SPANS] = {n: each[here] - number * before.get(n, 0) for n, each in batch[SPANS].items()}
    return found


def collate_classes(rows: Sequence[Mapping[str, Any]], *, pad_id: int, teacher_pad_id: int) -> Batch:
    """Likewise, with labels [B]; and the teacher's ids and mask, where it reads otherwise."""
    ids, mask = padded([row["input_ids"] for row in rows], pad_id)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["label"] for row in rows])}
    if "teacher_input_ids" in rows[0]:
        ids, mask = padded([row["teacher_input_ids"] for row in rows], teacher_pad_id)
        batch |= {"teacher_input_ids": ids, "teacher_attention_mask": mask}
    return batch


def units_of_rows(rows: Dataset) -> np.ndarray | None:
    """[N] the number of what each row belongs to: its group, or the document of which it holds most.

    None where the rows say nothing of it: each is then a unit of its own.
    """
    if "group" in rows.column_names:
        return np.unique(np.asarray(rows["group"][:], dtype=str), return_inverse=True)[1]
    if "documents" not in rows.column_names:  # [start, document, start, document, …]
        return None
    starts, owners = np.concatenate([np.zeros(0, int), *flat(rows, "documents")]).reshape(-1, 2).T
    counts = lengths_of(rows, "documents") // 2
    firsts, numbers = np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)
    ends = np.append(starts[1:], 0)
    ends[firsts + counts - 1] = lengths_of(rows)
    return owners[np.lexsort((starts - ends, numbers))[firsts]]


def pairwise(spans: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end, start, end, …] as [(start, end), …]."""
    return list(zip(spans[::2], spans[1::2], strict=True))


def padded(lists: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[B, T] token ids and the mask of those that are no padding."""
    longest = max(map(len, lists))
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in lists])
    return torch.tensor([[*each, *[pad_id] * (longest - len(each))] for each in lists]), mask


def reads_of(who: str) -> str:
    """What begins the names of what a model reads, where student and teacher read otherwise."""
    return "teacher_" if who == "teacher" else ""


def calibration_rows(rows: Dataset, count: int = 8, *, reads: str = "teacher_") -> Tensor:
    """[count, T] text without padding: the longest of the first rows.

    Args:
        reads: `reads_of` the model; where student and teacher read alike, all is the student's.
    """
    column = f"{reads}input_ids" if f"{reads}input_ids" in rows.column_names else "input_ids"
    ids = sorted(rows.select(range(min(8 * count, len(rows))))[column], key=len, reverse=True)[:count]
    return torch.tensor([row[: min(map(len, ids))] for row in ids])


def vocabulary_of(tokenizer: Tokenizer) -> int:
    """One more than a tokenizer's largest id: as many rows as a head must have for all of its tokens.

    `len(tokenizer)` counts them, which is less where the ids have gaps.
    """
    return 1 + max(tokenizer.get_vocab().values())


def runs(owners: np.ndarray) -> list[int]:
    """[start, owner, …] of runs of equal owners."""
    starts = np.flatnonzero(np.diff(owners, prepend=owners[:1] - 1))
    return np.column_stack([starts, owners[starts]]).flatten().tolist()


def largest_id(rows: Dataset, column: str = "input_ids") -> int:
    """The largest of all rows' ids."""
    return max(int(each.max(initial=0)) for each in flat(rows, column))


def random_ids(
    tokens: int, rows: int, length: int, generator: torch.Generator, *, is_full: bool
) -> list[list[int]]:
    """Rows of random ids; unless all are full the last is one shorter, to need a mask."""
    ids = torch.randint(tokens, (rows, length), generator=generator).tolist()
    if not is_full and rows > 1 and length > 2:
        ids[-1].pop()
    return ids


LISTS = ("input_ids", "read_only", "teacher_input_ids", "spans")


def fingerprint(*parts: Dataset) -> str:
    """16 hex digits that change when any token, prompt or label of any row does."""
    digest = hashlib.sha256()

    def take(size: int, arrays: Iterable[np.ndarray]) -> None:
        digest.update(size.to_bytes(8))
        for each in arrays:
            digest.update(np.ascontiguousarray(each, dtype="<i8"))

    for part in parts:
        for name in LISTS:
            if name in part.column_names:
                lengths = lengths_of(part, name)
                take(len(lengths), [lengths])
                take(int(lengths.sum()), flat(part, name))
        for name in ("prompt_tokens", "label", "is_answer"):
            if name in part.column_names:
                take(len(part), [part.with_format("numpy")[name][:]])
    return digest.hexdigest()[:16]


def lengths_of(rows: Dataset, column: str = "input_ids") -> np.ndarray:
    """[N] how long each row's list is."""
    sizes = [each.value_lengths().to_numpy() for lists in columns_of(rows, column) for each in lists.chunks]
    return np.concatenate([np.zeros(0, np.int32), *sizes]).astype(np.int64)


def flat(rows: Dataset, column: str = "input_ids") -> Iterator[np.ndarray]:
    """All rows' lists one after the other, some rows at a time: a million in a second, none of Python's."""
    for lists in columns_of(rows, column):
        yield from (each.flatten().to_numpy() for each in lists.chunks)
