"""Checkpoints: whole by their manifests, or passed over aloud; each with the best model up to its step.

checkpoints/checkpoint-<step>/manifest.json  {"files": {name: [bytes, xxh3-128]}}, null while it is written
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import xxhash

from kdlib.errors import RunError
from kdlib.runs.files import StudentFolder, read_json, synced, write_json, writing

MANIFEST = "manifest.json"
BEST = "best_model"  # in a checkpoint
WEIGHTS = "*.safetensors"  # of them a second name serves as a copy: they are written anew, never in place
NEEDED = {  # to go on as if nothing had been, one of each line; where processes share the student, folders
    "model": ("model.safetensors", "model.safetensors.index.json", "pytorch_model_fsdp*", "global_step*"),
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "scheduler": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
}

Listed = dict[str, tuple[int, str]]  # bytes and digest of each file


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint; -1, before the evaluation at step 0, where there is none."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else -1


def is_in_parts(checkpoint: Path) -> bool:
    """Whether ranks wrote it, each its own part of model and optimizer."""
    return any(checkpoint.glob("pytorch_model_fsdp_*/"))


def ranks_in(checkpoint: Path) -> int:
    """How many processes made a checkpoint: each left its random state."""
    return len([*checkpoint.glob("rng_state_*.pth")]) or 1


def checkpoints(folder: StudentFolder) -> list[Path]:
    """All folders that go by a checkpoint's name, whole or not, the newest first."""
    found = [p for p in folder.checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def last_whole(folder: StudentFolder) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint; and a line for each newer one that is not, or if it has no manifest."""
    said = []
    for checkpoint in checkpoints(folder):
        if found := fault(checkpoint):
            said.append(f"{checkpoint.name} is not whole and is passed over: {found}")
            continue
        if not (checkpoint / MANIFEST).exists():
            older = "of an older kdlib, so its files are only known to be complete"
            said.append(f"{checkpoint.name} has no {MANIFEST}, as those {older}")
        return checkpoint, said
    return None, said


def fault(checkpoint: Path, *, quick: bool = False) -> str:
    """What is wrong with a checkpoint's files, in words; "" where it is whole.

    Args:
        quick: by the files' sizes alone.
    """
    if not (checkpoint / MANIFEST).exists():
        return next(_faults_of_before(checkpoint), "")
    if not (files := _listed(checkpoint)):
        return f"its {MANIFEST} is not: it was being written when its training ended"
    own = {name: each for name, each in files.items() if not name.startswith(f"{BEST}/")}
    return next(_faults(checkpoint, own, quick=quick), "")


def begin(checkpoint: Path) -> None:
    """Make the folder of a checkpoint that is about to be written, in place of whatever has its name."""
    with writing(checkpoint):
        _removed(checkpoint)
        checkpoint.mkdir(parents=True)
    write_json(checkpoint / MANIFEST, {"files": None})


def seal(folder: StudentFolder, checkpoint: Path) -> None:
    """Declare a checkpoint whole: from here on it outlasts a kill and a power cut, with the log up to it."""
    with writing(checkpoint):
        if folder.best_model.exists():
            _copied(folder.best_model, checkpoint / BEST)
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
        entries = {str(path.relative_to(checkpoint)): [path.stat().st_size, digest(path)] for path in files}
        synced(checkpoint, *[folder.metrics] * folder.metrics.exists())
    write_json(checkpoint / MANIFEST, {"files": entries})
    with writing(checkpoint):
        synced(folder.checkpoints, within=False)


def thin_out(folder: StudentFolder, sealed: Path, limit: int | None) -> None:
    """Delete what is older than the newest `limit` whole checkpoints, if as many are there, and what is newer
    than the one just sealed: training went on from before that, as it was not whole.
    """
    whole = [path for path in checkpoints(folder) if path == sealed or not fault(path, quick=True)]
    whole = whole[whole.index(sealed) :]
    oldest = step_of(whole[limit - 1]) if limit and 0 < limit <= len(whole) else 0
    for checkpoint in checkpoints(folder):
        if not oldest <= step_of(checkpoint) <= step_of(sealed):
            _removed(checkpoint)


def restore_best(folder: StudentFolder, checkpoint: Path | None) -> str:
    """Make best_model/ what it was at this checkpoint (None: the start); says what it did, or cannot do."""
    if checkpoint is None:
        _removed(folder.best_model)
        return ""
    if not (files := _listed(checkpoint)):
        return ""  # nothing is known of it
    best = {
        name.removeprefix(f"{BEST}/"): each for name, each in files.items() if name.startswith(f"{BEST}/")
    }
    if best and not any(_faults(folder.best_model, best)) or not (best or folder.best_model.exists()):
        return ""
    if found := next(_faults(checkpoint / BEST, best), ""):
        return f"{checkpoint.name}: {BEST}/{found}; best_model/ stays as it is"
    with writing(folder.best_model):
        half_made = folder.best_model.with_name(f"{BEST}.tmp")
        if best:
            _copied(checkpoint / BEST, half_made)
            synced(half_made)
        _removed(folder.best_model)
        if best:
            half_made.rename(folder.best_model)
    return f"best_model/ is again the best up to step {step_of(checkpoint)}"


def removed_from(*folders: StudentFolder) -> int:
    """Delete all checkpoints of these students; returns the bytes freed."""
    freed = sum(file.stat().st_size for folder in folders for file in folder.checkpoints.rglob("*"))
    for folder in folders:
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return freed


def digest(path: Path) -> str:
    """XXH3, 128 bits: it finds what a disk, a copy or a kill has changed, at the speed of reading."""
    sum_of = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            sum_of.update(piece)
    return sum_of.hexdigest()


def _listed(checkpoint: Path) -> Listed:
    """The files of a sealed checkpoint; {} where its manifest is missing, torn or not finished."""
    try:
        listed = read_json(checkpoint / MANIFEST)["files"]
        return {name: (size, content) for name, (size, content) in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RunError):
        return {}


def _faults(checkpoint: Path, files: Listed, *, quick: bool = False) -> Iterator[str]:
    for name, (size, content) in files.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes, and {size} were written"
        elif not quick and digest(path) != content:
            yield f"{name} is not what was written"


def _faults_of_before(checkpoint: Path) -> Iterator[str]:
    """What can be told without a manifest: a file is missing, or torn."""
    try:
        state = read_json(checkpoint / "trainer_state.json")
    except RunError as error:
        yield f"trainer_state.json is no JSON ({error.__cause__})"
        return
    if not isinstance(state, dict) or state.get("global_step") != step_of(checkpoint):
        yield f"trainer_state.json is {'missing' if state is None else 'of another step'}"
    for what, names in NEEDED.items():
        if not any(path for name in names for path in checkpoint.glob(name)):
            yield f"it has no {what} ({names[0]})"
    index = checkpoint / "model.safetensors.index.json"
    shards = set(read_json(index)["weight_map"].values()) if index.exists() else set()
    yield from (f"{name} is missing" for name in sorted(shards) if not (checkpoint / name).exists())
    for path in sorted(checkpoint.glob(WEIGHTS)):
        if not _is_whole(path):
            yield f"{path.name} is torn"
    for path in (path for ending in ("*.pt", "*.pth") for path in sorted(checkpoint.glob(ending))):
        if not zipfile.is_zipfile(path):
            yield f"{path.name} is torn"


def _is_whole(safetensors: Path) -> bool:
    """Whether the file is as long as its header says: 8 bytes with the header's length, header, tensors."""
    with safetensors.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, safetensors.stat().st_size)))
        except ValueError:
            return False
    ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
    return safetensors.stat().st_size == 8 + length + max(ends, default=0)


def _copied(source: Path, target: Path) -> None:
    """A copy of a model's folder, which takes no room as long as both are there."""
    _removed(target)
    shutil.copytree(source, target, copy_function=_linked)


def _linked(source: str, target: str) -> None:
    if Path(source).match(WEIGHTS):
        try:
            os.link(source, target)
            return
        except OSError:  # not every file system knows second names
            pass
    shutil.copy2(source, target)


def _removed(path: Path) -> None:
    """Remove a folder, a file or a link; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
