"""The doctor: what is wrong with a config, found before its training; each check is a small function that
yields findings.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from kdlib.config import run as configs
from kdlib.config.run import Config, pairs
from kdlib.diagnostics.batch_checks import BATCH_CHECKS
from kdlib.diagnostics.class_checks import CLASS_BATCH_CHECKS, CLASS_CHECKS
from kdlib.diagnostics.config_checks import CONFIG_CHECKS
from kdlib.diagnostics.context import Subject, Unavailable
from kdlib.diagnostics.data_checks import DATA_CHECKS
from kdlib.diagnostics.findings import Finding, as_data, exit_status, ordered, text
from kdlib.diagnostics.fixes import rewritten
from kdlib.diagnostics.model_checks import MODEL_CHECKS, memory_suffices
from kdlib.diagnostics.question_checks import QUESTION_CHECKS
from kdlib.diagnostics.schedule_checks import SCHEDULE_CHECKS
from kdlib.errors import ConfigError

CHECKS = (*CONFIG_CHECKS, *SCHEDULE_CHECKS, *DATA_CHECKS, *MODEL_CHECKS)
"""In the order in which they are made; those of the task, `memory_suffices` and `BATCH_CHECKS`, which
load the models, follow.
"""
OF_TASK = {"sequence-classification": CLASS_CHECKS, "question-answering": QUESTION_CHECKS}
ON_BATCHES_OF_TASK = {"sequence-classification": CLASS_BATCH_CHECKS}
ROUNDS = 5  # of changes: one may bring another to light


@dataclass(frozen=True)
class Visit:
    """What was found in a config file; with `fix`, what was changed and what is left."""

    found: list[Finding]
    left: list[Finding]  # found after the changes
    changes: Mapping[str, Any]  # dotted path -> new value
    text: str | None  # the file's, after the changes; None where the config has faults of its own

    def __str__(self) -> str:
        changed = "".join(f"\n  {path}: {value}" for path, value in self.changes.items())
        return text(self.found) + (
            f"\n\nchanged:{changed}\n\nleft to you:\n\n{text(self.left)}" if self.changes else ""
        )

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"found": as_data(self.found), "changes": dict(self.changes), "left": as_data(self.left)}

    def exit_status(self, *, strict: bool) -> int:
        return exit_status(self.left, strict=strict)


def diagnose(config: Config, *, quick: bool = False, made: Mapping[str, Any] | None = None) -> list[Finding]:
    """What the doctor finds, the gravest first; [] for a config that is well.

    Args:
        quick: leave out what needs the models' weights.
        made: what is loaded already, by the names of kdlib.diagnostics.context.Subject: tokenizer, prepared,
            teacher, student.
    """
    return examine(Subject(config, made), quick=quick)


def visit(
    path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False, fix: bool = False
) -> Visit:
    """`diagnose` for a file, whose own faults are critical findings, and then nothing else is looked at;
    writes nothing.

    Args:
        fix: change what some finding proposes to change, and put the overrides in; look again until nothing
            is proposed.
    """
    try:
        config = configs.load(path, overrides)
    except ConfigError as error:
        return Visit(faults(error), faults(error), {}, None)
    subject, before = Subject(config), Path(path).read_text(encoding="utf-8")
    found = left = examine(subject, quick=quick)
    if not fix:
        return Visit(found, left, {}, before)
    changes, after = dict(pairs(overrides)), rewritten(before, dict(pairs(overrides)))
    for _ in range(ROUNDS):
        proposed = {where: value for each in left for where, value in (each.change or {}).items()}
        if proposed.items() <= changes.items():
            break
        changes |= proposed
        after = rewritten(before, changes)
        subject = subject.mended(configs.parse(yaml.safe_load(after), name=f"{path}, mended"))
        left = examine(subject, quick=quick)
    return Visit(found, left, changes, after)


def examine(subject: Subject, *, quick: bool = False) -> list[Finding]:
    """All checks in turn; what cannot be loaded is a finding, and the other checks go on."""
    _without_bars()
    task = subject.config.task
    found = [finding for check in (*CHECKS, *OF_TASK.get(task, ())) for finding in _answers(check, subject)]
    on_batches = (*BATCH_CHECKS, *ON_BATCHES_OF_TASK.get(task, ()))
    if not any(each.severity == "critical" for each in found):  # what cannot train takes no memory
        found += _answers(memory_suffices, subject)
    if quick:
        found.append(_not_measured("asked to be quick", on_batches))
    elif stops := [
        each
        for each in found
        if each.severity == "critical" and each.where.split(".")[0] in ("teacher", "student", "data")
    ]:
        found.append(_not_measured(f"{stops[0].where} comes first", on_batches))
    elif subject.config.teacher_stage:
        found.append(_not_measured("the teacher is trained first (teacher_stage)", on_batches))
    else:
        found += [finding for check in on_batches for finding in _answers(check, subject)]
    return ordered(found)


def faults(error: ConfigError) -> list[Finding]:
    """A config's faults, one finding each."""
    head, *lines = str(error).splitlines()
    if not re.search(r": \d+ faults?$", head):
        head, lines = "", [f"config: {error}"]
    split = [line.strip().partition(": ") for line in lines]
    return [
        Finding("critical", where, what, "the config cannot be read as it stands", "mend it by hand")
        for where, _, what in split
    ]


def _answers(check, subject: Subject) -> Iterator[Finding]:
    try:
        yield from check(subject)
    except Unavailable as error:
        yield Finding(
            "critical", error.where, str(error), "what depends on it could not be checked", "mend this first"
        )


def _not_measured(why: str, checks: Sequence[Callable[[Subject], Iterator[Finding]]]) -> Finding:
    names = ", ".join(check.__name__.replace("_", " ") for check in checks)
    return Finding(
        "note",
        "loss",
        f"{why}: the first batch was not measured",
        f"so these are open: {names}",
        "ask again without --quick" if why.startswith("asked") else "ask again when that is done",
    )


def _without_bars() -> None:
    """A progress bar for each file that is read is noise between findings."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
