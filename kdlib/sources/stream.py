"""The beginning of a source that is too large to be had: as much as a training reads, on the disk.

What is read is a table then, as of every other source, so a training that goes on after a kill, alone or on
several ranks, sees the rows that an undisturbed one sees: they are numbered, and the table is read again, or
made again of the same beginning.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.data import DataConfig
from kdlib.errors import DataError
from kdlib.sources.documents import SIDES, known_again, with_text
from kdlib.sources.places import identity, read_splits
from kdlib.sources.rows import columns_of, kept_once, own_splits

HEAD = 1000  # documents by which it is seen how many bytes a token stands for
MARGIN = 1.1  # so much more is read, as tokens elsewhere may be longer, and what came twice goes


def streamed(
    config: DataConfig, tokenizer: Tokenizer, notes: dict[str, Any]
) -> tuple[DataConfig, DatasetDict, int]:
    """The documents that `max_train_rows` need, and before them those held out; each text once.

    Held out is the beginning of the source's own validation split, else that of train.

    Args:
        notes: where it is counted which rows without a text were left out (`data.skip_unusable`).

    Returns:
        What the config says of these documents; them; and how many came twice and were left out.

    Raises:
        DataError: nothing to read, no such column, rows without a text, or an end before all is held out.
    """
    own = own_splits(config, [name for name in read_splits(config) if name != "train"])
    row_bytes = _row_bytes(config, tokenizer)
    share = 0.1 if isinstance(config.validation, str) else config.validation
    held_out = config.max_eval_rows or max(round(share * config.max_train_rows), 1)
    wanted = {"train": config.max_train_rows * MARGIN, "validation": held_out * MARGIN}

    def made(split: str, rows: float) -> Dataset:
        return with_text(config, _made(config, split, rows, row_bytes), split, "text", notes)

    if name := own.get("validation"):
        sides = {"train": "train", "validation": name}
        documents = DatasetDict({side: made(split, wanted[side]) for side, split in sides.items()})
    else:
        every = made("train", sum(wanted.values()))
        passed = np.cumsum(_sizes(every, row_bytes))
        first = int(np.searchsorted(passed, wanted["validation"])) + 1
        if first >= len(every):
            raise DataError(
                f"{config.source}: ends after {len(every)} documents, of which {held_out} rows are to be "
                "held out and none would be left to train on; lower data.max_eval_rows, or do not stream it"
            )
        sides = {"train": range(first, len(every)), "validation": range(first)}
        documents = DatasetDict({name: every.select(rows) for name, rows in sides.items()})
    texts = known_again([(documents[name], "text") for name in SIDES])
    kept = kept_once(config, {name: (each, each) for name, each in zip(SIDES, texts, strict=True)})
    split = DatasetDict({name: documents[name].select(rows) for name, rows in kept.items()})
    left_out = sum(map(len, documents.values())) - sum(map(len, split.values()))
    return config.model_copy(update={"text": "text", "max_eval_rows": held_out}), split, left_out


def _row_bytes(config: DataConfig, tokenizer: Tokenizer) -> float | None:
    """Bytes of text in a packed row, by the first documents; None where each document is a row."""
    texts = []
    try:
        for number, row in enumerate(read_splits(config)["train"].take(HEAD)):
            if config.text not in row:
                has = f"it has {', '.join(row)}: name the one with the text in data.text"
                raise DataError(f"{config.source}: no column {config.text!r}; {has}")
            texts += filter(None, [_text_of(config, row, "train", number)])
    except (OSError, ValueError, RuntimeError) as error:  # pyarrow's and json's are ValueErrors
        raise DataError(f"{config.source}: cannot be read as a stream: {error}") from error
    if not texts:
        raise DataError(f"{config.source}: is empty; at least two documents are needed")
    if not config.packing:
        return None
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
    return config.max_length * len("".join(texts).encode()) / max(tokens, 1)


def _made(config: DataConfig, split: str, rows: float, row_bytes: float | None) -> Dataset:
    """{"text"} of the first documents of a split that have so many rows together, as a table."""
    asked = {"config": config.as_dict(), "split": split, "rows": rows, "row_bytes": row_bytes}
    asked["made_of"] = identity(config)
    try:
        made = Dataset.from_generator(
            _documents, Features({"text": Value("string")}), gen_kwargs=asked, split=split
        )
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise (
            cause
            if isinstance(cause, DataError)
            else DataError(f"{config.source}: cannot be read as a stream: {cause}")
        ) from error
    return made


def _documents(
    config: Mapping[str, Any], split: str, rows: float, row_bytes: float | None, made_of: str
) -> Iterator[dict[str, str | None]]:
    """The generator of that table; `made_of` is for `datasets`: where the source changes, it is made anew."""
    asked, passed = DataConfig(**config), 0.0
    for number, row in enumerate(read_splits(asked)[split]):
        text = _text_of(asked, row, split, number)
        yield {"text": text}
        if text is not None:
            passed += len(text.encode()) / row_bytes if row_bytes else 1
        if passed >= rows:
            return


def _text_of(config: DataConfig, row: Mapping[str, Any], split: str, number: int) -> str | None:
    """A document's text; a DataError where it has none, and None where such are left out."""
    if not isinstance(text := row.get(config.text), str):
        if config.skip_unusable:
            return None
        found = f"document {number} of {split} has {config.text!r} = {text!r} ({type(text).__name__})"
        raise DataError(f"{config.source}: {found}; every document needs a text")
    return text


def _sizes(documents: Dataset, row_bytes: float | None) -> np.ndarray:
    """[documents] how many rows each makes, about."""
    if row_bytes is None:
        return np.ones(len(documents))
    sizes = [pc.binary_length(texts).to_numpy() for texts in columns_of(documents, "text")]
    return np.concatenate(sizes) / row_bytes
