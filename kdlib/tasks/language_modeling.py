"""Language modelling: the next token of a text."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
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
from kdlib.data.batches import (
    Prepared,
    collate,
    lengths_of,
    pairwise,
    random_ids,
    spans_of,
    vocabulary_of,
)
from kdlib.data.pairs import coverage, first_of
from kdlib.errors import ModelError
from kdlib.losses.alignment import SPANS, is_single, single_in
from kdlib.losses.signals import IGNORED, kept
from kdlib.models.loading import load_model
from kdlib.models.teacher import LiveTeacher
from kdlib.plots.tokens import SpanView, TokenView, token_view
from kdlib.students.student import Outline, sources, teacher_tokenizer_of, tokenizer_of
from kdlib.tasks.base import STAGE, Comparison, Sample, Task, register
from kdlib.tasks.rows import spread, within_heads
from kdlib.tasks.token_comparison import TokenComparison
from kdlib.tokens.vocabulary import Vocabularies, token_bytes

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
        "tokens_have_a_term",
        "documents_came_once",
        "held_out_groups_are_new",
        "enough_is_held_out",
    )
    checks_on_batches = ("models_do_not_look_ahead",)

    def prepare(self, config: Config, tokenizer: Tokenizer, *, new_head: bool = False) -> Prepared:
        teacher = teacher_tokenizer_of(config)
        data = config.data
        if data.streaming:  # as much of it as is trained on, whatever process asks
            needed = min(rows_of_training(config), data.max_train_rows or sys.maxsize)
            data = data.model_copy(update={"max_train_rows": needed})
        prepared = text.prepare(data, tokenizer, seed=config.seed, teacher=teacher)
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
        notes: list[str] = [STAGE] if config.teacher_stage else []
        heads = [each.get_text_config().vocab_size for each in (student, teacher) if each]
        try:
            vocabulary, other = vocabulary_of(tokenizer_of(config)), teacher_tokenizer_of(config)
        except ModelError:
            vocabulary, other = heads[-1], None
            taken = f"its head's {vocabulary:,} rows are taken for the vocabulary"
            notes.append(f"no tokenizer is to be had for {sources(config)[0]}: {taken}")
        if other is None:
            return Outline(config, student, teacher, min(vocabulary, *heads), self, notes)
        ours, theirs = min(vocabulary, heads[0]), min(vocabulary_of(other), heads[1])
        notes.append("each token is taken to be a span, and all of the smaller vocabulary to be shared")
        return Outline(config, student, teacher, ours, self, notes, _most_shared(ours, theirs))

    def random_batch(self, plan: Outline, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        data, known = plan.config.data, plan.vocabularies
        sizes = {"rows": rows, "length": data.max_length, "is_full": data.packing}
        drawn = partial(random_ids, generator=generator, **sizes)
        ids = drawn(plan.vocabulary)
        if known is None:
            return collate([{"input_ids": each} for each in ids], pad_id=0)
        spans = [np.arange(1, len(each) + 1).repeat(2).tolist() for each in ids]
        sides = zip(ids, drawn(known.teacher_size), spans, strict=True)
        names = ("input_ids", "teacher_input_ids", SPANS)
        both = [dict(zip(names, each, strict=True)) for each in sides]
        return collate(both, pad_id=0, teacher_pad_id=0)

    def facts(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher | None) -> dict[str, str]:
        end = prepared.notes.get("each_document_ends_with")
        ends = {"end of a text": f"{end}, learned where a text is not cut"} if end else {}
        if prepared.vocabularies is not None:
            return {**_of_both(prepared, tokenizer), **ends}
        same = ", the same for both" if teacher else ""
        return {"vocabulary": f"{len(tokenizer):,} tokens{same}", **ends}

    def example(
        self, config: Config, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher | None
    ) -> TokenView | SpanView:
        """Token by token, coloured by what is learned; as both cut it where the teacher reads otherwise."""
        if (other := teacher_tokenizer_of(config)) is not None:
            return SpanView(_stretches(prepared.train[0], tokenizer, other))
        batch = prepared.first_rows()
        ids, labels, read = (batch[name][0].tolist() for name in ("input_ids", "labels", "attention_mask"))
        return token_view(ids, [label != IGNORED for label in labels], read, tokenizer.decode)

    def sample(self, prepared: Prepared, tokenizer: Tokenizer, tokens: int = TOKENS) -> Sample:
        """The first tokens of the held-out rows; each row costs one more, its first.

        Where the teacher reads otherwise, those that are one token of its own too.
        """
        batch, known = prepared.collate(beginnings(prepared.validation, tokens)), prepared.vocabularies
        ids, length = batch["input_ids"].flatten().tolist(), batch["labels"].shape[1]
        here = (kept(batch["labels"]).positions + 1)[single_in(batch) if known else slice(None)].tolist()
        before = [
            tokenizer.decode(ids[max(last + 1, place // length * length) : place]) if place - last > 1 else ""
            for last, place in zip([-1, *here[:-1]], here, strict=True)
        ]
        texts = [tokenizer.decode([ids[place]]) for place in here]
        return Sample(batch, texts, before, lambda token: tokenizer.decode([token]), known)

    def comparison(
        self, config: Config, prepared: Prepared, tokenizer: Tokenizer, **options: Any
    ) -> Comparison:
        asked = {"prompts": self.prompts(config, prepared.measured), "new_tokens": config.compare.new_tokens}
        asked |= {"teacher_tokenizer": teacher_tokenizer_of(config)}
        return self.compared_by(prepared)(prepared, tokenizer, **asked, **options)

    def compared_by(self, prepared: Prepared) -> type[TokenComparison]:
        """What measures models on these rows."""
        return TokenComparison

    def prompts(self, config: Config, rows: Dataset) -> list[list[int]]:
        """What the models are to continue: beginnings of rows spread over the text, all of one length.

        Where all rows are shorter than that, the first half of each.
        """
        length, lengths = config.compare.prompt_tokens, lengths_of(rows)
        fit = np.flatnonzero(lengths >= length).tolist()
        chosen = spread(fit or range(len(rows)), config.compare.continuations)
        return [rows[n]["input_ids"][: length if fit else -(-int(lengths[n]) // 2)] for n in chosen]


def rows_of_training(config: Config) -> int:
    """How many rows `max_steps` take, by the config alone: the same for every rank, and when resumed."""
    training, processes = config.training, config.launch.processes
    ranks = max(torch.cuda.device_count(), 1) if processes == "auto" else processes
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    return training["max_steps"] * batch * ranks


def beginnings(rows: Sequence[Mapping[str, Sequence[int]]], tokens: int) -> list[dict[str, Any]]:
    """The first rows, the last one cut, that together have about so many tokens to predict."""
    taken: list[dict[str, Any]] = []
    for row in rows:
        if tokens < (FEW if taken else 1) or len(taken) == (ROWS if "prompt_tokens" in row else len(rows)):
            break
        given = max(row.get("prompt_tokens", 1), 1)
        cut = {"input_ids": list(row["input_ids"][: tokens + given])}
        taken.append({**row, **(first_of(row, tokens, prompt=given) if SPANS in row else cut)})
        tokens -= len(taken[-1]["input_ids"]) - given
    return taken


def _most_shared(student: int, teacher: int) -> Vocabularies:
    """Two vocabularies of these sizes that have as much in common as can be."""
    ours, larger = torch.arange(student), torch.arange(max(student, teacher))
    return Vocabularies(student, teacher, ours.where(ours < teacher, -1), larger % min(student, teacher))


def _of_both(prepared: Prepared, tokenizer: Tokenizer) -> dict[str, str]:
    """What of two vocabularies, and of the text, student and teacher say in the same tokens."""
    known, table = prepared.vocabularies, coverage(prepared, tokenizer)
    shared, size, whole = int((known.shared >= 0).sum()), known.student_size, table.loc["all"]
    sizes = f"{size:,} tokens, the teacher's {known.teacher_size:,}"
    classes = ", ".join(f"{name} {share:.0%}" for name, share in table["one_to_one"].drop("all").items())
    lost = sum(prepared.notes.get(f"{part}_documents_not_aligned", 0) for part in ("train", "validation"))
    return {
        "vocabularies": f"{sizes}; {shared:,} are of both, {shared / size:.0%} of the student's",
        "one token of both": f"{whole['one_to_one']:.0%} of what is learned ({classes})",
        "spans of both": f"{whole['in_spans']:.1%} of what is learned",
        **({"read by one alone": f"{lost} documents, left out"} if lost else {}),
    }


def _stretches(
    row: Mapping[str, Any], student: Tokenizer, teacher: Tokenizer
) -> list[tuple[str, list[str], list[str]]]:
    """Of a row that two tokenizers cut each stretch: whether it is compared, and its tokens on both sides.

    What is not compared comes in one, wherever it stands together.
    """
    ours, theirs = texts_of(row["input_ids"], student), texts_of(row["teacher_input_ids"], teacher)
    spans = spans_of([row], len(ours), len(theirs))
    names = np.where(is_single(spans), "single", "several")
    kinds = dict(zip((spans["starts"] + 1).tolist(), names, strict=True))
    found, begins = [], (0, 0)
    for ends in pairwise(row["spans"]):
        (first, other), (last, other_last) = begins, ends
        kind = str(kinds.get(first, "apart")) if first < last else "apart"
        sides = ours[first:last], theirs[other:other_last]
        if kind == "apart" and found and found[-1][0] == kind:  # two prompts, say
            _, *before = found.pop()
            sides = before[0] + sides[0], before[1] + sides[1]
        found.append((kind, *sides))
        begins = ends
    return found


def texts_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token stands for; bytes that are no text are written out, special ones by their names."""
    every, names = token_bytes(tokenizer), tokenizer.convert_ids_to_tokens(ids)
    said = [(every[number], name) for number, name in zip(ids, names, strict=True)]
    return [name if piece is None else piece.decode(errors="backslashreplace") for piece, name in said]


register(LanguageModeling())
