"""What two processes do together, all in one launch, as each must import torch first.

torchrun --nproc_per_node 2 ranks.py ANSWER FOLDER CONFIG …   writes what the sharded step gave to ANSWER,
then trains each CONFIG, where FOLDER/from names a checkpoint from that on
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import fsdp_on_cpu
import torch.distributed as dist
from sharded_step import gradients, teachers
from tiny_training import train_file

from kdlib.errors import NonFiniteLoss

if __name__ == "__main__":
    dist.init_process_group("gloo")
    fsdp_on_cpu.shard()
    answer, *rest = map(Path, sys.argv[1:])
    found = {"gradients": gradients(), "teachers": teachers(answer.parent)}
    if dist.get_rank() == 0:
        answer.write_text(json.dumps(found))
    for folder, file in zip(rest[::2], rest[1::2], strict=True):
        if dist.get_rank() == 0:
            fsdp_on_cpu.begin_from(folder)
        dist.barrier()
        with suppress(NonFiniteLoss):  # whose report is read
            train_file(folder, file)
    dist.destroy_process_group()
