"""What a training leaves to resume from, and whether the disk can hold it."""

import json
import shutil
from pathlib import Path

from transformers import TrainingArguments

from kdlib.errors import RunError
from kdlib.runs.files import StudentFolder, read_json
from kdlib.runs.folder import Run

FULL = 64 * 2**20  # bytes


def last_checkpoint(folder: StudentFolder) -> str | None:
    """The newest whole checkpoint; one that a kill left half-written is passed over."""
    found = sorted(folder.checkpoints.glob("checkpoint-*"), key=lambda path: step_of(path.name), reverse=True)
    return next((str(path) for path in found if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        return "global_step" in read_json(checkpoint / "trainer_state.json", {})  # written last
    except json.JSONDecodeError:
        return False


def step_of(checkpoint: str | None) -> int:
    """The step of a checkpoint's folder; -1 where there is none, before even the evaluation at step 0."""
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint else -1


def disk_is_full(folder: StudentFolder) -> bool:
    """True where so little is left that a failed write is put down to it."""
    return shutil.disk_usage(folder.path).free < FULL


def check_disk(folder: StudentFolder, *, weights: int, args: TrainingArguments) -> None:
    """Refuse before the first step what would fail at the first checkpoint.

    Args:
        weights: bytes of the student's weights; AdamW's two moments take as much again, each.
    """
    checkpoint = 3 * weights if args.save_strategy != "no" else 0
    needed = 3 * weights + checkpoint * ((args.save_total_limit or 2) + 1)
    free = shutil.disk_usage(next(p for p in (folder.path, *folder.path.parents) if p.exists())).free
    if free < needed:
        raise RunError(
            f"{folder.path}: {free / 2**30:.1f} GiB free, but models and checkpoints of this run need "
            f"{needed / 2**30:.1f} GiB; "
            "free some space, lower training.save_total_limit, or choose another folder with --runs"
        )


def clean(run: Run) -> int:
    """Delete the checkpoints of a run that is done, which only serve to go on, and return how many bytes that
    frees.

    Raises:
        RunError: the run is not done.
    """
    if (state := run.status["state"]) != "done":
        raise RunError(
            f"run {run.name} is {state}, not done: it may go on from its checkpoints with --resume; or "
            "delete them by hand"
        )
    folders = [student.checkpoints for student in (run, run.baseline)]
    freed = sum(file.stat().st_size for folder in folders for file in folder.rglob("*"))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return freed
