"""One process at a time works on a run, and the next is told which; a polite kill is an interrupt."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from made_log import stands

from kdlib.config.run import parse
from kdlib.errors import Died, RunError, Stopped
from kdlib.runs import folder as runs
from kdlib.runs.files import go_on, going_on
from kdlib.runs.folder import Run, working
from kdlib.runs.processes import heard, held, is_free, this_process
from kdlib.runs.states import STATES

HOLD = """
import sys, time
from pathlib import Path
from kdlib.runs.processes import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ASK = """
import sys
from pathlib import Path
from kdlib.runs.processes import held
with held(Path(sys.argv[1])):
    pass
"""


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    return runs.create(tmp_path / "runs", "first", parse(raw_config))


@pytest.fixture
def holder(run):
    """Starts a process that holds the run's lock; none outlives the test."""
    started = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(run.path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_told_who_holds_the_run(run, holder):
    first, me = holder(), this_process()
    assert not is_free(run.path)
    who = rf"run first is running already, on {me['host']}, process {first.pid}, since 20\d\d-.*; wait for it"
    for folder in (run.path, run.baseline.path):
        with pytest.raises(RunError, match=who), held(folder):
            pass
    with pytest.raises(RunError, match=who), working(run):
        pass
    assert run.noted["state"] == "created"  # who is refused writes nothing
    assert run.status["state"] == "running"  # and all see that somebody works on it
    first.kill()
    first.wait()
    assert is_free(run.path)
    with held(run.path):
        assert not is_free(run.path)
    assert is_free(run.path)


def test_what_the_holder_starts_works_on_its_behalf_and_it_may_hold_twice(run):
    with held(run.path), held(run.baseline.path):
        subprocess.run([sys.executable, "-c", ASK, str(run.path)], check=True)
    assert is_free(run.path)


def test_a_note_that_a_killed_process_left_makes_nobody_its_child(run):
    """Process numbers come again, as 1 in each container."""
    parent = {**this_process(), "pid": os.getppid(), "pid_started": 0.0, "since": "long ago"}
    runs.write_json(run.path.with_name(".first.lock.json"), parent)
    with held(run.path):
        assert not is_free(run.path)
    assert not run.path.with_name(".first.lock.json").exists()


def test_who_waits_is_told_for_whom(run, holder):
    first, told = holder(), []
    with held(run.path, wait=lambda who: (told.append(who), first.kill(), first.wait())):
        pass
    assert f"process {first.pid}, since" in told[0]


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (Stopped("x"), "stopped"), (KeyboardInterrupt("x"), "stopped"), (Died("x"), "died")]
    + [(RunError("x"), "failed"), (MemoryError("x"), "failed")],
)
def test_a_run_says_that_it_is_worked_on_and_how_that_ended(run, error, state):
    shown = []
    raised = pytest.raises(type(error), match="^x$") if error else nullcontext()
    with raised, working(run, failed=lambda run: shown.append(run.status["state"])):
        assert run.status["state"] == "running"
        if error:
            raise error
    assert (run.status["state"], run.status["message"]) == (state, "x" if error else "")
    is_reported = error and not isinstance(error, KeyboardInterrupt)  # who insists does not wait for a page
    assert shown == ([state] if is_reported else [])


def test_a_part_that_ends_well_leads_to_where_the_files_stand(run):
    """As notebooks that are run by hand: setup, a training, the comparison, and each of them again."""

    def after(part=lambda: None) -> tuple[str, str]:
        with working(run, whole=False):
            assert run.status["state"] == "running"
            with working(run):  # what a part consists of says nothing
                part()
            assert run.status["state"] == "running"
        return run.status["state"], run.status["message"]

    assert after() == ("created", "")
    with pytest.raises(RunError), working(run, whole=False):
        raise RunError("no such file")
    assert run.status["state"] == "failed"
    assert after() == ("created", "")  # what failed is made good
    run.metrics.touch()
    with pytest.raises(Stopped), working(run, whole=False):
        raise Stopped("at step 4")
    assert after() == ("stopped", "at step 4")  # a look at the first steps again trains it no further
    assert after(lambda: run.history.write_text("[]")) == ("trained", "")
    run.finish()
    assert run.status["state"] == "done"
    assert after() == ("done", "")


def test_a_state_that_cannot_follow_is_an_error_of_ours(run):
    for before, after in ((before, after) for before in STATES for after in STATES):
        with held(run.path):
            run._note(before)
            if after in STATES[before].then:
                run.set_status(after)
                assert run.noted["state"] == after
                continue
            with pytest.raises(ValueError, match=f"a run that is {before} is never {after} next"):
                run.set_status(after)
            assert run.noted["state"] == before


def test_a_run_that_was_copied_or_moved_while_it_ran_does_not_run_there(run):
    with working(run):
        copy = Run(Path(shutil.copytree(run.path, run.path.with_name("copy"))))
        assert copy.status["state"] == "died"
        with working(copy):  # and can go on
            assert (run.status["state"], copy.status["state"]) == ("running", "running")
    assert (run.status["state"], copy.status["state"]) == ("done", "done")


def test_a_lock_that_somebody_deletes_still_keeps_others_out_and_a_torn_note_harms_nobody(run, holder):
    first, lock = holder(), run.path.with_name(".first.lock")
    lock.unlink()
    with pytest.raises(RunError, match=f"is running already, on .*process {first.pid},"), held(run.path):
        pass
    first.kill()
    first.wait()
    lock.with_name(".first.lock.json").write_text("{")
    with working(run):
        lock.with_name(".first.lock.json").unlink()
        assert run.status["state"] == "running"
    assert run.status["state"] == "done"


def test_a_run_of_another_machine_is_not_said_to_have_died(run):
    stands(run, "running", host="elsewhere", pid=1)
    assert run.status["state"] == "running"


@pytest.mark.parametrize(
    ("signals", "torchrun", "expected"),
    [
        (["INT"], False, "ask"),
        (["TERM"], False, "ask"),
        (["INT", "INT"], False, "ask again"),
        (["TERM", "INT"], False, "ask"),
        (["INT", "TERM"], False, "ask"),
        (["TERM", "TERM"], False, "ask"),
        (["TERM", "INT", "INT"], False, "ask again"),
        (["INT", "INT"], True, "ask"),
    ],
)
def test_a_polite_kill_is_an_interrupt_and_only_a_second_ctrl_c_insists(
    monkeypatch, signals, torchrun, expected
):
    """A scheduler tells a command and its children, which pass it on; so does torchrun with Ctrl-C."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    heared = []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with heard(lambda: heared.append("ask"), lambda: heared.append("again")):
        for name in signals:
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
            time.sleep(0.01)
    assert " ".join(heared) == expected
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_way_on_is_that_of_the_command(monkeypatch):
    assert go_on() == "go on with --resume, or run this cell again"
    with going_on("go on with kd train x"):
        said = subprocess.run(
            [sys.executable, "-c", "from kdlib.runs.files import go_on; print(go_on())"],
            capture_output=True,
            text=True,
            cwd=Path.cwd(),
        )
        assert said.stdout == "go on with kd train x\n"
    assert go_on() == "go on with --resume, or run this cell again"
