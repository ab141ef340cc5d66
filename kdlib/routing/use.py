"""Which of a teacher's experts speak on held-out rows: by token, by layer, by kind of text, by routing.

Of each kept token counts what its teacher's routers gave their experts: the share of an expert's weight in
all weights given to the token, so that the shares of a layer's experts add up to 1, however a router scales
them.  L layers with a router, E experts in each, U independent units (documents, …), K kinds of text.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.data.batches import Batch, Prepared
from kdlib.data.text import units_of_tokens
from kdlib.losses.alignment import Alignment, spans_in
from kdlib.losses.signals import kept, moved
from kdlib.metrics.bootstrap import Bootstrap, interval, over
from kdlib.metrics.names import Range
from kdlib.models.teacher import LiveTeacher
from kdlib.routing.experts import routers_of, watched
from kdlib.routing.kinds import kinds_of

Asking = Mapping[str, AbstractContextManager]  # routing by name → what makes the teacher route so
ROWS = 64  # looked at, spread over the held-out rows
BATCH = 8  # rows of a forward pass
TEXT = 48  # tokens of a text that is shown token by token
DRAWS = 40_000_000  # numbers that a bootstrap's draws may be made of
SHUFFLES = 200  # of the kinds within units, to see what chance alone does
ORIGINAL = "original"  # the teacher's own routers and top-k
UNIT = Range(0.0, 1.0)


@dataclass(frozen=True)
class Counted:
    """Sums over kept tokens, apart for each unit and kind."""

    shares: np.ndarray  # [U, K, L, E]
    entropy: np.ndarray  # [U, K, L] of a token's shares, nats
    tokens: np.ndarray  # [U, K]
    asked: np.ndarray  # [L, E] kept tokens that asked the expert

    def loads(self, by: np.ndarray | None = None) -> np.ndarray:
        """[K, L, E] mean shares of each kind; `by`, [U, K], takes the kinds of a unit in another order."""
        at = (slice(None), slice(None)) if by is None else (np.arange(len(by))[:, None], by)
        return _over(self.shares[at].sum(0), self.tokens[at].sum(0)[:, None, None])


def look(
    teacher: LiveTeacher,
    prepared: Prepared,
    tokenizer: Tokenizer,
    asking: Asking | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Who speaks, as plain data: what experts.json has.  {} where the teacher is dense.

    Args:
        asking: the routings to be looked at, the original first; each is entered once for all rows.

    Returns:
        {"experts", "asked", "layers", "rows", "tokens", "units", "of"; "routings": {name: {"load": [L][E],
        "entropy": [L], "coverage", "max_load"}}; "kinds": {"names", "how", "tokens", "load": [K][L][E],
        "layer", "intervals": [K][E], "apart": [{"kinds", "value", "low", "high", "chance", "by_layer"}]};
        "text": {"tokens", "kinds", "layer", "weights": {name: [T][E]}}}
    """
    if not (routers := routers_of(teacher.model)):
        return {}
    asking = asking or {ORIGINAL: nullcontext()}
    rows = prepared.measured
    numbers = np.unique(np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int))
    units, of = units_of_tokens(prepared)
    units, rows = [units[number] for number in numbers], rows.select(numbers)
    kinds, names, how = kinds_of(rows, prepared, tokenizer)
    place, start = _window(kinds)
    found, texts = {}, {}
    for name, context in asking.items():
        with context:
            found[name] = counted(teacher, prepared, rows, units, kinds, len(names))
            texts[name] = shares_in(teacher, prepared, rows.select([place]))
    first = next(iter(found.values()))
    is_seen = first.tokens.sum(1) > 0
    by_kind = told_apart(first, names, resamples=resamples, seed=seed)
    layer = by_kind.get("layer", len(routers) // 2)
    shown = slice(start, start + TEXT)
    return {
        "experts": first.shares.shape[-1],
        "asked": int(next(iter(routers.values())).top_k),
        "layers": list(routers),
        "rows": len(rows),
        "tokens": int(first.tokens.sum()),
        "units": int(is_seen.sum()),
        "of": of,
        "interval": over(int(is_seen.sum()), of),
        "routings": {name: summary(each) for name, each in found.items()},
        "kinds": by_kind | {"how": how} if by_kind else {},
        "text": {
            "tokens": [tokenizer.decode([token]) for token in rows[place]["input_ids"][shown]],
            "kinds": [names[kind] for kind in kinds[place][shown]],
            "layer": layer,
            "weights": {name: _plain(each[shown, layer]) for name, each in texts.items()},
        },
    }


def summary(counted: Counted) -> dict[str, Any]:
    """Of one routing: loads and entropy by layer, which experts a kept token asked, the busiest's load."""
    tokens = counted.tokens.sum()
    load = _over(counted.shares.sum((0, 1)), tokens)
    return {
        "load": _plain(load),
        "entropy": _plain(_over(counted.entropy.sum((0, 1)), tokens)),
        "coverage": float((counted.asked > 0).mean()),
        "max_load": float(load.max(-1).mean() * load.shape[-1]),
    }


def told_apart(counted: Counted, names: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """How the loads of kinds of text differ, with 95 % intervals over units; {} where there is one kind.

    Half the sum of the absolute differences (total variation): the share of the load that one kind gives to
    other experts than the other does, 0 to 1, its mean over the layers.  It is above 0 by chance alone, the
    more so the fewer tokens: `chance` is what 95 % of shuffles of the kinds within each unit stay below.
    """
    there = np.flatnonzero(counted.tokens.sum(0))
    if len(there) < 2:
        return {}
    seen = counted.tokens.sum(1) > 0
    held = Counted(counted.shares[seen][:, there], counted.entropy[seen][:, there],
                   counted.tokens[seen][:, there], counted.asked)  # fmt: skip
    loads, units, generator = held.loads(), int(seen.sum()), np.random.default_rng(seed)
    table = np.concatenate([held.shares.reshape(units, -1), held.tokens], axis=1)
    draws = Bootstrap(units, max(min(resamples, DRAWS // table.shape[1]), 100), seed).sums(table)
    sums, tokens = draws[:, : -len(there)].reshape(-1, *loads.shape), draws[:, -len(there) :]
    drawn = _over(sums, tokens[:, :, None, None])
    turns = [generator.permuted(np.tile(np.arange(len(there)), (units, 1)), axis=1) for _ in range(SHUFFLES)]
    by_chance = np.stack([held.loads(turn) for turn in turns])
    pairs = []
    for a, b in combinations(range(len(there)), 2):
        by_layer, each = _apart(loads[a], loads[b]), _apart(drawn[:, a], drawn[:, b]).mean(-1)
        chance = np.nanquantile(_apart(by_chance[:, a], by_chance[:, b]).mean(-1), 0.95)
        found = interval(by_layer.mean(), each, units, UNIT)
        pair = {"kinds": [names[there[a]], names[there[b]]], "chance": float(chance)}
        pairs.append({**pair, **found, "by_layer": _plain(by_layer)})
    pairs.sort(key=lambda pair: -pair["value"])
    layer = int(np.argmax(pairs[0]["by_layer"]))
    return {
        "names": [names[kind] for kind in there],
        "tokens": held.tokens.sum(0).astype(int).tolist(),
        "load": _plain(loads),
        "layer": layer,
        "intervals": [
            [interval(loads[k, layer, e], drawn[:, k, layer, e], units, UNIT) for e in range(loads.shape[-1])]
            for k in range(len(there))
        ],
        "apart": pairs,
    }


@torch.no_grad()
def counted(
    teacher: LiveTeacher,
    prepared: Prepared,
    rows: Dataset,
    units: Sequence[np.ndarray],
    kinds: Sequence[np.ndarray],
    count: int,
) -> Counted:
    """What the experts were given, by unit and kind, as the teacher routes now.

    Args:
        units, kinds: of each row the numbers of its tokens' units and kinds.
        count: of kinds.
    """
    names = np.unique(np.concatenate(units))
    size, sums = len(names) * count, {}
    for start in range(0, len(rows), BATCH):
        some = slice(start, start + BATCH)
        batch = moved(
            prepared.collate([rows[n] for n in range(*some.indices(len(rows)))]), teacher.model.device
        )
        positions, owners = _places(teacher, batch)
        shares = torch.stack([each[positions] for each in _watched(teacher, batch)], dim=1)  # [N, L, E]
        unit, kind = (_spread(each[some], batch)[owners.cpu()] for each in (units, kinds))
        cell = torch.from_numpy(np.searchsorted(names, unit) * count + kind).to(shares.device)
        entropy = torch.special.entr(shares).sum(-1)
        parts = {"shares": shares, "entropy": entropy, "tokens": torch.ones(len(cell), device=shares.device)}
        for name, each in parts.items():
            total = torch.zeros(size, *each.shape[1:], dtype=torch.float64)
            total.index_add_(0, cell.cpu(), each.double().cpu())
            sums[name] = sums.get(name, 0) + total
        sums["asked"] = sums.get("asked", 0) + (shares > 0).sum(0).cpu()
    apart = {n: v.numpy().reshape(len(names), count, *v.shape[1:]) for n, v in sums.items() if n != "asked"}
    return Counted(**apart, asked=sums["asked"].numpy())


@torch.no_grad()
def shares_in(teacher: LiveTeacher, prepared: Prepared, row: Dataset) -> np.ndarray:
    """[T, L, E] shares in a single row, at each of the tokens that the student reads."""
    batch = moved(prepared.collate([row[0]]), teacher.model.device)
    every = torch.stack(_watched(teacher, batch), dim=1).cpu().numpy()
    length = batch["input_ids"].shape[1]
    if not teacher.reads or teacher.vocabularies is None:
        return every[:length]
    positions, owners = (each.cpu().numpy() for each in _places(teacher, batch))
    found = np.zeros((length, *every.shape[1:]), np.float32)  # 0 where nothing of the teacher's is there
    found[owners[::-1]] = every[positions[::-1]]
    return found


def _watched(teacher: LiveTeacher, batch: Batch) -> list[Tensor]:
    """Of each router [B·T, E] the shares that it gives; the head is not asked."""
    inputs = {name: batch[teacher.reads + name] for name in ("input_ids", "attention_mask")}
    with watched(teacher.model) as found:
        teacher.model.base_model(**inputs, use_cache=False)
    return [given / given.sum(-1, keepdim=True) for given in found.values()]


def _places(teacher: LiveTeacher, batch: Batch) -> tuple[Tensor, Tensor]:
    """[N] where the teacher reads what the kept tokens are told from, and the student's place for each."""
    labels = batch["labels"]
    if labels.ndim == 1:  # of rows that are classified, all that is read
        mask = batch[f"{teacher.reads}attention_mask"]
        rows, _ = (places := mask.nonzero()).T
        return places[:, 0] * mask.shape[1] + places[:, 1], rows * batch["input_ids"].shape[1]
    here = kept(labels).positions
    if teacher.vocabularies is None:
        return here, here
    lines, theirs = spans_in(batch)
    alignment = Alignment(**lines)
    return theirs["positions"], here[alignment.first][alignment.teacher_owner]


def _spread(lists: Sequence[np.ndarray], batch: Batch) -> np.ndarray:
    """[B·T] of a list for each row."""
    found = np.zeros(batch["input_ids"].shape, np.int64)
    for number, each in enumerate(lists):
        found[number, : len(each)] = each
    return found.flatten()


def _window(kinds: Sequence[np.ndarray]) -> tuple[int, int]:
    """The row and the place in it from which on TEXT tokens are most evenly of several kinds."""

    def even(row: np.ndarray) -> Iterator[tuple[float, int]]:
        for start in range(0, max(len(row) - TEXT, 0) + 1, TEXT // 4):
            shown = np.bincount(row[start : start + TEXT])
            yield min(len(row), TEXT) - float(shown.max()), start

    best = [max(even(row), key=lambda pair: pair[0]) for row in kinds]
    row = int(np.argmax([evenness for evenness, _ in best]))
    return row, best[row][1]


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Total variation of distributions over the last axis."""
    return np.abs(a - b).sum(-1) / 2


def _over(sums: np.ndarray, counts: Any) -> np.ndarray:
    """Means; nan where there is nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums / counts


def _plain(values: np.ndarray) -> list:
    return np.round(np.asarray(values, float), 6).tolist()
