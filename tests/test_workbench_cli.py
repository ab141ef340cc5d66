"""`kd` as people meet it: bad input is refused before anything is written; good input ends in a report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import kd_process, sentences, tiny_model, tiny_tokenizer
from made_log import read_metrics, stands
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdlib.config import run as configs
from kdlib.config.run import parse
from kdlib.errors import RunError
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run, project_root
from kdlib.workbench import cli, measurement, runner, session


@pytest.fixture
def kd(tmp_path, monkeypatch, capsys):
    """Runs `kd …` here: (exit status, what it said on standard error)."""

    def call(*words: object) -> tuple[int, str]:
        folders = (
            ["--runs", str(tmp_path / "runs"), "--reports", str(tmp_path / "reports")]
            if words[0] == "run"
            else []
        )
        monkeypatch.setattr(sys, "argv", ["kd", *map(str, words), *folders])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr().err

    return call


def nothing_written(tmp_path: Path) -> bool:
    return not (tmp_path / "runs").exists() and not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.temprature=3", "did you mean 'temperature'?"),
        ("training.max_steps=many", "training.max_steps: found 'many', needs int"),
        ("training.eval_strategy=sometimes", "it is one of no, steps, epoch"),
        ("loss.weights={kd: 0, ce: 0}", "all weights are 0"),
        ("loss.weights={kd: -1, ce: 1}", "weights are 0 or more"),
        ("data.source=missing.jsonl", "missing.jsonl: no such file"),
        ("data.text=body", "no column 'body'"),
        ("data.max_length=100000", "has 64 positions; lower it"),
        ("teacher.model=./nowhere", "./nowhere: no such folder"),
        ("student.layers=9", "student.layers is 9, but the teacher has 4"),
    ],
)
def test_a_bad_setting_is_refused_with_a_reason_and_nothing_is_written(
    kd, config_file, tmp_path, override, expected
):
    status, said = kd("run", config_file, "-o", override)
    assert status == 1
    assert any(line.startswith("kd: ") for line in said.splitlines())
    assert expected in said
    assert "Traceback" not in said
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("command", ["doctor", "forecast", "run", "dry-run", "selftest"])
def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    kd, config_file, copied_teacher, monkeypatch, command
):
    settings = json.loads((copied_teacher / "config.json").read_text())
    settings |= {"model_type": "stranger", "auto_map": {"AutoConfig": "theirs.Config"}}
    (copied_teacher / "config.json").write_text(json.dumps(settings))
    (copied_teacher / "theirs.py").write_text("raise AssertionError('a stranger’s file was run')")
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail(f"asked: {words}"))
    status, said = kd(command, config_file, "-o", f"teacher.model={copied_teacher}")
    assert (status, "Traceback" in said) == (2 if command == "doctor" else 1, False)
    assert command == "doctor" or "which is never run here" in said


def test_a_tracker_that_is_not_installed_is_refused_and_nothing_is_written(
    kd, config_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("kdlib.training.trackers.find_spec", lambda name: None)
    monkeypatch.setattr("kdlib.training.trackers.get_available_reporting_integrations", list)
    status, said = kd("run", config_file, "-o", "training.report_to=[tensorboard, wandb]")
    assert (status, nothing_written(tmp_path)) == (1, True)
    assert "training.report_to: tensorboard is not installed; run: pip install tensorboard" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty"),
        ('{"text": "one two three"}\nbroken\n', "1 broken line\n  line 2"),
        ('{"text": "a"}\n{"text": "b"}\n', "shorter than two tokens"),
    ],
)
def test_bad_data_is_refused_with_a_reason_and_nothing_is_written(
    kd, config_file, tmp_path, content, expected
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    status, said = kd("run", config_file, "-o", f"data.source={bad}")
    assert (status, expected in said, nothing_written(tmp_path)) == (1, True, True), said


def test_different_tokenizers_are_refused(kd, config_file, tmp_path):
    tiny_tokenizer(sentences(50, seed=9), size=290).save_pretrained(tmp_path / "other")
    tiny_model().save_pretrained(tmp_path / "other")
    status, said = kd("run", config_file, "-o", f"student={{from: {tmp_path / 'other'}}}")
    assert (status, "different vocabularies" in said, nothing_written(tmp_path)) == (1, True, True), said


def test_a_tokenizer_is_trained_once_and_not_of_too_little_text(kd, raw_config, tmp_path):
    source, folder = raw_config["data"]["source"], tmp_path / "tokenizer"
    few = kd("tokenizer", source, folder, "--vocabulary", 2000)
    assert few[0] == 1
    assert "tokens, not 2,000; ask for fewer" in few[1]
    assert not folder.exists()
    assert kd("tokenizer", source, folder, "--vocabulary", 280)[0] == 0
    assert len(AutoTokenizer.from_pretrained(folder)) == 280
    assert f"{folder}: is there already" in kd("tokenizer", source, folder)[1]


def test_a_missing_config_a_taken_name_and_an_unknown_run_are_refused(kd, config_file, tmp_path):
    assert kd("run", tmp_path / "tyni.yaml") == (
        1,
        f"kd: {tmp_path / 'tyni.yaml'}: no such file; did you mean 'tiny.yaml'?\n",
    )
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    status, said = kd("run", config_file, "--name", "taken")
    assert (status, "exists already" in said) == (1, True)
    status, said = kd("run", config_file, "--resume", "unknown")
    assert (status, "no run 'unknown'" in said) == (1, True)
    assert not list((tmp_path / "runs" / "taken").iterdir())


def test_a_parameter_that_the_notebooks_do_not_declare_is_refused(kd, config_file, tmp_path):
    status, said = kd("run", config_file, "-p", "smok=true")
    assert (
        status,
        "declares no parameter 'smok'; did you mean 'smoke'?" in said,
        nothing_written(tmp_path),
    ) == (1, True, True), said


@pytest.mark.parametrize(
    ("word", "expected"),
    [("smoke=true", "-p smoke: this parameter has a way of its own"), ("x", "key=value")],
)
def test_a_parameter_that_the_command_sets_itself_is_refused(kd, config_file, tmp_path, word, expected):
    status, said = kd("run", config_file, "-p", word)
    assert (status, expected in said, nothing_written(tmp_path)) == (1, True, True), said


def test_a_run_that_is_running_is_not_started_twice(kd, config_file, raw_config, tmp_path):
    busy = runs.create(tmp_path / "runs", "busy", parse(raw_config))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        stands(busy, "running", pid=other.pid, pid_started=psutil.Process(other.pid).create_time())
        status, said = kd("run", config_file, "--resume", "busy")
    assert (status, "is running already" in said) == (1, True), said


def test_a_folder_that_cannot_be_written_is_refused(config_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["kd", "run", str(config_file), "--runs", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert "choose a folder you can write to with --runs" in capsys.readouterr().err


def test_a_parameter_is_checked_against_the_notebook_itself():
    notebook = project_root() / "notebooks" / "02_train.ipynb"
    runner.check_parameters(notebook, {"config": 1, "run": 1, "overrides": 1, "smoke": 1})
    with pytest.raises(RunError, match="no parameter 'runn'; did you mean 'run'"):
        runner.check_parameters(notebook, {"runn": 1})


def test_the_students_of_a_run_train_without_notebooks(raw_config, tmp_path, monkeypatch, capsys):
    bench = session.Workbench(runs.create(tmp_path / "runs", "plain", parse(raw_config)))
    monkeypatch.setattr(sys, "argv", ["kd", "train", str(bench.run.path)])
    with pytest.raises(RunError, match="run 00_setup first"):
        bench.student()
    bench.setup()
    (bench.run.path / "STOP").touch()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    words = f"stopped at step 1 with a checkpoint; go on with kd train {bench.run.path}"
    assert (caught.value.code, capsys.readouterr().err.splitlines()[-1]) == (1, f"kd: {words}")
    assert (bench.run.status["state"], bench.run.status["message"]) == ("stopped", words)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert bench.run.status["state"] == "done"
    assert bench.run.is_trained
    assert bench.run.baseline.is_trained


def test_a_notebook_finds_the_newest_run_of_its_config(config_file, tmp_path, monkeypatch):
    for folder in ("notebooks", "configs"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")  # where JupyterLab starts
    with pytest.raises(RunError, match="there is no run of tiny.yaml yet; run 00_setup first"):
        session.open_run("tiny.yaml")
    made = session.open_run("tiny.yaml", new=True, overrides=["loss.temperature=3"])
    session.open_run("tiny.yaml", new=True, smoke=True)
    assert session.open_run("tiny.yaml").run == made.run
    with pytest.raises(RunError, match="other settings.*\n  loss.temperature: 3.0 -> 4.0"):
        session.open_run("tiny.yaml", run=made.run.name, overrides=["loss.temperature=4"])


def trained_to(step: int, run: Run, process) -> None:
    """Waits until the run's training has logged this step."""
    deadline = time.monotonic() + 240
    while not any(line["train/step"] >= step for line in read_metrics(run)):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


@pytest.fixture
def set_up(config_file, tmp_path):
    """Makes the run of a config file and does its first notebook's work here; gives it with the words
    that go on with it.
    """

    def make(name: str) -> tuple[Run, list[object]]:
        run = runs.create(
            tmp_path / "runs", name, configs.load(config_file), config_file=str(config_file), smoke=False
        )
        session.Workbench(run).setup()
        run.add_to_manifest(stages=["00_setup"])
        return run, [
            "run",
            config_file,
            "--resume",
            name,
            "--without",
            "01_dry_run",
            "--runs",
            tmp_path / "runs",
            "--reports",
            tmp_path / "reports",
        ]

    return make


@pytest.mark.slow
def test_a_run_whose_kernel_was_killed_and_that_was_stopped_resumes_to_the_end_of_an_undisturbed_one(
    config_file, raw_config, set_up, tmp_path
):
    raw_config["training"] |= {"max_steps": 200, "save_steps": 20, "eval_steps": 100, "logging_steps": 5}
    config_file.write_text(yaml.safe_dump(raw_config))
    run, go_on = set_up("tiny")
    process = kd_process(*go_on)
    trained_to(25, run, process)
    kernels = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ipykernel" in " ".join(child.cmdline())
    ]
    # the other waits for its notebook
    min(kernels, key=psutil.Process.create_time).send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "02_train: its kernel died" in said
    assert run.status["state"] == "died"
    index, report = tmp_path / "reports" / "index.html", tmp_path / "reports" / "tiny" / "report.html"
    assert '<span class="state died">died</span>' in index.read_text()
    assert '<span class="state died">died</span>' in report.read_text()
    assert "its kernel died" in report.read_text()

    stops = []
    for step, polite in ((60, signal.SIGINT), (90, signal.SIGTERM)):
        process = kd_process(*go_on)
        trained_to(step, run, process)
        process.send_signal(polite)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 128 + polite
        stopped = re.search(
            r"kd: 02_train: stopped at step (\d+) with a checkpoint; go on with --resume", said
        )
        stops.append(int(stopped[1]))
        assert (run.checkpoints / f"checkpoint-{stops[-1]}" / "model.safetensors").exists()
        assert run.status["state"] == "stopped"
        assert '<span class="state stopped">stopped</span>' in index.read_text()
        assert "stopped at step" in report.read_text()

    process = kd_process(*go_on)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "00_setup: done before" in out
    assert run.status["state"] == "done"
    steps = [line["train/step"] for line in read_metrics(run) if "train/loss" in line]
    assert steps == sorted({*range(5, 201, 5), *stops})
    whole = session.Workbench(set_up("whole")[0])
    whole.train()
    whole.train_baseline()
    for folder in (".", "baseline"):
        model = Path(folder, "final_model", "model.safetensors")
        assert (run.path / model).read_bytes() == (whole.run.path / model).read_bytes()
    for name in (
        "teacher_student_comparison.png",
        "comparison_results.json",
        "history.json",
        "baseline/final_model/model.safetensors",
    ):
        assert (run.path / name).exists()
    page = report.read_text()
    assert "state done" in page
    assert str(tmp_path) not in re.sub(
        r"<pre>.*?</pre>|<td>.*?</td>|<details class=\"notebook\".*", "", page, flags=re.DOTALL
    )
    assert AutoModelForCausalLM.from_pretrained(run.best_model).config.num_hidden_layers == 2


@pytest.mark.slow
def test_a_run_that_fails_keeps_its_metrics_and_a_partial_report(config_file, raw_config, set_up, tmp_path):
    raw_config["training"] |= {"learning_rate": 1e30, "max_grad_norm": 0, "optim": "sgd", "logging_steps": 1}
    config_file.write_text(yaml.safe_dump(raw_config))
    run, go_on = set_up("hot")
    process = kd_process(*go_on)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "NonFiniteLoss" in said
    assert read_metrics(run)
    assert run.status["state"] == "failed"
    page = (tmp_path / "reports" / "hot" / "report.html").read_text()
    assert "This report is partial" in page
    assert "NonFiniteLoss" in page


@pytest.mark.slow
def test_the_quickstart_runs_through_with_the_real_models(tmp_path):
    folders = ("--runs", tmp_path / "runs", "--reports", tmp_path / "reports")
    process = kd_process("run", "configs/quickstart.yaml", "--smoke", "--name", "smoke", *folders)
    out, said = process.communicate(timeout=800)
    assert process.returncode == 0, said
    assert out.strip().splitlines()[-1].startswith("report: ")
    results = json.loads((tmp_path / "runs" / "smoke" / "comparison_results.json").read_text())
    assert set(results["models"]) == {"teacher", "untrained", "baseline", "distilled"}
    assert (
        results["models"]["distilled"]["kl_to_teacher"]["value"]
        < results["models"]["untrained"]["kl_to_teacher"]["value"]
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "smoke" / "best_model")
    assert student.config.num_hidden_layers == 15
    assert os.path.getsize(tmp_path / "reports" / "smoke" / "report.html") < 5 * 2**20


def test_what_a_run_of_a_sweep_takes_is_forecast_by_its_memory_and_a_few_real_steps(raw_config, monkeypatch):
    took = measurement.Measured(step_s=2.0, evaluation_s=3.0, steps=12, evaluations=4)
    monkeypatch.setattr(measurement, "measured", lambda config: took)
    cost = cli._cost(parse(raw_config))
    assert cost.seconds == 12 * 2 + 4 * 3
    assert 0 < cost.peak < cost.at_most < cost.free
    assert cost.weights == 4 * sum(p.numel() for p in tiny_model(320, layers=2).parameters())


def test_a_dry_run_shows_shapes_tokens_steps_plan_and_forecast_and_leaves_a_run_to_go_on_with(
    config_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["kd", "dry-run", str(config_file), "--name", "tried", "--runs", str(tmp_path / "runs")]
    )
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr().out
    assert caught.value.code == 0
    for expected in (
        "logits [N, V]",
        "[30, 300]",
        "learned: 15",
        "dry run step 5/5",
        "kd, nats",
        "T²",
        "12 steps of",
        "learning_rate",
        "0.7·T²·KL(teacher ‖ student; T=2)",
        "the doctor: ",
        "student = teacher: 0",
        "GiB",
        "--resume tried",
    ):
        assert expected in said, expected
    run = Run(tmp_path / "runs" / "tried")
    assert run.manifest["optimizer_steps"] == 12
    assert not run.checkpoints.exists()
