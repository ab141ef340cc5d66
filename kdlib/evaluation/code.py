"""Models scored by running what they write: a run's teacher, baseline and student, or any given ones."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlib.code import sandbox
from kdlib.code.problems import Problem, read_problems
from kdlib.code.sandbox import Limits
from kdlib.code.scoring import judge, results_of
from kdlib.config.run import Config, parse
from kdlib.config.sections import CodeConfig
from kdlib.errors import RunError
from kdlib.evaluation.compare import folder_for, named_students
from kdlib.evaluation.completions import answers_of
from kdlib.hardware import precision_of
from kdlib.metrics.names import called_student
from kdlib.models.loading import device_of
from kdlib.runs.files import write_json, writing
from kdlib.runs.folder import Run, locate, open_run, project_root


def score(
    models: Mapping[str, str],
    settings: CodeConfig,
    folder: Path,
    *,
    precision: str = "auto",
    device: str = "auto",
    resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Ask each model, run each program, and write results.json, verdicts.json and completions.jsonl.

    Args:
        models: name → model, the one that others are held against first.

    Returns:
        The results of each benchmark, as `scoring.results_of` has them, with what was asked.

    Raises:
        RunError: this system gives no fence; no model was asked.
        DataError, ModelError: no such benchmark, no such model.
    """
    limits = Limits(network=settings.allow_network)
    if not (tried := sandbox.run("", limits)).passed:
        raise RunError(f"an empty program does not pass here: {tried.name} {tried.message}; nothing was run")
    every = {name: read_problems(name) for name in settings.benchmarks}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dtype, _ = precision_of(precision, device_of(device))
    found, verdicts = [], {}
    for benchmark, problems in every.items():
        asked, options = problems[: settings.limit], {"device": device, "dtype": dtype, "seed": seed}
        file = folder / "completions.jsonl"
        answers = {n: answers_of(n, source, asked, settings, file, **options) for n, source in models.items()}
        print(f"{benchmark}: running {len(models) * len(asked) * settings.samples:,} programs …", flush=True)
        rows = verdicts[benchmark] = judge(asked, answers, chat=settings.chat, limits=limits)
        results = results_of(asked, rows, settings.k, resamples=resamples, seed=seed)
        found.append({**_asked(benchmark, problems, settings), **results, "sources": dict(models)})
    write_json(folder / "verdicts.json", verdicts)
    write_json(folder / "results.json", found)
    return found


def score_run(run: Run, config: Config) -> list[dict[str, Any]]:
    """What `config.code` asks, of a run's teacher, its baseline where there is one, and its student.

    The students are those in best_model/, which were not chosen on these problems.

    Raises:
        RunError: a student is not trained yet.
    """
    if not config.code:
        return []
    for student in (run, *([run.baseline] if config.baseline else [])):
        if not student.is_trained:
            raise RunError(f"{student.path} is not trained yet; run 02_train first")
    models = {"teacher": config.teacher.model} if config.teacher else {}
    if config.baseline:
        models["baseline"] = str(run.baseline.best_model)
    models[called_student(config.teacher)] = str(run.best_model)
    about = {"precision": config.precision, "device": config.wanted_device, "seed": config.seed}
    return score(models, config.code, run.code, resamples=config.compare.resamples, **about)


def evaluate(
    models: Sequence[str],
    asked: Mapping[str, Any],
    overrides: Sequence[str],
    root: Path,
    reports: Path,
    output: Path | None = None,
) -> tuple[list[dict[str, Any]], Run | Path]:
    """Score a run (its name or folder), or models (MODEL or name=MODEL).

    Args:
        asked: a config's section `code`, as plain data; `overrides` are of it.
        output: where models' results are written, in place of a folder among the `reports`.

    Returns:
        What `score` returns, and where it is written: the run, or the models' folder.
    """
    files = [str(Path(name).absolute()) if Path(name).is_file() else name for name in asked["benchmarks"]]
    settings = parse({**asked, "benchmarks": files}, overrides, name="kd evaluate", kind=CodeConfig)
    where, name = locate(models[0], root)
    if len(models) > 1 or not (where / name / "config.yaml").exists():
        named = named_students(models)
        folder = folder_for(output or reports / f"evaluate_{[*named][-1]}")
        return score(named, settings, folder), folder
    run = open_run(where, name)
    config = parse({**run.config.as_dict(), "code": settings.as_dict()}, name=str(run.path / "config.yaml"))
    os.chdir(project_root())  # from which a config names its models
    return score_run(run, config), run


def _asked(benchmark: str, problems: list[Problem], settings: CodeConfig) -> dict[str, Any]:
    stated = {
        name: value for name, value in settings.as_dict().items() if name not in ("benchmarks", "limit")
    }
    name = benchmark if benchmark in ("humaneval", "mbpp") else Path(benchmark).stem
    return {"benchmark": name, "of": len(problems), "settings": stated}
