"""Whole training steps: the same student, teacher, tokens and optimizer, in our trainer and in others'.

Each contender trains the student for a few steps in a process of its own, as its users would: neither a heap
that others have cut up nor what our trainer asks of the C library is a part of it.  What is timed is the time
from the end of one optimizer step to the end of the next, after a warm-up: batch, forward passes, loss,
backward pass, clipping, AdamW; no set-up, log or checkpoint.  TRL's GKDTrainer computes its loss at T = 1 and
has no CE, which is less work than ours.
"""

import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kdlib.benchmarks.heads import CE, KD
from kdlib.benchmarks.peers import module
from kdlib.benchmarks.rounds import BooksClock, StepClock, rotated, seconds
from kdlib.benchmarks.settings import StepsConfig
from kdlib.cache.making import Wanted, fill, opened
from kdlib.cache.parts import Recipe
from kdlib.cache.teacher import CachedTeacher
from kdlib.config.models import AdapterConfig
from kdlib.config.run import parse
from kdlib.data.batches import collate
from kdlib.hardware import peak_memory
from kdlib.losses.buffers import Workspace
from kdlib.models.adapters import adapted
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.models.teacher import LiveTeacher
from kdlib.routing.gates import compared_layers
from kdlib.runs.child_processes import in_fresh_process
from kdlib.runs.files import StudentFolder
from kdlib.students.depth import even_layers, shallower
from kdlib.training.plan import objective_of
from kdlib.training.trainer import DistillationTrainer

HIDDEN = {"kd": KD, "ce": CE, "hidden": 0.1}


@dataclass
class Pair:
    """What all contenders share."""

    student: PreTrainedModel  # float32, never trained itself: each contender gets a copy
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset  # of exactly `length` tokens
    settings: StepsConfig
    precision: str
    device: torch.device

    @property
    def options(self) -> dict[str, Any]:
        """TrainingArguments for every contender alike; TRL's defaults differ in bf16 and checkpointing."""
        return {
            "max_steps": self.settings.warmup + self.settings.steps,
            "per_device_train_batch_size": self.settings.batch,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "bf16": self.precision == "bfloat16",
            "activation_checkpointing": False,
            "use_cpu": self.device.type == "cpu",
            "dataloader_pin_memory": self.device.type == "cuda",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        }

    @property
    def parts(self) -> dict[str, Any]:
        """Arguments for every Trainer alike."""
        return {
            "model": copy.deepcopy(self.student).train(),
            "train_dataset": self.rows,
            "processing_class": self.tokenizer,
            "data_collator": partial(collate, pad_id=self.tokenizer.pad_token_id),
        }


def pair(settings: StepsConfig, *, precision: str, device: torch.device, seed: int) -> Pair:
    """Teacher, student and tokens, the same for the same arguments."""
    torch.manual_seed(seed)
    teacher, tokenizer = load_model(settings.teacher), load_tokenizer(settings.teacher)
    layers = even_layers(settings.student_layers, teacher.config.get_text_config().num_hidden_layers)
    count = settings.batch * (settings.warmup + settings.steps)
    rows = Dataset.from_dict({"input_ids": torch.randint(len(tokenizer), (count, settings.length)).tolist()})
    student = shallower(teacher, layers)
    teacher = teacher.to(device, getattr(torch, precision)).eval()
    return Pair(student, teacher, tokenizer, rows, settings, precision, device)


def ours(
    made: Pair,
    folder: Path,
    *,
    weights: Mapping[str, float],
    layers: Any = "even",
    lora: bool = False,
    cache: Mapping[str, int] | None = None,
) -> Trainer:
    """kdlib's trainer.

    Args:
        layers: as a config has them in loss.features.
        lora: an adapter is trained.
        cache: the teacher is on a disk, as this setting of `loss:` looks at it; {}: its hidden states.
    """
    asked, parts = made.settings, made.parts
    if lora:
        adapted(parts["model"], AdapterConfig())
    loss = {"weights": weights, "temperature": asked.temperature, "features": {"layers": layers}}
    loss |= cache or {}
    rest = {"teacher": {"model": "-"}, "student": {"from": "-"}, "data": {"source": "-"}, "training": {}}
    objective = objective_of(config := parse({**rest, "loss": loss}))
    live = LiveTeacher(made.teacher, len(made.tokenizer))
    teacher = live if cache is None else on_disk(made, live, folder / "signals", cache)
    return DistillationTrainer(
        **parts,
        args=TrainingArguments(str(folder), **made.options),
        objective=objective,
        layer_pairs=compared_layers(config, parts["model"], made.teacher, objective),
        teacher=teacher if "kd" in weights else None,
        vocabulary=len(made.tokenizer),
        workspace=Workspace(asked.chunk, compiled=True),
        folder=StudentFolder(folder),
    )


def on_disk(made: Pair, teacher: LiveTeacher, folder: Path, loss: Mapping[str, int]) -> CachedTeacher:
    """What the teacher says of the rows, asked once."""
    config, (form, count) = made.teacher.config, next(iter(loss.items()), ("hidden", 0))
    recipe = Recipe(form, teacher.vocabulary, config.hidden_size, count, (made.settings.temperature,))
    wanted = Wanted("teacher", {}, recipe, recipe, folder)
    collated = partial(collate, pad_id=made.tokenizer.pad_token_id)
    fill(wanted, recipe, made.rows, collated, lambda: teacher, batch=made.settings.batch)
    found = opened(wanted, recipe)
    return CachedTeacher(found, found, teacher.vocabulary, config)


def trainer_sft(made: Pair, folder: Path) -> Trainer:
    """transformers' own Trainer and the model's own loss."""
    return Trainer(**made.parts, args=TrainingArguments(str(folder), **made.options))


def trl_sft(made: Pair, folder: Path) -> Trainer:
    """TRL's SFTTrainer on the same token ids."""
    trl = module("trl")
    ready = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    args = trl.SFTConfig(str(folder), **made.options, **ready)
    return trl.SFTTrainer(**made.parts, args=args)


def trl_gkd(made: Pair, folder: Path, *, beta: float) -> Trainer:
    """TRL's GKDTrainer on the data's own tokens (lmbda 0: nothing is generated); beta 0 is the forward KL."""
    gkd = module("trl.experimental.gkd")
    args = gkd.GKDConfig(str(folder), **made.options, beta=beta, lmbda=0.0, max_length=None)
    # a copy: accelerate wraps its forward
    return gkd.GKDTrainer(**made.parts, teacher_model=copy.deepcopy(made.teacher), args=args)


TRAINERS: dict[str, Callable[..., Trainer]] = {
    "ours_kd": partial(ours, weights={"kd": KD, "ce": CE}),
    "ours_lora": partial(ours, weights={"kd": KD, "ce": CE}, lora=True),
    "ours_hidden": partial(ours, weights=HIDDEN),
    "ours_routed": partial(ours, weights=HIDDEN, layers={"route": {"top_k": 4}}),
    "ours_from_hidden": partial(ours, weights={"kd": KD, "ce": CE}, cache={}),
    "ours_from_top_k": partial(ours, weights={"kd": KD, "ce": CE}, cache={"top_k": 32}),
    "ours_from_samples": partial(ours, weights={"kd": KD, "ce": CE}, cache={"samples": 12}),
    "ours_sft": partial(ours, weights={"ce": 1.0}),
    "trainer_sft": trainer_sft,
    "trl_sft": trl_sft,
    "trl_gkd": partial(trl_gkd, beta=0.0),
    "trl_gkd_jsd": partial(trl_gkd, beta=0.5),
}


def rounds(settings: StepsConfig, skipped: dict[str, str], **options: Any) -> Iterator[dict[str, Any]]:
    """Every contender's median step in each round, the order rotated, each time in a fresh process.

    Args:
        skipped: takes the names of contenders whose package is not there, and why.
        options: those of `pair`; the device by its name.

    Yields:
        {"round": …, "name": …, "wall_s": …, "cpu_s": …, "peak_bytes": …}; of ours also "ledger_s".
    """
    for number, name in rotated(settings.contenders, settings.rounds):
        if name in skipped:
            continue
        asked = {"name": name, "settings": settings.model_dump(), **options}
        found = in_fresh_process(__name__, asked, what=f"timing {name}", memory=False)
        if "skipped" in found:
            skipped[name] = found["skipped"]
        else:
            yield {"round": number, "name": name, **found}


def measured(name: str, made: Pair) -> dict[str, float]:
    """One contender's median step, and the peak of its memory beside the teacher's weights."""
    with peak_memory(made.device) as peak:
        found = _teacher_alone(made) if name == "teacher" else _trained(name, made)
    return found | {"peak_bytes": peak.bytes}


def _trained(name: str, made: Pair) -> dict[str, float]:
    clocks = [StepClock()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[name](made, Path(folder))
        clocks += [BooksClock(trainer)] if isinstance(trainer, DistillationTrainer) else []
        for clock in clocks:
            trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return {key: value for clock in clocks for key, value in clock.figures(made.settings.warmup).items()}


@torch.no_grad()
def _teacher_alone(made: Pair) -> dict[str, float]:
    """The teacher's forward pass with all its logits, on batches as the trainers see them."""
    times = []
    for number in range(made.settings.warmup + made.settings.steps):
        rows = [made.rows[i] for i in range(number * made.settings.batch, (number + 1) * made.settings.batch)]
        batch = {name: tensor.to(made.device) for name, tensor in collate(rows, pad_id=0).items()}
        del batch["labels"]
        with torch.autocast(made.device.type, torch.bfloat16, enabled=made.precision == "bfloat16"):
            times.append(seconds(lambda batch=batch: made.teacher(**batch, use_cache=False), made.device))
    walls, cpus = ([line[key] for line in times[made.settings.warmup :]] for key in ("wall_s", "cpu_s"))
    return {"wall_s": statistics.median(walls), "cpu_s": None if None in cpus else statistics.median(cpus)}


def flops(made: Pair) -> dict[str, float]:
    """Multiplications and additions of a KD step's matrix products: what cannot be avoided, per part.

    Two per weight and position, four per attended pair and attention channel with half of the pairs behind
    the causal mask; a backward pass costs twice its forward pass; heads at the kept tokens only.
    """
    batch, length = made.settings.batch, made.settings.length

    def body(model: PreTrainedModel) -> float:
        config, heads = model.config, model.config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention = 4 * heads * width * config.num_hidden_layers
        return batch * length * (2 * _matrices(model) + attention * length / 2)

    def head(model: PreTrainedModel) -> float:
        return 2 * batch * (length - 1) * model.get_output_embeddings().weight.numel()

    return {
        "teacher, forward": body(made.teacher),
        "teacher's head": head(made.teacher),
        "student, forward and backward": 3 * body(made.student),
        "student's head, forward and backward": 3 * head(made.student),
    }


def _matrices(model: PreTrainedModel) -> int:
    """Weights of the layers: matrices only, without embedding and head."""
    outside: set[Tensor] = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return sum(weight.numel() for weight in model.parameters() if weight.ndim > 1 and weight not in outside)


def main() -> None:
    asked = json.loads(sys.argv[1])
    name, settings, device = asked.pop("name"), asked.pop("settings"), torch.device(asked.pop("device"))
    try:
        found = measured(name, pair(StepsConfig(**settings), device=device, **asked))
    except ImportError as error:
        found = {"skipped": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
