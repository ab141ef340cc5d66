"""The settings of the student-aware project, with small folders in the place of the hub's models."""

from pathlib import Path

from conftest import sentences, tiny_model, tiny_tokenizer
from made_log import read_metrics
from tiny_architectures import tiny

from kdlib.config.run import load
from kdlib.runs import folder as runs
from kdlib.runs.folder import project_root
from kdlib.workbench import session


def test_the_settings_of_the_student_aware_project_train_a_student_with_other_tokens(tmp_path, monkeypatch):
    """configs/student_aware_moe.yaml: phases, a router that learns, and a gate, over two vocabularies."""
    config = project_root() / "configs" / "student_aware_moe.yaml"
    monkeypatch.chdir(tmp_path)
    tiny("qwen3_moe", vocab_size=290).save_pretrained("teacher")
    tiny_tokenizer(sentences(80, seed=9), size=290).save_pretrained("teacher")
    tiny_model(layers=2).save_pretrained("student")
    tiny_tokenizer(sentences(80)).save_pretrained("student")
    Path("text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in sentences(300, seed=1)))
    places = {"teacher.model": "./teacher", "student.from": "./student", "data.source": "text.jsonl"}
    few = {"max_steps": 10, "warmup_steps": 1, "logging_steps": 1, "eval_steps": 5, "save_steps": 5}
    few |= {"gradient_accumulation_steps": 2, "use_cpu": True}
    places |= {"data.subset": None, "data.max_length": 24, "data.max_eval_rows": 8, "precision": "float32"}
    settings = load(config, {**places, **{f"training.{name}": value for name, value in few.items()}})
    assert (settings.loss.top_k, settings.early_stopping.patience) == (256, 10)
    bench = session.Workbench(runs.create(tmp_path / "runs", "run", settings))
    bench.setup()
    bench.train()
    rows = [row for row in read_metrics(bench.run) if "train/loss" in row]
    late = {"relational", "hidden", "contrastive"}
    assert rows[-1].keys() >= {f"train/{name}_loss" for name in (*late, "projected_kl", "route_balance")}
    assert all(
        rows[0].get(f"train/{name}_weight", 0) == 0 < rows[-1][f"train/{name}_weight"] for name in late
    )
    assert rows[-1]["train/projected_kl_weight"] == 0.7
    assert (bench.run.final_model / "model.safetensors").exists()
