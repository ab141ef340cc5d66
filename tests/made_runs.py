"""Runs as their files would be, made without training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from made_log import stands

from kdlib.config.run import parse
from kdlib.runs import folder as runs, log as metrics
from kdlib.runs.folder import Run, project_root

EVIL = (
    '<script>window.hit = 1</script><img src=x onerror="window.hit = 2">]]></style></title></textarea><svg '
    'onload="window.hit = 3">'
    "[a](javascript:window.hit=4) ![x](http://evil.example/pixel.png) $\\href{javascript:window.hit=5}{x}$ "
    "$x_{"
)
RAW = {
    "teacher": {"model": "a-teacher"},
    "student": {"from": "teacher", "layers": 2},
    "data": {"source": "a-text", "max_length": 16},
    "loss": {"temperature": 2.0, "weights": {"kd": 0.7, "ce": 0.3}},
    "baseline": {"weights": {"ce": 1.0}},
    "precision": "float32",
    "training": {"max_steps": 6, "learning_rate": 1e-3, "eval_strategy": "steps", "use_cpu": True},
}


def run_cells(name: str, run: Run) -> dict[str, Any]:
    """Run a notebook's cells one after another, as by hand; gives what they leave."""
    cells = nbformat.read(project_root() / "notebooks" / f"{name}.ipynb", as_version=4).cells
    parameters, *others = [cell.source for cell in cells if cell.cell_type == "code"]
    names: dict[str, Any] = {}
    exec(parameters, names)
    names["run"] = str(run.path)
    for cell in others:
        exec(cell, names)
    return names


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def results(distilled_kl: float = 1.0, text: str = "fine") -> dict[str, Any]:
    """What a comparison leaves."""
    metrics = ("perplexity", "bits_per_byte", "kl_to_teacher", "agreement", "accuracy")
    facts = {
        "parameters": 10**6,
        "size_on_disk_gib": 0.1,
        "forward_tokens_per_s": {"value": 100.0, "low": 90.0, "high": 105.0},
        "peak_memory_gib": 0.2,
    }
    models = {
        name: {**{m: interval(1.5) for m in metrics}, **facts}
        for name in ("teacher", "untrained", "baseline", "distilled")
    }
    models["distilled"]["kl_to_teacher"] = interval(distilled_kl)
    differences = [
        {
            "model": "distilled",
            "against": other,
            "metric": m,
            **interval(distilled_kl - 1.5 if m == "kl_to_teacher" else 0.3),
        }
        for other in ("teacher", "untrained", "baseline")
        for m in metrics
    ]
    return {
        "models": models,
        "differences": differences,
        "rows": 8,
        "tokens": 100,
        "resamples": 100,
        "interval": "95 %",
        "prompts": [text],
        "samples": {name: [text] for name in models},
    }


def made_run(
    root: Path,
    name: str,
    raw: Mapping[str, Any] = RAW,
    *,
    state: str = "done",
    message: str = "",
    steps: int = 6,
    kl: float | None = 1.0,
    **manifest: Any,
) -> Run:
    """A run that made so many of its 6 steps; compared unless `kl` is None."""
    run = runs.create(root, name, parse(dict(raw)), optimizer_steps=6, **manifest)
    for folder in (run, run.baseline):
        folder.path.mkdir(exist_ok=True)
        for step in range(2, steps + 1, 2):
            at = {"train/step": step, "train/epoch": step / 10, "time": f"2026-01-31T10:{step:02d}:00+00:00"}
            terms = {
                "train/kd_loss": 4 / step,
                "train/kd_weight": 0.7,
                "train/ce_loss": 2.0,
                "train/ce_weight": 0.3,
            }
            rest = {
                "train/temperature": 2.0,
                "train/learning_rate": 1e-4 * step,
                "train/grad_norm": 1.0,
                "train/tokens_per_s": 100.0,
            }
            metrics.append_metrics(folder, {**at, "train/loss": 0.7 * 4 / step + 0.6, **terms, **rest})
            metrics.append_metrics(folder, {**at, "eval/loss": 2.0, "eval/kl_to_teacher": 3 / step})
    if kl is not None:
        runs.write_json(run.path / "comparison_results.json", results(kl))
    stands(run, state, message)
    return run
