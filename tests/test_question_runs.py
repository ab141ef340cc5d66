"""configs/quantumbench_qa.yaml through all notebooks, with nothing but its paths put right."""

import json
import subprocess
import sys

import pytest
from made_questions import multiple_choice, tiny_gpt2, written

from kdlib.choices import METRICS
from kdlib.config import load
from kdlib.runs import Run, project_root

CONFIG = "configs/quantumbench_qa.yaml"


def test_the_preset_says_what_the_project_did():
    config = load(project_root() / CONFIG)
    assert (config.teacher.model, config.student.source) == ("gpt2-large", "gpt2")
    assert (config.loss.weights, config.loss.temperature) == ({"kd": 0.5, "ce": 0.5}, 3.0)
    assert (config.training["learning_rate"], config.training["warmup_steps"]) == (2e-5, 0.1)


@pytest.mark.slow
def test_a_file_of_questions_runs_the_preset_through_all_notebooks(tmp_path):
    teacher, student = (tiny_gpt2(tmp_path / name, layers=layers, width=32, seed=layers) for name, layers in (("large", 2), ("small", 1)))
    paths = {"teacher.model": teacher, "student.from": student, "data.source": written(multiple_choice(80), tmp_path / "questions.jsonl"),
             "data.max_length": 128}  # as many positions as these models have
    words = [word for path, value in paths.items() for word in ("-o", f"{path}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "kdlib.cli", "run", CONFIG, "--smoke", "--name", "asked", *words, "--runs", tmp_path / "runs",
         "--reports", tmp_path / "reports"], cwd=project_root(), capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(tmp_path / "runs" / "asked")
    results = json.loads((run.path / "comparison_results.json").read_text())
    assert results["split"] == "test"
    assert set(results["models"]) == {"teacher", "untrained", "baseline", "distilled"}
    for model in results["models"].values():
        assert set(METRICS) <= set(model)
    assert all(prompt.startswith("Question: ") and prompt.endswith("\nAnswer:") for prompt in results["prompts"])
    assert any("eval/choice_accuracy" in line for line in map(json.loads, run.metrics.read_text().splitlines()))
    assert (tmp_path / "reports" / "asked" / "report.html").exists()
