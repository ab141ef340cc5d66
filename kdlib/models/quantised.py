"""Teachers in few bits, by transformers' quantisers: the head, and what is no matrix, stay as they are."""

from importlib.util import find_spec
from typing import Any

import torch

from kdlib.errors import ModelError


def check_installed(name: str | None) -> None:
    """Raises a ModelError where the package of a quantiser, as in a config, is not there."""
    package = (name or "").partition("_")[0]
    if package and find_spec(package) is None:
        do = f"run: pip install 'kdlib[{package}]', or leave quantization out"
        raise ModelError(f"teacher.quantization: {name} needs {package}, which is not installed; {do}")


def options_of(name: str | None, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of `from_pretrained`, for a model that is quantised as it is loaded, onto the device where it lies."""
    if name is None:
        return {}
    check_installed(name)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name == "torchao_int8":
        from torchao.quantization import Int8WeightOnlyConfig  # 1 s

        how: Any = TorchAoConfig(Int8WeightOnlyConfig())
    elif name == "bitsandbytes_int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        products = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        how = BitsAndBytesConfig(load_in_4bit=True, **products)
    return {"quantization_config": how, "device_map": {"": device}}
