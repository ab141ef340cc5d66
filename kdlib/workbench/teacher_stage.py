"""The teacher's own training, before it teaches: for a head of the task's classes, or for experts that are
copies of each other so far (kdlib.routing.upcycle).

It is a run like others, in runs/teacher_<model>_<8 hex digits>/, of which the digits change with every
setting that its weights depend on.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from kdlib.cache.making import opened
from kdlib.cache.shards import Shards
from kdlib.cache.stock import FOLDER
from kdlib.config.run import BESIDE, Config, parse
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError, RunError, Stopped
from kdlib.evaluation import caching
from kdlib.models.sharing import ranks_of
from kdlib.runs import folder as runs
from kdlib.runs.files import go_on
from kdlib.runs.folder import Run
from kdlib.runs.processes import held
from kdlib.students.student import check_pair, tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.training import run as training, trackers
from kdlib.training.plan import check_processes, extent, objective_of, training_arguments, try_out


def own_config(config: Config) -> Config:
    """The stage as a run of its own: the teacher is the student, and ce is all there is to learn from."""
    plain = config.as_dict()
    seed = config.seed if config.data.split_seed is None else config.data.split_seed
    return parse(
        {
            **{name: plain[name] for name in ("task", "device", "precision", "trackers")},
            "teacher": {**plain["teacher"], "experts": "topk"},  # how they are asked later changes no stage
            **plain["teacher_stage"],
            "student": {"from": config.teacher.model},
            "data": {**plain["data"], "split_seed": seed},  # teacher and students are kept from the same rows
            "loss": {"weights": {"ce": 1.0}},
        },
        name="teacher_stage",
    )


def check_arguments(config: Config, *, trains: bool = False) -> TrainingArguments:
    """What `training:` asks for; refused where it cannot be had here, or an adapter; a stage's too."""
    args = training_arguments(config, Path("unused"))
    tasks.check_made(config)
    if trains:
        check_processes(args, ranks_of(config.launch.processes, config.wanted_device))
    try_out(args)
    trackers.check_key(args.report_to)  # of a tracker that is installed
    if config.teacher_stage is not None:
        check_arguments(own_config(config), trains=trains)
    return args


def preflight(config: Config, *, trains: bool = True) -> None:
    """Refuse what can be refused before a run's folder is made: arguments, tokenizers, data, a cache.

    `trains`: whether this process will train, too.
    """
    args, tokenizer = check_arguments(config, trains=trains), tokenizer_of(config)
    check_pair(config, tokenizer)
    ranks = ranks_of(config.launch.processes, config.wanted_device)
    prepared = tasks.prepare(config, tokenizer)
    extent(args, len(prepared.train), ranks)
    if config.teacher and config.teacher.cache:
        caching.plan(config, prepared, Path("unused"))


def run_of(config: Config, root: Path) -> Run:
    """Where the stage of this config is, or will be."""
    text = json.dumps(own_config(config).without(*BESIDE), sort_keys=True)
    name = Path(config.teacher.model).name.removesuffix(".gguf")
    return Run(root / f"teacher_{name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def resolved(config: Config, root: Path) -> Config:
    """The config with the trained teacher in place of its stage, where there is one and it is trained."""
    if config.teacher_stage is None or not (run := run_of(config, root)).is_trained:
        return config
    trained = config.teacher.model_copy(update={"model": os.path.relpath(run.best_model)})
    return config.model_copy(update={"teacher": trained, "teacher_stage": None})


def taught(config: Config, asked_by: Run) -> Config:
    """`resolved`, after the teacher is trained where that is still to do, from its last checkpoint if any.

    Its run stands beside `asked_by`, and stops when that is asked to.  The best teacher by
    `metric_for_best_model` on the validation rows is taken.  Of several runs that need the same teacher at
    the same time, one trains it and the others wait.
    """
    if config.teacher_stage is None:
        return config
    root = asked_by.path.parent
    run = run_of(config, root)
    with held(run.path, wait=_waiting(run, asked_by)):
        own = own_config(config)
        tokenizer = tokenizer_of(own)
        prepared = tasks.prepare(own, tokenizer, new_head=True)
        before = run.manifest.get("data", {}).get("fingerprint")
        if before not in (None, prepared.notes["fingerprint"]):
            raise RunError(
                f"{run.name} was trained on other rows than {config.data.source} has now, and rows that are "
                f"held out now may be among them; delete {os.path.relpath(run.path)}, and it is trained "
                "again, or give the new rows another name"
            )
        if run.is_trained:
            print(f"the teacher was trained before, in {run.name}", flush=True)
            _tidy(run)
        else:
            print(f"{config.teacher.model} is trained for the task first, in {run.name}", flush=True)
            made = {"teacher": None, "tokenizer": tokenizer, "prepared": prepared, "asked_by": asked_by}
            _train(own, run, **made)
    return resolved(config, root)


def cached(config: Config, root: Path) -> list[Shards]:
    """The caches that runs of a config below `root` train and are evaluated from, whole at the end.

    A config without `teacher.cache` is taken to say `true`.

    Raises:
        ConfigError: it has no teacher, or asks for what no cache holds.
        RunError: see kdlib.cache.making.fill.
    """
    if config.teacher is None:
        raise ConfigError("teacher: found null, needs one that can be asked; name its model")
    if not config.teacher.cache:
        config = parse(config.as_dict(), {"teacher.cache": True})
    preflight(config, trains=False)
    config = taught(config, Run(root / FOLDER))
    prepared = tasks.prepare(config, tokenizer_of(config))
    found = caching.plan(config, prepared, root)
    caching.make(config, prepared, found, partial(tasks.load_teacher, config, prepared))
    return [opened(found, recipe).shards for recipe in dict.fromkeys(found.recipes.values())]


def _waiting(run: Run, asked_by: Run) -> Callable[[str], None]:
    """What to do while another process trains the teacher: say so once, and look for a STOP."""
    told: set[str] = set()

    def wait(who: str) -> None:
        if who not in told:
            told.add(who)
            print(f"waiting for the teacher, {run.name}: it is being trained on {who}", flush=True)
        if (asked_by.path / "STOP").exists():
            (asked_by.path / "STOP").unlink(missing_ok=True)
            raise Stopped(f"stopped while waiting for the teacher; {go_on()}")

    return wait


def _train(config: Config, run: Run, *, prepared: Prepared, **made: Any) -> None:
    if not run.path.exists():
        runs.create(run.path.parent, run.name, config, teacher_stage=True)
    with runs.working(run):
        student = tasks.untrained_student(config, prepared, None)
        run.add_to_manifest(
            data=prepared.notes, formula=objective_of(config, student=student).at(0.0).formula
        )
        training.train(config, run, student=student, prepared=prepared, label="teacher", **made)
    _tidy(run)


def _tidy(run: Run) -> None:
    """What remains to do for a teacher that is trained: also what an earlier process was killed before."""
    if run.noted["state"] != "done":
        with runs.working(run):
            pass
    runs.clean(run)
