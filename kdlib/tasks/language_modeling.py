"""Language modelling: the next token of a text; what the models are compared by, token by token."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel as Model,
    PreTrainedTokenizerBase as Tokenizer,
)

from kdlib.config.run import Config
from kdlib.config.task_rules import RULES
from kdlib.data import text
from kdlib.data.batches import Batch, Prepared, calibration_rows, collate, random_ids, vocabulary_of
from kdlib.errors import ModelError
from kdlib.hardware import middle_half, repeated
from kdlib.losses.objective import eval_terms, row_sums
from kdlib.losses.signals import IGNORED, kept
from kdlib.metrics.bootstrap import Bootstrap, over
from kdlib.metrics.paired import differences, intervals
from kdlib.models.heads import check_causal
from kdlib.models.loading import load_model
from kdlib.models.student import Outline, sources, teacher_tokenizer_of, tokenizer_of
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.tokens import TokenView, token_view
from kdlib.tasks.base import Comparison, Sample, Task, register, spread, within_heads

BATCH = 8  # rows per forward pass
TOKENS = 128  # looked at one by one: as many as one reads
ROWS = 12  # where most of a row is given and little of it predicted
FEW = 8  # not worth a row of their own


class LanguageModeling(Task):
    """Causal language models on text; the base of every task whose models say tokens."""

    rules = RULES["causal-lm"]
    kind = "causal language model"
    auto = AutoModelForCausalLM
    known = MODEL_FOR_CAUSAL_LM_MAPPING
    checks = (
        "documents_have_something_to_predict",
        "documents_are_not_cut",
        "documents_came_once",
        "held_out_groups_are_new",
        "enough_is_held_out",
    )
    checks_on_batches = ("models_do_not_look_ahead",)

    def prepare(self, config: Config, tokenizer: Tokenizer, *, new_head: bool = False) -> Prepared:
        teacher = teacher_tokenizer_of(config)
        prepared = text.prepare(config.data, tokenizer, seed=config.seed, teacher=teacher)
        return within_heads(config, prepared, tokenizer, teacher)

    def load(
        self,
        source: str,
        prepared: Prepared,
        dtype: torch.dtype = torch.float32,
        *,
        untrained: bool = False,
        **options: Any,
    ) -> Model:
        return load_model(source, dtype, **options)

    def outlined(
        self,
        config: Config,
        student: PreTrainedConfig,
        teacher: PreTrainedConfig | None,
        vocabulary: int | None,
    ) -> Outline:
        notes, heads = [], [each.get_text_config().vocab_size for each in (student, teacher) if each]
        try:
            vocabulary = vocabulary_of(tokenizer_of(config))
        except ModelError:
            vocabulary = heads[-1]
            taken = f"its head's {vocabulary:,} rows are taken for the vocabulary"
            notes.append(f"no tokenizer is to be had for {sources(config)[0]}: {taken}")
        return Outline(config, student, teacher, min(vocabulary, *heads), self, notes)

    def random_batch(self, plan: Outline, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        data = plan.config.data
        ids = random_ids(plan.vocabulary, rows, data.max_length, generator, is_full=data.packing)
        return collate([{"input_ids": each} for each in ids], pad_id=0)

    def facts(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher | None) -> dict[str, str]:
        end = prepared.notes.get("each_document_ends_with")
        ends = {"end of a text": f"{end}, learned where a text is not cut"} if end else {}
        same = ", the same for both" if teacher else ""
        return {"vocabulary": f"{len(tokenizer):,} tokens{same}", **ends}

    def example(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher | None) -> TokenView:
        """Token by token, coloured by what is learned."""
        batch = prepared.first_rows()
        ids, labels, read = (batch[name][0].tolist() for name in ("input_ids", "labels", "attention_mask"))
        return token_view(ids, [label != IGNORED for label in labels], read, tokenizer.decode)

    def sample(self, prepared: Prepared, tokenizer: Tokenizer, tokens: int = TOKENS) -> Sample:
        """The first tokens of the held-out rows; each row costs one more, its first."""
        batch = collate(beginnings(prepared.validation, tokens), pad_id=tokenizer.pad_token_id)
        predicted = kept(batch["labels"])
        ids, length = batch["input_ids"].flatten().tolist(), batch["labels"].shape[1]
        here = (predicted.positions + 1).tolist()
        before = [
            tokenizer.decode(ids[max(last + 1, place // length * length) : place]) if place - last > 1 else ""
            for last, place in zip([-1, *here[:-1]], here, strict=True)
        ]
        texts = [tokenizer.decode([token]) for token in predicted.targets.tolist()]
        return Sample(batch, texts, before, lambda token: tokenizer.decode([token]))

    def comparison(
        self, config: Config, prepared: Prepared, tokenizer: Tokenizer, **options: Any
    ) -> Comparison:
        asked = {"prompts": self.prompts(config, prepared.measured), "new_tokens": config.compare.new_tokens}
        return self.compared_by(prepared)(prepared, tokenizer, **asked, **options)

    def compared_by(self, prepared: Prepared) -> type["TokenComparison"]:
        """What measures models on these rows."""
        return TokenComparison

    def prompts(self, config: Config, rows: Dataset) -> list[list[int]]:
        """What the models are to continue: beginnings of rows spread over the text, all of one length.

        Where all rows are shorter than that, the first half of each.
        """
        length, every = config.compare.prompt_tokens, [list(row["input_ids"]) for row in rows]
        fit = [ids[:length] for ids in every if len(ids) >= length]
        return spread(fit or [ids[: -(-len(ids) // 2)] for ids in every], config.compare.continuations)


class TokenComparison(Comparison):
    """Of every model the sums over each document's tokens are kept, or over each row's where none is known.

    A packed block holds parts of several documents: each token counts for its own.  Student and teacher are
    asked batch by batch, so that no more than one batch of either is held; the teacher is asked again beside
    each student.
    """

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: Tokenizer,
        *,
        prompts: Sequence[Sequence[int]] = (),
        new_tokens: int = 32,
        **options: Any,
    ) -> None:
        """Every model continues the prompts, greedily, by so many `new_tokens`."""
        super().__init__(prepared, tokenizer, **options)
        self.prompts, self.new_tokens = prompts, new_tokens
        self.unit_of_token, self.of_units = text.units_of_tokens(prepared)
        self.units = 1 + max(int(each.max(initial=0)) for each in self.unit_of_token)
        self.teacher: LiveTeacher | None = None
        self.sums: dict[str, np.ndarray] = {}  # model -> [units, terms + 1]
        self.samples: dict[str, list[str]] = {}

    def add(self, name: str, model: LiveTeacher, prepared: Prepared) -> dict[str, Any]:
        """What it costs; a ModelError where it looks ahead."""
        check_causal(name, model.model, calibration_rows(prepared.measured, 1))
        return {"forward_tokens_per_s": forward_tokens_per_s(model.model, next(self._batches())[1])}

    def beside_teacher(self, name: str, model: LiveTeacher) -> None:
        self.teacher = model if name == "teacher" else self.teacher
        self.sums[name] = sum(self._sums(units, batch, model) for units, batch in self._batches())

    def show(self, name: str, model: Model) -> None:
        made = self.prompts and continuations(model, self.tokenizer, self.prompts, self.new_tokens)
        self.samples[name] = list(made)

    def results(self, student: str) -> dict[str, Any]:
        sizes, tokens = self._bytes(), next(iter(self.sums.values()))[:, -1]
        units, terms = int((tokens > 0).sum()), eval_terms(self.teacher)  # of others nothing is predicted
        draws = Bootstrap(units, self.resamples, self.seed)
        figures: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
        for name, sums in self.sums.items():
            table = np.column_stack([sums, sizes])[tokens > 0]
            found, drawn = (
                _figures(each, terms) for each in (table.sum(0, keepdims=True), draws.sums(table))
            )
            figures[name] = {measure: (float(found[measure][0]), drawn[measure]) for measure in found}
        return {
            "models": {n: intervals(each, units, itself=n == "teacher") for n, each in figures.items()},
            "differences": differences(figures, units),
            "rows": len(self.prepared.measured),
            "units": units,
            "tokens": int(tokens.sum()),
            "resamples": self.resamples,
            "interval": over(units, self.of_units),
            "samples": self.samples,
            "prompts": [self.tokenizer.decode(prompt) for prompt in self.prompts],
        }

    def _batches(self) -> Iterator[tuple[list[np.ndarray], Batch]]:
        """Each batch, and of its rows the unit of each token."""
        rows = self.prepared.measured
        for start in range(0, len(rows), BATCH):
            numbers = range(start, min(start + BATCH, len(rows)))
            units = [self.unit_of_token[n] for n in numbers]
            yield units, self.prepared.collate([rows[n] for n in numbers])

    def _units_of(self, units: Sequence[np.ndarray], labels: Tensor) -> Tensor:
        """[N] the unit of each kept token."""
        every = np.zeros(labels.shape, dtype=np.int64)
        for number, row in enumerate(units):
            every[number, : len(row)] = row
        return torch.from_numpy(every)[:, 1:][labels[:, 1:] != IGNORED]

    def _sums(self, units: Sequence[np.ndarray], batch: Batch, model: LiveTeacher) -> np.ndarray:
        """[units, terms + 1] sums of one batch."""
        its_units = self._units_of(units, batch["labels"])
        batch = {key: value.to(model.model.device) for key, value in batch.items()}
        tokens = kept(batch["labels"])
        signal = model(batch, tokens)
        teacher = signal if model is self.teacher else self.teacher and self.teacher(batch, tokens)
        numbers, places = its_units.unique(return_inverse=True)
        where = places.to(signal.device)
        sums = row_sums(
            signal, teacher, tokens.targets, where, row_count=len(numbers), terms=eval_terms(self.teacher)
        )
        found = np.zeros((self.units, len(sums)))
        found[numbers.numpy()] = torch.stack(list(sums.values()), dim=1).cpu().double().numpy()
        return found

    def _bytes(self) -> np.ndarray:
        """[units] bytes of the text that is predicted."""
        found = [
            (self._units_of(units, b["labels"]), kept(b["labels"]).targets) for units, b in self._batches()
        ]
        units, targets = (torch.cat(each).numpy() for each in zip(*found, strict=True))
        return np.bincount(units, text.bytes_of_tokens(targets, self.tokenizer), self.units)


def _figures(sums: np.ndarray, terms: Iterable[str]) -> dict[str, np.ndarray]:
    """[R, terms + 2] sums of each term, of tokens and of bytes to each measure, [R]."""
    *drawn, tokens, size = sums.T
    total = dict(zip(terms, drawn, strict=True))
    mean = {name: nats / tokens for name, nats in total.items()}
    with np.errstate(divide="ignore", invalid="ignore"):  # of special tokens alone there is no text
        bits_per_byte = total["ce"] / math.log(2) / size
    return {"perplexity": np.exp(mean.pop("ce")), "bits_per_byte": bits_per_byte, **mean}


@torch.no_grad()
def forward_tokens_per_s(model: Model, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Tokens per second of a plain forward pass with logits: median, middle half; padding is no token."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    tokens = int(inputs["attention_mask"].sum())
    seconds = repeated(lambda: model(**inputs, use_cache=False), model.device)
    return middle_half([tokens / each for each in seconds])


@torch.no_grad()
def continuations(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[str]:
    """Greedy continuations of prompts; nothing is padded: each by itself unless all are of one length."""
    if len(set(map(len, prompts))) > 1:
        return [text for prompt in prompts for text in continuations(model, tokenizer, [prompt], new_tokens)]
    ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def beginnings(rows: Sequence[Mapping[str, Sequence[int]]], tokens: int) -> list[dict[str, Any]]:
    """The first rows, the last one cut, that together have about so many tokens to predict."""
    taken: list[dict[str, Any]] = []
    for row in rows:
        if tokens < (FEW if taken else 1) or len(taken) == (ROWS if "prompt_tokens" in row else len(rows)):
            break
        given = max(row.get("prompt_tokens", 1), 1)
        ids = list(row["input_ids"][: tokens + given])
        taken.append({**row, "input_ids": ids})
        tokens -= len(ids) - given
    return taken


register(LanguageModeling())
