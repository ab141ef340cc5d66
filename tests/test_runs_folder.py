import os
import subprocess
import sys
import time

import psutil
import pytest
from made_log import stands

from kdlib.config.run import BESIDE, parse
from kdlib.errors import RunError
from kdlib.reports import run as reports
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run, clean
from kdlib.runs.processes import PARENT
from kdlib.runs.progress import edits


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    return runs.create(tmp_path / "runs", "first", parse(raw_config))


def test_a_new_run_holds_its_resolved_config_and_a_manifest(run, raw_config):
    assert run.config == parse(raw_config)
    assert run.manifest["run"] == "first"
    assert run.status["state"] == "created"


def test_a_runs_config_that_a_person_edits_is_read_as_any_config_and_said_to_be_changed(run):
    assert edits(run) == []
    path = run.path / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("text: text", "text: 2024-01-01").replace("seed: 0", "seed: 010"))
    assert run.config.data.text == "2024-01-01"
    assert run.config.seed == 10
    lines = ["data.text: text -> 2024-01-01", "seed: 0 -> 10"]
    assert sorted(edits(run)) == lines
    page = reports.render(run, run.path.parent / "reports").read_text()
    assert "config.yaml by hand since it was made" in page
    assert all(line.replace(">", "&gt;") in page for line in lines)
    path.write_text(f"{text}\nseed: 1\n")
    with pytest.raises(RunError, match=r"(?s)config.yaml: .*'seed' stands twice .*bring back a copy"):
        _ = run.settings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("first", "exists already; choose another --name, or go on"),
        ("a/b", "use letters"),
        (".x", "no leading dot"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(run, raw_config, name, expected):
    with pytest.raises(RunError, match=expected):
        runs.create(run.path.parent, name, parse(raw_config))


def test_a_run_goes_on_only_with_the_settings_it_was_made_with(run, raw_config):
    assert runs.open_run(run.path.parent, "first", parse(raw_config)) == run
    with pytest.raises(RunError, match="other settings.*\n  loss.temperature: 2.0 -> 3.0"):
        runs.open_run(run.path.parent, "first", parse(raw_config, ["loss.temperature=3"]))


@pytest.mark.parametrize("change", ["launch.processes=2", "trackers.entity=other"])
def test_who_hears_of_a_run_and_how_many_train_it_make_no_other_run_and_hold_from_then_on(
    run, raw_config, change
):
    assert change.partition(".")[0] in BESIDE
    changed = parse(raw_config, [change])
    for state, expected in [("done", run.config), ("running", run.config), ("stopped", changed)]:
        stands(run, state)
        assert runs.open_run(run.path.parent, "first", changed).config == expected, state


def test_a_run_that_is_not_there_names_the_nearest(run):
    with pytest.raises(RunError, match="no run 'frist'.*did you mean 'first'"):
        runs.open_run(run.path.parent, "frist")


def test_a_running_run_whose_process_is_gone_has_died(run):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        stands(run, "running", pid=process.pid, pid_started=psutil.Process(process.pid).create_time())
        assert run.status["state"] == "running"
    assert run.status["state"] == "died"
    assert run.status["message"] == "the process that ran it is gone"


def test_a_killed_process_that_nobody_has_buried_is_gone_too(run):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = psutil.Process(process.pid).create_time()
    stands(run, "running", pid=process.pid, pid_started=started)
    assert run.status["state"] == "running"
    process.kill()
    until = time.monotonic() + 10
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
    assert run.status["state"] == "died"
    process.wait()


def test_only_a_run_that_is_done_loses_its_checkpoints(run):
    for folder in (run, run.baseline):
        (folder.checkpoints / "checkpoint-4").mkdir(parents=True)
        (folder.checkpoints / "checkpoint-4" / "weights").write_bytes(bytes(1000))
    stands(run, "stopped", "stopped at step 4")
    with pytest.raises(
        RunError, match="is stopped, not done: it may go on from its checkpoints with --resume"
    ):
        clean(run)
    stands(run, "done")
    assert clean(run) >= 2000
    assert not run.checkpoints.exists()
    assert not run.baseline.checkpoints.exists()
    assert clean(run) == 0


def test_a_status_that_cannot_be_written_says_so(run):
    (run.path / f"status.json.{os.getpid()}.tmp").mkdir()
    with pytest.raises(RunError, match="cannot write .*status.json"):
        run.set_status("running")


def test_a_folder_that_cannot_be_written_says_so(raw_config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write .*choose a folder you can write to with --runs"):
        runs.create(tmp_path / "file" / "runs", "x", parse(raw_config))


def test_the_project_is_found_from_its_notebooks(monkeypatch):
    root = runs.project_root()
    monkeypatch.chdir(root / "notebooks")
    assert runs.project_root() == root
    assert not runs.headless()
    monkeypatch.setitem(os.environ, PARENT, "kd")
    assert runs.headless()


def test_runs_made_in_the_same_second_have_names_of_their_own(tmp_path):
    names = []
    for _ in range(3):
        names.append(runs.new_name(tmp_path, "configs/mine.yaml"))
        (tmp_path / names[-1]).mkdir()
    assert len(set(names)) == 3
    assert all(name.startswith("mine_") for name in names)


@pytest.mark.parametrize(
    ("file", "begins"),
    [
        ("my config.yaml", "my_config_20"),
        ("lr=1e-4,T=2.yaml", "lr=1e-4_T=2_20"),
        ("größe 1.yaml", "größe_1_20"),
        ("x" * 300 + ".yaml", "x" * 80 + "_20"),
        ("... .yaml", "run_20"),
    ],
)
def test_a_run_gets_a_name_that_a_folder_can_have(tmp_path, raw_config, file, begins):
    name = runs.new_name(tmp_path, file)
    assert name.startswith(begins)
    assert runs.create(tmp_path, name, parse(raw_config)).name == name
