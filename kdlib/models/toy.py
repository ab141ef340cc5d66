"""What TrainingArguments configure, made on a toy model: it fails before a load, and by name."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from kdlib.errors import ConfigError, nearest
from kdlib.models.hooks import layers_of

# what transformers, accelerate and torch raise for settings that they cannot follow
FAULTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError)
FAULTS = (*FAULTS, RuntimeError, TypeError, ValueError)
READ_BY = {  # optim_args by optimizer, as in transformers' trainer_optimizer.py
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}


def make_all(args: TrainingArguments, steps: int) -> None:
    """Make on a toy model what the arguments configure, so that what cannot be made fails before a load.

    Optimizer, schedule, loader, checkpointing and compiler, each with one step; it takes a moment.

    Args:
        steps: of the whole training, or about so many.

    Raises:
        ConfigError: one of them cannot be made here; the message names the settings.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        toy_args, batch = copy(args), {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
        toy_args.output_dir, toy_args.report_to = folder, []
        toy_args.full_determinism, toy_args.torch_compile, toy_args.torch_compile_backend = False, False, None
        toy_args.fsdp, toy_args.fsdp_plugin_args = None, None  # which several processes share
        with _named("training"):
            row = {name: values[0] for name, values in batch.items()}
            rows_of_a_batch = [row] * args.train_batch_size
            rows = {"train_dataset": rows_of_a_batch, "eval_dataset": rows_of_a_batch}
            trainer = Trainer(model=_toy(), args=toy_args, **rows)
        with _named(f"training.dataloader_* ({args.dataloader_num_workers} workers)"):
            trainer.get_train_dataloader()
        with _named(f"training.optim: {args.optim.value}"):
            optimizer = trainer.create_optimizer()
            _check_read(args, optimizer)
        kind = args.lr_scheduler_type.value
        with _named(f"training.lr_scheduler_type: {kind}, lr_scheduler_kwargs: {args.lr_scheduler_kwargs}"):
            schedule = trainer.create_scheduler(steps)
            if isinstance(schedule, LambdaLR):
                _ = [schedule.lr_lambdas[0](step) for step in (0, steps // 2, steps - 1)]
        with _named("training.activation_checkpointing_kwargs"):
            if args.activation_checkpointing:
                checkpoint_activations(trainer.model, args.activation_checkpointing_kwargs)
            batch = {name: values.to(args.device) for name, values in batch.items()}
            trainer.model(**batch).loss.backward()
        with _named(f"training.optim: {args.optim.value}"):
            optimizer.step()
        if args.torch_compile:
            with _named("training.torch_compile"):
                compile_layers(_toy().to(args.device), args)(**batch).loss.backward()


def compile_layers(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """The model with each of its layers compiled in place, as `torch_compile` asks.

    The layers alone: what reads a head's input is hooked in for one forward pass, which a compiled whole
    would not see.
    """
    for layer in layers_of(model):
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    return model


def checkpoint_activations(model: PreTrainedModel, options: Mapping[str, Any] | None) -> None:
    """As the Trainer does it."""
    rest = dict(options or {})
    every, offload = rest.pop("every_n_layers", 1), rest.pop("offload", False)
    model.activation_checkpointing_enable(rest or None, every_n_layers=every, offload=offload)


def _toy() -> PreTrainedModel:
    """A language model of some hundred parameters, with the names of a real one's parts."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0))


def _check_read(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> None:
    """transformers passes over what an optimizer does not read."""
    given = [pair.partition("=")[0].strip() for pair in (args.optim_args or "").split(",") if pair.strip()]
    if type(optimizer).__module__.startswith(("torch.", "transformers.")):
        known = READ_BY.get(args.optim.value, ())
        for name in given:
            if name not in known:
                reads = f"it reads {', '.join(known)}" if known else "it reads none"
                raise ValueError(f"optim_args has {name!r}{nearest(name, known)}; {reads}: leave it out")


@contextmanager
def _named(settings: str) -> Iterator[None]:
    """What cannot be made inside is a ConfigError that names these settings."""
    try:
        yield
    except FAULTS as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"{settings}: cannot be made here: {said}; mend it, or leave it out") from error
