"""The doctor: what is wrong with a config before it trains, and what of that can be changed in its file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from kdlib.config import run as configs
from kdlib.config.reading import pairs, read_yaml
from kdlib.config.run import Config
from kdlib.config.sections import flow
from kdlib.diagnostics import data_checks
from kdlib.diagnostics.config_checks import CONFIG_CHECKS
from kdlib.diagnostics.context import Context, Finding, Findings, Unavailable, answered, as_text, ordered
from kdlib.diagnostics.memory import forecast
from kdlib.diagnostics.model_checks import BATCH_CHECKS, MODEL_CHECKS, memory_suffices
from kdlib.errors import ConfigError
from kdlib.tasks.base import task_of

CHECKS = (*CONFIG_CHECKS, *MODEL_CHECKS)
"""In the order in which they are made; the task's own, `memory_suffices` and `BATCH_CHECKS` follow."""
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
        left = f"\n\nchanged:{changed}\n\nleft to you:\n\n{as_text(self.left)}" if self.changes else ""
        return as_text(self.found) + left

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found, left = ([asdict(each) for each in some] for some in (self.found, self.left))
        return {"found": found, "changes": dict(self.changes), "left": left}

    def exit_status(self, *, strict: bool) -> int:
        """2 with a critical finding, 1 with a warning where `strict`, else 0; notes do not count."""
        left = {each.severity for each in self.left}
        return 2 if "critical" in left else 1 if strict and "warning" in left else 0


def diagnose(config: Config, *, quick: bool = False, made: Mapping[str, Any] | None = None) -> list[Finding]:
    """What the doctor finds, the gravest first; [] for a config that is well.

    Args:
        quick: leave out what needs the models' weights.
        made: what is loaded already, by the names of Context's properties: tokenizer, prepared, teacher, ….
    """
    return examine(Context(config, made), quick=quick)


def visit(
    path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False, fix: bool = False
) -> Visit:
    """`diagnose` for a file; where that has faults itself, they are critical, and nothing else is looked at.

    With `fix` the returned text has the overrides and all that findings propose; no file is written.
    """
    try:
        context = Context(configs.load(path, overrides))
    except ConfigError as error:
        return Visit(faults(error), faults(error), {}, None)
    before = Path(path).read_text(encoding="utf-8")
    found = left = examine(context, quick=quick)
    if not fix:
        return Visit(found, left, {}, before)
    changes = dict(pairs(overrides))
    after = rewritten(before, changes)
    for _ in range(ROUNDS):
        proposed = {where: value for each in left for where, value in (each.change or {}).items()}
        if proposed.items() <= changes.items():
            break
        changes |= proposed
        after = rewritten(before, changes)
        context = context.mended(configs.parse(read_yaml(after, str(path)), name=f"{path}, mended"))
        left = examine(context, quick=quick)
    return Visit(found, left, changes, after)


def examine(context: Context, *, quick: bool = False) -> list[Finding]:
    """All checks in turn; what cannot be loaded is a finding, and the other checks go on."""
    datasets.disable_progress_bars()  # one for each file that is read is noise between findings
    transformers.utils.logging.disable_progress_bar()
    task = task_of(context.config)
    on_batches = (*BATCH_CHECKS, *map(_named, task.checks_on_batches))
    found = [each for check in (*CHECKS, *map(_named, task.checks)) for each in _answers(check, context)]
    if not any(each.severity == "critical" for each in found):  # what cannot train takes no memory
        found += _answers(partial(memory_suffices, forecast=forecast), context)
    grave = [each.where for each in found if each.severity == "critical"]
    stops = [where for where in grave if where.split(".")[0] in ("teacher", "student", "data")]
    do = "ask again when that is done"
    if quick:
        why, do = "asked to be quick", "ask again without --quick"
    elif stops:
        why = f"{stops[0]} comes first"
    elif context.config.teacher_stage:
        why = "the teacher is trained first (teacher_stage)"
    else:
        return ordered([*found, *(each for check in on_batches for each in _answers(check, context))])
    open_yet = ", ".join(check.__name__.replace("_", " ") for check in on_batches)
    why = f"{why}: the first batch was not measured"
    return ordered([*found, Finding("note", "loss", why, f"so these are open: {open_yet}", do)])


def faults(error: ConfigError) -> list[Finding]:
    """A config's faults, one finding each."""
    head, *lines = str(error).splitlines()
    if not re.search(r": \d+ faults?$", head):
        lines = [f"config: {error}"]
    why, do = "the config cannot be read as it stands", "mend it by hand"
    split = (line.strip().partition(": ") for line in lines)
    return [Finding("critical", where, what, why, do) for where, _, what in split]


def _named(check: Any) -> Any:
    """A task's check: its own, or one of kdlib.diagnostics.data_checks by its name."""
    return getattr(data_checks, check) if isinstance(check, str) else check


def _answers(check, context: Context) -> Findings:
    try:
        with answered("doctor", getattr(check, "func", check).__name__):
            yield from check(context)
    except Unavailable as error:
        if error.is_absent:
            return
        why, do = "what depends on it could not be checked", "mend this first"
        if error.is_unforeseen:
            do = "see whether models and rows are whole and of the right kind: a training would meet the same"
            do += (
                "; if they are, it is a fault of kdlib's: report it, and kd run --anyway trains all the same"
            )
        yield Finding("critical", error.where, str(error), why, do)


def rewritten(text: str, changes: Mapping[str, Any]) -> str:
    """The YAML text with each value put in at its dotted path; every other character stays as it is.

    Sections on the way are made where they are missing.  A new key stands before the last of its section,
    since what follows the last may be the next section's comment.  No key stands there twice.
    """
    for path, value in changes.items():
        text = _put(text, path.split("."), value)
    return text


def _put(text: str, path: Sequence[str], value: Any) -> str:
    node, start = yaml.compose(text), 0  # the value, and where what stands before it ends
    for depth, name in enumerate(path):
        if isinstance(node, yaml.SequenceNode):
            node = node.value[int(name)]
            start = node.start_mark.index
            continue
        rest = value
        for key in reversed(path[depth + 1 :]):
            rest = {key: rest}
        if not isinstance(node, yaml.MappingNode) or not node.value:  # null, or {}
            return _replaced(text, node, start, {name: rest})
        keys = [key.value for key, _ in node.value]
        if name not in keys:
            return _inserted(text, node, f"{name}: {flow(rest)}")
        key, node = node.value[keys.index(name)]
        start = text.index(":", key.end_mark.index) + 1
    return _replaced(text, node, start, value)


def _inserted(text: str, section: yaml.MappingNode, line: str) -> str:
    """The text with another key and value before the last of a section, or after its only one."""
    last = section.value[-1][0].start_mark
    if section.flow_style:
        return f"{text[: last.index]}{line}, {text[last.index :]}"
    indented = "\n" + " " * last.column
    if len(section.value) > 1:
        return f"{text[: last.index]}{line}{indented}{text[last.index :]}"
    after = _end(section)
    end = after + len(text[after:].partition("\n")[0])
    return f"{text[:end]}{indented}{line}{text[end:]}"


def _replaced(text: str, node: yaml.Node, start: int, value: Any) -> str:
    """The text with another value in place of a node, which begins somewhere after `start`."""
    begin = node.start_mark.index
    before = text[:begin] if begin > start and text[start:begin].strip(" ") == "" else f"{text[:start]} "
    return f"{before}{flow(value)}{text[_end(node) :]}"


def _end(node: yaml.Node) -> int:
    """Where a node ends: in block style with its last scalar, before what stands between it and the next."""
    while not isinstance(node, yaml.ScalarNode) and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return node.end_mark.index
