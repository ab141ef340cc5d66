"""The most memory that a rank takes for a training: what a forecast for ranks is held against.

torchrun --nproc_per_node 2 measured_rank.py ANSWER FOLDER CONFIG   writes bytes of the second rank
"""

import resource
import sys
from pathlib import Path

import fsdp_on_cpu
import torch.distributed as dist
from tiny_training import pieces

from kdlib.config import run as config
from kdlib.runs.files import StudentFolder
from kdlib.students.depth import even_layers
from kdlib.training import run as training

if __name__ == "__main__":
    answer, folder, file = map(Path, sys.argv[1:])
    settings = config.load(file)
    dist.init_process_group("gloo")
    if settings.training["fsdp"]:
        fsdp_on_cpu.shard()
    layers = even_layers(settings.student.layers, 30)
    training.train(settings, StudentFolder(folder), **pieces(settings, layers=layers))
    if dist.get_rank() == 1:  # the first loads what it has saved, too
        answer.write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    dist.destroy_process_group()
