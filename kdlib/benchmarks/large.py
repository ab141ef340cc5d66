"""`python -m kdlib.benchmarks.large`: OLMo 2's shapes with random weights, 7B into 1B, on one GPU.

Tokens per second, the share of the card's matrix products that they are (MFU), and the peak of memory beside
what `kd forecast` says of the same models.  `--tiny` tries it anywhere, on models of thousands of parameters.
"""

import json
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from kdlib.benchmarks.rounds import matmul_speed
from kdlib.benchmarks.settings import StepsConfig
from kdlib.benchmarks.steps import Pair, flops, measured
from kdlib.config.run import parse
from kdlib.diagnostics.memory import forecast
from kdlib.errors import ModelError
from kdlib.hardware import GIB
from kdlib.models.loading import blank, device_of, load_config, load_tokenizer
from kdlib.runs.processes import bare_errors

SHAPES = {  # of OLMo-2-1124-7B and OLMo-2-0425-1B
    "teacher": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "student": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
}
VOCABULARY, CHANNELS = 100_352, 128  # rows of both heads; of an attention head
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
STATED = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12}
"""Products of bfloat16 a second that makers state of their cards, dense."""


@dataclass(frozen=True)
class Found:
    """What was measured; `mfu` of the stated speed, None of a card that is not known here."""

    device: str
    tokens_per_s: float
    flops_per_token: float
    mfu: float | None
    of_products: float  # of the fastest matrix product here, now
    peak_gib: float | None  # allocated; None on a CPU
    forecast_gib: float  # likewise: without what a process holds before it loads a model


def measure(*, batch: int, length: int, steps: int, tiny: bool, device: torch.device) -> Found:
    """A few KD steps in bfloat16, the student's weights in float32, and what they come to."""
    options = {"teacher": "", "student_layers": 1, "batch": batch, "length": length, "steps": steps}
    settings = StepsConfig(**options, warmup=2, precision=["bfloat16"], contenders=["ours_kd"])
    with tempfile.TemporaryDirectory() as folder:
        kinds = saved(Path(folder), tiny=tiny)
        made = pair(Path(folder), settings, device)
        expected = forecast(parse(config_of(Path(folder), kinds, batch, length)), device=device.type)
        found = measured("ours_kd", made)
    weights = sum(each.nbytes for each in made.teacher.parameters())
    per_token = sum(flops(made).values()) / (batch * length)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    speed = batch * length / found["wall_s"]
    return Found(
        name,
        tokens_per_s=speed,
        flops_per_token=per_token,
        mfu=share_of(name, speed * per_token),
        of_products=speed * per_token / matmul_speed(torch.bfloat16, device),
        peak_gib=(found["peak_bytes"] + weights) / GIB if device.type == "cuda" else None,
        forecast_gib=max(sum(m.values()) - m["framework"] for m in expected.moments.values()) / GIB,
    )


def share_of(card: str, flops_per_s: float) -> float | None:
    """Of what the card's maker states; None where it is not known here."""
    known = [speed for name, speed in STATED.items() if name in card.replace("-", " ").split()]
    return flops_per_s / known[0] if known else None


def saved(folder: Path, *, tiny: bool) -> dict[str, str]:
    """Both models' configs, with a tokenizer, as a hub would give them: {model: its folder}."""
    vocabulary = 500 if tiny else VOCABULARY
    words = Tokenizer(
        models.WordLevel({f"t{number}": number for number in range(vocabulary)}, unk_token="t0")
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t1")
    for name, shape in SHAPES.items():
        sizes = TINY if tiny else shape
        heads = max(sizes["hidden_size"] // CHANNELS, 2)
        sizes = {**sizes, "num_attention_heads": heads, "vocab_size": vocabulary}
        config = AutoConfig.for_model("olmo2", **sizes, eos_token_id=1, pad_token_id=1)
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in SHAPES}


def pair(folder: Path, settings: StepsConfig, device: torch.device) -> Pair:
    """Both with random weights, and rows of random tokens."""
    torch.manual_seed(0)
    config = {name: load_config(str(folder / name)) for name in SHAPES}
    tokenizer = load_tokenizer(str(folder / "student"))
    with torch.device(device):
        teacher = blank(AutoModelForCausalLM, "teacher", config["teacher"], torch.bfloat16)
        student = blank(AutoModelForCausalLM, "student", config["student"], torch.float32)
    count = settings.batch * (settings.warmup + settings.steps)
    rows = Dataset.from_dict({"input_ids": torch.randint(len(tokenizer), (count, settings.length)).tolist()})
    return Pair(student, teacher, tokenizer, rows, settings, "bfloat16", device)


def config_of(folder: Path, models: Mapping[str, str], batch: int, length: int) -> dict:
    """The same as a config, for the forecast."""
    return {
        "teacher": {"model": models["teacher"]},
        "student": {"from": models["student"]},
        "precision": "bfloat16",
        "data": {"source": str(folder), "max_length": length},
        "loss": {"weights": {"kd": 0.7, "ce": 0.3}, "chunk": StepsConfig.model_fields["chunk"].default},
        "training": {"per_device_train_batch_size": batch, "max_steps": 4},
    }


def main(
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 8,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny models, on any device: does it run?")] = False,
) -> None:
    """Time KD steps of OLMo 2's shapes, 7B into 1B, and hold their memory against the forecast."""
    device = device_of("auto")
    if device.type != "cuda" and not tiny:
        found = f"this machine has {device.type}"
        raise ModelError(f"{found}, and a 7B teacher with a 1B student need a CUDA GPU of 80 GiB; or --tiny")
    logging.disable_progress_bar()
    with redirect_stdout(None):
        found = measure(batch=batch, length=length, steps=steps, tiny=tiny, device=device)
    print(json.dumps(asdict(found), indent=1))


if __name__ == "__main__":
    with bare_errors():
        typer.run(main)
