"""One tiny training in a process of its own: for tests that kill it, or run it on two ranks.

python tiny_training.py FOLDER CONFIG   (CONFIG: a run's YAML; the untrained student is written to FOLDER/start)
"""

import sys
from pathlib import Path

import torch

from kdlib import config, models, tasks, training
from kdlib.runs import StudentFolder
from kdlib.teachers import LiveTeacher


def pieces(settings, *, dtype=torch.float32, layers=(0, 3)):
    """Everything that `train` needs, freshly made and the same each time."""
    tokenizer = models.load_tokenizer(settings.teacher.model)
    teacher = models.load_model(settings.teacher.model)
    prepared = tasks.prepare(settings, tokenizer)
    student = tasks.untrained_student(settings, prepared, layers).to(dtype)
    return {"student": student, "teacher": LiveTeacher(teacher.to(dtype), len(tokenizer)), "tokenizer": tokenizer, "prepared": prepared}


if __name__ == "__main__":
    folder, settings = StudentFolder(Path(sys.argv[1])), config.load(sys.argv[2])
    training.train(settings, folder, label="tiny", **pieces(settings))
