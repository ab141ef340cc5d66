"""Language models compared token by token, on the same text; where the teacher cuts it otherwise, by span."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel as Model, PreTrainedTokenizerBase as Tokenizer

from kdlib.data import text
from kdlib.data.batches import Batch, Prepared, calibration_rows
from kdlib.hardware import middle_half, repeated
from kdlib.losses.alignment import SpanSignal, unit_of
from kdlib.losses.objective import EVAL_TERMS, eval_terms, row_sums
from kdlib.losses.signals import IGNORED, Kept, kept, moved
from kdlib.metrics.bootstrap import Bootstrap, over
from kdlib.metrics.paired import differences, intervals
from kdlib.models.heads import check_causal
from kdlib.models.teacher import LiveTeacher
from kdlib.tasks.base import Comparison

COLUMNS = (*EVAL_TERMS, "tokens", "single", "bytes")  # summed over each unit
BATCH = 8  # rows per forward pass
OF_ITSELF = {"ce": EVAL_TERMS["ce"], "accuracy": EVAL_TERMS["accuracy"]}
BY_TOKEN = ("perplexity", "accuracy")  # not comparable between tokenizers


class TokenComparison(Comparison):
    """Of every model the sums over each document's tokens are kept, or over each row's where none is known.

    A packed block holds parts of several documents: each token counts for its own.  Student and teacher are
    asked batch by batch, so that no more than one batch of either is held; the teacher is asked again beside
    each student.  One with a tokenizer of its own is measured on its tokens in the spans, so in bits per byte
    of the same text, and compared where a span is one token on both sides.
    """

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: Tokenizer,
        *,
        prompts: Sequence[Sequence[int]] = (),
        new_tokens: int = 32,
        teacher_tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> None:
        """Every model continues the prompts, greedily, by so many `new_tokens`.

        Args:
            teacher_tokenizer: where it is another.
        """
        super().__init__(prepared, tokenizer, **options)
        self.teacher_tokenizer = teacher_tokenizer
        self.prompts, self.new_tokens = prompts, new_tokens
        self.unit_of_token, self.of_units = text.units_of_tokens(prepared)
        self.units = 1 + max(int(each.max(initial=0)) for each in self.unit_of_token)
        self.teacher: LiveTeacher | None = None
        self.sums: dict[str, np.ndarray] = {}  # model -> [units, COLUMNS]
        self.samples: dict[str, list[str]] = {}

    def add(self, name: str, model: LiveTeacher, prepared: Prepared) -> dict[str, Any]:
        """What it costs; a ModelError where it looks ahead."""
        check_causal(name, model.model, calibration_rows(prepared.measured, 1, reads=model.reads))
        return {"forward_tokens_per_s": forward_tokens_per_s(model, next(self._batches())[1])}

    def beside_teacher(self, name: str, model: LiveTeacher) -> None:
        self.teacher = model if name == "teacher" else self.teacher
        self.sums[name] = sum(self._sums(units, batch, model) for units, batch in self._batches())

    def show(self, name: str, model: Model) -> None:
        tokenizer, prompts = self.tokenizer, self.prompts
        if name == "teacher" and self.teacher_tokenizer:
            tokenizer = self.teacher_tokenizer
            prompts = [tokenizer(self.tokenizer.decode(prompt))["input_ids"] for prompt in prompts]
        self.samples[name] = list(prompts and continuations(model, tokenizer, prompts, self.new_tokens))

    def results(self, student: str) -> dict[str, Any]:
        tokens = self.sums[student][:, COLUMNS.index("tokens")]
        units = int((tokens > 0).sum())  # of others nothing is predicted
        figures = self._measured(tokens > 0)
        return {
            "models": _intervals(figures, units),
            **({"mix": self._by_source(tokens > 0)} if "mix" in self.prepared.notes else {}),
            "differences": differences(figures, units),
            "rows": len(self.prepared.measured),
            "units": units,
            "tokens": int(tokens.sum()),
            "resamples": self.resamples,
            "interval": over(units, self.of_units),
            "samples": self.samples,
            "prompts": [self.tokenizer.decode(prompt) for prompt in self.prompts],
        }

    def _measured(self, chosen: np.ndarray) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
        """Model → measure → its value over these units, [units] true or false, and on resampled ones."""
        draws = Bootstrap(int(chosen.sum()), self.resamples, self.seed)
        figures: dict[str, dict[str, tuple[float, np.ndarray]]] = {}
        for name, sums in self.sums.items():
            table = sums[chosen]
            found, drawn = (_figures(each) for each in (table.sum(0, keepdims=True), draws.sums(table)))
            left_out = BY_TOKEN if name == "teacher" and self.prepared.vocabularies else ()
            left_out += () if self.teacher else ("kl_to_teacher", "agreement")
            figures[name] = {m: (float(found[m][0]), drawn[m]) for m in found if m not in left_out}
        return figures

    def _by_source(self, chosen: np.ndarray) -> list[dict[str, Any]]:
        """Of each source of a mix what its notes say, and its models' figures on its own held-out units."""
        source = np.zeros(self.units, int)
        for units, number in zip(self.unit_of_token, self.prepared.measured["source"], strict=True):
            source[units] = number
        every = []
        for number, part in enumerate(self.prepared.notes["mix"]):
            its = chosen & (source == number)
            models = _intervals(self._measured(its), int(its.sum()))
            every.append({**part, "units": int(its.sum()), "models": models})
        return every

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
        """[units, COLUMNS] sums of one batch."""
        its_units, every = self._units_of(units, batch["labels"]), moved(batch, model.model.device)
        tokens = kept(every["labels"])
        signal = model(every, tokens)
        if isinstance(signal, SpanSignal):
            return self._of_spans(its_units, tokens, signal)
        teacher = signal if model is self.teacher else self.teacher and self.teacher(every, tokens)
        if isinstance(teacher, SpanSignal):  # of the same bytes
            lines = teacher.alignment
            its_units[lines.owner.cpu() == lines.spans] = self.units
        rows = {"row_count": self.units + 1, "terms": eval_terms(self.teacher)}
        sums = row_sums(signal, teacher, tokens.targets, its_units.to(signal.device), **rows)
        return self._columns(sums, its_units, tokens.targets, self.tokenizer)

    def _of_spans(self, units: Tensor, tokens: Kept, teacher: SpanSignal) -> np.ndarray:
        """Likewise of the teacher, by its own tokens."""
        lines, said = teacher.alignment, teacher.said
        spans = units.to(said.device)[lines.first]
        theirs = spans[lines.teacher_owner]
        sums = row_sums(said, None, teacher.targets, theirs, row_count=self.units + 1, terms=OF_ITSELF)
        single = torch.bincount(spans[lines.single], minlength=self.units + 1)
        sums |= {"single": single, "agreement": single}
        return self._columns(sums, theirs.cpu(), teacher.targets, self.teacher_tokenizer)

    def _columns(
        self, sums: Mapping[str, Tensor], units: Tensor, targets: Tensor, tokenizer: Tokenizer
    ) -> np.ndarray:
        """[units, COLUMNS] of sums over units and those in none, and the bytes of the tokens that came."""
        sizes = text.bytes_of_tokens(targets.cpu().numpy(), tokenizer)
        found = {name: each.cpu().double().numpy() for name, each in sums.items()}
        found["bytes"] = np.bincount(units.numpy(), sizes, self.units + 1)
        found.setdefault("single", found["tokens"])
        return np.column_stack([found.get(n, np.zeros(self.units + 1)) for n in COLUMNS])[: self.units]


def _intervals(figures: Mapping[str, Any], units: int) -> dict[str, Any]:
    return {name: intervals(each, units, itself=name == "teacher") for name, each in figures.items()}


def _figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """[R, COLUMNS] sums to each measure, [R]."""
    of = dict(zip(COLUMNS, sums.T, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):  # of special tokens alone there is no text
        bits_per_byte = of["ce"] / math.log(2) / of["bytes"]
        means = {name: of[name] / of[unit_of(name, spans=True)] for name in EVAL_TERMS}
    return {"perplexity": np.exp(means.pop("ce")), "bits_per_byte": bits_per_byte, **means}


@torch.no_grad()
def forward_tokens_per_s(asked: LiveTeacher, batch: Batch) -> dict[str, float]:
    """Tokens per second of a plain forward pass with logits: median, middle half; padding is no token."""
    model, names = asked.model, ("input_ids", "attention_mask")
    inputs = {name: batch[asked.reads + name].to(model.device) for name in names}
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
