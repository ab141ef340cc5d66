"""Language modelling: the next token of a text; what the models are compared by, token by token."""

import math
from collections.abc import Mapping, Sequence
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
from kdlib.data.batches import Prepared, calibration_rows, collate, random_ids
from kdlib.errors import ModelError
from kdlib.losses.objective import EVAL_TERMS, row_sums
from kdlib.losses.signals import IGNORED, Signal, kept
from kdlib.metrics.bootstrap import Bootstrap, interval
from kdlib.metrics.paired import differences
from kdlib.models.causality import check_causal
from kdlib.models.efficiency import seconds_of
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.models.student import Outline
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.tokens import TokenView, token_view
from kdlib.tasks.base import Comparison, Sample, Task, register, spread

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
        "enough_is_held_out",
    )

    def prepare(self, config: Config, tokenizer: Tokenizer, *, new_head: bool = False) -> Prepared:
        return text.prepare(config.data, tokenizer, seed=config.seed)

    def load(
        self, source: str, prepared: Prepared, dtype: torch.dtype = torch.float32, *, untrained: bool = False
    ) -> Model:
        return load_model(source, dtype)

    def outlined(
        self, config: Config, student: PreTrainedConfig, teacher: PreTrainedConfig, vocabulary: int | None
    ) -> Outline:
        notes = []
        try:
            vocabulary = len(load_tokenizer(config.teacher.model))
        except ModelError:
            vocabulary = teacher.get_text_config().vocab_size
            taken = f"its head's {vocabulary:,} rows are taken for the vocabulary"
            notes.append(f"no tokenizer is to be had for {config.teacher.model}: {taken}")
        return Outline(config, student, teacher, vocabulary, self, notes)

    def random_batch(self, plan: Outline, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        data = plan.config.data
        ids = random_ids(plan.vocabulary, rows, data.max_length, generator, is_full=data.packing)
        return collate([{"input_ids": each} for each in ids], pad_id=0)

    def facts(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher) -> dict[str, str]:
        return {"vocabulary": f"{len(tokenizer):,} tokens, the same for both"}

    def example(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher) -> TokenView:
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
        """What the models are to continue: beginnings of rows spread over the text, all of one length."""
        length = config.compare.prompt_tokens
        fit = [row["input_ids"] for row in rows if len(row["input_ids"]) >= length]
        return [list(ids[:length]) for ids in spread(fit, config.compare.continuations)]


class TokenComparison(Comparison):
    """Between models the sums of each row are kept, and what the teacher said (its last hidden states)."""

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
        every = list(prepared.measured)
        self.batches = [prepared.collate(every[i : i + BATCH]) for i in range(0, len(every), BATCH)]
        labels = [row for batch in self.batches for row in batch["labels"]]
        texts = tokenizer.batch_decode([row[row != IGNORED] for row in labels], skip_special_tokens=True)
        self.row_bytes = np.array([len(each.encode()) for each in texts], dtype=float)  # of what is predicted
        self.teacher_signals: list[Signal] = []  # batch by batch
        self.sums: dict[str, np.ndarray] = {}  # model -> [rows, terms + 1]
        self.samples: dict[str, list[str]] = {}

    def add(self, name: str, model: LiveTeacher, prepared: Prepared) -> dict[str, Any]:
        """Its sums over all rows; a ModelError where it looks ahead."""
        check_causal(name, model.model, calibration_rows(prepared.measured, 1))
        self.sums[name] = np.concatenate([self._sums(number, model) for number in range(len(self.batches))])
        return {"forward_tokens_per_s": forward_tokens_per_s(model.model, self.batches[0])}

    def show(self, name: str, model: Model) -> None:
        made = self.prompts and continuations(model, self.tokenizer, self.prompts, self.new_tokens)
        self.samples[name] = list(made)

    def results(self, student: str) -> dict[str, Any]:
        count = len(self.row_bytes)
        draws = Bootstrap(count, self.resamples, self.seed).times  # [resamples, rows] times drawn
        figures: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
        for name, sums in self.sums.items():
            found, drawn = self._figures(sums, np.ones((1, count))), self._figures(sums, draws)
            figures[name] = {measure: (float(found[measure][0]), drawn[measure]) for measure in found}
        models = {name: {m: interval(*pair) for m, pair in each.items()} for name, each in figures.items()}
        return {
            "models": models,
            "differences": differences(figures),
            "rows": count,
            "tokens": int(next(iter(self.sums.values()))[:, -1].sum()),
            "resamples": self.resamples,
            "interval": "95 %, paired bootstrap over rows",
            "samples": self.samples,
            "prompts": self.tokenizer.batch_decode(self.prompts),
        }

    def _sums(self, number: int, model: LiveTeacher) -> np.ndarray:
        """[rows, terms + 1] sums of one batch."""
        batch = {key: value.to(model.model.device) for key, value in self.batches[number].items()}
        tokens = kept(batch["labels"])
        signal = model(batch, tokens)
        if number == len(self.teacher_signals):  # the first model, the teacher, is asked once
            self.teacher_signals.append(signal)
        teacher, count = self.teacher_signals[number], len(batch["labels"])
        sums = row_sums(signal, teacher, tokens.targets, tokens.rows, row_count=count)
        return torch.stack(list(sums.values()), dim=1).cpu().double().numpy()

    def _figures(self, sums: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Each measure for each draw of rows, [draws, rows] times each row is drawn: [draws]."""
        *drawn, tokens = (draws @ sums).T  # of each term and the count of tokens: [draws]
        total = dict(zip(EVAL_TERMS, drawn, strict=True))
        mean = {name: nats / tokens for name, nats in total.items()}
        bits_per_byte = total["ce"] / math.log(2) / (draws @ self.row_bytes)
        return {"perplexity": np.exp(mean.pop("ce")), "bits_per_byte": bits_per_byte, **mean}


@torch.no_grad()
def forward_tokens_per_s(model: Model, batch: Mapping[str, Tensor], repeats: int = 2) -> float:
    """Tokens per second of a plain forward pass with logits, the best of a few; padding is no token."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    seconds = min(seconds_of(lambda: model(**inputs, use_cache=False), model.device) for _ in range(repeats))
    return int(inputs["attention_mask"].sum()) / seconds


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
