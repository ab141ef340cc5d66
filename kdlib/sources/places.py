"""Where texts and questions come from: a built-in name, a file, a folder, or the hub."""

import glob
import json
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError

from kdlib.config.sections import HUB_IDS, DataConfig
from kdlib.errors import DataError, listed, nearest, nearest_file
from kdlib.sources.built_in import BUILT_IN

NULL = re.compile(rb"null[ \t\r]*(?:\n|\Z)")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_splits(config: DataConfig) -> DatasetDict:
    """The source's splits: "train", which is not empty, and others where it has them; or streams of these.

    `config.source` is a built-in name, a file (.jsonl, .csv, .parquet, .txt by paragraph), a folder saved by
    `datasets` or holding such files, or a hub id.
    """
    path = Path(config.source).expanduser()
    if config.source in BUILT_IN:
        found = BUILT_IN[config.source]()
    elif path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        read = datasets.load_from_disk if saved else partial(datasets.load_dataset, **_how(config))
        found = _loaded(path, lambda: read(str(path)))
    elif path.suffix in READERS or path.is_file():
        found = _read_file(path, _how(config))
    else:
        found = _from_hub(config)
    if isinstance(found, Dataset):
        found = DatasetDict(train=found)
    if "train" not in found:
        raise DataError(f"{config.source}: has the splits {', '.join(found)}; one named train is needed")
    if isinstance(found, DatasetDict) and len(found["train"]) == 0:
        raise DataError(f"{config.source}: is empty; at least two documents are needed")
    return found


def _how(config: DataConfig) -> dict[str, bool]:
    return {"streaming": True} if config.streaming else {}


def _read_file(path: Path, how: Mapping[str, Any]) -> DatasetDict:
    if not path.exists():
        raise DataError(f"{path}: no such file{nearest_file(path)}")
    if path.suffix not in READERS:
        raise DataError(f"{path}: unknown type of file; it may be {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; at least two documents are needed")
    options = {"data_files": glob.escape(str(path)), **how}
    options |= {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
    try:
        return _loaded(path, lambda: datasets.load_dataset(READERS[path.suffix], **options))
    except DataError:
        if path.suffix == ".jsonl":
            _check_lines(path)
        raise


def _loaded(path: Path, load: Callable[[], DatasetDict | Dataset]) -> DatasetDict | Dataset:
    for file in sorted(path.rglob("*.json*")) if path.is_dir() else [path]:
        _check_nulls(file)
    try:
        with _no_script(path):
            return load()
    # pyarrow's and json's errors are ValueErrors
    except (DatasetGenerationError, OSError, ValueError, KeyError) as error:
        what, cause = path.suffix or "a folder of data files", error.__cause__ or error
        raise DataError(f"{path}: cannot be read as {what}: {cause}") from error


@contextmanager
def _no_script(source: object) -> Iterator[None]:
    """Where `datasets` (4 and later) finds a loading script, which it never runs: an error that says so."""
    try:
        yield
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        raise DataError(
            f"{source}: its rows are made by code of its own, which is never run here ({error}); name its "
            "data files (.jsonl, .csv, .parquet), or a copy that has them"
        ) from error


def _check_nulls(path: Path) -> None:
    """Refuse lines of JSON that are `null` and no more, of which pyarrow's reader dies, and its process."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for found in NULL.finditer(content):
            if not content[content.rfind(b"\n", 0, found.start()) + 1 : found.start()].strip():
                _check_lines(path)


def _check_lines(path: Path) -> None:
    """Name every broken line of a .jsonl file, where the reader would name a byte."""
    broken = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        broken.append(f"line {number}: not an object")
                except json.JSONDecodeError as error:
                    broken.append(f"line {number}: {error.msg}: {line.strip()[:60]!r}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if broken:
        raise DataError(f"{path}: {len(broken)} broken lines{listed(broken, 5)}")


def _from_hub(config: DataConfig) -> DatasetDict:
    if config.source.startswith((".", "/", "~")):
        raise DataError(f"{config.source}: no such file or folder")
    try:
        with _no_script(config.source):
            return datasets.load_dataset(config.source, config.subset, **_how(config))
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        # ValueError: a subset must be named, or is not there
        known = HUB_IDS.get(config.source.lower())
        hint = f"; on the hub it is {known}" if known else nearest(config.source, BUILT_IN)
        raise DataError(
            f"{config.source}: no data set to be had by this name{hint}. It is "
            f"no file, no folder and no built-in name ({', '.join(BUILT_IN)}); as a hub id (its "
            f"configuration goes into data.subset): {error}"
        ) from error
