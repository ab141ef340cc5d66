"""The files of a source: which there are, of which form and split, and what tells that they have changed."""

import contextlib
import glob
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets.config
from datasets.data_files import DataFilesList, get_data_patterns
from datasets.fingerprint import Hasher

from kdlib.errors import DataError, nearest_file

PROSE: dict[str, Any] = {"sample_by": "paragraph", "encoding": "utf-8-sig"}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {  # ending → the reader, and how it reads
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), ("json", {})),
    **{".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"})},
    **dict.fromkeys((".parquet", ".pq"), ("parquet", {})),
    **dict.fromkeys((".txt", ".md"), ("text", PROSE)),
    ".arrow": ("arrow", {}),
}
PACKED, ARCHIVE = (".gz", ".zst", ".bz2", ".xz"), ".zip"
KNOWN = f"{', '.join(FORMS)}, each also packed ({', '.join(PACKED)}), or {ARCHIVE}"
BY_PATTERN = "name those to be read by a pattern, as data.source: folder/*.jsonl"
MAGIC = re.compile(r"[*?[]")
CARD = re.compile(r"\A---\s*$.*^(configs|dataset_info):", re.MULTILINE | re.DOTALL)
BESIDE = re.compile(r"(readme|licen[cs]e|notice|changelog|citation|contributing|requirements)\b", re.I)
OF_DATASETS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
OF_CODE = (
    "its rows are made by code of its own, which is never run here ({}); name its data files (.jsonl, .csv, "
    ".parquet), or a copy that has them"
)


def is_saved(path: str) -> bool:
    """Whether it is a folder that `datasets` saved."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def is_local(source: str) -> bool:
    """Whether it is files, or can be nothing else."""
    is_named = source.startswith((".", "/", "~")) or bool(ending(source) or MAGIC.search(source))
    return is_named or os.path.exists(source)


def is_prose(source: str) -> bool:
    """Whether it is one file of text, whose paragraphs are parts of one text."""
    is_one = not (MAGIC.search(source) or os.path.isdir(source))
    return is_one and ending(source) in FORMS and FORMS[ending(source)][0] == "text"


def ending(path: str) -> str:
    """What the name says of its form: `.jsonl` of `A.JSONL.gz`; nothing where that is not known."""
    stem, last = os.path.splitext(path.lower())
    last = os.path.splitext(stem)[1] if last in PACKED else last
    return last if last in FORMS or last == ARCHIVE else ""


def folder_of(path: str) -> str | None:
    """A folder, or what an archive holds; None of anything else."""
    if os.path.isdir(path):
        return path
    return _unpacked(path) if os.path.isfile(path) and ending(path) == ARCHIVE else None


def has_card(folder: str) -> bool:
    """Whether a folder says itself which files are which split's, and of what types."""
    card = Path(folder, "README.md")
    others = (Path(folder, name).is_file() for name in (".huggingface.yaml", "dataset_infos.json"))
    return any(others) or (card.is_file() and CARD.search(card.read_text("utf-8", "replace")) is not None)


def splits_of(path: str) -> dict[str, list[str]]:
    """{split: its files} of a folder, a pattern or a file; a DataError where that is not certain."""
    if os.path.isdir(path):
        files = _data_files(DataFilesList.from_patterns(["**"], glob.escape(os.path.abspath(path))))
        if not files:
            code = next((name for name in sorted(os.listdir(path)) if name.endswith(".py")), None)
            raise DataError(
                f"{path}: {f'{OF_CODE} ({code})' if code else f'no data file in it; it may be {KNOWN}'}"
            )
        return _told_apart(files, path)
    if os.path.isfile(path):
        return {"train": [path]}
    if not (magic := MAGIC.search(path)):
        raise DataError(f"{path}: no such file or folder{nearest_file(Path(path))}")
    files = sorted(os.path.abspath(file) for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not files:
        raise DataError(f"{path}: no file is called so")
    folder = os.path.dirname(path[: magic.start()]) or "."
    found = _told_apart(files, os.path.dirname(folder) if os.path.basename(folder) == "data" else folder)
    return found if len(found) > 1 else {"train": files}


def form_of(files: Sequence[str], source: str) -> tuple[str, dict[str, Any]]:
    """What reads all of these files, and how; a DataError where there is none, or more than one."""
    endings = {ending(file): os.path.basename(file) for file in files}
    if unknown := next((name for each, name in endings.items() if each not in FORMS), None):
        raise DataError(f"{source}: {unknown}: unknown type of file; it may be {KNOWN}")
    forms = [FORMS[each] for each in endings]
    if any(form != forms[0] for form in forms):
        both = ", ".join(f"{each} ({name})" for each, name in sorted(endings.items()))
        raise DataError(f"{source}: has files of several forms, {both}; {BY_PATTERN}")
    return forms[0]


def stamp(file: str) -> str:
    """What changes whenever a file's content does: the last of these times nobody can set."""
    found = os.stat(file)
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def _data_files(files: Sequence[str]) -> list[str]:
    """Those that may hold rows, by their endings; not what is written beside such."""
    names = {file: os.path.basename(file) for file in files}
    return [
        x for x, name in names.items() if ending(x) and name not in OF_DATASETS and not BESIDE.match(name)
    ]


def _told_apart(files: Sequence[str], folder: str) -> dict[str, list[str]]:
    """Files of a folder by split, as `datasets` tells these by names; all are train's where it tells none."""
    base = glob.escape(os.path.abspath(folder))
    patterns = {str(name): each for name, each in get_data_patterns(base).items()}
    matched = {name: {*DataFilesList.from_patterns(each, base)} for name, each in patterns.items()}
    found = {name: [file for file in files if file in each] for name, each in matched.items()}
    found = {name: each for name, each in found.items() if each}
    told = [file for each in found.values() for file in each]
    if twice := next((file for file in told if told.count(file) > 1), None):
        raise DataError(f"{twice}: is of two splits by its name, {' and '.join(found)}; rename it")
    if told and (left := next((file for file in files if file not in told), None)):
        other = f"as {os.path.basename(told[0])} beside it does"
        raise DataError(f"{left}: belongs to no split by its name, {other}; {BY_PATTERN}")
    return found or {"train": [*files]}


def _unpacked(path: str) -> str:
    """A folder in the cache with what the archive now holds."""
    key = Hasher.hash([os.path.abspath(path), stamp(path)])
    folder = Path(datasets.config.HF_DATASETS_CACHE, "kdlib_archives", key)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = tempfile.mkdtemp(dir=folder.parent)
        try:
            with zipfile.ZipFile(path) as archive:
                if (size := sum(each.file_size for each in archive.infolist())) > shutil.disk_usage(
                    part
                ).free:
                    raise DataError(f"{path}: unpacked it has {size:,} bytes, for which there is no room")
                archive.extractall(part)
            with contextlib.suppress(FileExistsError):  # another process was first
                os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return str(folder)
