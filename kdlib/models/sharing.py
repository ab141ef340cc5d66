"""Models that ranks share by FSDP2, each holding its part of every weight; and such ranks without the others.

A layer is gathered as it is run, then let go of; norm, embedding and head likewise, in one group where they
are tied: each group that has a weight gathers it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig, mixin
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.initialization import no_init_weights

from kdlib.errors import ConfigError
from kdlib.hardware import world_size
from kdlib.models.hooks import instead, layers_name
from kdlib.models.loading import blank, device_of, load_config

SHARDED_ON = {"cuda"}  # on others accelerate turns FSDP off without a word, and DDP trains
USUAL = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
ON_DEVICE = {"cpu_ram_efficient_loading": False, "cpu_offload": None}  # of a step, not of how it is loaded
GATHERED = "gathered weights"
SENT = {  # by what ranks share: what is gathered or to be reduced, and which argument it is, or the result
    "c10d::_allgather_base_": (GATHERED, 0),
    "_c10d_functional::all_gather_into_tensor": (GATHERED, None),
    "c10d::_reduce_scatter_base_": ("gradient buckets", 1),
    "_c10d_functional::reduce_scatter_tensor": ("gradient buckets", 0),
}


@contextmanager
def sharded(model: str, *, offload: bool = False) -> Iterator[dict[str, Any]]:
    """Inside, options of `load_model` by which each rank reads its own part of every weight, and no more.

    Args:
        offload: the parts lie in the CPU's memory.
    """
    if not dist.is_initialized():  # gloo beside NCCL, for what lies on the CPU
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    config = load_config(model)
    with torch.device("meta"), no_init_weights():
        made = blank(AutoModelForCausalLM, model, config, torch.float32)
    with tied_as_one():
        yield {"distributed_config": shares_of(made, dist.get_world_size(), offload=offload)}


def shares_of(model: PreTrainedModel, ranks: int, *, offload: bool = False) -> DistributedConfig:
    """How so many ranks share a model, in transformers' words."""
    layers = f"{layers_name(model)}.*"  # transformers' plan is for the names of Llama's parts
    plan = None if layers in (model.fsdp_plan or {}) else {layers: "free_full_weight"}
    return DistributedConfig(fsdp_size=ranks, fsdp_plan=plan, fsdp_cpu_offload=offload)


def ranks_of(wanted: int | str, device: str) -> int:
    """How many processes share the students' training: those that this one is among, else as is wanted.

    Args:
        wanted: as `launch.processes`; `auto` is one for each GPU, and one where there is none.
        device: as in a config.

    Raises:
        ConfigError: more are wanted than there are GPUs.
    """
    if launched := world_size():
        return launched
    gpus = torch.cuda.device_count() if device_of(device).type == "cuda" else 0
    if gpus and wanted != "auto" and int(wanted) > gpus:
        do = f"write {gpus}, or auto; or use more machines (notebooks/guides/running.md)"
        raise ConfigError(
            f"launch.processes: found {wanted}, needs a GPU for each, and here are {gpus}; {do}"
        )
    return max(gpus, 1) if wanted == "auto" else int(wanted)


def check_shards(device: torch.device) -> None:
    """Raises a ConfigError where ranks on such a device cannot share one model."""
    if device.type not in SHARDED_ON:
        found = f"found on {device.type} ranks, where accelerate shards nothing and DDP would train instead"
        raise ConfigError(f"training.fsdp: {found}; needed are several CUDA devices, or leave fsdp out: DDP")


@contextmanager
def tied_as_one() -> Iterator[None]:
    """Inside, ranks that share a model gather its norm, embedding and head once where they are tied.

    transformers 5.23 shares a model before it ties the two, so each would be gathered by itself.
    """
    usual = mixin.apply_fully_sharded_data_parallelism

    def share(made: PreTrainedModel, mesh: Any, plan: dict[str, str], experts: dict[str, str]) -> Any:
        made.tie_weights()
        embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
        if embedding.weight is head.weight:
            kept = [made.get_submodule(name) for name, style in plan.items() if style == "keep_full_weight"]
            offload = made.config.distributed_config.fsdp_cpu_offload
            policy = CPUOffloadPolicy() if offload else OffloadPolicy()
            tied = [*dict.fromkeys((embedding, *kept, head))]
            ranks = mesh.get_mesh("fsdp")
            fully_shard(tied, mesh=ranks, reshard_after_forward=True, offload_policy=policy)
            plan = {name: style for name, style in plan.items() if made.get_submodule(name) not in tied}
        return usual(made, mesh, plan, experts)

    with instead((mixin, "apply_fully_sharded_data_parallelism", share)):
        yield


@contextmanager
def fake_ranks(count: int) -> Iterator[DeviceMesh]:
    """A group of so many processes, of which this one is the first and the others are not there."""
    dist.init_process_group("fake", rank=0, world_size=count)
    try:
        names = ("pp", "dp_replicate", "fsdp", "tp")  # transformers'
        yield init_device_mesh("cpu", (1, 1, count, 1), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def share(student: PreTrainedModel, mesh: DeviceMesh, args: TrainingArguments, dtype: torch.dtype) -> None:
    """Leave of a student what one of the mesh's ranks holds, as accelerate does."""
    plugin = FullyShardedDataParallelPlugin(**{**USUAL, **(args.fsdp_plugin_args or {}), **ON_DEVICE})
    if dtype is not torch.float32:
        plugin.set_mixed_precision(dtype)
    asked = {"state": SimpleNamespace(fsdp_plugin=plugin), "is_main_process": False, "mixed_precision": "no"}
    dimensions = SimpleNamespace(fsdp_dim_names=("fsdp",))
    accelerator = SimpleNamespace(**asked, torch_device_mesh=mesh, parallelism_config=dimensions)
    fsdp2_prepare_model(accelerator, student)


def share_teacher(teacher: PreTrainedModel | None, mesh: DeviceMesh) -> None:
    """Likewise of a teacher, where there is one, as transformers does where it loads it."""
    if teacher is None:
        return
    how = shares_of(teacher, mesh.size())
    with tied_as_one():
        teacher.maybe_distribute_model(teacher, how, TransformersDeviceMesh(mesh, mesh))
    teacher.set_reshard_after_forward(True)


def held_here(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that ranks share; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_converted(model: PreTrainedModel) -> bool:
    """Whether its files have other weights than its memory, as experts' have: then one rank makes them."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # 0.2 s

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def write_in_parts(model: PreTrainedModel, file: Path, beside: str) -> None:
    """The weights of a model that ranks share as one file, but those `beside` it; every rank must call it."""
    left_out = (*(model.all_tied_weights_keys or {}), beside)
    state = {n: each for n, each in get_model_state_dict(model).items() if not n.startswith(left_out)}
    folder, one = file.with_name("parts"), dict.fromkeys(state, 1)
    writer = HuggingFaceStorageWriter(str(folder), one, save_distributed=True, enable_consolidation=True)
    dcp.save(state, storage_writer=writer)
    if dist.get_rank() == 0:
        next(folder.glob("*.safetensors")).rename(file)
        shutil.rmtree(folder)
