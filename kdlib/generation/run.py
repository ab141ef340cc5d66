"""One run of `kd generate`, from its folder's prompts and log to kept, rejected and failed rows.

runs/<run>/  config.yaml  manifest.json  status.json  prompts.jsonl  answers.jsonl (the log)  progress.json
             kept.jsonl  rejected.jsonl  failed.jsonl
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kdlib.config.reading import differences
from kdlib.config.run import load, parse
from kdlib.errors import RunError, without_keys
from kdlib.filters import judge, sift
from kdlib.generation import stage
from kdlib.generation.answers import Answer, AnswerLog, Failure
from kdlib.generation.config import GenerationConfig
from kdlib.generation.prices import Budget
from kdlib.generation.stage import Session
from kdlib.prompts import evolve
from kdlib.prompts.made import made
from kdlib.prompts.prompt import Prompt, are_alone, plain_row, read_prompts
from kdlib.runs import folder as runs
from kdlib.runs.files import now, read_json, write_json, write_text
from kdlib.runs.folder import Run

# filters that need not look twice
PASSED = {"overlap": [], "near_duplicates": None, "tests": False}


@dataclass(frozen=True)
class Generation:
    """Rows that are wanted, as `kd generate` and its notebook have them; `begin` writes, and `ask` pays."""

    config: GenerationConfig
    root: Path  # the folder of runs
    name: str
    goes_on: bool = False  # there is such a run
    origin: Mapping[str, Any] = field(default_factory=dict)  # of a new one, for its manifest

    @cached_property
    def prompts(self) -> list[Prompt]:
        """What is asked, before the teacher makes any of it harder."""
        if not self.goes_on:
            return prompts_of(self.config)
        return read_prompts(runs.open_run(self.root, self.name).path / "prompts.jsonl")

    def begin(self) -> Run:
        """The run's folder, with its prompts, once nothing is in sight that would stop it.

        Raises:
            RunError: as `reopened` and `created`.
            ConfigError, DataError, TeacherError, ModelError: as `prompts_of` and `check`.
        """
        if self.goes_on:
            run = reopened(self.root, self.name, self.config)
            check(self.config)
            return run
        runs.check_new(self.root, self.name)
        prompts = self.prompts
        check(self.config)
        return created(self.root, self.name, self.config, prompts, **self.origin)

    def ask(self, run: Run, *, again: bool = False, render: Callable[[Run], Any] = bool) -> Any:
        """As `generate`, with a status that says how it ended; however it did, `render` makes a report.

        Returns:
            What `render` does.
        """
        with runs.working(run, failed=render):
            generate(run, self.config, again=again)
        return render(run)


def wanted(config: str, run: str | None = None, overrides: Sequence[str] = ()) -> Generation:
    """What a notebook asks for.

    Args:
        config: YAML file.
        run: a run's name, or its folder: made where there is none, else it goes on.  None: the newest run of
            this config that asked the same goes on, so that nothing is paid twice; else a new one begins.

    Raises:
        ConfigError: the file or the overrides do not fit.
    """
    os.chdir(runs.project_root())  # paths mean the same in JupyterLab, which starts in notebooks/
    settings = load(config, overrides, kind=GenerationConfig)
    root, name = runs.locate(run) if run else (runs.default_root(), None)
    name = name or _newest(root, config, settings) or runs.new_name(root, config)
    goes_on = (root / name).exists()
    print(f"run: {name} ({Run(root / name).status['state'] if goes_on else 'new'})")
    return Generation(settings, root, name, goes_on, {"config_file": config})


def _newest(root: Path, config: str, settings: GenerationConfig) -> str | None:
    for run in runs.all_runs(root):
        origin = {"kind": "generation", "config_file": config}
        if origin.items() <= run.manifest.items() and _before(run).asking() == settings.asking():
            return run.name
    return None


def prompts_of(config: GenerationConfig) -> list[Prompt]:
    """What is asked, without keys: they are kept in files, and go to the teacher so.

    Raises:
        ConfigError, DataError: as `made`.
    """
    return [_clean(prompt) for prompt in made(config.prompts, config.seed)]


def check(config: GenerationConfig) -> None:
    """Raise what would stop a run, before anything is paid: of teacher, judge, or filters.

    Raises:
        ConfigError, TeacherError, ModelError, DataError, RunError: as `stage.check` and `sift.check`.
    """
    sift.check(config.filters)
    for each in filter(None, (config.stage, config.judging)):
        stage.check(each)


def created(root: Path, name: str, config: GenerationConfig, prompts: Sequence[Prompt], **origin: Any) -> Run:
    """A new run's folder, with its prompts."""
    run = runs.create(root, name, config, kind="generation", **origin)
    _write_rows(run.path / "prompts.jsonl", (plain_row(each, alone=are_alone(prompts)) for each in prompts))
    return run


def reopened(root: Path, name: str, config: GenerationConfig) -> Run:
    """A run that goes on, with these limits, budget, prices and filters in place of its own.

    Raises:
        RunError: there is no such run, it is a training's, or it asked something else.
    """
    run = runs.open_run(root, name)
    if run.manifest.get("kind") != "generation":
        raise RunError(f"run {name!r} made no rows; kd run goes on with a training")
    before = _before(run)
    if lines := differences(before.asking(), config.asking()):
        raise RunError(
            f"run {name!r} asked something else, so it cannot go on with this:\n  "
            + "\n  ".join(lines)
            + "\nlimits, budget, prices and filters may differ; for the rest start a new run"
        )
    if lines := differences(before.as_dict(), config.as_dict()):
        run.put_config(config)
        run.add_to_manifest(changed=[*run.manifest.get("changed", []), {"at": now(), "settings": lines}])
    return run


def generate(run: Run, config: GenerationConfig, *, again: bool = False) -> dict[str, int]:
    """Ask what has no answer yet, and write the rows; returns how many are kept, rejected, failed, unasked.

    Args:
        again: ask also what failed and may have been paid.  What failed for nothing always is.

    Raises:
        Stopped: the budget is used up, or a signal asked to stop; the rows so far are written.
        TeacherError: no further prompt would have an answer; likewise.
    """
    prompts = read_prompts(run.path / "prompts.jsonl")
    log = AnswerLog(run.path / "answers.jsonl")
    session = Session(run, log, Budget(config.budget.usd if config.budget else None, log.spent), again)
    prompts = with_harder(session, config, prompts)
    counts = write_files(session, config, prompts, session.ask(config.stage, prompts))
    ending = {**counts, "spent_usd": session.budget.spent, "under_way": 0, "held_usd": 0.0, "at": now()}
    write_json(run.path / "progress.json", read_json(run.path / "progress.json", {}) | ending)
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print(f"{said}; ${session.budget.spent:.2f} spent")
    if session.ended:
        raise session.ended
    return counts


def with_harder(session: Session, config: GenerationConfig, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, and after them the variants of each round of `prompts.evolve`, by the teacher."""
    every, latest = [*prompts], [*prompts]
    for _ in range(config.prompts.evolve):
        got = session.ask(config.evolving, [evolve.asked(prompt, config.seed) for prompt in latest])
        found = [
            evolve.evolved(prompt, answer.text, answer.finish)
            for prompt, answer in zip(latest, got, strict=True)
            if isinstance(answer, Answer)
        ]
        latest = [_clean(prompt) for prompt in found if prompt is not None]
        every += latest
    return every


def reasons_against(
    session: Session, config: GenerationConfig, answered: Sequence[tuple[Prompt, Answer]]
) -> list[str | None]:
    """For each answer why it is not kept, or None; the judge is asked about those that all filters keep."""
    reasons = sift.sifted(config.filters, answered)
    if not config.judging:
        return reasons
    places = [number for number, reason in enumerate(reasons) if reason is None]
    asked = [judge.asked(answered[n][0], answered[n][1].text) for n in places]
    got = session.ask(config.judging, asked)
    scores = [judge.score(each.text) if isinstance(each, Answer) else None for each in got]
    alone = config.filters.model_copy(update=PASSED)  # what these have passed
    found = sift.sifted(alone, [answered[number] for number in places], scores=scores)
    for number, reason in zip(places, found, strict=True):
        reasons[number] = reason
    return reasons


def write_files(
    session: Session,
    config: GenerationConfig,
    prompts: Sequence[Prompt],
    got: Sequence[Answer | Failure | None],
) -> dict[str, int]:
    """kept.jsonl, rejected.jsonl and failed.jsonl, in the order of the prompts; returns how many rows."""
    alone, model = are_alone(prompts), config.teacher.model
    first: dict[object, int] = {}
    answered: dict[int, tuple[Prompt, Answer]] = {}
    for number, (prompt, answer) in enumerate(zip(prompts, got, strict=True)):
        if first.setdefault(prompt.messages, number) == number and isinstance(answer, Answer):
            answered[number] = (prompt, answer)
    reasons = dict(zip(answered, reasons_against(session, config, [*answered.values()]), strict=True))
    files: dict[str, list[dict[str, Any]]] = {"kept": [], "rejected": [], "failed": []}
    for number, (prompt, answer) in enumerate(zip(prompts, got, strict=True)):
        row = plain_row(prompt, alone=alone)
        if first[prompt.messages] != number:
            files["rejected"].append(row | {"reason": f"repeated prompt: number {first[prompt.messages]}"})
        elif isinstance(answer, Failure):
            about = {"teacher": model, "reason": answer.reason, "cost": answer.cost}
            files["failed"].append(row | about)
        elif answer:
            row, reason = answered_row(prompt, answer, model, alone=alone), reasons[number]
            files["rejected" if reason else "kept"].append(row | ({"reason": reason} if reason else {}))
    for name, rows in files.items():
        _write_rows(session.run.path / f"{name}.jsonl", rows)
    counts = {name: len(rows) for name, rows in files.items()}
    return counts | {"unasked": len(prompts) - sum(counts.values())}


def answered_row(prompt: Prompt, answer: Answer, teacher: str, *, alone: bool) -> dict[str, Any]:
    """A row as `task: question-answering` reads it: prompt and response, or messages to the assistant's."""
    row = plain_row(prompt, alone=alone)
    if not alone:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": answer.text}]
    about = {"teacher": teacher, "finish": answer.finish, "cost": answer.cost}
    return row | {"response": answer.text, **about, "usage": answer.usage and asdict(answer.usage)}


def _before(run: Run) -> GenerationConfig:
    return parse(run.settings, name=str(run.path / "config.yaml"), kind=GenerationConfig)


def _clean(prompt: Prompt) -> Prompt:
    return replace(prompt, messages=tuple((role, without_keys(text)) for role, text in prompt.messages))


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
