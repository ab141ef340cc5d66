"""The one seam by which CPU ranks take the way of GPUs: accelerate turns FSDP on there, and kdlib lets it.

accelerate knows several CPU processes as MULTI_CPU, and never shards on them.
"""

import shutil
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from kdlib.models import sharing


def shard() -> None:
    """From here on, in this process."""
    sharing.SHARDED_ON.add("cpu")
    usual = AcceleratorState.__init__

    def made(self, *args, fsdp_plugin=None, **options):
        usual(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = made
    torch.Tensor.pin_memory = lambda self: self  # of a teacher in the CPU's memory: it is there already


def begin_from(folder: Path) -> None:
    """Give a student's folder the checkpoint that its file `from` names, if it has one."""
    if (named := folder / "from").exists():
        checkpoint = Path(named.read_text())
        shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
