"""Several processes that `kd run --processes` starts give what one gives; one that dies is named."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import kd_process, tiny_experiment
from made_log import read_metrics
from safetensors.torch import load_file
from tiny_training import comparable

from kdlib.config.run import parse
from kdlib.errors import ConfigError, Died, ModelError, Stopped
from kdlib.models import sharing
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run, project_root
from kdlib.sweeps.config import SweepConfig
from kdlib.sweeps.trials import Base
from kdlib.training.plan import check_processes, extent, training_arguments
from kdlib.training.run import share_step
from kdlib.workbench import session, teacher_stage

SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 60}
TRAINING = {**SGD, "save_steps": 10, "eval_steps": 20, "save_total_limit": 9}
WITHIN_S = 60.0  # of a death all others have stopped


@pytest.mark.parametrize("processes", [0, -1, 1.5, "many", True, None])
def test_a_number_of_processes_that_is_none_is_refused(raw_config, processes):
    with pytest.raises(
        ConfigError, match=r"launch.processes: found .*; it is a number of 1 or more, or auto"
    ):
        parse({**raw_config, "launch": {"processes": processes}})


def test_auto_is_one_process_for_each_gpu_and_more_than_those_are_refused(monkeypatch):
    assert [sharing.ranks_of(wanted, "cpu") for wanted in (1, "auto", 3)] == [1, 1, 3]
    monkeypatch.setattr(sharing, "device_of", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [sharing.ranks_of(wanted, "cuda") for wanted in (1, "auto", 2)] == [1, 4, 2]
    with pytest.raises(ConfigError, match="found 8, needs a GPU for each, and here are 4; write 4, or auto"):
        sharing.ranks_of(8, "cuda")


def test_more_processes_than_rows_are_refused_before_a_run_is_made(raw_config):
    config = parse(
        {**raw_config, "data": {**raw_config["data"], "max_train_rows": 3}, "launch": {"processes": 4}}
    )
    with pytest.raises(ConfigError, match="found 3 rows, needs one for each of 4 processes"):
        teacher_stage.preflight(config)


def test_what_needs_several_processes_is_refused_for_one_alone(raw_config, tmp_path):
    args = training_arguments(parse(raw_config), tmp_path)
    assert (extent(args, 64, 2).batches, extent(args, 64).batches) == (8, 16)
    args.fsdp = "full_shard"
    with pytest.raises(ConfigError, match="found on cpu ranks"):  # so several are not the fault
        check_processes(args, 2)
    with pytest.raises(ConfigError, match="with one process; needed are several, by --processes N"):
        check_processes(args)


@pytest.mark.parametrize(
    ("before", "now", "each", "expected"),
    [
        (None, 1, (4, 2), (4, 2)),
        (None, 3, (4, 2), (4, 2)),
        (2, 2, (4, 2), (4, 2)),
        (2, 1, (4, 1), (4, 2)),
        (1, 2, (4, 2), (4, 1)),
        (1, 2, (4, 1), (2, 1)),
        (4, 6, (3, 2), (1, 4)),
        (2, 3, (4, 1), None),
    ],
)
def test_a_step_has_the_rows_that_it_had_with_other_processes(before, now, each, expected):
    args = SimpleNamespace(
        world_size=now, per_device_train_batch_size=each[0], gradient_accumulation_steps=each[1]
    )
    if expected is None:
        with pytest.raises(ConfigError, match=r"8 rows a step, .* 2 process.*, cannot be shared by 3"):
            share_step(args, before)
        return
    said = share_step(args, before)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == expected
    rows = (before or now) * each[0] * each[1]
    assert said == ("" if now == 1 == (before or 1) else said)
    assert not said or said.startswith(f"{rows} rows a step: {now} process(es) × {expected[0]} rows")


def test_a_run_goes_on_with_other_processes_and_a_sweep_knows_its_trials_again(raw_config, tmp_path):
    two = parse(raw_config, ["launch.processes=2"])
    runs.create(tmp_path, "first", parse(raw_config))
    assert runs.open_run(tmp_path, "first", two).config.launch.processes == 2
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(raw_config))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two.as_dict()))
    names = {
        Base(SweepConfig(base=base, grid={grid: [3]}), "sweep", tmp_path).trial({grid: 3}).run
        for grid in ("loss.temperature", "launch.processes")
        for base in ("base.yaml", "two.yaml")
    }
    assert len(names) == 2


@pytest.fixture(scope="module")
def place(teacher_folder, tmp_path_factory) -> Path:
    """A folder of runs: `begun` is set up, and `whole` the same trained by two processes, undisturbed."""
    place = tmp_path_factory.mktemp("launched")
    raw = tiny_experiment(teacher_folder, place)
    raw |= {"launch": {"processes": 2}, "baseline": None, "training": {**raw["training"], **TRAINING}}
    raw["data"]["max_train_rows"] = 200  # 25 whole steps: else two ranks repeat rows in the last of a pass
    session.Workbench(runs.create(place / "runs", "begun", parse(raw))).setup()
    shutil.copytree(place / "runs" / "begun", place / "runs" / "whole")
    session.Workbench(Run(place / "runs" / "whole")).train()
    return place


@pytest.fixture
def begun(place, tmp_path) -> Run:
    return Run(shutil.copytree(place / "runs" / "begun", tmp_path / "runs" / "begun"))


def is_equal(run: Run, other: Run, *, within: float) -> None:
    """Every student of the first in every weight and every figure."""
    for student in (each for each in (run, run.baseline) if each.path.exists()):
        same = other.path / student.path.relative_to(run.path)
        for name in ("final_model", "best_model"):
            one, two = (load_file(each / name / "model.safetensors") for each in (student.path, same))
            for weight, values in one.items():
                torch.testing.assert_close(two[weight], values, rtol=within, atol=within)
        for line, found in zip(comparable(student.path), comparable(same), strict=True):
            assert found == pytest.approx(line, rel=within)


def at_step(run: Run, step: int, deed) -> threading.Thread:
    """Does this when a student's log has come so far."""

    def wait() -> None:
        while not any(line.get("train/step", 0) >= step for line in read_metrics(run)):
            time.sleep(0.01)
        deed()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def ranks_below(pid: int) -> dict[str, psutil.Process]:
    """By rank, what a process has started to train."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        if (rank := child.environ().get("RANK")) is not None:
            found[rank] = child
    return found


slow = [pytest.mark.slow, pytest.mark.together, pytest.mark.timeout(900)]


class TestLaunched:
    pytestmark = slow

    def test_two_processes_from_setup_to_report_equal_one(self, raw_config, tmp_path):
        raw_config["training"] |= SGD | {"max_steps": 12}
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw_config))
        folders = ["--runs", tmp_path / "runs", "--reports", tmp_path / "reports", "--name", "two"]
        process = kd_process("run", tmp_path / "tiny.yaml", "--processes", 2, *folders)
        said, errors = process.communicate()
        assert process.returncode == 0, said[-2000:] + errors[-3000:]
        two = Run(tmp_path / "runs" / "two")
        assert two.manifest["stages"] == ["00_setup", "01_dry_run", "02_train", "03_compare"]
        assert (two.status["state"], two.baseline.is_trained) == ("done", True)
        assert (tmp_path / "reports" / "two" / "report.html").exists()
        assert said.count("8 rows a step: 2 process(es) × 4 rows × 1 accumulated") == 3  # dry run, students
        assert said.count("\nkd: loss = ") == 1, "rank 0 alone says the formula"
        raw_config["training"]["per_device_train_batch_size"] = 8
        bench = session.Workbench(runs.create(tmp_path / "runs", "one", parse(raw_config)))
        bench.run.add_to_manifest(student_layers=two.manifest["student_layers"])
        bench.train()
        bench.train_baseline()
        is_equal(bench.run, two, within=1e-5)

    def test_a_killed_rank_is_named_and_the_run_goes_on_with_two_or_one(self, place, begun, capfd):
        deaths = []

        def kill() -> None:
            deaths.append(time.monotonic())
            ranks_below(os.getpid())["1"].kill()

        thread = at_step(begun, 24, kill)
        with pytest.raises(
            Died, match=r"^rank 1 of 2 was killed \(SIGKILL, as for want of memory\); go on with"
        ):
            session.Workbench(begun).train()
        assert time.monotonic() - deaths[0] < WITHIN_S
        thread.join()
        assert ranks_below(os.getpid()) == {}
        assert begun.status["state"] == "died"
        assert begun.status["message"].startswith("rank 1 of 2 was killed")
        for processes in (1, 2):
            again = Run(shutil.copytree(begun.path, begun.path.with_name(f"on-{processes}")))
            session.Workbench(again, processes).train()
            assert again.status["state"] == "trained"
            is_equal(Run(place / "runs" / "whole"), again, within=1e-6)

    def test_an_interrupt_is_a_checkpoint_of_all_ranks(self, begun, capfd):
        at_step(begun, 24, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped, match=r"^stopped at step \d+ with a checkpoint; go on with"):
            session.Workbench(begun).train()
        assert (begun.status["state"], (begun.path / "STOP").exists()) == ("stopped", False)
        last = max(line["train/step"] for line in read_metrics(begun) if "train/step" in line)
        assert 24 <= last < 60
        assert (begun.checkpoints / f"checkpoint-{last}" / "rng_state_1.pth").exists()

    def test_ranks_end_with_the_process_that_launched_them(self, begun):
        process = subprocess.Popen(
            [sys.executable, "-m", "kdlib", "train", str(begun.path)],
            cwd=project_root(),
            stdout=subprocess.DEVNULL,
        )
        reached = at_step(begun, 12, lambda: None)
        reached.join(timeout=300)
        ranks = ranks_below(process.pid)
        process.kill()
        process.wait()
        gone, alive = psutil.wait_procs(ranks.values(), timeout=20)
        assert (len(gone), alive) == (2, [])
        assert begun.status["state"] == "died"

    def test_a_rank_without_the_models_files_says_so_alone(self, begun, tmp_path, monkeypatch):
        """As on a machine that has not what the first has."""
        config = begun.config.as_dict()
        config["teacher"]["model"] = os.path.relpath(config["teacher"]["model"], project_root())
        runs.write_text(begun.path / "config.yaml", parse(config).as_yaml())
        (tmp_path / "away").mkdir()
        code = f"import os\nif os.environ.get('RANK') == '1':\n    os.chdir({str(tmp_path / 'away')!r})\n"
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        with pytest.raises(ModelError, match="^rank 1 of 2: .*tiny-teacher.*: no such folder"):
            session.Workbench(begun).train()
        assert begun.status["state"] == "failed"
