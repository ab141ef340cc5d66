"""Loading teacher, student and tokenizer; making a student from a teacher; checking that the two speak
one vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from kdlib import hardware as cpu
from kdlib.config.run import Config
from kdlib.errors import ModelError, nearest
from kdlib.losses.signals import Form
from kdlib.models.embedded import BUILT_IN, built_in_folder, plain_config, unpacked
from kdlib.models.hooks import captured_hidden, layers_name, layers_of


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The one by which rows are made and with which the student is saved: the teacher's, whose vocabulary
    both share.

    Where rows are classified the student has its own; the teacher may read otherwise
    (kdlib.data.classification).
    """
    is_own = config.task == "sequence-classification" and config.student.source != "teacher"
    return load_tokenizer(config.student.source if is_own else config.teacher.model)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model named as in `load_model`; a missing pad token becomes EOS, as padding is
    masked anyway.
    """
    with explained(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder_of(model))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model by hub id, local folder, .gguf file or built-in name; safetensors only, no
    remote code.

    Raises:
        ModelError: there is no such model, it cannot be loaded so, or some of its weights are not in its
            files.
    """
    with explained(model, "model"):
        made, info = AutoModelForCausalLM.from_pretrained(
            folder_of(model), dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    if absent := sorted(info["missing_keys"]):
        raise ModelError(
            f"{model}: {len(absent)} of its weights as a language model are not in its files and would be "
            f"random ({', '.join(absent[:3])}"
            f"{', …' * (len(absent) > 3)}); it was trained for something else (an encoder, a classifier?): "
            "name a causal language model"
        )
    return made.eval()


def load_config(model: str):
    """A model's configuration alone, without its weights."""
    with explained(model, "model"):
        return AutoConfig.from_pretrained(folder_of(model))


def check_pair(config: Config, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a student that the teacher cannot teach: layers it lacks, or a tokenizer whose ids mean other
    things.

    Raises:
        ModelError: names the layers, or the first tokens that differ.
    """
    configs = {
        name: load_config(name) for name in {config.teacher.model, config.student.source} - {"teacher"}
    }
    for name, each in configs.items():
        positions = getattr(each, "max_position_embeddings", None)
        if positions and config.data.max_length > positions:
            raise ModelError(
                f"data.max_length is {config.data.max_length}, but {name} has {positions} positions; lower it"
            )
    if config.student.source == "teacher":
        check_layers(config, configs[config.teacher.model].num_hidden_layers)
        return
    # each reads the rows in its own way; what they share is the classes
    if config.task == "sequence-classification":
        return
    student, ours = load_tokenizer(config.student.source).get_vocab(), teacher.get_vocab()
    if student != ours:
        differing = [token for token in {**student, **ours} if student.get(token) != ours.get(token)]
        shown = ", ".join(
            f"{t!r}: {student.get(t, 'absent')} / {ours.get(t, 'absent')}" for t in sorted(differing)[:3]
        )
        raise ModelError(
            f"student {config.student.source} ({len(student)} tokens) and teacher {config.teacher.model} "
            f"({len(ours)}) have "
            f"different vocabularies: {len(differing)} tokens differ, e.g. {shown} (student / teacher id). "
            "The kd term compares "
            "token by token and needs one vocabulary: use a student of the teacher's family, or `student: "
            "{from: teacher}`"
        )


def chosen_layers(config: Config, teacher: PreTrainedModel, calibration: Tensor) -> list[int] | None:
    """Which of the teacher's layers the student keeps; None for a student that is not made from the teacher.

    Args:
        calibration: [B, T] token ids of training text, on which influence is measured.
    """
    if config.student.source != "teacher":
        return None
    total, keep, count = teacher.config.num_hidden_layers, config.student.keep, config.student.layers
    check_layers(config, total)
    if isinstance(keep, list):
        return keep
    if keep == "first" or count == 1:
        return list(range(count))
    if keep == "even":
        return even_layers(count, total)
    return sorted(layer_influence(teacher, calibration).topk(count).indices.tolist())


def even_layers(count: int, total: int) -> list[int]:
    """`count` of `total` layers, spread evenly from the first to the last."""
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def check_layers(config: Config, total: int) -> None:
    """Refuse layers that a teacher of `total` layers does not have."""
    keep, count = config.student.keep, config.student.layers
    if isinstance(keep, list):
        if not keep or sorted(set(keep)) != keep or keep[0] < 0 or keep[-1] >= total:
            raise ModelError(f"student.keep {keep}: needs rising layer numbers from 0 to {total - 1}")
    elif count > total:
        raise ModelError(f"student.layers is {count}, but the teacher has {total}; choose 1 to {total}")


@torch.no_grad()
def layer_influence(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """How much each layer turns the residual stream: 1 - mean cosine between its input and output.

    Args:
        input_ids: [B, T] text without padding.

    Returns:
        [L] from 0 (the layer does nothing) to 2.

    Reference: Men et al. 2024 (ShortGPT, "block influence"), https://arxiv.org/abs/2403.03853
    """
    influence = []

    # on the layers themselves: `hidden_states` ends with the final norm's output
    def measure(layer, args, kwargs, output):
        before, after = (
            args[0] if args else kwargs["hidden_states"],
            output[0] if isinstance(output, tuple) else output,
        )
        influence.append(1 - F.cosine_similarity(before.float(), after.float(), dim=-1).mean())

    layers = layers_of(model)
    handles = [layer.register_forward_hook(measure, with_kwargs=True) for layer in layers]
    try:
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(influence)


def shallower(teacher: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A float32 copy of the teacher with only the layers `keep`; embeddings, norms and head come along."""
    config = with_layers(teacher.config, keep)
    with no_init_weights():  # every weight is the teacher's; this leaves out the tying too
        student = type(teacher)(config)
    student.tie_weights()
    prefix = layers_name(teacher) + "."
    new_index = {old: new for new, old in enumerate(keep)}
    state = {}
    for name, value in teacher.state_dict().items():
        if name.startswith(prefix):
            old, rest = name.removeprefix(prefix).split(".", 1)
            if int(old) in new_index:
                state[f"{prefix}{new_index[int(old)]}.{rest}"] = value
        else:
            state[name] = value
    student.load_state_dict(state)
    if student.can_generate():
        # without the teacher's sampling habits
        student.generation_config = GenerationConfig.from_model_config(config)
    return student.float().eval()


def with_layers(config: PreTrainedConfig, keep: Sequence[int]) -> PreTrainedConfig:
    """A copy of a model's config with only the layers `keep`."""
    changed = plain_config(config)
    for name, value in config.to_dict().items():  # layer_types, no_rope_layers, …: one entry per layer
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(changed, name, [value[i] for i in keep])
    changed.num_hidden_layers = len(keep)
    return changed


def blank_model(name: str, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model of this config with random weights; `name` is for the message of an error.

    Raises:
        ModelError: the config is of no such model.
    """
    with explained(name, "causal language model"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def head_form(model: PreTrainedModel) -> Form | None:
    """How logits follow from head(last hidden states): as they are, scaled or soft-capped by the model's
    config.

    None for a model whose logits are made otherwise, or computed all at once whether asked or not: seen on
    four tokens, not guessed from the model's name.
    """
    head, form, training = model.get_output_embeddings(), stated_form(model), model.training
    if form is None:
        return None
    model.eval()
    with captured_hidden(model) as states:
        logits = model(input_ids=torch.arange(4, device=model.device)[None], use_cache=False).logits
    model.train(training)
    return (
        form
        if torch.allclose(form.logits(head(states[0])).to(logits.dtype), logits, rtol=1e-3, atol=1e-3)
        else None
    )


def stated_form(model: PreTrainedModel) -> Form | None:
    """What the structure and config of a model say of `head_form`, without a look at what it computes."""
    config = model.config.get_text_config()
    if (
        not isinstance(model.get_output_embeddings(), nn.Linear)
        or "logits_to_keep" not in inspect.signature(model.forward).parameters
    ):
        return None
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return Form(float(scale), getattr(config, "final_logit_softcapping", None))


def device_of(config: Config) -> torch.device:
    """Where the run computes: CUDA, else Apple's MPS, else the CPU; `device:` and `training.use_cpu` have
    their way.

    Raises:
        ModelError: the device that is asked for is not there.
    """
    found = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    )
    if config.training.get("use_cpu") or config.device == "cpu":
        return torch.device("cpu")
    if config.device not in ("auto", found.type):
        raise ModelError(
            f"device: found {config.device}, but this machine has {found.type}; write {found.type}, or auto"
        )
    return found


def precision_of(config: Config) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and the reason for it."""
    device = device_of(config).type
    if config.precision != "auto":
        return getattr(torch, config.precision), f"precision: {config.precision}"
    if device not in ("cpu", "cuda"):
        return torch.float32, f"{device}: bf16 is not tried here"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return (
            torch.bfloat16 if major >= 8 else torch.float32
        ), f"{name} has compute capability {major}.{minor}; bf16 gains from 8.0 on"
    capable = bool(cpu.bf16_instructions())
    return (
        torch.bfloat16 if capable else torch.float32
    ), f"this CPU has {'' if capable else 'no '}avx512_bf16 or amx_bf16"


def parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def folder_of(model: str) -> str:
    """What `from_pretrained` takes for a model named as in `load_model`; a GGUF file is unpacked once
    into the cache.
    """
    if model in BUILT_IN:
        return str(built_in_folder(model))
    if model.endswith(".gguf"):
        if not Path(model).exists():
            raise ModelError(f"{model}: no such file")
        return str(unpacked(Path(model)))
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise ModelError(f"{model}: no such folder")
    return str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model


@contextmanager
def explained(model: str, what: str) -> Iterator[None]:
    """transformers' own errors as ModelErrors that say what may be given; `what` was looked for under
    this name.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}: no {what} to be had by this name{nearest(model, BUILT_IN)}. It may be a hub id, a "
            "local folder, a .gguf "
            f"file or a built-in name ({', '.join(BUILT_IN)}). transformers says: {error}"
        ) from error
