"""A teacher whose signals come from a disk: no model is there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, Trainer

from kdlib.cache.rows import as_tensor, asked_in, keys_of
from kdlib.errors import RunError
from kdlib.losses.alignment import TeacherSignal
from kdlib.losses.signals import Kept, moved
from kdlib.models.hooks import instead
from kdlib.models.teacher import Inside, beside
from kdlib.tokens.vocabulary import Vocabularies

SAID = "teacher_said"  # under which a batch has what the teacher says of it


@dataclass
class SignalCache:
    """One recipe's rows on a disk, and how they become signals."""

    shards: Any  # kdlib.cache.shards.Shards
    recipe: Any  # kdlib.cache.parts.Recipe
    head: Any = None  # kdlib.cache.parts.Head, where the hidden states that it reads are kept


@dataclass
class CachedTeacher:
    """In place of a LiveTeacher, in a training and its evaluations; each batch brings what it says."""

    taught: SignalCache  # of the rows that it teaches
    exact: SignalCache  # of the rows that are evaluated
    vocabulary: int
    config: PreTrainedConfig  # of the model that was asked
    reads: str = ""
    vocabularies: Vocabularies | None = None
    model = routing = own_device = None  # there is none

    def to(self, device: torch.device) -> None:
        """Put the head there."""
        for cache in (self.taught, self.exact):
            cache.head = moved(cache.head, device)
        self.vocabularies = moved(self.vocabularies, device)

    def collated(self, collate: Callable[[Any], Any], *, teaches: bool) -> Callable[[Any], dict[str, Any]]:
        """A collate function whose batches bring what this teacher says of them."""
        return _WithSaid(collate, self.taught if teaches else self.exact, self.reads)

    def __call__(
        self, batch: Mapping[str, Any], kept: Kept, inside: Inside | None = None, *, teaches: bool = False
    ) -> TeacherSignal:
        """As LiveTeacher's.

        Raises:
            RunError: a row of the batch was never asked about.
        """
        cache = self.taught if teaches else self.exact
        if SAID not in batch:
            raise RunError(
                f"{cache.shards.folder}: some rows are not there: the data have changed since it was made; "
                "run `kd cache` again, which asks about what is missing"
            )
        said = batch[SAID]
        signal = cache.recipe.said(said["kept"], said["counts"], cache.head)
        if self.vocabularies is None:
            return signal
        return beside(batch, self.vocabularies, lambda theirs: signal)


@dataclass(frozen=True)
class _WithSaid:
    """Collates rows and reads what was kept of them, in whatever process loads them."""

    collate: Callable[[Any], Any]
    cache: SignalCache
    reads: str

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        found = keys_of(batch, asked_in(batch), self.reads)
        each = [self.cache.shards.read(key) for _, key, _ in found]
        if any(arrays is None for arrays in each):  # who asks for it is told
            return batch
        parts: list[Any] = [self.cache.shards.nothing(), *each]
        kept = {name: as_tensor(name, np.concatenate([part[name] for part in parts])) for name in parts[0]}
        return {**batch, SAID: {"kept": kept, "counts": [count for *_, count in found]}}


class CacheTrainer(Trainer):
    """A Trainer whose batches bring what a teacher on a disk says of them."""

    teacher: Any

    def _get_dataloader(self, *arguments: Any, **options: Any) -> DataLoader:
        if not isinstance(self.teacher, CachedTeacher):
            return super()._get_dataloader(*arguments, **options)
        collated = self.teacher.collated(self.data_collator, teaches=options.get("is_training", False))
        with instead((self, "data_collator", collated)):
            return super()._get_dataloader(*arguments, **options)
