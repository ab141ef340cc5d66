"""Random lives of runs: started, stopped, killed, gone on with, two at once, moved, copied, damaged.

The processes are real, with the real locks, notes, logs and checkpoints; what they train is nothing.  After
each event every run is as a model of it says, and what a checkpoint had is there.

LIVES=500 pytest tests/test_runs_lives.py   makes so many.
"""

import multiprocessing
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from made_log import logged, read_metrics
from made_runs import RAW

from kdlib.config.run import parse
from kdlib.errors import RunError, Stopped
from kdlib.reports.summary import UNREADABLE, summaries
from kdlib.runs import checkpoints, processes
from kdlib.runs.folder import Run, all_runs, clean, create, working
from kdlib.runs.log import append_metrics, cut_metrics
from kdlib.runs.progress import progress

LIVES = int(os.environ.get("LIVES", "60"))
CONFIG = parse(RAW)
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
TORN = ["", "{", "[1]", '{"state": "asleep"}']
WORKERS, NAMES = 3, st.sampled_from(["a", "b", "c"])
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + LIVES)]


class Work:
    """What a process does on a run, a deed at a time; it begins where the last whole checkpoint is."""

    def begin(self, path: str, whole: bool) -> None:
        self.run = Run(Path(path))
        inside = working(self.run, whole=whole)
        inside.__enter__()
        self.inside = inside
        try:
            checkpoint, _ = checkpoints.last_whole(self.run)
            cut_metrics(self.run, checkpoints.step_of(checkpoint))
        except RunError as error:
            self.end(error)
            raise

    def step(self, step: int) -> None:
        append_metrics(self.run, logged(step))

    def torn_step(self) -> None:
        with self.run.metrics.open("a") as file:
            file.write('{"train/st')

    def checkpoint(self, step: int, is_sealed: bool) -> None:
        folder = self.run.checkpoints / f"checkpoint-{step}"
        checkpoints.begin(folder)
        for name in FILES:
            (folder / name).write_text(name)
        if is_sealed:
            checkpoints.seal(self.run, folder)

    def history(self) -> None:
        self.run.history.write_text("[]")

    def end(self, error: BaseException | None) -> None:
        inside, self.inside = self.inside, None
        with suppress(type(error) if error else ()):
            inside.__exit__(error and type(error), error, None)

    def interrupt(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def create(self, root: str, name: str) -> None:
        create(Path(root), name, CONFIG)


def serve(pipe: Any) -> None:
    """The life of a process: it does what it is told, and says what came of it."""
    work = Work()
    while True:
        try:
            deed, given = pipe.recv()
            getattr(work, deed)(*given)
            said = None
        except KeyboardInterrupt as interrupt:
            work.end(interrupt)
            said = "interrupted"
        except RunError as error:
            said = str(error)
        except BaseException:
            said = f"BUG: {traceback.format_exc()}"
        pipe.send(said)


class Process:
    """A process of its own, as a kernel or a `kd run` is."""

    every: list["Process"] = []

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        Process.every.append(self)
        self.on: Life | None = None  # what it works on

    def does(self, deed: str, *given: Any) -> str | None:
        """What came of it: None, or the message of a RunError."""
        self.pipe.send((deed, given))
        return self.answer()

    def answer(self) -> str | None:
        said = self.pipe.recv()
        assert not (said or "").startswith("BUG"), said
        return said

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass
class Life:
    """What must be true of a run."""

    name: str
    state: str = "created"
    message: str = ""
    by: Process | None = None
    whole: bool = True
    before: tuple[str, str] = ("created", "")
    logged: list[int] = field(default_factory=list)
    sealed: int = 0
    is_begun: bool = False
    is_trained: bool = False
    is_torn: bool = False  # its status
    is_garbled: bool = False  # its log
    is_note_left: bool = False  # of a process that was killed
    is_lock_gone: bool = False  # while a process held it
    is_noted: bool = True  # how it stands, in its status

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.name)

    def ends(self, state: str, message: str = "") -> None:
        if self.by:
            self.by.on = self.by = None
            self.is_note_left = False
        self.state, self.message = state, message

    def loses_note(self) -> None:
        """After which nothing tells that a process was killed, where its status does not."""
        self.is_note_left = False
        if not (self.by or self.is_noted) and self.state == "died":
            self.ends("stopped" if self.is_begun else "created")

    def rests(self) -> None:
        """After a part that ended well."""
        state, message = self.before
        if state == "done" or self.is_trained:
            self.ends("done" if state == "done" else "trained")
        elif self.is_begun:
            self.ends(state, message) if state in ("stopped", "failed", "died") else self.ends("stopped")
        else:
            self.ends("created")


class Lives(RuleBasedStateMachine):
    """Three processes on three names."""

    idle: list[Process] = []  # from one life to the next: only who was killed is replaced

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="lives-")) / "runs"
        self.lives: dict[str, Life] = {}
        self.processes = [Lives.idle.pop() if Lives.idle else Process() for _ in range(WORKERS)]

    def run(self, life: Life) -> Run:
        return Run(self.root / life.name)

    def note(self, life: Life) -> Path:
        return self.root / f".{life.name}.lock.json"

    def is_note_whole(self, life: Life) -> bool:
        return self.note(life).exists() and len(self.note(life).read_text()) > len("[1]")

    def at_work(self) -> list[Process]:
        return [each for each in self.processes if each.on]

    def one_of(self, data: Any, found: list) -> Any:
        return data.draw(st.sampled_from(found))

    @rule(name=NAMES)
    def is_made_by_two_at_once(self, name):
        for each in [each for each in self.processes if not each.on][:2]:
            each.pipe.send(("create", (str(self.root), name)))
            said = each.answer()
            assert (said is not None) == (name in self.lives), said
            assert "exists already" in (said or "exists already")
            self.lives.setdefault(name, Life(name))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), whole=st.booleans())
    def starts(self, data, whole):
        life = self.one_of(data, [*self.lives.values()])
        if not (free := [each for each in self.processes if not each.on]):
            return
        said = free[0].does("begin", str(self.root / life.name), whole)
        if life.by:
            who = f"{processes.this_process()['host']}, process {life.by.process.pid}, since "
            who = who if self.is_note_whole(life) else "another process"
            assert said.startswith(f"run {life.name} is running already, on {who}")
            return
        before, life.is_note_left, life.is_lock_gone = (life.state, life.message), False, False
        if life.is_torn:
            assert "status.json: found" in said
            return
        if life.is_garbled:
            assert "metrics.jsonl: found a line that is no JSON" in said
            life.ends("failed", said)
            return
        assert said is None
        life.by, life.whole, life.before, life.is_noted, free[0].on = free[0], whole, before, True, life
        life.logged = [step for step in life.logged if step <= life.sealed]

    @precondition(lambda self: self.at_work())
    @rule(data=st.data(), count=st.integers(1, 3), seals=st.booleans())
    def trains(self, data, count, seals):
        each = self.one_of(data, self.at_work())
        for _ in range(count):
            step = len(each.on.logged) + 1
            assert each.does("step", step) is None
            each.on.logged.append(step)
            each.on.is_begun = True
        if seals:
            assert each.does("checkpoint", step, True) is None
            each.on.sealed = step

    @precondition(lambda self: self.at_work())
    @rule(data=st.data())
    def is_trained(self, data):
        each = self.one_of(data, [each for each in self.at_work() if each.on.logged] or [None])
        if each:
            assert each.does("history") is None
            each.on.is_trained = True

    @precondition(lambda self: self.at_work())
    @rule(data=st.data(), how=st.sampled_from(["well", "asked", "failed", "interrupted"]))
    def ends(self, data, how):
        each = self.one_of(data, self.at_work())
        life = each.on
        if how == "interrupted":
            assert each.does("interrupt") == "interrupted"
        else:
            errors = {"well": None, "asked": Stopped("as asked"), "failed": RunError("no such file")}
            said = each.does("end", errors[how])
            assert said is None or (life.is_torn and "status.json: found" in said), said
        life.is_noted = not life.is_torn
        if how == "well":
            life.ends("done") if life.whole else life.rests()
        elif how == "failed":
            life.ends("failed", "no such file")
        else:
            life.ends("stopped", "as asked" if how == "asked" else f"interrupted; {processes.go_on()}")

    @precondition(lambda self: self.at_work())
    @rule(data=st.data(), amid=st.sampled_from(["", "a line", "a checkpoint"]))
    def is_killed(self, data, amid):
        each = self.one_of(data, self.at_work())
        if amid == "a line" and not each.on.is_garbled:
            each.does("torn_step")
            each.on.is_begun = True
        if amid == "a checkpoint":
            each.does("checkpoint", len(each.on.logged) + 1, False)
        life = each.on
        is_note_left = self.is_note_whole(life)
        each.kill()
        is_told = life.is_noted or is_note_left  # else nobody can know that there was a process
        begun = "trained" if life.is_trained else "stopped" if life.is_begun else "created"
        life.ends("died" if is_told else begun, "the process that ran it is gone" * is_told)
        life.is_note_left = is_note_left
        self.processes[self.processes.index(each)] = Process()

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), name=NAMES, is_copied=st.booleans())
    def is_moved_or_copied(self, data, name, is_copied):
        life = self.one_of(data, [*self.lives.values()])
        if name in self.lives or (life.by and not is_copied):
            return
        (shutil.copytree if is_copied else Path.rename)(self.run(life).path, self.root / name)
        if is_copied:
            own = {**vars(life), "name": name, "by": None, "logged": [*life.logged]}
            self.lives[name] = Life(**own)
            if life.by and life.is_noted:
                self.lives[name].ends("died", "the process that ran it is gone")
            elif life.by:
                self.lives[name].ends(
                    "trained" if life.is_trained else "stopped" if life.is_begun else "created"
                )
            self.lives[name].loses_note()
        else:
            self.lives[name] = self.lives.pop(life.name)
            life.name = name
            life.loses_note()

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), content=st.sampled_from(TORN))
    def status_is_torn(self, data, content):
        life = self.one_of(data, [*self.lives.values()])
        (self.run(life).path / "status.json").write_text(content)
        life.is_torn = True

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), content=st.sampled_from(["", "{", "[1]", None]), of_lock=st.booleans())
    def a_note_or_a_lock_is_torn_or_deleted(self, data, content, of_lock):
        life = self.one_of(data, [*self.lives.values()])
        lock = self.root / f".{life.name}.lock"
        if life.by and (life.is_lock_gone or not self.is_note_whole(life)):
            return  # without both nobody could know any more
        life.is_lock_gone = of_lock
        path = lock if of_lock else self.note(life)
        if content is None or of_lock:
            path.unlink(missing_ok=True)
        else:
            path.write_text(content)
        if not of_lock:
            life.loses_note()

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def log_is_garbled(self, data):
        life = self.one_of(data, [*self.lives.values()])
        if not (life.by or life.is_garbled) and life.logged:
            with self.run(life).metrics.open("a") as file:
                file.write("\ngarbage\n")
            life.is_garbled = True

    @precondition(lambda self: any(each.is_torn or each.is_garbled for each in self.lives.values()))
    @rule()
    def is_mended_as_the_message_says(self):
        for life in self.lives.values():
            run = self.run(life)
            if life.is_torn:
                (run.path / "status.json").unlink()
                life.is_torn = life.is_noted = False
                if not life.by:
                    begun = "stopped" if life.is_begun else "created"
                    state = "trained" if life.is_trained else "died" if life.is_note_left else begun
                    life.ends(state, "the process that ran it is gone" * (state == "died"))
            if life.is_garbled:
                whole = [
                    line for line in run.metrics.read_bytes().splitlines(keepends=True) if line[:1] == b"{"
                ]
                run.metrics.write_bytes(b"".join(line for line in whole if line.endswith(b"}\n")))
                life.is_garbled = False

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def is_cleaned(self, data):
        life = self.one_of(data, [*self.lives.values()])
        if life.is_torn or life.by:
            return
        run = self.run(life)
        if run.noted["state"] == "done":
            clean(run)
            assert not run.checkpoints.exists()
            life.sealed = 0
        else:
            with pytest.raises(RunError, match=f"is {run.noted['state']}, not done"):
                clean(run)
        life.loses_note()

    @invariant()
    def every_run_is_as_its_model_says(self):
        assert {run.name for run in all_runs(self.root)} == {*self.lives}
        for life in self.lives.values():
            run = self.run(life)
            if life.is_torn:
                with pytest.raises(RunError, match=r"status.json: found .*bring back a copy, or delete it"):
                    _ = run.status
                continue
            expected = "running" if life.by else life.state
            status = run.status
            assert (life.name, status["state"]) == (life.name, expected)
            assert status["message"] == ("" if life.by else life.message)
            if not life.is_garbled:
                steps = [line["train/step"] for line in read_metrics(run)]
                assert steps == life.logged
                assert checkpoints.step_of(checkpoints.last_whole(run)[0]) == (life.sealed or -1)

    def teardown(self):
        expected = {name: "running" if life.by else life.state for name, life in self.lives.items()}
        for name, life in self.lives.items():
            if life.is_torn or life.is_garbled:
                expected[name] = UNREADABLE
            elif self.run(life).metrics.exists():
                shown = progress(self.run(life)).state
                assert shown == expected[name] or (shown == "trained" and life.is_trained)
        assert {each.name: each.state for each in summaries(self.root)} == expected
        for each in self.processes:
            if each.on:
                each.kill()
            else:
                Lives.idle.append(each)
        shutil.rmtree(self.root.parent)


def test_random_lives_lose_nothing_and_are_told_truly(monkeypatch):
    monkeypatch.setattr(processes, "LOOK_S", 0.01)
    monkeypatch.setattr(processes, "LINGERS_S", 0.0)
    monkeypatch.setattr(os, "fsync", lambda number: None)  # no power is cut
    options: dict[str, Callable | Any] = {
        "max_examples": LIVES,
        "stateful_step_count": 16,
        "deadline": None,
        "phases": [Phase.generate],
    }
    try:
        run_state_machine_as_test(
            Lives,
            settings=settings(
                **options, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
            ),
        )
    finally:
        for each in Process.every:
            each.kill()
