"""What a notebook shows of a run at its start: what was found, shapes, the first steps."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from kdlib.config.models import TeacherConfig
from kdlib.config.run import Config
from kdlib.data.batches import Prepared
from kdlib.evaluation import caching
from kdlib.evaluation.quantised import lost_by
from kdlib.losses.alignment import said_of
from kdlib.losses.signals import kept
from kdlib.models.loading import parameters
from kdlib.models.teacher import LiveTeacher
from kdlib.runs.log import terms_in
from kdlib.students.adapters import trained_part

PACKAGES = ("kdlib", "torch", "transformers", "accelerate", "datasets", "tokenizers", "papermill", "numpy")
TEXTS = {"train": "training text", "validation": "held-out text", "test": "test text"}


def versions() -> dict[str, str]:
    """Of what a run is made with."""
    return {name: version(name) for name in PACKAGES}


def size_of(model: PreTrainedModel) -> str:
    """`134.5 M parameters, 30 layers`; of one with an adapter, what of it is trained."""
    layers = model.config.get_text_config().num_hidden_layers
    return f"{parameters(model) / 1e6:.1f} M parameters, {layers} layers{trained_part(model)}"


def named_size(config: TeacherConfig | None, teacher: LiveTeacher | None) -> str:
    """`gpt2-large: 774.0 M parameters, 36 layers`; of one with experts, how they are asked."""
    if not (config and teacher):
        return "none: text alone"
    whose = "the student's own base, " if config.source else ""
    routing = f"; {teacher.routing}" if teacher.routing else ""
    return f"{whose}{config.model}: {size_of(teacher.model)}{routing}"


def of_teacher(config: Config, prepared: Prepared, teacher: LiveTeacher | None, root: Path) -> dict[str, str]:
    """Who teaches, what of it is lost where it is quantised, and what is kept where it is asked once."""
    size, lost = named_size(config.teacher, teacher), of_quantised(config, prepared, teacher)
    return {"teacher": size, **lost, **of_caches(config, prepared, root)}


def of_quantised(config: Config, prepared: Prepared, teacher: LiveTeacher | None) -> dict[str, str]:
    """What a quantised teacher has lost; {} of any other."""
    if not (teacher and config.teacher and config.teacher.quantization):
        return {}
    return {"quantised teacher": f"{config.teacher.quantization}: {lost_by(config, prepared, teacher)}"}


def of_caches(config: Config, prepared: Prepared, root: Path) -> dict[str, str]:
    """What will be kept of a teacher that is asked once, below the runs' folder; {} of any other."""
    sizes = caching.expected(config, prepared, root)
    lines = [
        f"{os.path.relpath(path)}, {size / 1e6:,.1f} MB before it is compressed"
        for path, size in sizes.items()
    ]
    return {"teacher asked once": "; ".join(lines)} if lines else {}


def texts_in(notes: Mapping[str, Any]) -> dict[str, str]:
    """How much text there is to train on, to choose by, and to be compared on."""
    found = {}
    for name, what in TEXTS.items():
        if f"{name}_rows" in notes:
            documents, rows, tokens = (notes[f"{name}_{unit}"] for unit in ("documents", "rows", "tokens"))
            found[what] = f"{documents} documents, {rows} rows, {tokens:,} tokens"
    for part in notes.get("mix", ()):
        trained, held_out = (f"{part[f'{side}_rows']:,}" for side in ("train", "validation"))
        rows = f"{trained} rows, and {held_out} held out"
        found[f"of {part['source']}"] = f"{part['share']:.1%} of the training rows: {rows}"
    if left_out := notes.get("unusable_rows_left_out"):
        first = "; ".join(notes["first_unusable_rows"])
        found["left out"] = f"{left_out:,} rows that cannot be used, as {first}"
    if merged := notes.get("merged_labels"):
        found["labels merged"] = "; ".join(merged)
    return found


def of_plan(plan: pd.DataFrame) -> pd.DataFrame:
    """The schedules at every tenth of a training."""
    tenths = sorted({round(i * (len(plan) - 1) / 10) for i in range(11)})
    return plan.iloc[tenths].set_index("step").map("{:.3g}".format)


def of_shapes(models: Mapping[str, LiveTeacher | None], prepared: Prepared, unit: str) -> pd.DataFrame:
    """One training batch, and what each model makes of it, a column each; a `unit` is a token or a row."""
    batch = prepared.collate([prepared.train[i] for i in range(min(2, len(prepared.train)))])
    tokens, columns = kept(batch["labels"]), {}
    at_once = f"all logits at once: {'classes' if unit == 'row' else 'no plain head'}"
    for name, model in ((name, model) for name, model in models.items() if model):
        signal, settings = said_of(model(batch, tokens)), model.model.config.get_text_config()
        columns[name] = {
            "input_ids [B, T]": list(batch[f"{model.reads}input_ids"].shape),
            f"kept {unit}s N": len(signal),
            "layers, hidden size": f"{settings.num_hidden_layers}, {settings.hidden_size}",
            "logits [N, V]": [len(signal), signal.logits(slice(0, 1)).shape[-1]],
            "head": "applied in chunks" if model.form else at_once,
        }
    return pd.DataFrame(columns)


def of_steps(log: pd.DataFrame) -> pd.DataFrame:
    """A row a step."""
    shown = {"step": log["step"]}
    for term in terms_in(log):
        shown[f"{term}, nats"] = log[f"{term}_loss"].map("{:.4f}".format)
        shown[f"{term} weight"] = log[f"{term}_weight"]
    shown |= {
        "loss": log["loss"].map("{:.4f}".format),
        "T": log["temperature"],
        "learning rate": log["learning_rate"].map("{:.1e}".format),
        "grad norm": log["grad_norm"].map("{:.2f}".format),
    }
    return pd.DataFrame(shown).set_index("step")
