"""Models that were trained elsewhere, by this package or another, compared on the same rows: what `kd
compare` does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from transformers import PreTrainedTokenizerBase

from kdlib.config.run import Config, pairs, parse
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError, RunError
from kdlib.evaluation.compare import Comparison, prompts_of
from kdlib.hardware import precision_of
from kdlib.models.loading import device_of, load_config, load_tokenizer
from kdlib.models.student import check_pair, tokenizer_of
from kdlib.plots.axes import LABELS
from kdlib.reports.run import render_comparison
from kdlib.runs.files import write_json
from kdlib.tasks import base as tasks
from kdlib.tasks.classification import ClassComparison

TASKS = ("sequence-classification", "causal-lm", "question-answering")
LONGEST = 1024  # tokens of a row, where the models can read so many


def named_students(texts: Sequence[str]) -> dict[str, str]:
    """Name -> model of each `name=MODEL` or `MODEL`, which is called by the last part of its path.

    Raises:
        ConfigError: two of one name, or a name that means another model in a comparison.
    """
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
    task: str = TASKS[0],
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the teacher and each student on the test rows of `data`, else on its validation rows, else on
    all it has.

    Args:
        students: name -> model; the comparison is about the first, which is measured last, against all
            others.
        overrides: of a config, as after -o: what is read and how it is split, `compare.resamples`,
            `precision`, `device`.

    Returns:
        What a run's comparison_results.json has, the models' places (`sources`), and which rows were measured
        (`rule`).

    Raises:
        ConfigError: a task or a setting that does not fit.
        DataError: no such rows or columns.
        ModelError: no such model, other classes, or another vocabulary than the teacher's.
    """
    student, *others = students
    every = [teacher, *students.values()]
    configs = {
        name: _config(teacher, students[name], data, task, overrides, among=every)
        for name in (*others, student)
    }
    for config in configs.values():
        check_pair(config, tokenizer_of(config))
    config = configs[student]
    tokenizer = tokenizer_of(config)
    read = _rows if {key for key, _ in pairs(overrides)} & {"data.validation", "data.test"} else _all_rows
    prepared = read(config)
    results = (
        _compare_classes(configs, student, tokenizer, prepared, read)
        if task == "sequence-classification"
        else _compare_tokens(configs, student, tokenizer, prepared)
    )
    split = results["split"]
    dtype, _ = precision_of(config.precision, device_of(config.wanted_device))
    how = prepared.notes["test" if split == "test" else "split"]
    return {
        **results,
        "task": task,
        "student": student,
        "sources": {"teacher": teacher, **students},
        "rule": f"each model as given, on {results['rows']:,} {split} rows of {data} ({split}: {how})",
        "precision": str(dtype).removeprefix("torch."),
    }


def _rows(config: Config) -> Prepared:
    return tasks.prepare(config, tokenizer_of(config))


def _all_rows(config: Config) -> Prepared:
    """The rows of the data; where nothing divides them all are for testing (of questions nearly all:
    those trained on have no choices).
    """
    prepared = _rows(config)
    if (
        prepared.test is not None
        or prepared.notes["split"] == "the source's own"
        or config.task == "question-answering"
    ):
        return prepared
    every, limit = concatenate_datasets([prepared.train, prepared.validation]), config.data.max_eval_rows
    if limit is not None and limit < len(every):
        every = every.shuffle(seed=config.seed).select(range(limit))
    return replace(prepared, test=every, notes={**prepared.notes, "test": "all there are, each text once"})


def folder_for(output: Path) -> Path:
    """The folder for what `write` leaves, made where it is missing.

    Raises:
        RunError: it is a run's, which has a comparison of its own, or the disk refuses.
    """
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


def write(results: Mapping[str, Any], folder: Path) -> None:
    """comparison_results.json, and report.html with its figures and tables."""
    write_json(folder / "comparison_results.json", results)
    render_comparison(results, folder)


def _config(
    teacher: str, student: str, data: str, task: str, overrides: Sequence[str], *, among: Sequence[str]
) -> Config:
    """A config that trains nothing; its rows are as long as the shortest of `among` can read."""
    if task not in TASKS:
        raise ConfigError(f"--task {task}: compared are models for {' or '.join(TASKS)}; name one of these")
    for key, _ in pairs(overrides):
        if key.partition(".")[0] in ("task", "teacher", "student"):
            raise ConfigError(f"-o {key}: this has an option of its own: --task, --teacher, --student")
    positions = [getattr(load_config(model), "max_position_embeddings", None) or LONGEST for model in among]
    limits = [load_tokenizer(model).model_max_length for model in among]
    read = {
        "source": data,
        "max_length": min(LONGEST, *positions, *limits),
        **({"validation": 0.99} if task == TASKS[2] else {}),
    }
    raw = {
        "task": task,
        "teacher": {"model": teacher},
        "student": {"from": student},
        "loss": {"weights": {"ce": 1.0}},
        "training": {},
        "data": read,
    }
    return parse(raw, overrides, name="kd compare")


def _compare_classes(
    configs: Mapping[str, Config],
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    read: Callable[[Config], Prepared],
) -> dict[str, Any]:
    """Each student reads the same rows by a tokenizer of its own; `tokenizer` and `prepared` are of the
    one it is about.
    """
    config = configs[student]
    device = device_of(config.wanted_device)
    dtype, _ = precision_of(config.precision, device)
    comparison = ClassComparison(
        prepared, tokenizer, device=device, resamples=config.compare.resamples, seed=config.seed
    )
    print("measuring teacher …", flush=True)
    comparison.add(
        "teacher", lambda: tasks.load(config.teacher.model, prepared, dtype), source=config.teacher.model
    )
    for name, its in configs.items():
        rows, model = prepared if name == student else read(its), its.student.source
        print(f"measuring {name} …", flush=True)
        comparison.add(
            name, lambda model=model, rows=rows: tasks.load(model, rows, dtype), source=model, prepared=rows
        )
    return comparison.results(student)


def _compare_tokens(
    configs: Mapping[str, Config], student: str, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> dict[str, Any]:
    config = configs[student]
    device, chosen = device_of(config.wanted_device), config.compare
    dtype, _ = precision_of(config.precision, device)
    comparison = Comparison(prepared, tokenizer, device=device, resamples=chosen.resamples, seed=config.seed)
    prompts = prompts_of(config, comparison.rows)
    for name, model in {
        "teacher": config.teacher.model,
        **{name: its.student.source for name, its in configs.items()},
    }.items():
        print(f"measuring {name} …", flush=True)
        comparison.add(
            name,
            lambda model=model: tasks.load(model, prepared, dtype),
            prompts=prompts,
            new_tokens=chosen.new_tokens,
        )
    return {**comparison.results(), "prompts": tokenizer.batch_decode(prompts)}
