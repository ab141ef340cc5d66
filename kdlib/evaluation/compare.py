"""Teacher and students on the same held-out rows, with intervals: the models of a run, or any given ones."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

from kdlib.config.reading import pairs
from kdlib.config.run import Config, parse
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError, RunError
from kdlib.hardware import GIB, peak_memory, precision_of
from kdlib.metrics.names import called_student
from kdlib.models.loading import (
    device_of,
    folder_of,
    load_config,
    load_tokenizer,
    parameters,
    positions_of,
)
from kdlib.plots.axes import LABELS
from kdlib.runs.files import StudentFolder, write_json
from kdlib.runs.folder import Run
from kdlib.students.student import check_pair, tokenizer_of
from kdlib.tasks.base import (
    TASKS,
    Comparison,
    asked,
    load_teacher,
    prepare,
    task_of,
    teacher_of,
    untrained_student,
)

LONGEST = 1024  # tokens of a row, where the models can read so many


@dataclass(frozen=True)
class Candidate:
    """A model to be measured."""

    load: Callable[[], PreTrainedModel]
    source: str | None = None  # where its weights are stored; None for a model that is not stored
    prepared: Prepared | None = None  # the same rows for one with a tokenizer of its own


def measured(
    comparison: Comparison, prepared: Prepared, candidates: Mapping[str, Candidate], student: str
) -> dict[str, Any]:
    """Each model in turn, the teacher first if there is one: what it says, its time, memory and size."""
    costs: dict[str, dict[str, Any]] = {}
    for name, each in candidates.items():
        print(f"measuring {name} …", flush=True)
        rows = each.prepared or prepared
        with peak_memory(comparison.device) as peak:
            model = each.load().to(comparison.device)
            live = (teacher_of if name == "teacher" else asked)(model, rows)
            took = comparison.add(name, live, rows)
        comparison.beside_teacher(name, live)
        comparison.show(name, model)
        held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        costs[name] = {
            "parameters": parameters(model),
            "size_on_disk_gib": ((each.source and stored_bytes(each.source)) or held) / GIB,
            **took,
            "peak_memory_gib": peak.bytes / GIB,
        }
        del model, live
    found = comparison.results(student)
    print(f"intervals: {found['interval']}")
    models = {name: {**measures, **costs[name]} for name, measures in found["models"].items()}
    return {**found, "models": models, "student": student, "split": prepared.measured_on}


def stored_bytes(source: str) -> int | None:
    """Bytes of a model's weights in its folder or the hub's cache; None where they are in neither."""
    try:
        folder = folder_of(source)
        path = Path(folder if Path(folder).is_dir() else snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    whole = path / "model.safetensors"
    files = [whole] if whole.exists() else path.glob("model-*-of-*.safetensors")
    return sum(file.stat().st_size for file in files) or None


def compare_run(run: Run, config: Config, tokenizer: Tokenizer, prepared: Prepared) -> dict[str, Any]:
    """Compare the models of a finished run and write its comparison_results.json; see `student_in`.

    Args:
        config: the run's, with the teacher that taught in it.
    """
    dtype, stored = _dtype(config), partial(_stored, config, prepared)
    student = called_student(config.teacher)
    untrained = untrained_student(config, prepared, run.manifest["student_layers"]).to(dtype)
    candidates = {
        **({"teacher": _teaching(config, prepared, dtype)} if config.teacher else {}),
        # a copy, so that its memory is its own, not the teacher's that it is cut from
        "untrained": Candidate(lambda: deepcopy(untrained)),
        **({"baseline": stored(student_in(run.baseline, prepared))} if config.baseline else {}),
        student: stored(student_in(run, prepared)),
    }
    results = {
        "task": task_of(config).rules.name,
        **measured(_comparison(config, prepared, tokenizer), prepared, candidates, student),
        "rule": rule_of(run.config, prepared),
        "precision": str(dtype).removeprefix("torch."),
    }
    write_json(run.path / "comparison_results.json", results)
    return results


def rule_of(config: Config, prepared: Prepared) -> str:
    """Which students of a run are compared, on which rows, and who has an advantage there."""
    if prepared.measured_on == "test":
        chosen = "best_model/ of each student, chosen on the validation rows"
        return f"{chosen}; measured on the test rows, on which nothing was chosen"
    stopped = "when early stopping by these very rows ended it"
    ended = stopped if config.early_stopping else "after equally many steps"
    teacher = "; the teacher is the best by these rows, so its figures are rather too good"
    return (
        f"final_model/ of each student, {ended}; measured on the validation rows, as there are no test rows: "
        f"best_model/ was chosen on these very rows{teacher if config.teacher_stage else ''}"
    )


def student_in(folder: StudentFolder, prepared: Prepared) -> str:
    """The student that is compared: one chosen on other rows than it is measured on, else the last."""
    return str(folder.best_model if prepared.measured_on == "test" else folder.final_model)


def named_students(texts: Sequence[str]) -> dict[str, str]:
    """Name -> model of each `name=MODEL` or `MODEL`, called by the last part of its path; no name twice."""
    found: dict[str, str] = {}
    for text in texts:
        given = None if Path(text).exists() else re.fullmatch(r"([\w.+-]+)=(.+)", text)
        name, model = given.groups() if given else (Path(text).expanduser().absolute().name, text)
        if name in found or name in LABELS:
            raise ConfigError(
                f"--student {text}: the name {name!r} is taken; give it one of its own: --student "
                f"NAME={model}"
            )
        # a folder may be called `teacher`
        found[name] = str(Path(model).absolute()) if Path(model).is_dir() else model
    return found


def compare(
    teacher: str,
    students: Mapping[str, str],
    data: str,
    *,
    task: str = "sequence-classification",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure models that were trained anywhere, on test rows of `data`, else validation rows, else all.

    Args:
        students: name -> model; the comparison is about the first, which is measured last, against all.
        overrides: of a config, as after -o: of `data`, `compare`, `precision`, `device`.

    Raises:
        ConfigError: a task or a setting that does not fit.
        DataError: no such rows or columns.
        ModelError: no such model, or other classes.
    """
    student, *others = students
    every = [teacher, *students.values()]
    configs = {
        name: _config(teacher, students[name], data, task, overrides, among=every)
        for name in (*others, student)
    }
    config, tokenizers = configs[student], {name: tokenizer_of(each) for name, each in configs.items()}
    for name, each in configs.items():
        check_pair(each, tokenizers[name])
    own, shares_rows = tokenizers[student].get_vocab(), task_of(config).rules.one_vocabulary
    if shares_rows and (apart := [name for name in others if tokenizers[name].get_vocab() != own]):
        raise ConfigError(
            f"--student {', '.join(apart)}: reads other tokens than {student}, and several students are held "
            "against each other token by token; compare those that read alike, or each with the teacher alone"
        )
    is_split = {key for key, _ in pairs(overrides)} & {"data.validation", "data.test"}
    read = prepare if is_split else _all_rows
    tokenizer = tokenizers[student]
    prepared = read(config, tokenizer)
    candidates = {"teacher": _stored(config, prepared, teacher)}
    for name, its in configs.items():
        rows = prepared if shares_rows or name == student else read(its, tokenizers[name])
        candidates[name] = _stored(its, rows, its.student.source)
    results = measured(_comparison(config, prepared, tokenizer), prepared, candidates, student)
    split = results["split"]
    how = prepared.notes["test" if split == "test" else "split"]
    return {
        **results,
        "task": task,
        "sources": {"teacher": teacher, **students},
        "rule": f"each model as given, on {results['rows']:,} {split} rows of {data} ({split}: {how})",
        "precision": str(_dtype(config)).removeprefix("torch."),
    }


def folder_for(output: Path) -> Path:
    """A folder for what `compare` found; a RunError where it is a run's, or the disk refuses to make it."""
    if (output / "config.yaml").exists():
        raise RunError(
            f"--output {output}: is the folder of a run, which has a comparison of its own; name another"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--output {output}: cannot be made: {error.strerror}; name a folder that you can write to"
        ) from error
    return output


def _comparison(config: Config, prepared: Prepared, tokenizer: Tokenizer) -> Comparison:
    options = {"device": device_of(config.wanted_device), "resamples": config.compare.resamples}
    return task_of(config).comparison(config, prepared, tokenizer, seed=config.seed, **options)


def _teaching(config: Config, prepared: Prepared, dtype: torch.dtype) -> Candidate:
    """The teacher as it taught: of one that was quantised, those weights."""
    return Candidate(lambda: load_teacher(config, prepared, dtype).model, config.teacher.model, prepared)


def _stored(config: Config, prepared: Prepared, source: str) -> Candidate:
    return Candidate(lambda: task_of(config).load(source, prepared, _dtype(config)), source, prepared)


def _dtype(config: Config) -> torch.dtype:
    return precision_of(config.precision, device_of(config.wanted_device))[0]


def _all_rows(config: Config, tokenizer: Tokenizer) -> Prepared:
    """The rows of the data; where nothing divides them all are for testing."""
    prepared, is_own = prepare(config, tokenizer), "the source's own"
    if prepared.test is not None or prepared.notes["split"] == is_own or task_of(config).compared_data:
        return prepared
    every, limit = concatenate_datasets([prepared.train, prepared.validation]), config.data.max_eval_rows
    if limit is not None and limit < len(every):
        every = every.shuffle(seed=config.seed).select(range(limit))
    return replace(prepared, test=every, notes={**prepared.notes, "test": "all there are, each text once"})


def _config(
    teacher: str, student: str, data: str, task: str, overrides: Sequence[str], *, among: Sequence[str]
) -> Config:
    """A config that trains nothing; its rows are as long as the shortest of `among` can read."""
    if task not in TASKS:
        raise ConfigError(f"--task {task}: compared are models for {' or '.join(TASKS)}; name one of these")
    for key, _ in pairs(overrides):
        if key.partition(".")[0] in ("task", "teacher", "student"):
            raise ConfigError(f"-o {key}: this has an option of its own: --task, --teacher, --student")
    positions = [positions_of(load_config(model)) or LONGEST for model in among]
    limits = [load_tokenizer(model).model_max_length for model in among]
    rows = {"source": data, "max_length": min(LONGEST, *positions, *limits), **TASKS[task].compared_data}
    pair = {"teacher": {"model": teacher}, "student": {"from": student}}
    raw = {"task": task, **pair, "loss": {"weights": {"ce": 1.0}}, "training": {}, "data": rows}
    return parse(raw, overrides, name="kd compare")
