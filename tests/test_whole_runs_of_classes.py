"""configs/dbpedia_soft.yaml through every stage with nothing but its paths put right: models of its
family, rows of its form.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer
from datasets import ClassLabel, Dataset, Features, Value
from made_answers import CLASSES
from transformers import Qwen2Config, Qwen2ForCausalLM

from kdlib.config.run import load
from kdlib.reports.run import render
from kdlib.runs.folder import project_root
from kdlib.workbench.session import open_run

CONFIG = "configs/dbpedia_soft.yaml"


def entries(count: int, seed: int) -> list[dict]:
    """As DBpedia's rows: a title, what it is about, the number of its topic."""
    generator, rows = random.Random(seed), []
    for number in range(count):
        topic = number % len(CLASSES)
        words = generator.choices(
            ["known", "from", "the", "north", "since", "and", "early", "its", "first"], k=8
        )
        words[generator.randrange(8)] = CLASSES[topic].split()[0].lower()
        rows.append(
            {
                "label": topic,
                "title": f"Entry {seed} {number}",
                "content": f" Entry {number} is {' '.join(words)}.",
            }
        )
    return rows


def dbpedia(folder: Path) -> Path:
    """A folder as the hub's dbpedia_14 is: parquet files of train and test."""
    features = Features(
        {"label": ClassLabel(names=list(CLASSES)), "title": Value("string"), "content": Value("string")}
    )
    for seed, (name, count) in enumerate({"train": 420, "test": 140}.items()):
        (folder / "dbpedia_14").mkdir(exist_ok=True)
        Dataset.from_list(entries(count, seed), features=features).to_parquet(
            folder / "dbpedia_14" / f"{name}-00000-of-00001.parquet"
        )
    return folder / "dbpedia_14"


def qwen(folder: Path, *, layers: int, size: int) -> Path:
    """A language model of the family, without a head for topics."""
    torch.manual_seed(layers)
    tokenizer = tiny_tokenizer([f"{row['title']} {row['content']}" for row in entries(100, 5)], size)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=0,
            bos_token_id=0,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_preset_says_what_the_project_did():
    config = load(project_root() / CONFIG)
    assert (config.teacher.model, config.student.source) == (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "Qwen/Qwen2.5-0.5B",
    )
    assert (config.loss.weights, config.loss.temperature, config.data.max_length) == (
        {"kd": 0.7, "ce": 0.3},
        3.0,
        128,
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_folder_of_dbpedias_form_goes_through_every_stage_of_the_preset(tmp_path, monkeypatch, capfd):
    """What the notebooks call, in one process; questions go through notebooks (tests/test_whole_runs.py)."""
    monkeypatch.chdir(project_root())
    teacher, student = (
        qwen(tmp_path / "teacher", layers=3, size=300),
        qwen(tmp_path / "student", layers=2, size=280),
    )
    paths = {"teacher.model": teacher, "student.from": student, "data.source": dbpedia(tmp_path)}
    bench = open_run(
        CONFIG, str(tmp_path / "runs" / "topics"), {k: str(v) for k, v in paths.items()}, new=True
    )
    bench.setup()
    bench.doctor()
    bench.shapes()
    assert "its class" in str(bench.example())
    assert "fail" not in set(bench.selftest()["result"])
    bench.dry_run()
    bench.train(anyway=True)  # a teacher of random weights knows nothing, and the doctor says so
    bench.train_baseline()
    results, run = bench.compare(), bench.run
    bench.explore("distilled", "baseline")
    render(run, tmp_path / "reports")
    assert results == json.loads((run.path / "comparison_results.json").read_text())
    assert (results["split"], results["rows"], results["labels"]) == ("test", 140, list(CLASSES))
    assert set(results["models"]) == {"teacher", "untrained", "baseline", "distilled"}
    assert sum(run.manifest["data"]["train_classes"].values()) == 378  # a tenth of each class is held out
    assert set(run.manifest["data"]["validation_classes"].values()) == {3}
    assert "trained for the task first" in capfd.readouterr().out
    assert any("eval/accuracy" in line for line in map(json.loads, run.metrics.read_text().splitlines()))
    page = (tmp_path / "reports" / "topics" / "report.html").read_text()
    assert "Mean of transportation" in page
    assert "rows per second" in page
    assert (run.path / "final_model" / "model.safetensors").exists()
