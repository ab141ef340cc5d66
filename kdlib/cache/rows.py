"""A row of a teacher's signals: its key, which is its content, and its bytes."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from kdlib.losses.alignment import SPANS, spans_in
from kdlib.losses.signals import FOUND, Kept, kept

KEY = 16  # bytes
CODEC = "zstd"
Arrays = dict[str, np.ndarray]  # by name, [n, …] of a row's n kept tokens


def asked_in(batch: Mapping[str, Any]) -> Kept:
    """The tokens of a batch that its teacher predicts: its own, where it has another tokenizer."""
    found = batch.get(FOUND)
    if SPANS in batch:
        return Kept(**((found or {}).get(SPANS) or spans_in(batch))[1])
    return kept(batch["labels"], found)


def keys_of(batch: Mapping[str, Any], tokens: Kept, reads: str = "") -> list[tuple[int, bytes, int]]:
    """(number, key, kept tokens) of each row that has some; the key digests its ids and which are predicted.

    Whatever else stands in the batch, and however it is padded, the key of a row is the same.

    Args:
        batch, tokens: on the CPU, as collated; reads: see kdlib.models.teacher.signal_of.
    """
    ids, mask = (batch[reads + name].numpy() for name in ("input_ids", "attention_mask"))
    rows, width = tokens.rows.numpy(), ids.shape[1]
    at = tokens.positions.numpy() % width if batch["labels"].ndim == 2 else np.zeros(len(rows), int)
    found = []
    for row in np.unique(rows):
        places = at[rows == row]
        digest = blake2b(ids[row][mask[row] == 1].astype("<i8").tobytes(), digest_size=KEY)
        digest.update(b"|" + places.astype("<i8").tobytes())
        found.append((int(row), digest.digest(), len(places)))
    return found


def packed(array: np.ndarray) -> bytes:
    """A row's numbers compressed: all their first bytes, then all their second ones, and so on.

    High bytes hardly differ, so ids take about the bits that they need, and so do sorted log-probabilities.
    """
    planes = np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.dtype.itemsize).T
    return pa.compress(np.ascontiguousarray(planes), codec=CODEC, asbytes=True)


def unpacked(blob: Any, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """The same numbers again."""
    kind, size = np.dtype(dtype), int(np.prod(shape, dtype=int))
    planes = pa.decompress(blob, decompressed_size=size * kind.itemsize, codec=CODEC)
    whole = np.frombuffer(planes, np.uint8).reshape(kind.itemsize, size).T
    return np.ascontiguousarray(whole).view(kind).reshape(shape)


def checksum(key: bytes, blobs: Sequence[Any]) -> int:
    """Of a row's key and bytes."""
    found = crc32(key)
    for blob in blobs:
        found = crc32(blob, found)
    return found


def as_arrays(parts: Mapping[str, Tensor], vocabulary: int) -> Arrays:
    """Tensors as they are stored: ids in as few bytes as the vocabulary needs, bfloat16 by its bits."""
    small = "<u2" if vocabulary <= 2**16 else "<u4"
    return {
        name: each.numpy().astype(small) if name == "ids" else _bits(each).numpy()
        for name, each in parts.items()
    }


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def as_tensor(name: str, array: np.ndarray) -> Tensor:
    """The tensor that was stored under this name."""
    if name == "ids":
        return torch.from_numpy(array.astype(np.int32))
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if found.dtype is torch.int16 else found
