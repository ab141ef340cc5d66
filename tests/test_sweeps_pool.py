"""A sweep's processes: what fails stops nothing, what stopped goes on, nothing is done twice; then all of
it with real runs.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import sweep_trials
import yaml
from conftest import kd_process
from made_log import read_metrics, stands
from sweep_trials import Acted, Trained

from kdlib.config import run as configs
from kdlib.errors import ConfigError, ModelError, RunError
from kdlib.reports.index import render_index
from kdlib.runs import child_processes, folder as runs
from kdlib.runs.folder import Run, project_root
from kdlib.runs.processes import held
from kdlib.sweeps import pool, processes, report, results, run as sweep_run
from kdlib.sweeps.config import SweepConfig
from kdlib.sweeps.pool import Clock, Cost, Order
from kdlib.sweeps.results import Sweep
from kdlib.sweeps.trials import Base, Search, expanded
from kdlib.workbench import cli, runner


@pytest.fixture
def rendered() -> list[str]:
    """The runs of `acted` whose report was asked for."""
    return []


@pytest.fixture
def acted(config_file, tmp_path, monkeypatch, rendered):
    """One start of a sweep whose runs do as they are told: acted({number of the trial: deed}, …) -> Sweep."""
    monkeypatch.setattr(processes, "GRACE", 1.0)

    def start(deeds=(), *, seeds=3, jobs=1, timeout_s=None, meanwhile=None, on=None, work=Acted) -> Sweep:
        settings = configs.parse(
            {"base": str(config_file), "grid": {"seed": list(range(seeds))}}, kind=SweepConfig
        )
        base = Base(settings, "s", tmp_path)
        trials, _ = expanded(settings, base)
        sweep = Sweep(tmp_path / "runs" / "s")
        sweep_run.begin(
            sweep,
            settings,
            trials,
            file="s.yaml",
            base="tiny.yaml",
            command="kd sweep s.yaml",
            repeated=[],
            forecast="",
        )
        (sweep.path.parent / "deeds.json").write_text(
            json.dumps({trials[number].run: deed for number, deed in dict(deeds).items()})
        )
        folders = (tmp_path / "runs", tmp_path / "reports")
        pages = (lambda run, folder: rendered.append(run.name), render_index)  # there is nothing in the runs
        order = Order("s", "s.yaml", "kd sweep s.yaml", *folders, *pages, jobs=jobs, on=on)
        acting = work(sweep.path, tmp_path / "reports", None if on else jobs, timeout_s)
        with processes.executor(jobs, on, folders[0]) as (where, jobs):
            made = pool.Pool(sweep, base, order, where, jobs, acting, Clock(), report.render)
            if meanwhile:
                threading.Thread(target=meanwhile, daemon=True).start()
            made.run(pool.Listed(sweep_run.to_do(sweep, trials)))
        return sweep

    return start


def starts(sweep_folder: Path) -> list[int]:
    """How often each trial was started, in the order of the sweep."""
    trials = results.Sweep(sweep_folder).facts["trials"]
    files = [sweep_folder.parent / trial["run"] / "starts" for trial in trials]
    return [len(file.read_text()) if file.exists() else 0 for file in files]


def test_a_sweep_goes_on_after_a_failure_and_repeats_only_what_failed(acted, tmp_path, capsys):
    with pytest.raises(RunError, match=r"1 of the runs failed:\n  s_\w+: 02_train: no luck"):
        acted({1: "fail"})
    folder = tmp_path / "runs" / "s"
    sweep = Sweep(folder)
    assert starts(folder) == [1, 1, 1]
    assert results.trial_table(sweep)["state"].tolist() == ["done", "failed", "done"]
    assert sweep.status["state"] == "failed"
    said = capsys.readouterr().out
    assert len(re.findall(r"^started ", said, re.MULTILINE)) == 3
    assert re.search(
        r"done     s_\w+  seed=0: KL to the teacher 1\.00 \[0\.900, 1\.10\]; took \d s; 2 to go, about \d s",
        said,
    )
    assert re.search(
        r"failed   s_\w+  seed=1: 02_train: no luck; took \d s.*\n         all it said: .*log.txt", said
    )
    manifests = {path: path.stat().st_mtime_ns for path in folder.parent.glob("*/manifest.json")}

    acted()
    assert starts(folder) == [1, 2, 1]
    assert sweep.status["state"] == "done"
    assert "goes on (failed)" in capsys.readouterr().out
    assert sum(path.stat().st_mtime_ns != before for path, before in manifests.items()) == 1
    failed = folder.parent / sweep.facts["trials"][1]["run"]
    assert (failed / "log.txt").read_text().count("said by") == 2
    assert not list(folder.parent.glob("*/checkpoints"))


def test_what_a_killed_start_left_undone_of_a_run_that_is_done_is_made_up_for(acted, tmp_path, rendered):
    names = [trial["run"] for trial in acted().facts["trials"]]
    for name in names[1:]:
        (tmp_path / "reports" / name).mkdir(parents=True)
        (tmp_path / "reports" / name / "report.html").touch()
    (tmp_path / "runs" / names[0] / "checkpoints").mkdir()
    rendered.clear()
    acted()
    assert rendered == names[:1]
    assert not (tmp_path / "runs" / names[0] / "checkpoints").exists()
    assert starts(tmp_path / "runs" / "s") == [1, 1, 1]


def test_a_process_that_ends_without_a_word_has_died_with_its_last_words(acted, tmp_path):
    with pytest.raises(RunError, match=r"its process ended with status -9: said by s_"):
        acted({0: "vanish"})
    assert starts(tmp_path / "runs" / "s") == [1, 1, 1]


@pytest.mark.parametrize("deed", ["sleep", "deaf"])
def test_a_run_that_takes_too_long_is_asked_to_stop_and_then_made_to(acted, tmp_path, deed):
    began = time.monotonic()
    with pytest.raises(RunError, match=r"1 of the runs failed:\n.*not done within timeout_minutes: 0.05"):
        acted({0: deed}, seeds=2, timeout_s=3.0)
    assert time.monotonic() - began < 30
    assert starts(tmp_path / "runs" / "s") == [1, 1]


@pytest.mark.parametrize(("deed", "times"), [("sleep", 1), ("deaf", 2)])
def test_an_interrupt_stops_all_and_starts_no_more_and_a_second_ends_at_once(
    acted, tmp_path, deed, times, capsys
):
    def interrupt():
        for _ in range(times):
            until = time.monotonic() + 20
            while sum(starts(tmp_path / "runs" / "s")) < 2:
                assert time.monotonic() < until
                time.sleep(0.05)
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError, match="stopped; the same command goes on where it stopped"):
        acted(dict.fromkeys(range(4), deed), seeds=4, jobs=2, meanwhile=interrupt)
    assert starts(tmp_path / "runs" / "s") == [1, 1, 0, 0]
    assert "Ctrl-C again" in capsys.readouterr().out
    assert not [child for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())]
    assert acted(seeds=4).status["state"] == "done"
    assert starts(tmp_path / "runs" / "s") == [2, 2, 1, 1]


def test_jobs_run_side_by_side(acted, tmp_path):
    acted({0: "together", 1: "together"}, seeds=2, jobs=2)
    assert starts(tmp_path / "runs" / "s") == [1, 1]


def test_side_by_side_the_cores_are_divided_unless_somebody_has_divided_them(tmp_path, monkeypatch):
    monkeypatch.setattr(child_processes, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processes.Work(tmp_path, tmp_path, jobs=4).environment()["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in processes.Work(tmp_path, tmp_path).environment()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert processes.Work(tmp_path, tmp_path, jobs=4).environment()["OMP_NUM_THREADS"] == "5"


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "deeds.json").write_text("{}")
    return runs.create(tmp_path / "runs", "one", configs.parse(raw_config))


def test_no_second_process_is_started_on_a_run_whose_log_is_held(run, tmp_path):
    """The processes of a sweep that was itself killed hold their logs."""
    hold = (
        "import fcntl, sys, time; log = open(sys.argv[1], 'a'); fcntl.flock(log, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(2)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(run.path / "log.txt")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    runs.write_json(run.path / "status.json", {"state": "done"})
    outcome = Acted(tmp_path, tmp_path)(run)
    assert holder.wait(1) == 0  # it waited until the log was free
    assert outcome.state == "done"
    assert not (run.path / "starts").exists()
    holder.stdout.close()


def test_a_process_holds_its_log_from_its_start(run, tmp_path):
    (run.path.parent / "deeds.json").write_text(json.dumps({"one": "sleep"}))
    thread = threading.Thread(target=Acted(tmp_path, tmp_path), args=(run,))
    thread.start()
    until = time.monotonic() + 20
    while not (run.path / "starts").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    with (run.path / "log.txt").open("a") as log, pytest.raises(BlockingIOError):
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    processes.ask(tmp_path, processes.AT_ONCE)
    thread.join(20)
    assert not thread.is_alive()


def test_a_run_that_runs_elsewhere_is_waited_for(run, tmp_path):
    with ThreadPoolExecutor() as threads:
        with held(run.path):
            waiting = threads.submit(Acted(tmp_path, tmp_path), run)
            time.sleep(0.5)
            assert not waiting.done()
            run._note("done")
        assert waiting.result().state == "done"
    assert not (run.path / "starts").exists()


def test_a_run_of_a_machine_that_is_gone_is_gone_on_with(run, tmp_path):
    stands(run, "running", host="gone")
    assert Acted(tmp_path, tmp_path)(run).state == "done"
    assert (run.path / "starts").read_text() == "x"


@pytest.fixture(scope="module")
def cluster():
    """Two dask workers of a thread each, in processes of their own that work elsewhere than the project."""
    distributed = pytest.importorskip("distributed", reason='needs pip install "kdlib[dask]"')
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=":0", processes=True
    ) as made:
        with distributed.Client(made) as client:
            client.run(os.chdir, os.sep)
        yield made


def test_on_a_cluster_whose_worker_is_killed_all_is_done_and_nothing_twice(acted, tmp_path, cluster, capsys):
    def kill():
        while sum(starts(tmp_path / "runs" / "s")) < 2:
            time.sleep(0.05)
        os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
        (tmp_path / "runs" / "go").touch()

    sweep = acted(
        dict.fromkeys(range(6), "wait"), seeds=6, jobs=0, meanwhile=kill, on=cluster.scheduler_address
    )
    assert starts(sweep.path) == [1] * 6
    assert results.trial_table(sweep)["state"].tolist() == ["done"] * 6
    logs = [sweep.run(trial["run"]).path / "log.txt" for trial in sweep.facts["trials"]]
    assert all(log.read_text().startswith(f"in {project_root()} ") for log in logs)
    assert len(re.findall(r"^done ", capsys.readouterr().out, re.MULTILINE)) == 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_six_trainings_are_each_done_once_though_a_worker_and_then_a_machine_are_lost(
    acted, raw_config, config_file, tmp_path, cluster
):
    raw_config["training"] |= {"max_steps": 40, "save_steps": 10, "eval_steps": 20}
    config_file.write_text(yaml.safe_dump(raw_config | {"baseline": None}))
    settings = configs.parse({"base": str(config_file), "grid": {"seed": [*range(6)]}}, kind=SweepConfig)
    trials, _ = expanded(settings, Base(settings, "s", tmp_path))
    every = [runs.create(tmp_path / "runs", trial.run, trial.config) for trial in trials]
    for run in every:
        run.add_to_manifest(student_layers=[0, 3])
    lost, most = [], 0

    def lose_two() -> None:
        """The worker of the first that has come so far, then that of the second with all that it started."""
        nonlocal most
        while any(run.status["state"] != "done" for run in every):
            for run in every:
                training = trainings_of(run)
                most = max(most, len(training))
                steps = [line["train/step"] for line in read_metrics(run)] if len(lost) < 2 else []
                if training and run not in lost and max(steps, default=0) >= 10:
                    worker = training[0].parent()
                    with_it = [worker, *worker.children(recursive=True)] if lost else [worker]
                    for process in with_it:
                        process.kill()
                    lost.append(run)
            time.sleep(0.1)

    sweep = acted(seeds=6, jobs=0, meanwhile=lose_two, on=cluster.scheduler_address, work=Trained)
    assert results.trial_table(sweep)["state"].tolist() == ["done"] * 6
    assert (len(lost), most) == (2, 1)
    for run in every:
        steps = [line["train/step"] for line in read_metrics(run) if "train/loss" in line]
        assert steps == [*range(2, 41, 2)]
        begun = (run.path / "log.txt").read_text().count("\nkd: loss = ")
        assert begun == 1 + (run == lost[1])  # the first one's went on, and was waited for
        assert run.is_trained


def trainings_of(run: Run) -> list[psutil.Process]:
    """The processes that train this run now."""
    every = psutil.process_iter(["cmdline", "status"])
    found = [each for each in every if (each.info["cmdline"] or [""])[-1] == str(run.path)]
    return [each for each in found if each.info["status"] != psutil.STATUS_ZOMBIE]


def test_a_cluster_that_cannot_do_the_work_says_why(cluster, tmp_path, monkeypatch):
    def refused(on, root, jobs=0):
        with pytest.raises(RunError) as caught, processes.executor(jobs, on, root):
            pytest.fail("it was taken")
        return str(caught.value)

    began = time.monotonic()
    assert "--on tcp://127.0.0.1:9: no dask scheduler answers" in refused("tcp://127.0.0.1:9", tmp_path)
    assert time.monotonic() - began < 30
    assert "no dask scheduler answers" in refused("no address at all", tmp_path)
    monkeypatch.setattr(processes, "_unseen", sweep_trials.unseen)  # as where another disk is mounted
    assert f"it does not see {tmp_path}" in refused(cluster.scheduler_address, tmp_path)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(ConfigError, match=r'pip install "kdlib\[dask\]"'),
        processes.executor(0, "x", tmp_path),
    ):
        pytest.fail("it was taken")


def test_a_sweep_that_is_running_is_not_started_twice_and_a_runs_name_is_not_a_sweeps(acted, run, tmp_path):
    acted(seeds=1)
    sweep = Sweep(tmp_path / "runs" / "s")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        stands(sweep, "running", pid=other.pid, pid_started=psutil.Process(other.pid).create_time())
        with pytest.raises(RunError, match=f"run s is running already, on .*, process {other.pid},"):
            acted(seeds=1)
    with pytest.raises(RunError, match="'one' is the name of a run"):
        sweep_run.begin(Sweep(run.path), None, [])


def test_the_forecast_corrects_itself_as_runs_finish():
    clock = Clock({"a": 10.0, "b": 10.0, "c": 30.0})
    assert clock.left(["a", "b", "c"], 2) == 50.0
    clock.learn("a", 20.0)
    assert clock.left(["b", "c"], 2) == 40.0  # twice as long as forecast, two at a time
    assert Clock().left(["a"], 1) is None
    unforetold = Clock()
    unforetold.learn("a", 20.0)
    assert unforetold.left(["b", "c"], 1) == 40.0


def test_each_distinct_cost_is_forecast_once(config_file, tmp_path):
    asked = []

    def forecast(config) -> Cost:
        asked.append(config)
        if config.student.layers > 4:
            raise ModelError("student.layers is 9, but the teacher has 4")
        size = config.student.layers * 2.0**30
        return Cost(seconds=600.0, peak=size, at_most=1.1 * size, free=2.0**32, weights=size)

    grid = {
        "loss.temperature": [1, 2],
        "loss.weights.kd:ce": [0.5, 0.9, 1],
        "student.layers": [2, 3, 9],
        "seed": [0, 1],
    }
    changes = {"base": str(config_file), "grid": grid, "overrides": {"baseline": None}}
    settings = configs.parse(changes, kind=SweepConfig)
    trials, _ = expanded(settings, Base(settings, "s", tmp_path))
    order = Order("s", "s.yaml", "", tmp_path / "runs", tmp_path, None, None, jobs=2, forecast=forecast)
    clock, text = sweep_run.forecast(trials, order, keep_checkpoints=False)
    assert len(asked) == 3 * 2  # layers × whether there is CE at all
    assert len(clock.forecast) == 24
    assert "forecast of 36 runs, 2 side by side" in text
    assert "time    6.0 h of training" in text
    assert "memory  6.00 GiB at the highest, 4.00 free: does not fit; take fewer --jobs" in text
    assert text.count("no forecast, and it will hardly run: student.layers is 9, but the teacher has 4") == 12
    kept = re.search(r"disk    ([\d.]+) GiB \(a run's checkpoints go", text)
    assert float(kept[1]) == 36 * 2 * 2.5 + 2 * 3 * 3 * 2  # two models each; two runs' two checkpoints


def test_a_search_nears_the_best_and_remembers_finished_trials(config_file, tmp_path):
    pytest.importorskip("optuna", reason='needs pip install "kdlib[sweep]"')
    space = {
        "loss.temperature": {"uniform": [1, 6]},
        "loss.divergence": {"choice": ["forward_kl", "reverse_kl"]},
    }
    settings = configs.parse(
        {"base": str(config_file), "search": {"trials": 25, "from": space}}, kind=SweepConfig
    )
    base, done = Base(settings, "s", tmp_path), []

    def until(count, search):
        while len(done) < count and (trial := search.next()):
            value = abs(trial.parameters["loss.temperature"] - 3) + (
                trial.parameters["loss.divergence"] == "reverse_kl"
            )
            done.append((dict(trial.parameters), value))
            search.told(trial, value)

    until(10, Search(settings, base, []))
    again = Search(
        settings, base, [*done, ({"loss.temperature": 2.5, "loss.divergence": "forward_kl"}, None)]
    )
    assert len(again.ahead()) == 15
    assert again.ahead()[0].startswith("s_")  # what was not finished comes first
    until(99, again)
    assert len(done) <= 25
    assert min(value for _, value in done) < 0.3
    assert sum(value for _, value in done[15:]) / len(done[15:]) < sum(value for _, value in done[:10]) / 10


def test_without_optuna_a_search_says_what_to_install(config_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    settings = configs.parse(
        {"base": str(config_file), "search": {"trials": 2, "from": {"seed": {"choice": [1]}}}},
        kind=SweepConfig,
    )
    with pytest.raises(ConfigError, match=r'pip install "kdlib\[sweep\]"'):
        Search(settings, Base(settings, "s", tmp_path), [])


def test_a_notebook_can_be_left_out_but_not_the_first():
    assert runner.without(["01_dry_run"]) == ("00_setup", "02_train", "03_compare", "04_student_aware")
    with pytest.raises(RunError, match="--without 00_setup: the others need it"):
        runner.without(["00_setup"])
    with pytest.raises(RunError, match="did you mean '01_dry_run'"):
        runner.without(["01_dryrun"])


@pytest.fixture
def sweep_file(config_file, tmp_path) -> Path:
    path = tmp_path / "try.yaml"
    grid = {"loss.temperature": [1, 4], "loss.weights.kd:ce": [0.5, 0.9]}
    path.write_text(
        yaml.safe_dump(
            {
                "base": str(config_file),
                "overrides": {"baseline": None},
                "grid": grid,
                "jobs": 2,
                "smoke": True,
            }
        )
    )
    return path


def test_a_dry_run_lists_the_runs_and_writes_nothing(sweep_file, tmp_path, monkeypatch, capsys):
    words = [
        "kd",
        "sweep",
        str(sweep_file),
        "--dry-run",
        "--no-forecast",
        "--runs",
        str(tmp_path / "runs"),
        "-o",
        "seed=3",
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    said = capsys.readouterr().out
    assert "try: 4 runs" in said
    assert re.search(r"try_\w{8}  new      loss.temperature=4, loss.weights.kd:ce=0.9", said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_killed_in_the_middle_ends_with_two_good_runs_and_the_planted_failure(sweep_file, tmp_path):
    three = yaml.safe_load(sweep_file.read_text()) | {"grid": {"loss.temperature": [1, 2, 4]}}
    sweep_file.write_text(yaml.safe_dump(three))
    folders = ("--runs", tmp_path / "runs", "--reports", tmp_path / "reports", "--no-forecast")
    settings = configs.load(sweep_file, kind=SweepConfig)
    trials, _ = expanded(settings, Base(settings, "try", tmp_path))
    planted = runs.create(tmp_path / "runs", trials[1].run, trials[1].config)
    (planted.path / "final_model").write_text("in the way")
    others = [Run(tmp_path / "runs" / trial.run) for trial in trials if trial.run != planted.name]

    process = kd_process("sweep", sweep_file, *folders)
    deadline = time.monotonic() + 900
    while not any(run.status["state"] == "done" for run in others) or not any(
        run.status["state"] == "running" and read_metrics(run) for run in others
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    psutil.wait_procs(family[1:], timeout=10)
    finished = {run.name: before(run) for run in others if run.status["state"] == "done"}
    assert len(finished) == 1
    assert "died" in {run.status["state"] for run in others}
    assert Sweep(tmp_path / "runs" / "try").status["state"] == "died"

    process = kd_process("sweep", sweep_file, *folders)
    out, said = process.communicate(timeout=900)
    assert process.returncode == 1
    assert f"kd: sweep try: 1 of the runs failed:\n  {planted.name}: 02_train:" in said
    assert {run.status["state"] for run in others} == {"done"}
    assert planted.status["state"] == "failed"
    assert {run.name: before(run) for run in others if run.name in finished} == finished
    assert not any(f"started  {name}" in out or f"goes on (died) {name}" in out for name in finished)

    sweep = Sweep(tmp_path / "runs" / "try")
    table = results.trial_table(sweep).set_index("run")
    values = {
        run.name: json.loads((run.path / "comparison_results.json").read_text())["models"]["distilled"][
            "kl_to_teacher"
        ]["value"]
        for run in others
    }
    assert table["value"].dropna().to_dict() == values
    report = (tmp_path / "reports" / "try" / "report.html").read_text()
    best = min(values, key=values.get)
    assert f"lowest with loss.temperature={table.loc[best, 'loss.temperature']}" in report
    assert report.count('<span class="state done">') == 2
    assert all(f'href="../{run.name}/report.html"' in report for run in (*others, planted))
    assert "This report is partial" in (tmp_path / "reports" / planted.name / "report.html").read_text()
    assert all((tmp_path / "reports" / run.name / "report.html").exists() for run in others)
    assert not any(run.checkpoints.exists() for run in others)


def before(run: Run) -> dict[str, int]:
    """When each file of a run was written that stays."""
    files = [
        path for path in sorted(run.path.rglob("*")) if path.is_file() and "checkpoints" not in path.parts
    ]
    return {str(path): path.stat().st_mtime_ns for path in files}
