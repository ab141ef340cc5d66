"""Run folders: what a run made, in files that people and programs read.

runs/<run>/  config.yaml  manifest.json  status.json  plan.json  metrics.jsonl  history.json  evaluations/
             best_model/  final_model/  checkpoints/  notebooks/  baseline/ (a student's folder again)
"""

import datetime
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from kdlib.config.reading import differences, read_text, read_yaml
from kdlib.config.run import BESIDE, Config, parse
from kdlib.errors import ConfigError, Died, RunError, Stopped, nearest, refuse_keys, shown, without_controls
from kdlib.metrics.names import is_comparison
from kdlib.runs import processes, states
from kdlib.runs.checkpoints import removed_from
from kdlib.runs.files import (
    WHOLE,
    StudentFolder,
    commit,
    now,
    project_root,
    read_json,
    write_json,
    write_text,
    writing,
)
from kdlib.runs.processes import headless, heard_at_once, held, holder_of, this_process
from kdlib.runs.states import ILL, STATES


@dataclass(frozen=True)
class Run(StudentFolder):
    """One run's folder; itself the folder of the distilled student."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def baseline(self) -> StudentFolder:
        return StudentFolder(self.path / "baseline")

    @property
    def notebooks(self) -> Path:
        return self.path / "notebooks"

    @property
    def code(self) -> Path:
        """Where its models' programs are: completions.jsonl, verdicts.json, results.json."""
        return self.path / "code"

    @property
    def config(self) -> Config:
        return _resolved(*self._config_file)

    @property
    def settings(self) -> dict[str, Any]:
        """config.yaml as it stands there, also of another version, or a benchmark's."""
        return _read(*self._config_file)

    @property
    def _config_file(self) -> tuple[Path, int]:
        path = self.path / "config.yaml"  # resolved
        return path, path.stat().st_mtime_ns

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json", {})

    @property
    def status(self) -> dict[str, Any]:
        """{"state": one of STATES, "since": …, "message": …}, as all who look at the run are to see it."""
        noted, by = self._noted()
        left = {"is_begun": self.metrics.exists(), "is_trained": self.is_trained}
        return states.put(noted, states.seen(noted["state"], by=by, **left))

    @property
    def noted(self) -> dict[str, Any]:
        """What status.json says: what its next state follows on."""
        return self._noted()[0]

    def _noted(self) -> tuple[dict[str, Any], str]:
        """And who works, or worked, on the run since, as `states.seen` has it."""
        path = self.path / "status.json"
        status = read_json(path, {"state": "created", "message": ""})
        if (said := status.get("state")) not in STATES:
            need = f"it is one of {', '.join(STATES)}"
            raise RunError(f"{path}: found the state {shown(said)}; {need}; {WHOLE}")
        is_held, is_own, is_gone = processes.hold_on(self.path, status)
        by = "gone" if is_gone else "lives" if is_held and not is_own else ""
        return states.put(status, states.noted(said, lives=is_own)), by

    @property
    def comparison(self) -> dict[str, Any] | None:
        """comparison_results.json; None where nothing was compared.

        Raises:
            RunError: it is not of a student and another model.
        """
        path = self.path / "comparison_results.json"
        if (results := read_json(path)) and not is_comparison(results):
            need = "it needs models, the student and another, and their differences; run 03_compare again"
            raise RunError(f"{path}: found no comparison; {need}, or delete it")
        return results or None

    def set_status(self, state: str, message: str = "") -> None:
        """Note how the run stands from now on; a ValueError where that cannot follow on how it stood."""
        states.check(self.status["state"], state)
        self._note(state, message)

    def _note(self, state: str, message: str = "") -> None:
        status = {"state": state, "message": without_controls(message), "since": now(), **this_process()}
        write_json(self.path / "status.json", status)

    def put_config(self, config: Config) -> None:
        """Write config.yaml, and what it says into the manifest too: see `progress.edits`."""
        write_text(self.path / "config.yaml", config.as_yaml())
        self.add_to_manifest(settings=config.as_dict())

    def add_to_manifest(self, **entries: Any) -> None:
        write_json(self.path / "manifest.json", {**self.manifest, **entries})

    def finish(self) -> None:
        """Mark a run made by hand as done; the command that runs notebooks does it itself."""
        if not headless():
            with working(self):
                pass


@contextmanager
def working(run: Run, failed: Callable[[Run], object] = bool, *, whole: bool = True) -> Iterator[None]:
    """Inside, this process alone works on the run; status.json says that it does, and how it ended.

    What that process does or starts meanwhile is part of it: who began says how it ended.

    Args:
        failed: called after that with the run, where it did not end well, and was not ended at once.
        whole: the run is done after that, and not only a part of it, as in a notebook that is run by hand.

    Raises:
        RunError: another process works on it.
    """
    holder = holder_of(run.path)
    if processes.started_this(holder) or (processes.is_this(holder) and run.noted["state"] == "running"):
        yield
        return
    with held(run.path), heard_at_once():
        states.check((before := run.noted)["state"], "running")
        run._note("running")
        try:
            yield
        except BaseException as error:
            asked = isinstance(error, (Stopped, KeyboardInterrupt))
            state = "stopped" if asked else "died" if isinstance(error, Died) else "failed"
            with suppress(RunError):  # a full disk must not hide what went wrong
                run.set_status(state, str(error) or type(error).__name__)
                if not isinstance(error, KeyboardInterrupt):  # whom nobody is to wait for
                    failed(run)
            raise
        facts = {"is_begun": run.metrics.exists(), "is_trained": run.is_trained}
        state = "done" if whole else states.at_rest(before["state"], **facts)
        run.set_status(state, before.get("message", "") if state in ILL else "")


def part(method: Callable) -> Callable:
    """Of something that has a `run`: what this method does is a part of it, see `working`."""

    @wraps(method)
    def worked(self, *given, **options):
        with working(self.run, whole=False):
            return method(self, *given, **options)

    return worked


def new_name(root: Path, config_path: str | Path, *, smoke: bool = False) -> str:
    """`quickstart_20260131_235959`, of letters fit for a folder; where that second has it, with _2, _3, …"""
    stem = re.sub(r"[^\w.+=-]+", "_", Path(config_path).stem).strip("._")[:80] or "run"
    name = f"{stem}{'-smoke' * smoke}_{datetime.datetime.now():%Y%m%d_%H%M%S}"
    taken = sum(path.name.startswith(name) for path in root.glob("*"))
    return f"{name}_{taken + 1}" if taken else name


def create(root: Path, name: str, config: Config, **origin: Any) -> Run:
    """Make a new run's folder with its resolved config; `origin` goes into its manifest.

    Raises:
        ConfigError: the config or its origin holds a key.
        RunError: the name is taken or unfit for a folder, or the disk refuses.
    """
    check_new(root, name)
    refuse_keys([config.as_dict(), origin])
    made = Run(root / f".{os.getpid()}.new")  # a kill leaves no half of a run
    shutil.rmtree(made.path, ignore_errors=True)
    try:
        with writing(root / name):
            made.notebooks.mkdir(parents=True)
        made.put_config(config)
        made.add_to_manifest(run=name, created=now(), commit=commit(), **origin)
        made._note("created")
        check_new(root, name)
        with writing(root / name):
            made.path.rename(root / name)
    except RunError:
        shutil.rmtree(made.path, ignore_errors=True)
        raise
    return Run(root / name)


def check_new(root: Path, name: str) -> None:
    """Raise a RunError where this name cannot become a new run."""
    if not re.fullmatch(r"[\w.+=-]+", name) or name.startswith("."):
        raise RunError(f"run name {name!r}: use letters, digits and . _ - + = only, and no leading dot")
    if (root / name).exists():
        advice = f"choose another --name, or go on with it by --resume {name}"
        raise RunError(f"run {name!r} exists already; {advice}")


def open_run(root: Path, name: str, config: Config | None = None) -> Run:
    """An existing run; with `config`, only if it was made with the same settings, but for those in BESIDE.

    Such a run, where it is to go on, goes on with the `launch` and the `trackers` of `config`.

    Raises:
        RunError: there is no such run, or its settings differ (the message lists how).
    """
    run = Run(root / name)
    if not (run.path / "config.yaml").exists():
        raise RunError(f"no run {name!r} in {root}{nearest(name, (r.name for r in all_runs(root)))}")
    if config and (lines := differences(run.config.without(*BESIDE), config.without(*BESIDE))):
        raise RunError(
            f"run {name!r} was made with other settings, so it cannot go on with these:\n  "
            + "\n  ".join(lines)
            + "\ngive the settings it was made with, or start a new run"
        )
    if config and config != run.config and run.status["state"] not in ("running", "done"):
        run.put_config(config)
    return run


def clean(run: Run) -> int:
    """Delete the checkpoints of a run that is done, which only serve to go on; returns the bytes freed.

    Raises:
        RunError: the run is not done.
    """
    with held(run.path):
        if (state := run.noted["state"]) != "done":
            advice = "it may go on from its checkpoints with --resume; or delete them by hand"
            raise RunError(f"run {run.name} is {state}, not done: {advice}")
        return removed_from(run, run.baseline)


def default_root() -> Path:
    return project_root() / "runs"


def locate(run: str, root: Path | None = None) -> tuple[Path, str]:
    """A run's name, sought in `root`, or its folder as seen from here, as (the folder of runs, name)."""
    if os.sep not in run:
        return root or default_root(), run
    path = Path(run).absolute()
    return path.parent, path.name


def all_runs(root: Path) -> list[Run]:
    """Every run below this folder, newest first."""
    found = [Run(path.parent) for path in root.glob("[!.]*/config.yaml")]
    return sorted(found, key=lambda run: (_created(run), run.name), reverse=True)


def _created(run: Run) -> str:
    """As its manifest says; nothing where that is broken, which who opens the run is told."""
    with suppress(RunError):
        return str(run.manifest.get("created", ""))
    return ""


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> dict[str, Any]:
    try:
        found = read_yaml(read_text(path), str(path))
    except ConfigError as error:
        raise RunError(f"{error}; {WHOLE}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path}: found {type(found).__name__}, needs sections; {WHOLE}")
    return found


@lru_cache(maxsize=64)
def _resolved(path: Path, changed: int) -> Config:
    return parse(_read(path, changed), name=str(path))
