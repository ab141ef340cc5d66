"""The parity self-test: equal things computed in two ways, on this config, these models and these rows.

Five pairs that must agree whatever the config says: a step in micro-batches and in one batch, dense logits
and logits by the chunk, rows padded together and rows alone, training and evaluation, and a teacher held
against itself.  All of it goes through the trainer's own step, on a few rows cut to different lengths, so
that a mean of means or a leak of padding shows. Where rows are classified there are no chunks: the line says
so, and has not passed.
"""

import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.config.run import Config
from kdlib.data.batches import Prepared
from kdlib.hardware import precision_of
from kdlib.losses.buffers import Workspace
from kdlib.losses.ledger import LedgerWindow
from kdlib.losses.signals import kept
from kdlib.models.hooks import attend_eagerly
from kdlib.models.loading import device_of
from kdlib.models.student import check_pair, tokenizer_of
from kdlib.models.teacher import PROJECTIONS, LiveTeacher
from kdlib.runs.files import StudentFolder
from kdlib.schedulers import breakpoints, from_spec
from kdlib.tasks import base as tasks
from kdlib.training.plan import DRY_RUN, compared_layers, objective_of, training_arguments, workspace_of
from kdlib.training.trainer import DistillationTrainer

ROWS, LONGEST = 3, 64  # rows and tokens of the longest: enough for every kind of error, and quick
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1), torch.float16: (2.5e-3, 1.25e-2)}
"""(terms, gradient) by the dtype of the products, relative.  Rounding alone was seen to do (2e-7, 4e-7) in
float32, where longer sums have room to do more, and (2e-3, 5e-3) in bfloat16; float16 has three binary digits
more than that.  A wrong count, mask, weight or temperature does more than any of these.
"""
# nats; below it a term's difference is held against this, as rounding does not shrink with the term
SMALL = 0.1
CONTRASTIVE = {"ce", "contrastive"}  # not 0 where student and teacher agree


@dataclass(frozen=True)
class Check:
    """Two figures that should be one: how far apart they are, and how far rounding may set them apart;
    None where nothing is compared.
    """

    compared: str
    difference: float | None = None
    tolerance: float | None = None

    @property
    def result(self) -> str:
        if self.difference is None:
            return "left out"
        return "pass" if self.difference <= self.tolerance else "fail"  # nan passes nothing

    @property
    def line(self) -> dict[str, str]:
        figures = {
            name: "" if (value := getattr(self, name)) is None else f"{value:{form}}"
            for name, form in (("difference", ".1e"), ("tolerance", ".0e"))
        }
        return {"compared": self.compared, **figures, "result": self.result}


def selftest(config: Config) -> pd.DataFrame:
    """`parity` from a config alone: loads what it names and makes the student as a run would, without a
    run's folder.
    """
    training_arguments(config, Path("unused"))  # a fault shows before anything is loaded
    tokenizer = tokenizer_of(config)
    check_pair(config, tokenizer)
    prepared = tasks.prepare(config, tokenizer)
    teacher = tasks.load_teacher(config, prepared)
    student = tasks.untrained_student(
        config, prepared, tasks.layers_for_student(config, teacher.model, prepared)
    )
    return parity(config, student=student, teacher=teacher, tokenizer=tokenizer, prepared=prepared)


def parity(
    config: Config,
    *,
    student: PreTrainedModel,
    teacher: LiveTeacher,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
) -> pd.DataFrame:
    """The self-test's table, a line per comparison: compared, difference, tolerance, result (pass, fail, or
    left out).

    At the start of training, and for each term that is silent there, where its weight is greatest.  Dropout
    is off, and an estimate from samples is compared by its expectation.  Nothing is kept: models, their modes
    and random numbers are as before (but for the student's gradients, which are cleared); nothing is written
    outside a temporary folder.
    """
    dtype, _ = precision_of(config.precision, device_of(config.wanted_device))
    terms, gradient = TOLERANCES[dtype]
    rows = shortened(prepared.train)
    with (
        _as_before(student, teacher.model),
        tempfile.TemporaryDirectory() as folder,
        without_dropout(student),
    ):
        trainer = _trainer(config, student, teacher, tokenizer, prepared, rows, Path(folder))
        checks = []
        for fraction in (fractions := tested_fractions(config)):
            # the objective reads their quotient alone
            trainer.state.global_step, trainer.state.max_steps = fraction, 1
            at = f", at {100 * fraction:.3g} % of training" if len(fractions) > 1 else ""
            checks += [
                replace(check, compared=check.compared + at)
                for check in _checks(trainer, rows, terms, gradient)
            ]
    return pd.DataFrame([check.line for check in checks])


def shortened(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first rows, each cut to another length: packed rows are all alike, and a mean of means would not
    show.

    Of a classification with their classes, and as the teacher reads them too.  Where a row's beginning is
    given, it is cut there, and some of it is learned, more in each row: answers may all be of one token.
    """
    if rows and "prompt_tokens" in rows[0]:
        return [_with_little_prompt(rows[i], learned=i + 1) for i in range(min(ROWS, len(rows)))]
    found = [{"label": rows[i]["label"]} if "label" in rows[i] else {} for i in range(min(ROWS, len(rows)))]
    for name in ("input_ids", "teacher_input_ids"):
        if name in rows[0]:
            taken = [rows[i][name][:LONGEST] for i in range(len(found))]
            longest = max(map(len, taken))
            for number, ids in enumerate(taken):
                found[number][name] = list(ids[: max(longest * (number + 1) // len(taken), 2)])
    return found


def _with_little_prompt(row: Mapping[str, Any], *, learned: int) -> dict[str, Any]:
    """The row's last tokens; what is learned of them begins `learned` tokens before its answer, where
    there are so many.
    """
    ids = list(row["input_ids"][: row["prompt_tokens"] + LONGEST // 2])
    start = max(len(ids) - LONGEST * learned // ROWS, 0)
    return {"input_ids": ids[start:], "prompt_tokens": max(row["prompt_tokens"] - start - learned, 1)}


def tested_fractions(config: Config) -> list[float]:
    """The start of training; then, for each term that no fraction so far has in it, the one where its
    weight is greatest.
    """
    specs, fractions = config.loss.schedules, [0.0]
    when = breakpoints(*specs.values())
    for course in map(from_spec, specs.values()):
        if not any(course(fraction) for fraction in fractions) and course(best := max(when, key=course)):
            fractions.append(best)
    return fractions


@contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Dropout and layer drop off in every module and in the config, whichever the forward pass reads;
    back at the end.
    """
    found = [
        (part, name, value)
        for part in (*model.modules(), model.config)
        for name, value in vars(part).items()
        if type(value) is float and ("drop" in name or (name == "p" and "Dropout" in type(part).__name__))
    ]
    for part, name, _ in found:
        setattr(part, name, 0.0)
    try:
        yield
    finally:
        for part, name, value in found:
            setattr(part, name, value)


def _trainer(config, student, teacher, tokenizer, prepared, rows, folder: Path) -> DistillationTrainer:
    """The trainer of the run, its logits in chunks so small that several are needed for these few rows."""
    args = training_arguments(config, folder, **DRY_RUN)
    objective = objective_of(config)
    pairs = compared_layers(config, student, teacher.model, objective)
    tokens = len(kept(prepared.collate(rows)["labels"]).targets)
    usual = workspace_of(config, args, len(prepared.train), prepared.vocabulary)
    chunk = min(usual.chunk or tokens, tokens // 3 + 1)
    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        processing_class=tokenizer,
        data_collator=prepared.collate,
        vocabulary=prepared.vocabulary,
        layer_pairs=pairs,
        objective=replace(objective, samples=None),
        teacher=teacher,
        workspace=Workspace(chunk, compiled=usual.compiled),
        folder=StudentFolder(folder),
    )
    # float16: the usual first scale of 65536 overflows until it has come down
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler(args.device.type, init_scale=2.0**10)
    return trainer


def _checks(
    trainer: DistillationTrainer, rows: Sequence[Mapping], terms: float, gradient: float
) -> list[Check]:
    """The five comparisons at one moment; two sides differ in one thing only.

    Chunks come first: an error there comes out differently for other batches, so that later lines show it
    too.
    """
    whole = trainer.data_collator(rows)
    tokens, chunk = len(kept(whole["labels"]).targets), trainer.workspace.chunk
    sums, slopes = _step(trainer, [whole])
    if whole["labels"].ndim == 1:
        checks = [
            Check(f"logits by the chunk: a row has {trainer.vocabulary}, one for each class, made at once")
        ]
    else:
        dense_sums, other = _with_dense_logits(trainer, whole)
        how = (
            f"{chunk} logits at a time = all at once"
            if trainer.form
            else "logits all at once, twice: this head is no plain matrix"
        )
        checks = [Check(f"{how}, terms", _furthest(sums, dense_sums, tokens), terms)]
        checks.append(Check(f"{how}, gradient", _apart(slopes, other), gradient))
    _, other = _step(
        trainer, [{name: values[i : i + 1] for name, values in whole.items()} for i in range(len(rows))]
    )
    checks.append(
        Check(
            f"1 batch of {len(rows)} rows = {len(rows)} of 1, accumulated, gradient",
            _apart(slopes, other),
            gradient,
        )
    )
    del slopes, other
    alone = [_step(trainer, [trainer.data_collator([row])])[0] for row in rows]
    added = {name: sum(each[name] for each in alone) for name in sums}
    checks.append(
        Check("rows padded together = each row alone, terms", _furthest(sums, added, tokens), terms)
    )
    means = {name: value / tokens for name, value in sums.items()}
    weights = trainer.objective.at(trainer.state.global_step).weights
    means["loss"] = sum(weight * means[name] for name, weight in weights.items())
    checks.append(
        Check("training = evaluation, loss and terms", _furthest(means, _evaluated(trainer, whole)), terms)
    )
    return [
        *checks,
        Check("student = teacher: 0 in every divergence, nats", _against_itself(trainer, whole), terms),
    ]


def _step(
    trainer: DistillationTrainer, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """One optimizer step's terms, summed over its tokens, and its gradient, as the training loop would
    make them.
    """
    taken, count = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(taken)
    trainer.window = LedgerWindow()
    for batch in taken:
        trainer.training_step(trainer.model, batch, count)
    sums = {name: value * float(count) for name, (value, _) in trainer.window.figures().items()}
    slopes = {
        name: parameter.grad
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    trainer.model.zero_grad()  # lets go of the gradients, which stay as they were taken
    return sums, slopes


def _with_dense_logits(
    trainer: DistillationTrainer, batch: Mapping[str, Tensor]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The step with student's and teacher's logits made by the models themselves, all at once."""
    forms = trainer.form, trainer.teacher.form
    trainer.form = trainer.teacher.form = None
    try:
        return _step(trainer, [batch])
    finally:
        trainer.form, trainer.teacher.form = forms


def _evaluated(trainer: DistillationTrainer, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """The loss, the terms and kl_to_teacher as an evaluation at this moment gives them, per token."""
    figures = trainer.evaluation_loop([batch], "parity").metrics
    names = (
        "loss",
        "kl_to_teacher",
        *(f"{name}_loss" for name in trainer.objective.at(trainer.state.global_step).weights),
    )
    return {name.removesuffix("_loss"): figures[f"eval_{name}"] for name in names}


def _against_itself(trainer: DistillationTrainer, batch: Mapping[str, Tensor]) -> float:
    """The greatest term, of those whose least value is 0, with the teacher in the student's place,
    reading what the teacher is to read.
    """
    batch = {
        **batch,
        **{
            name.removeprefix("teacher_"): values
            for name, values in batch.items()
            if name.startswith("teacher_")
        },
    }
    usual = trainer.model, trainer.form, trainer.layer_pairs
    trainer.model, trainer.form = trainer.teacher.model, trainer.teacher.form
    trainer.layer_pairs = [(theirs, theirs) for _, theirs in trainer.layer_pairs]
    try:
        figures = _evaluated(trainer, batch)
    finally:
        trainer.model, trainer.form, trainer.layer_pairs = usual
    return max(abs(value) for name, value in figures.items() if name not in CONTRASTIVE | {"loss"})


def _furthest(one: Mapping[str, float], other: Mapping[str, float], tokens: int = 1) -> float:
    """The greatest relative difference between terms of the same name, both divided by `tokens`; nan
    where there is one.
    """
    pairs = [(value / tokens, other[name] / tokens) for name, value in one.items()]
    return float(np.max([abs(a - b) / max(abs(a), abs(b), SMALL) for a, b in pairs]))


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """|one - other| / |one| over all parameters; a gradient that only one of the two has is a difference."""
    difference = size = 0.0
    for name in {**one, **other}:
        ours, theirs = one.get(name, 0.0), other.get(name, 0.0)
        difference, size = (
            math.hypot(total, float(torch.as_tensor(part).float().norm()))
            for total, part in ((difference, ours - theirs), (size, ours))
        )
    return difference / size if size else difference


@contextmanager
def _as_before(*given: PreTrainedModel) -> Iterator[None]:
    """Gives back models in their places, modes and ways of attending, without what was added; and the
    random numbers.
    """
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
            if hasattr(model, PROJECTIONS):
                delattr(model, PROJECTIONS)
            attend_eagerly(model, False)
            model.to(device)
