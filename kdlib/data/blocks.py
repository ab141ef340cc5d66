"""From documents to rows of tokens: tokenized, packed or cut, a batch of Arrow's arrays at a time.

What lies in memory is a batch, however long the text is; the rows are a table on the disk.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.sources.progress import Told
from kdlib.tokens.vocabulary import beginning, ids_of

IDS, NUMBER = datasets.List(datasets.Value("int32")), datasets.Value("int32")
WHOLE = datasets.Features({"input_ids": IDS, "document": NUMBER})
ROWS = datasets.Features({"input_ids": IDS, "documents": IDS})
LISTS = pa.list_(pa.int32())
AT_ONCE = 4_000_000  # bytes of text whose tokens are Python's numbers
TOGETHER = 10_000  # documents that are packed end to end; what is left over of them goes
BATCH = 1000  # documents; a divisor of TOGETHER


def tokenized(
    documents: Dataset, column: str, tokenizer: Tokenizer, numbers: Sequence[int] | np.ndarray | None = None
) -> Dataset:
    """{"input_ids", "document"} of each document of two tokens or more; shorter ones predict nothing and go.

    Args:
        numbers: what each is called in "document", several alike where they belong together; else its place.
    """
    first, called = beginning(tokenizer), None if numbers is None else np.asarray(numbers)
    tell = Told("tokenizing", len(documents), "documents", has_bar=True)

    def ids(table: pa.Table, places: list[int]) -> pa.Table:
        found, kept = [], []
        for texts in _pieces(table[column]):
            lists = ids_of(tokenizer, texts)
            kept += [len(each) > 1 for each in lists]
            found.append(pa.array([first + each for each in lists if len(each) > 1], LISTS))
            tell(places[0] + len(kept))
        owners = np.asarray(places)[kept]
        owners = owners if called is None else called[owners]
        return pa.table({"input_ids": pa.chunked_array(found, LISTS), "document": owners.astype("int32")})

    return _mapped(documents, ids, WHOLE, "tokenizing")


def packed(rows: Dataset, length: int, *, separator: int | None) -> Dataset:
    """Documents end to end, a separator after each, in blocks of exactly `length`; what is left over goes.

    That is what does not fill a block after every `TOGETHER` documents.

    Returns:
        {"input_ids", "documents": [start, number, …]}: whose the tokens from each start on are.
    """
    tell = Told("packing", len(rows), "documents", has_bar=True)
    after, begun = [] if separator is None else [separator], np.zeros((2, 0), np.int32)

    def blocks(table: pa.Table, places: list[int]) -> pa.Table:
        nonlocal begun
        tokens, sizes = _ended(table["input_ids"], after)
        numbers = table["document"].to_numpy() if "document" in table.column_names else np.asarray(places)
        stream = np.vstack([tokens, np.repeat(numbers, sizes)])
        if places[0] % TOGETHER:
            stream = np.hstack([begun, stream])
        end = stream.shape[1] // length * length
        (ids, owners), begun = stream[:, :end], stream[:, end:].astype("int32")
        edges = np.arange(0, end + 1, length)
        is_new = np.diff(owners, prepend=-1) != 0
        is_new[edges[:-1]] = True
        starts = np.flatnonzero(is_new)
        tell(places[-1] + 1)
        runs = np.column_stack([starts % length, owners[starts]])
        return _table(_lists(ids, edges), _lists(runs.flatten(), 2 * np.searchsorted(starts, edges)))

    return _mapped(rows, blocks, ROWS, "packing")


def one_each(rows: Dataset, length: int, *, end: Sequence[int]) -> Dataset:
    """Each document a row of its own, of so many tokens at most; where it is not cut it has its end."""

    def cut(table: pa.Table, places: list[int]) -> pa.Table:
        tokens, sizes = _ended(table["input_ids"], end)
        within = np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        edges = np.append(0, np.cumsum(np.minimum(sizes, length)))
        owners = np.column_stack([np.zeros(len(sizes), int), table["document"].to_numpy()])
        owned = _lists(owners.flatten(), 2 * np.arange(len(sizes) + 1))
        return _table(_lists(tokens[within < length], edges), owned)

    return _mapped(rows, cut, ROWS, "cutting")


def _mapped(rows: Dataset, function: Callable, features: datasets.Features, what: str) -> Dataset:
    """A table of tables: `Dataset.map` with Arrow's arrays in place of Python's lists."""
    options = {"batched": True, "batch_size": BATCH, "with_indices": True}
    made = rows.with_format("arrow").map(function, features=features, desc=what, **options)
    return made.with_format(None)


def _pieces(texts: pa.ChunkedArray) -> Iterator[list[str]]:
    """The same texts, about `AT_ONCE` bytes of them at a time."""
    passed = np.cumsum(pc.binary_length(texts).to_numpy()) // AT_ONCE
    for first, last in pairwise([0, *np.flatnonzero(np.diff(passed)) + 1, len(texts)]):
        yield texts.slice(first, last - first).to_pylist()


def _ended(lists: pa.ChunkedArray, after: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """All lists' tokens one after the other, with these after each list; and how many each then has."""
    sizes = np.concatenate([each.value_lengths().to_numpy() for each in lists.chunks])
    tokens = np.concatenate([each.flatten().to_numpy() for each in lists.chunks])
    places = np.repeat(np.cumsum(sizes), len(after))
    return np.insert(tokens, places, np.tile(np.array(after, "int32"), len(sizes))), sizes + len(after)


def _lists(values: np.ndarray, edges: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(edges.astype("int32"), values.astype("int32"))


def _table(ids: pa.ListArray, documents: pa.ListArray) -> pa.Table:
    return pa.table({"input_ids": ids, "documents": documents})
