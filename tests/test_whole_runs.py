"""A preset as `kd run` runs it, in a project of its own: its paths put right, and nothing else.  It does what
its project did, and nothing of the machine and no key is in what it leaves; nothing stalls.

SOAK=10 (make soak) runs each notebook so many times in a row.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import yaml
from made_questions import multiple_choice, tiny_gpt2, written

from kdlib.config.run import load
from kdlib.config.task_rules import RULES
from kdlib.reports import explorers
from kdlib.reports.notebook_html import notebook_html
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run, project_root
from kdlib.runs.processes import PARENT
from kdlib.training.trackers import TRACKERS
from kdlib.workbench.runner import NOTEBOOKS

CONFIG = "configs/quantumbench_qa.yaml"
TIMES = int(os.environ.get("SOAK", "1"))
LONGEST = 240  # seconds; a notebook takes 10 to 20 where nothing else computes
KEYS = {
    name: f"planted-{name.lower()}-0123456789"
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "WANDB_API_KEY", "HF_TOKEN")
}
# the Trainer and wandb note where they run; nothing is shown of these files
INTERNAL = ("checkpoints", "wandb")
EXECUTE = """
import sys
from pathlib import Path
from kdlib.workbench import runner
notebook = sys.argv[1]
run = Path("runs", "again")
parameters = {"config": "configs/quantumbench_qa.yaml", "run": "./runs/again"}
runner.execute(Path("notebooks", f"{notebook}.ipynb"), run / "notebooks" / f"{notebook}.ipynb", parameters)
"""
pytestmark = [pytest.mark.slow, pytest.mark.together, pytest.mark.timeout(LONGEST * (TIMES + len(NOTEBOOKS)))]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project's folder with everything in it: notebooks, questions, models, and the preset that names
    them; it tells every tracker.
    """
    folder = tmp_path_factory.mktemp("home") / "project"
    shutil.copytree(
        project_root() / "notebooks",
        folder / "notebooks",
        ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
    )
    for name in ("configs", "data"):
        (folder / name).mkdir()
    written(multiple_choice(80), folder / "data" / "quantumbench.jsonl")
    raw = yaml.safe_load((project_root() / CONFIG).read_text())
    for layers, (name, key) in enumerate({"student": "from", "teacher": "model"}.items(), start=1):
        tiny_gpt2(folder / name, layers=layers, width=32, seed=layers)
        raw[name][key] = f"./{name}"
    raw["data"]["max_length"] = 128  # as many positions as these models have
    raw["training"]["report_to"] = [name for name in TRACKERS if find_spec(name)]
    (folder / CONFIG).write_text(yaml.safe_dump(raw))
    return folder


def started(project: Path, *words: str, **options) -> subprocess.CompletedProcess:
    """Python with these words in the project's folder, with keys in its environment; fails after LONGEST
    seconds per notebook.
    """
    ours = {
        "HOME": str(project.parent),
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(project / "runs" / "trackio"),
    }
    return subprocess.run(
        [sys.executable, *words],
        cwd=project,
        env={**os.environ, **KEYS, **ours, **options},
        text=True,
        capture_output=True,
        timeout=LONGEST * (len(NOTEBOOKS) if "run" in words else 1),
    )


@pytest.fixture(scope="module")
def run(project) -> Run:
    """All four notebooks through `kd run`."""
    done = started(project, "-m", "kdlib", "run", CONFIG, "--name", "whole")
    assert done.returncode == 0, done.stderr
    return Run(project / "runs" / "whole")


def holding(words: list[str], files: list[Path]) -> list[str]:
    """`file: word` for each of these words that a file holds."""
    return [f"{file}: {word}" for file in files for word in words if word.encode() in file.read_bytes()]


def files_of(project: Path) -> list[Path]:
    return [file for name in ("runs", "reports") for file in (project / name).rglob("*") if file.is_file()]


def test_the_preset_says_what_the_project_did():
    config = load(project_root() / CONFIG)
    assert (config.teacher.model, config.student.source) == ("gpt2-large", "gpt2")
    assert (config.loss.weights, config.loss.temperature) == ({"kd": 0.5, "ce": 0.5}, 3.0)
    assert (config.training["learning_rate"], config.training["warmup_steps"]) == (2e-5, 0.1)


def test_a_file_of_questions_runs_through_all_notebooks(run, project):
    results = json.loads((run.path / "comparison_results.json").read_text())
    assert results["split"] == "test"
    assert set(results["models"]) == {"teacher", "untrained", "baseline", "distilled"}
    for model in results["models"].values():
        assert set(RULES["question-answering"].measures) <= set(model)
    assert all(
        prompt.startswith("Question: ") and prompt.endswith("\nAnswer:") for prompt in results["prompts"]
    )
    assert any(
        "eval/choice_accuracy" in line for line in map(json.loads, run.metrics.read_text().splitlines())
    )
    assert (project / "reports" / "whole" / "report.html").exists()


def test_no_key_of_the_environment_is_in_any_file_of_a_run(run, project):
    # which are looked into too
    assert {"wandb", "tensorboard", "checkpoints"} <= {path.name for path in run.path.iterdir()}
    assert holding(list(KEYS.values()), files_of(project)) == []
    assert holding(["learning_rate"], [run.path / "config.yaml"])  # it would be found


def test_no_path_of_the_machine_is_in_what_a_run_shows(run, project):
    shown = [
        file
        for file in files_of(project)
        if not {*INTERNAL, "trackio"}.intersection(file.relative_to(project).parts)
    ]
    assert {"report.html", "index.html", "manifest.json", "metrics.jsonl", "02_train.ipynb"} <= {
        file.name for file in shown
    }
    machine = [project.parent, project_root(), sys.prefix, Path.home(), Path("/tmp/ipykernel")]
    assert holding([str(path) for path in machine], shown) == []


def test_the_executed_notebooks_have_no_error_and_no_widget_that_a_page_would_miss(run, project):
    for name in NOTEBOOKS:
        path = run.notebooks / f"{name}.ipynb"
        outputs = [
            output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])
        ]
        assert outputs, name
        assert "error" not in {output.output_type for output in outputs}
        kinds = {kind for output in outputs for kind in output.get("data", {})}
        assert not [kind for kind in kinds if "widget" in kind], (
            f"{name}: a page without scripts shows no widget: {kinds}"
        )
        page = notebook_html(path)
        for fault in ("Loading widget", "Error displaying widget", "Traceback (most recent call last)"):
            assert fault not in page, name
    page = (project / "reports" / "whole" / "report.html").read_text()
    assert "Loading widget" not in page
    assert all(name in page for name in NOTEBOOKS)


def test_the_notebooks_leave_still_explorers_when_nobody_sits_there(run):
    for name, marks in {
        "01_dry_run": ["of the teacher&#39;s mass", "kd-yaml"],
        "03_compare": ["kd-heat"],
    }.items():
        cells = nbformat.read(run.notebooks / f"{name}.ipynb", as_version=4).cells
        pages = [
            output.data["text/html"]
            for cell in cells
            for output in cell.get("outputs", [])
            if "text/html" in output.get("data", {})
        ]
        assert all(any(mark in page for page in pages) for mark in marks)
    assert list(runs.read_json(run.path / "explorers.json")["students"]) == [
        "distilled",
        "baseline",
        "untrained",
    ]
    assert len(explorers.static_html(run)) == 3


@pytest.mark.skipif(TIMES == 1, reason="the other tests have run each once; SOAK=10 for more")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_again_and_again_without_a_stall(run, project, name):
    # the last compares trained students, the others begin
    kept = None if name == NOTEBOOKS[-1] else ("config.yaml", "manifest.json")
    for _ in range(TIMES - 1):  # once it has been run already
        again = run.path.with_name("again")
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(run.path, again, ignore=lambda folder, names: set(names).difference(kept or names))
        (again / "notebooks").mkdir(exist_ok=True)
        done = started(project, "-c", EXECUTE, name, **{PARENT: "kd"})
        assert done.returncode == 0, done.stderr
