"""Which of a teacher's experts speak on held-out rows: by token, by layer, by kind of text, by routing.

Of each kept token counts what its teacher's routers gave their experts: the share of an expert's weight in
all weights given to the token, so that the shares of a layer's experts add up to 1, however a router scales
them.  L layers with a router, E experts in each, U independent units (documents, …), K kinds of text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.run import Config
from kdlib.data.batches import Batch, Prepared
from kdlib.data.kinds import kinds_of
from kdlib.data.text import units_of_tokens
from kdlib.losses.alignment import Alignment, SpanSignal, said_of, spans_in
from kdlib.losses.chunked import Weighted, token_values
from kdlib.losses.signals import kept, moved
from kdlib.losses.terms import SoftTargets
from kdlib.metrics.bootstrap import over
from kdlib.metrics.loads import Counted, rounded, summary, told_apart
from kdlib.models.loading import device_of
from kdlib.models.teacher import LiveTeacher
from kdlib.routing.experts import AllExperts, routers_of, watched
from kdlib.routing.figures import FILE, FOLDER, ORIGINAL, save
from kdlib.routing.student_aware import StudentAware, routing_of, trained_router
from kdlib.runs.files import write_json
from kdlib.runs.folder import Run

# routing by name → what makes the teacher route so in one pass; it is told the [N] places that are looked at
Asking = Mapping[str, Callable[[Tensor], AbstractContextManager]]
ROWS = 32  # looked at, spread over the held-out rows
BATCH = 8  # rows of a forward pass
TEXT = 48  # tokens of a text that is shown token by token


def look(
    teacher: LiveTeacher,
    prepared: Prepared,
    tokenizer: Tokenizer,
    asking: Asking | None = None,
    *,
    config: Config | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Who speaks, as plain data: what experts.json has.  {} where the teacher is dense.

    Args:
        asking: the routings to be looked at, the original first.
        config: of which the rows are: its source may say of which kind a text is.

    Returns:
        {"experts", "asked", "layers", "rows", "tokens", "units", "of"; "routings": {name: {"load": [L][E],
        "entropy": [L], "coverage", "max_load", "moved_by"}}; "kinds": {"names", "how", "tokens",
        "load": [K][L][E],
        "layer", "intervals": [K][E], "apart": [{"kinds", "value", "low", "high", "chance", "by_layer"}]};
        "text": {"tokens", "kinds", "layer", "weights": {name: [T][E]}}}
    """
    if not (routers := routers_of(teacher.model)):
        return {}
    asking = asking or {ORIGINAL: nullcontext}
    rows = prepared.measured
    numbers = np.unique(np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(int))
    units, of = units_of_tokens(prepared)
    units, rows = [units[number] for number in numbers], rows.select(numbers)
    kinds, names, how = kinds_of(rows, prepared, tokenizer, config)
    place, start = _window(kinds)
    found, texts = {}, {}
    for name, routed in asking.items():
        found[name] = counted(teacher, prepared, rows, units, kinds, len(names), routed)
        texts[name] = shares_in(teacher, prepared, rows.select([place]), routed)
    few = rows.select(range(0, len(rows), -(-len(rows) // BATCH)))
    moves = {
        name: {} if routed is nullcontext else {"moved_by": moved_by(teacher, prepared, few, routed)}
        for name, routed in asking.items()
    }
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
        "routings": {name: {**summary(each), **moves[name]} for name, each in found.items()},
        "kinds": by_kind | {"how": how} if by_kind else {},
        "text": {
            "tokens": [tokenizer.decode([token]) for token in rows[place]["input_ids"][shown]],
            "kinds": [names[kind] for kind in kinds[place][shown]],
            "layer": layer,
            "weights": {name: rounded(each[shown, layer]) for name, each in texts.items()},
        },
    }


def of_run(
    run: Run, config: Config, teacher: LiveTeacher | None, prepared: Prepared, tokenizer: Tokenizer
) -> dict[str, Any]:
    """`look` for a run; written into its experts.json, and figures and tables into experts/."""
    if not facts_of(teacher):
        why = "has no experts: a dense model asks all of itself for every token" if teacher else "is none"
        print(f"the teacher {why}, so there is nothing to see here")
        return {}
    teacher.to(device_of(config.wanted_device))
    print("asking the teacher which of its experts speak …", flush=True)
    how = {"config": config, "resamples": config.compare.resamples, "seed": config.seed}
    asking = asking_of(teacher, config.teacher.experts, run.path)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # experts may be drawn
        found = look(teacher, prepared, tokenizer, asking, **how)
    write_json(run.path / FILE, found)
    save(run.path / FOLDER, found)
    return found


@torch.no_grad()
def asking_of(teacher: LiveTeacher, experts: Any, folder: Path) -> Asking:
    """The teacher's own routing and that in which it taught, as `teacher.experts` has it.

    A router that learned comes after one that did not, both asking all experts, so that these two differ by
    what it learned and by nothing else.

    Raises:
        RunError: it should have learned, and the run's folder has no router: it is not trained yet.
    """
    own, routing = {ORIGINAL: nullcontext}, routing_of(teacher.model, experts)
    if isinstance(routing, StudentAware):
        for name, weight in trained_router(folder).items():
            routing.weights[name].copy_(weight)
        return {**own, "all experts": AllExperts(teacher.model).asked, "student-aware": routing.asked}
    if experts == "topk":
        return own
    return {**own, "all experts" if experts == "all" else "drawn experts": routing.asked}


@torch.no_grad()
def moved_by(
    teacher: LiveTeacher,
    prepared: Prepared,
    rows: Dataset,
    routed: Callable[[Tensor], AbstractContextManager],
) -> float:
    """By how much who is asked moves what the teacher says: KL(as it was made ‖ so), nats per kept token."""
    batch = moved(prepared.collate([*rows]), teacher.model.device)
    tokens, (places, _) = kept(batch["labels"]), _places(teacher, batch)
    own = teacher(batch, tokens)
    with routed(places):
        other = said_of(teacher(batch, tokens))
    came = own.targets if isinstance(own, SpanSignal) else tokens.targets
    return float(token_values(other, said_of(own), came, terms=[Weighted(SoftTargets())], chunk=128).mean())


def facts_of(teacher: LiveTeacher | None) -> dict[str, dict[str, int]]:
    """{"experts": {"layers", "each", "asked"}}, for a manifest: of a dense model, or of none, nothing."""
    routers = list(routers_of(teacher.model).values()) if teacher else []
    if not routers:
        return {}
    each, asked = int(routers[0].num_experts), int(routers[0].top_k)
    return {"experts": {"layers": len(routers), "each": each, "asked": asked}}


@torch.no_grad()
def counted(
    teacher: LiveTeacher,
    prepared: Prepared,
    rows: Dataset,
    units: Sequence[np.ndarray],
    kinds: Sequence[np.ndarray],
    count: int,
    routed: Callable[[Tensor], AbstractContextManager] = nullcontext,
) -> Counted:
    """What the experts were given, by unit and kind, in one routing.

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
        with routed(positions):
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
def shares_in(
    teacher: LiveTeacher,
    prepared: Prepared,
    row: Dataset,
    routed: Callable[[Tensor], AbstractContextManager] = nullcontext,
) -> np.ndarray:
    """[T, L, E] shares in a single row, at each of the tokens that the student reads."""
    batch = moved(prepared.collate([row[0]]), teacher.model.device)
    positions, owners = _places(teacher, batch)
    with routed(positions):
        every = torch.stack(_watched(teacher, batch), dim=1).cpu().numpy()
    length = batch["input_ids"].shape[1]
    if not teacher.reads or teacher.vocabularies is None:
        return every[:length]
    positions, owners = positions.cpu().numpy(), owners.cpu().numpy()
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
