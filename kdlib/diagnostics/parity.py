"""The parity self-test: equal things computed in two ways, on this config, these models and these rows.

All of it goes through the trainer's own step, on a few rows cut to different lengths, so that a mean of
means or a leak of padding shows.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.config.run import Config
from kdlib.config.terms import ROUTE_WEIGHTS, ROUTER
from kdlib.data.batches import Prepared, row_of
from kdlib.data.pairs import first_of, of_teacher
from kdlib.hardware import precision_of
from kdlib.losses.alignment import SPANS, UNITS, counted, unit_of
from kdlib.losses.buffers import Workspace
from kdlib.losses.ledger import LedgerWindow
from kdlib.losses.objective import Objective
from kdlib.losses.signals import kept
from kdlib.models.hooks import attend_eagerly, instead, without_dropout
from kdlib.models.loading import device_of
from kdlib.models.teacher import BESIDE, LiveTeacher
from kdlib.routing.gates import compared_layers
from kdlib.runs.files import StudentFolder
from kdlib.schedulers import breakpoints, from_spec
from kdlib.students.student import check_pair, tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.tokens.vocabulary import Vocabularies
from kdlib.training.plan import (
    DRY_RUN,
    check_causality,
    objective_of,
    training_arguments,
    workspace_of,
)
from kdlib.training.trainer import DistillationTrainer

ROWS, LONGEST = 3, 64  # rows and tokens of the longest: enough for every kind of error, and quick
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1), torch.float16: (2.5e-3, 1.25e-2)}
"""(terms, gradient) by the dtype of the products, relative.  Rounding alone was seen to do (2e-7, 4e-7) in
float32 and (2e-3, 5e-3) in bfloat16; a wrong count, mask, weight or temperature does more than any of these.
"""
SMALL = 0.1  # nats, against which a smaller term's difference is held: rounding does not shrink with the term
CONTRASTIVE = {"ce", "contrastive"}  # not 0 where student and teacher agree


def selftest(config: Config) -> pd.DataFrame:
    """`parity` of what a config names, the student made as a run would make it."""
    training_arguments(config, Path("unused"))  # a fault shows before anything is loaded
    tokenizer = tokenizer_of(config)
    check_pair(config, tokenizer)
    prepared = tasks.prepare(config, tokenizer)
    teacher = tasks.load_teacher(config, prepared)
    layers = tasks.layers_for_student(config, teacher and teacher.model, prepared)
    student = tasks.untrained_student(config, prepared, layers)
    return parity(config, student=student, teacher=teacher, tokenizer=tokenizer, prepared=prepared)


def parity(
    config: Config,
    *,
    student: PreTrainedModel,
    teacher: LiveTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
) -> pd.DataFrame:
    """The self-test's table, a line per comparison: compared, difference, tolerance, result.

    The result is pass, fail, or left out.  Compared is at the `tested_fractions`, without dropout, and an
    estimate from samples by its expectation.  Models and random numbers are left as they were, the student
    without gradients; nothing is written outside a temporary folder.

    Raises:
        ModelError: a model looks ahead: nothing else means anything then.
    """
    dtype, _ = precision_of(config.precision, device_of(config.wanted_device))
    rows, fractions = shortened(prepared.train), tested_fractions(config)
    lines, theirs = [], teacher and teacher.model
    with _as_before(student, theirs), TemporaryDirectory() as folder, without_dropout(student):
        trainer = _trainer(config, student, teacher, tokenizer, prepared, rows, Path(folder))
        for who, pair in check_causality(config, prepared, student, theirs).items():
            lines.append(_line(f"another last token leaves the {who}'s earlier logits alone", *pair))
        for fraction in fractions:
            trainer.state.global_step, trainer.state.max_steps = fraction, 1  # only the quotient is read
            at = f", at {100 * fraction:.3g} % of training" if len(fractions) > 1 else ""
            lines += [_line(name + at, *pair) for name, *pair in _compared(trainer, rows, *TOLERANCES[dtype])]
    return pd.DataFrame(lines)


def _line(compared: str, difference: float | None = None, tolerance: float | None = None) -> dict[str, str]:
    if difference is None:
        return {"compared": compared, "difference": "", "tolerance": "", "result": "left out"}
    result = "pass" if difference <= tolerance else "fail"  # of nan too
    figures = {"difference": f"{difference:.1e}", "tolerance": f"{tolerance:.0e}"}
    return {"compared": compared, **figures, "result": result}


def shortened(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first rows, each cut to another length: packed rows are all alike, and hide a mean of means.

    Of a classification with their classes, and as the teacher reads them too.  Where a row's beginning is
    given, it is cut there, and some of it is learned, more in each row: answers may all be of one token.
    """
    first = [rows[i] for i in range(min(ROWS, len(rows)))]
    if first and SPANS in first[0]:
        return [first_of(row, LONGEST * (number + 1) // ROWS) for number, row in enumerate(first)]
    if first and "prompt_tokens" in first[0]:
        return [_with_little_prompt(row, learned=number + 1) for number, row in enumerate(first)]
    found = [{name: row[name] for name in ("label",) if name in row} for row in first]
    for name in ("input_ids", "teacher_input_ids"):
        taken = [row[name][:LONGEST] for row in first if name in row]
        for number, ids in enumerate(taken):
            share = max(map(len, taken)) * (number + 1) // len(taken)
            found[number][name] = list(ids[: max(share, 2)])
    return found


def _with_little_prompt(row: Mapping[str, Any], *, learned: int) -> dict[str, Any]:
    """The row's last tokens, learned from `learned` tokens before its answer on, where there are so many."""
    ids = list(row["input_ids"][: row["prompt_tokens"] + LONGEST // 2])
    start = max(len(ids) - LONGEST * learned // ROWS, 0)
    return {"input_ids": ids[start:], "prompt_tokens": max(row["prompt_tokens"] - start - learned, 1)}


def tested_fractions(config: Config) -> list[float]:
    """The start of training; for each term that none so far has in it, where its weight is greatest."""
    specs, fractions = config.loss.schedules, [0.0]
    when = breakpoints(*specs.values())
    for weight in map(from_spec, specs.values()):
        if not any(weight(fraction) for fraction in fractions) and weight(best := max(when, key=weight)):
            fractions.append(best)
    return fractions


def _trainer(config, student, teacher, tokenizer, prepared, rows, folder: Path) -> DistillationTrainer:
    """The trainer of the run, its logits in chunks so small that several are needed for these few rows."""
    args, objective = training_arguments(config, folder, **DRY_RUN), objective_of(config, student=student)
    tokens = len(kept(prepared.collate(rows)["labels"]).targets)
    usual = workspace_of(config, args, len(prepared.train), prepared.largest_vocabulary)
    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        tokenizer=tokenizer,
        data_collator=prepared.collate,
        vocabulary=prepared.vocabulary,
        layer_pairs=compared_layers(config, student, teacher.model, objective) if teacher else (),
        objective=objective.without_chance,
        teacher=teacher,
        workspace=Workspace(min(usual.chunk or tokens, tokens // 3 + 1), compiled=usual.compiled),
        folder=StudentFolder(folder),
    )
    if trainer.accelerator.scaler is not None:  # float16: the usual first scale of 65536 overflows
        trainer.accelerator.scaler = torch.amp.GradScaler(args.device.type, init_scale=2.0**10)
    return trainer


def _compared(
    trainer: DistillationTrainer, rows: Sequence[Mapping], terms: float, gradient: float
) -> Iterator[tuple]:
    """(compared, difference, tolerance) of each pair; its two sides differ in one thing only.

    Chunks come first: an error there shows in later lines too.
    """
    whole = trainer.data_collator(rows)
    tokens, chunk = len(kept(whole["labels"]).targets), trainer.workspace.chunk
    sums, slopes = _step(trainer, [whole])
    if whole["labels"].ndim == 1:
        yield (f"logits by the chunk: a row has {trainer.vocabulary}, one for each class, made at once",)
    else:
        twice = "logits all at once, twice: this head is no plain matrix"
        how = f"{chunk} logits at a time = all at once" if trainer.form else twice
        both = filter(None, (trainer, trainer.teacher))
        with instead(*((each, "form", None) for each in both)):  # by the models themselves
            dense, dense_slopes = _step(trainer, [whole])
        yield f"{how}, terms", _furthest(sums, dense, tokens), terms
        yield f"{how}, gradient", _apart(slopes, dense_slopes), gradient
    count, usual, plain = len(rows), trainer.objective, _without(trainer.objective, ROUTER)
    ones = [row_of(whole, number) for number in range(count)]
    with instead((trainer, "objective", plain)):  # the router's term is of a batch as a whole
        own, own_slopes = (sums, slopes) if plain == usual else _step(trainer, [whole])
        apart = _apart(own_slopes, _step(trainer, ones)[1])
        alone = [_step(trainer, [trainer.data_collator([row])])[0] for row in rows]
    yield f"1 batch of {count} rows = {count} of 1, accumulated, gradient", apart, gradient
    added = {name: sum(each[name] for each in alone) for name in own}
    yield "rows padded together = each row alone, terms", _furthest(own, added, tokens), terms
    counts = _counts(tokens, [whole])
    means = {name: value / counts(name) for name, value in sums.items()}
    weights = trainer.objective.at(trainer.state.global_step).weights
    means["loss"] = sum(weight * means[name] for name, weight in weights.items())
    yield "training = evaluation, loss and terms", _furthest(means, _evaluated(trainer, rows, whole)), terms
    name, teacher = "student = teacher: 0 in every divergence, nats", trainer.teacher
    yield (
        (name, _against_itself(trainer, rows, whole), terms)
        if teacher and not teacher.own_device
        else (name,)
    )


def _without(objective: Objective, *terms: str) -> Objective:
    return replace(objective, weights={n: w for n, w in objective.weights.items() if n not in terms})


def _step(
    trainer: DistillationTrainer, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One optimizer step's terms, summed over its tokens, and its gradient, as in the training loop."""
    taken, count = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(taken)
    trainer.window = LedgerWindow()
    for batch in taken:
        trainer.training_step(trainer.model, batch, count)
    counts = _counts(count, batches)
    sums = {name: value * counts(name) for name, (value, _) in trainer.window.figures().items()}
    slopes = {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}
    trainer.model.zero_grad()  # lets go of the gradients, which stay as they were taken
    return sums, slopes


def _counts(tokens: float, batches: Sequence[Mapping[str, Any]]) -> Callable[[str], float]:
    """What a term's sum is divided by: tokens, or spans, all and those of one token on both sides."""
    spans = [counted(batch[SPANS]) for batch in batches if SPANS in batch]
    every = dict(zip(UNITS, [float(tokens), *sum(spans, torch.zeros(2)).tolist()], strict=True))
    return lambda term: every[unit_of(term, spans=bool(spans))]


def _evaluated(trainer: DistillationTrainer, rows: Sequence[Mapping], batch: Mapping) -> dict[str, float]:
    """The loss, kl_to_teacher if there is one, and the terms, as an evaluation of these rows gives them."""
    loader = DataLoader(Dataset.from_list(list(rows)), len(rows), collate_fn=lambda _: batch)
    figures = trainer.evaluation_loop(loader, "parity").metrics
    terms = [f"{name}_loss" for name in trainer.objective.at(trainer.state.global_step).weights]
    names = ["loss", "kl_to_teacher", *terms] if trainer.teacher else ["loss", *terms]
    return {name.removesuffix("_loss"): figures[f"eval_{name}"] for name in names}


def _against_itself(trainer: DistillationTrainer, rows: Sequence[Mapping], batch: Mapping) -> float:
    """The greatest term whose least value is 0: the teacher, and what it reads, in the student's place."""
    read = {name: values for name, values in batch.items() if name.startswith("teacher_")}
    mine = {**batch, **{name.removeprefix("teacher_"): values for name, values in read.items()}}
    teacher, pairs = trainer.teacher, [(theirs, theirs) for _, theirs in trainer.layer_pairs]
    itself = {"model": teacher.model, "form": teacher.form, "layer_pairs": pairs}
    plain = replace(_without(trainer.objective, ROUTER, *ROUTE_WEIGHTS), route=None)  # it has no gate
    itself |= {"objective": plain, "vocabulary": teacher.vocabulary}
    if (known := teacher.vocabularies) is not None:
        mine, own = of_teacher(batch), torch.arange(teacher.vocabulary, device=known.shared.device)
        known = Vocabularies(teacher.vocabulary, teacher.vocabulary, own, own)
    changes = [(trainer, name, value) for name, value in itself.items()]
    with instead(*changes, (teacher, "vocabularies", known)):
        figures = _evaluated(trainer, rows, mine)
    return max(abs(value) for name, value in figures.items() if name not in CONTRASTIVE | {"loss"})


def _furthest(one: Mapping[str, float], other: Mapping[str, float], tokens: int = 1) -> float:
    """The greatest relative difference of terms, divided by `tokens` each; nan where there is one."""
    pairs = [(one[name] / tokens, other[name] / tokens) for name in one]
    return float(np.max([abs(a - b) / max(abs(a), abs(b), SMALL) for a, b in pairs]))


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """|one - other| / |one| over all parameters; a gradient that only one of the two has is a difference."""
    pairs = [(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}]
    difference = math.hypot(*(float(torch.as_tensor(a - b).float().norm()) for a, b in pairs))
    size = math.hypot(*(float(torch.as_tensor(a).float().norm()) for a, _ in pairs))
    return difference / size if size else difference


@contextmanager
def _as_before(*models: PreTrainedModel | None) -> Iterator[None]:
    """Gives back models in their places, modes and ways of attending, unadorned; and random numbers."""
    given = [model for model in models if model]
    modes = [(part, part.training) for model in given for part in model.modules()]
    devices, numbers = [model.device for model in given], (random.getstate(), np.random.get_state())
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        for part, mode in modes:
            part.training = mode
        for model, device in zip(given, devices, strict=True):
            for name in [name for name, _ in model.named_children() if name.startswith(BESIDE)]:
                delattr(model, name)
            attend_eagerly(model, False)
            model.to(device)
