"""The files of a training, and how they are read and written: whole or not at all."""

import datetime
import errno
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.errors import RunError, without_keys

REFUSALS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "ENOTDIR")
GO_ON = "KDLIB_GO_ON"
WHOLE = "kdlib writes it whole: bring back a copy, or delete it and make it again"


def project_root() -> Path:
    """The folder that holds notebooks/ and configs/: this one or the nearest above (as in JupyterLab)."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "configs").is_dir():
            return folder
    return here


def commit() -> str | None:
    """Which one of the project's is checked out; None where it is no clone."""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project_root(), check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class StudentFolder:
    """Where one student's training leaves its files."""

    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best_model(self) -> Path:
        return self.path / "best_model"

    @property
    def final_model(self) -> Path:
        return self.path / "final_model"

    @property
    def history(self) -> Path:
        return self.path / "history.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def is_trained(self) -> bool:
        """Training reached its end: history.json is the last file written."""
        return self.history.exists()


def read_json(path: Path, default: Any = None) -> Any:
    """What a file of kdlib's holds; `default`, whose kind it must be of, where there is none.

    Raises:
        RunError: it holds no JSON, or something else than `default` is.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: found no JSON ({error}); {WHOLE}") from error
    if default is not None and not isinstance(found, type(default)):
        needed = "an object" if isinstance(default, dict) else "a list"
        raise RunError(f"{path}: found {type(found).__name__}, needs {needed}; {WHOLE}")
    return found


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write all or nothing, also in a power cut, and no keys: to a neighbour first, then renamed.

    Raises:
        RunError: the disk refuses.
    """
    neighbour = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # of this process: several write one index
    with writing(path):
        neighbour.write_text(without_keys(text), encoding="utf-8")
        synced(neighbour)
        neighbour.replace(path)
        synced(path.parent, within=False)


def json_lines(path: Path) -> list[Any]:
    """The rows of a file that is added to, as far as they are whole; none where there is no file.

    A last line that is being written, or that a kill has torn, is left out: `is_torn` tells.

    Raises:
        RunError: a whole line is no JSON.
    """
    content, found = path.read_bytes() if path.exists() else b"", []
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8", "replace")
    for number, line in enumerate(whole.split("\n"), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            do = "bring back a copy, or delete that line: what it says is then asked for again"
            raise RunError(f"{path}, line {number}: found no JSON ({error}); {do}") from None
    return found


def is_torn(path: Path) -> bool:
    """Whether a file that is added to ends within a line."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def add_json_lines(path: Path, rows: Iterable[Any], *, at_once: bool = True) -> None:
    """Add rows, without keys: all of them, or none where the disk refuses.  A torn last line is cut before.

    Args:
        at_once: return when the disk has them, so that a power cut loses none.

    Raises:
        RunError: the disk refuses.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    left = without_keys(text).encode("utf-8", "replace")  # halves of characters, as JSON can hold, go too
    with writing(path), path.open("ab", buffering=0) as file:
        if is_torn(path):
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
        before = os.fstat(file.fileno()).st_size
        try:
            while left:
                left = left[os.write(file.fileno(), left) :]
            if at_once:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(before)  # no half a line between two
            raise


def synced(*paths: Path, within: bool = True) -> None:
    """Have the disk take in files, and folders with all that is `within` them; returns when it has."""
    for path in paths:
        inside = path.rglob("*") if within and path.is_dir() else ()
        for each in (*inside, path):
            opened = os.open(each, os.O_RDONLY)
            try:
                os.fsync(opened)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot be told so
                    raise
            finally:
                os.close(opened)


def without_keys_in(path: Path) -> None:
    """Take the keys out of a file that others wrote, where it is there and holds one."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if (clean := without_keys(text)) != text:
        with writing(path):
            path.write_text(clean, encoding="utf-8")  # in place: it may be locked, or open elsewhere


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a disk that refuses is a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def is_refusal(error: BaseException) -> bool:
    """True for a disk that refuses: full, read-only, not ours; not for a tracker's lost connection.

    safetensors tells the system's number in words: `Os { code: 122, kind: QuotaExceeded, … }`.
    """
    said = re.search(r"\bcode: (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    number = int(said[1]) if said else error.errno if isinstance(error, OSError) else None
    return errno.errorcode.get(number or 0) in REFUSALS


def write_error(path: Path, error: Exception) -> RunError:
    """The RunError for a disk that refuses."""
    advice = f"free some space, then {go_on()}"
    if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        advice = "choose a folder you can write to with --runs"
    return RunError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; {advice}")


@contextmanager
def going_on(how: str) -> Iterator[None]:
    """Inside, and in what is started there, this is how a stopped run goes on."""
    before = os.environ.get(GO_ON)
    os.environ[GO_ON] = how
    try:
        yield
    finally:
        del os.environ[GO_ON]
        os.environ.update({GO_ON: before} if before else {})


def go_on() -> str:
    """How to go on from the last checkpoint: as the command says that was used, else as in a notebook."""
    return os.environ.get(GO_ON, "go on with --resume, or run this cell again")


def now() -> str:
    """This moment, to the millisecond: steps may be shorter than a second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")
