"""One training from a config: resumed where it stopped, its files left behind."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from kdlib.cache.teacher import CachedTeacher
from kdlib.config.run import Config
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError, KdlibError, RunError, Stopped, listed
from kdlib.losses.objective import EVAL_TERMS, ObjectiveAt
from kdlib.models.loading import parameters
from kdlib.models.saved import FIRST_ROWS, Trained, mean_of_first, settle_generation, special_tokens
from kdlib.models.teacher import BESIDE, LiveTeacher
from kdlib.routing.gates import compared_layers
from kdlib.runs.checkpoints import is_in_parts, last_whole, ranks_in, restore_best, step_of
from kdlib.runs.files import StudentFolder, go_on, is_refusal, write_error, write_json
from kdlib.runs.folder import Run
from kdlib.runs.log import cut_metrics, history
from kdlib.runs.processes import held
from kdlib.runs.verdict import cut_units
from kdlib.schedulers import from_spec
from kdlib.training import nan_report, trackers
from kdlib.training.callbacks import (
    EarlyStop,
    PlanFile,
    StopAfter,
    StopRequest,
    best_evaluation,
    check_disk,
    disk_is_full,
)
from kdlib.training.plan import (
    DRY_RUN,
    check_causality,
    check_processes,
    compile_layers,
    objective_of,
    training_arguments,
    try_out,
    workspace_of,
)
from kdlib.training.trainer import DistillationTrainer

# relative, of cross-entropies of one student here and on the CPU; rounding was seen to do 1e-7 and 2e-3
EXACT, ROUNDED = 1e-4, 1e-2


def train(
    config: Config,
    folder: StudentFolder,
    *,
    student: PreTrainedModel,
    teacher: LiveTeacher | CachedTeacher | None,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    weights: Mapping[str, Any] | None = None,
    label: str = "",
    stop_after: int | None = None,
    dense: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    asked_by: StudentFolder | None = None,
) -> DistillationTrainer:
    """Train one student into its folder, from its last checkpoint where there is one.

    Args:
        teacher: a model, or what one said; None where no term needs one: a teacher's own stage.
        weights: in place of the config's: the baseline's.
        stop_after: a dry run of so many steps: no checkpoints, no models.
        dense: compute all logits at once: the slow reference.
        asked_by: the run that needs this one first: a STOP file there counts as well.

    Raises:
        ConfigError: a tracker cannot be told.
        ModelError: a model looks ahead.
        Stopped: by an interrupt or a STOP file; a checkpoint is there.
        RunError: the disk is full, another process trains this run, or what was saved is not what it was.
        NonFiniteLoss: see nan_report/.
    """
    args = training_arguments(config, folder.checkpoints, **(DRY_RUN if stop_after else {}))
    if args.fsdp and args.world_size == 1 and last_whole(folder)[0]:
        print(f"{label}: this process goes on alone, with the models whole: training.fsdp is off", flush=True)
        args = training_arguments(config, folder.checkpoints, fsdp=None)
    check_processes(args)
    try_out(args, len(prepared.train))
    if args.activation_checkpointing and not student.supports_gradient_checkpointing:
        what = f"{type(student).__name__} keeps all activations; leave it out"
        raise ConfigError(f"training.activation_checkpointing: {what}")
    if args.torch_compile:
        compile_layers(student, args)
        args.torch_compile, args.torch_compile_backend = False, None  # else accelerate compiles the whole
    told = trackers.named_in(args)  # by kdlib, so not by the Trainer too
    args.report_to = [name for name in args.report_to or () if name not in told]
    trackers.check_key(told)
    if not stop_after:
        check_disk(folder, weights=4 * parameters(student), args=args)  # bytes
    with nullcontext() if args.process_index else held(folder.path), _write_errors(folder):
        checkpoint, said = last_whole(folder)
        if args.fsdp and checkpoint and not is_in_parts(checkpoint):
            raise RunError(
                f"{checkpoint.name} was saved whole, by a process alone, and ranks read parts; go on with one"
            )
        said.append(share_step(args, ranks_in(checkpoint) if checkpoint else None))
        args.eval_on_start &= checkpoint is None  # else that evaluation is in metrics.jsonl already
        if args.process_index == 0:
            folder.path.mkdir(parents=True, exist_ok=True)
            cut_metrics(folder, step_of(checkpoint))
            cut_units(folder, step_of(checkpoint))
            for line in filter(None, (*said, restore_best(folder, checkpoint))):
                print(f"{label}: {line}", flush=True)
            nan_report.put_aside(folder)
        objective = objective_of(config, weights, student)
        pairs = compared_layers(config, student, teacher.model or teacher, objective) if teacher else ()
        beside = any(name.startswith(BESIDE) for name, _ in student.named_children())
        if beside and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # DDP sees only its forward: they would count as unused
        for line in settle_generation(student, tokenizer):
            print(f"{label}: the student is saved so: {line}", flush=True)
        special = special_tokens(student)
        schedule = config.training.get("lr_scheduler_type")
        trainer = DistillationTrainer(
            model=student,
            args=args,
            train_dataset=prepared.train,
            eval_dataset=prepared.validation,
            tokenizer=tokenizer,
            data_collator=prepared.collate,
            objective=objective,
            teacher=teacher,
            vocabulary=prepared.vocabulary,
            layer_pairs=pairs,
            workspace=workspace_of(config, args, len(prepared.train), prepared.largest_vocabulary),
            learning_rate_schedule=from_spec(schedule) if isinstance(schedule, Mapping) else None,
            folder=folder,
            label=label,
            last_step=stop_after,
            grad_norms_every=config.diagnostics.grad_norms_every,
            dense=dense,
            figures=prepared.figures,
            choices=prepared.choices.get("validation"),
            callbacks=[*callbacks],
        )
        check_causality(config, prepared, student, teacher.model if teacher else None)
        if (stops := config.early_stopping) and not stop_after:
            trainer.add_callback(EarlyStop(stops.patience, stops.min_delta))
        stop = StopRequest(folder.path, folder.path.parent, *([asked_by.path] if asked_by else []))
        formulas = dict.fromkeys(objective.at(fraction).formula for fraction in (0.0, 1.0))
        facts = {"formula": "  …  ".join(formulas), **config.as_dict()}
        run = folder.path if isinstance(folder, Run) else folder.path.parent
        tracking = trackers.Tracking(told, trackers.TrackedTraining(folder, run, label, facts))
        ends = StopAfter(stop_after) if stop_after else stop
        for callback in (PlanFile(folder, objective.planned), ends, tracking):
            trainer.add_callback(callback)
        with nullcontext() if stop_after else stop.heard(is_first=args.process_index == 0), tracking:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if stop_after:
            return trainer
        if stop.stopped:
            raise Stopped(f"stopped at step {trainer.state.global_step} with a checkpoint; {go_on()}")
        _finish(trainer, folder, prepared.validation, special)
    return trainer


def share_step(args: TrainingArguments, before: int | None) -> str:
    """Give each rank its share of the rows that a step had with `before` of them; says what a step has.

    Args:
        before: None where training begins: then each rank's share is as `training:` says.

    Raises:
        ConfigError: the rows cannot be shared equally.
    """
    now, batch, times = args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps
    rows = (before or now) * batch * times
    if rows % now:
        found = f"{rows} rows a step, as this training began with {before} process(es)"
        raise ConfigError(f"{found}, cannot be shared by {now}; go on with a number that divides {rows}")
    batch = math.gcd(batch, rows // now)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, rows // now // batch
    shared = f"{rows} rows a step: {now} process(es) × {batch} rows × {rows // now // batch} accumulated"
    return "" if now == (before or 1) == 1 else shared


@contextmanager
def _write_errors(folder: StudentFolder) -> Iterator[None]:
    """Inside, a disk that refuses is a RunError; of a full one, torch, safetensors and tokenizers have each
    their own.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, KdlibError) and (is_refusal(error) or disk_is_full(folder)):
            raise write_error(folder.path, error) from error
        raise


def _finish(
    trainer: DistillationTrainer, folder: StudentFolder, rows: Dataset, special: Mapping[str, Any]
) -> None:
    trainer.save_student(folder.final_model)
    first = rows.select(range(min(FIRST_ROWS, len(rows))))
    loader, ce = trainer.get_test_dataloader(first), {"ce": EVAL_TERMS["ce"]}
    now = mean_of_first(trainer._row_sums(loader, ObjectiveAt({}, {}), ce, with_teacher=False)[0])
    logged = best_evaluation(trainer.args, trainer.state.log_history)
    best = logged.get("first_rows_ce") if logged else None  # a kdlib of before noted none
    if not folder.best_model.exists():  # no evaluation during training: the last is the best known
        trainer.save_student(folder.best_model)
        best = now
    if trainer.is_world_process_zero():
        _check_saved(trainer, {folder.final_model: now, folder.best_model: best}, first, special)
        write_json(folder.history, history(folder))  # the last file: it says that training reached its end


def _check_saved(
    trainer: DistillationTrainer,
    places: Mapping[Path, float | None],
    rows: Dataset,
    special: Mapping[str, Any],
) -> None:
    """Load what was saved again: it must be what was trained, and say what it said when it was saved.

    Args:
        places: folder → nats per token of these rows that it said; None where that is not known.

    Raises:
        RunError: it is not, or does not; the files stay.
    """
    trainer.student.zero_grad()  # its memory is enough for another copy of the weights
    args, batch = trainer.args, trainer.data_collator(list(rows))
    rounded = args.bf16 or args.fp16 or args.tf32 or torch.finfo(trainer.student.dtype).bits < 32
    within = ROUNDED if rounded else EXACT
    trained = Trained(trainer.student, trainer.tokenizer, special, batch, trainer.vocabulary, within)
    for place, nats in places.items():
        if faults := trained.faults(place, nats):
            raise RunError(
                f"{place}: the student saved there is not the one that was trained:{listed(faults)}\n"
                f"Nothing is deleted. See what moved it, then {go_on()}: final_model/ is saved anew from the "
                "last checkpoint, and both are looked at again; where best_model/ differs still, delete "
                "checkpoints/ and train again"
            )
