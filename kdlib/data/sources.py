"""Where texts and questions come from: a built-in name, a file, a folder, or the hub."""

import ast
import glob
import json
import sysconfig
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError

from kdlib.config.sections import DataConfig, read_beside
from kdlib.errors import DataError, listed, nearest

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SECTIONS: dict[str, str] = read_beside(__file__)  # section of the library reference → its modules
SHORTEST = 20  # characters of a docstring
TESTS = {"test", "tests", "idle_test"}
HOLDS = (ast.stmt, ast.excepthandler, ast.match_case)  # what definitions may stand in


def read_splits(config: DataConfig) -> DatasetDict:
    """The source's splits: "train", which is not empty, and others where it has them.

    `config.source` is a built-in name, a file (.jsonl, .csv, .parquet, .txt by paragraph), a folder saved by
    `datasets` or holding such files, or a hub id.
    """
    path = Path(config.source).expanduser()
    if config.source in BUILT_IN:
        found = BUILT_IN[config.source]()
    elif path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        read = datasets.load_from_disk if saved else datasets.load_dataset
        found = _loaded(path, lambda: read(str(path)))
    elif path.suffix in READERS or path.is_file():
        found = _read_file(path)
    else:
        found = _from_hub(config)
    if isinstance(found, Dataset):
        found = DatasetDict(train=found)
    if "train" not in found:
        raise DataError(f"{config.source}: has the splits {', '.join(found)}; one named train is needed")
    if len(found["train"]) == 0:
        raise DataError(f"{config.source}: is empty; at least two documents are needed")
    return found


def check_column(config: DataConfig, rows: Dataset, column: str, setting: str) -> None:
    """Refuse a column that is not there; `setting` names it in the config."""
    if column not in rows.column_names:
        near, what = nearest(column, rows.column_names), setting.rpartition(".")[2]
        raise DataError(
            f"{config.source}: no column {column!r}{near}; it has {', '.join(rows.column_names)}: name the "
            f"one with the {what} in {setting}"
        )


def group_values(config: DataConfig, rows: Dataset, split: str) -> list[str] | None:
    """What each row belongs to and is not divided from: `data.group`, a built-in source's own; None without.

    Raises:
        DataError: no such column, or rows with nothing in it.
    """
    group = config.group or ("group" if config.source in BUILT_IN else None)
    if config.group:
        check_column(config, rows, config.group, "data.group")
    if group not in rows.column_names:
        return None
    values = rows[group][:]
    faults = [
        f"row {number} of {split}"
        for number, value in enumerate(values)
        if value is None or value != value or not str(value).strip()
    ]
    what = f"have nothing in {group!r} (data.group), so they cannot be kept together with their like"
    refuse_rows(config, faults, f"{what}; name what each belongs to")
    return list(map(str, values))


def own_splits(config: DataConfig, names: Collection[str]) -> dict[str, str]:
    """{"validation" or "test": which split of the source it is}: those that the config names, else so called.

    A `data.test` that is a share is taken from train, whatever the source has.  A DataError where the config
    names a split that is none of `names`.
    """
    own = {}
    for what, asked in (("validation", config.validation), ("test", config.test)):
        name = asked if isinstance(asked, str) else what
        if name in names:
            own[what] = name
        elif name == asked:
            raise DataError(
                f"{config.source}: no split {asked!r}{nearest(asked, names)}; held out can be "
                f"{', '.join(names) or 'none of its own'}: name it in data.{what}, or write a share of the "
                "rows, as 0.1"
            )
    if isinstance(config.test, float):
        own.pop("test", None)
    return own


def kept_once(
    config: DataConfig, splits: Mapping[str, Sequence[tuple[Hashable, Hashable]]]
) -> dict[str, list[int]]:
    """{split: the numbers of its rows that stay}: each row once, and none trained on that is held out.

    Args:
        splits: of each row the row itself, and what of it must not stand on two sides: its text, its
            question.  Where it does it stays in test, else in validation, so that held-out rows are whole.

    Raises:
        DataError: that leaves a split empty.
    """
    kept, held_out = {}, set[Hashable]()
    for name in ("test", "validation", "train"):
        first = {row: number for number, (row, _) in reversed([*enumerate(splits.get(name, ()))])}
        kept[name] = sorted(number for number in first.values() if splits[name][number][1] not in held_out)
        held_out |= {side for _, side in splits.get(name, ())}
        if splits.get(name) and not kept[name]:
            raise DataError(
                f"{config.source}: all that {name} has is held out in another split too, so nothing is left "
                "of it; give splits that do not repeat each other, or train alone, and kdlib divides it"
            )
    return {name: kept[name] for name in splits}


def refuse_rows(config: DataConfig, faults: Sequence[str], what: str) -> None:
    """Raise where there are faults: `3 rows <what>`, and the first ten of them, a line each."""
    if faults:
        count = f"{len(faults)} row{'s' * (len(faults) != 1)}"
        raise DataError(f"{config.source}: {count} {what}{listed(faults)}")


def python_docs() -> Dataset:
    """The language reference that comes with every Python: 79 documents, 465 kB of prose and code."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    return Dataset.from_dict({"name": names, "text": [topics[name] for name in names]})


def python_texts() -> Dataset:
    """Two kinds of text that come with every Python, as much of each: 79 of prose, some 50 of code.

    {"name", "text", "kind": "prose" (`python_docs`) or "code", the shortest modules of the standard library}.
    """
    home, prose = Path(sysconfig.get_path("stdlib")), python_docs()
    files = [home / f"{name}.py" for names in SECTIONS.values() for name in names.split()]
    sources = {file.stem: file.read_text(encoding="utf-8") for file in files if file.exists()}
    sizes = accumulate(sorted(map(len, sources.values())))
    fit = sum(size <= len("".join(prose["text"])) for size in sizes)
    names = sorted(sorted(sources, key=lambda name: len(sources[name]))[:fit])
    code = {"name": names, "text": [sources[name] for name in names], "kind": ["code"] * fit}
    kinds = prose.add_column("kind", ["prose"] * len(prose))
    return datasets.concatenate_datasets([kinds, Dataset.from_dict(code)])


@cache  # it takes a few seconds
def stdlib_sections() -> Dataset:
    """Docstrings of the standard library, labelled by their module's section of the library reference.

    {"text", "label", "group": the module}: some 6,200 in 18 sections, read with `ast`; nothing is imported.
    Some name their module: the split is by module, so that no such name was trained on.
    """
    home = Path(sysconfig.get_path("stdlib"))
    rows = [
        {"text": text, "label": label, "group": module}
        for label, names in SECTIONS.items()
        for name in names.split()
        for file in _files(home, name)
        for module in [".".join(file.relative_to(home).with_suffix("").parts).removesuffix(".__init__")]
        for text in _docstrings(ast.parse(file.read_bytes()))
    ]
    if not rows:
        raise DataError(f"stdlib-sections: no sources of the standard library in {home}; use another Python")
    text, classes = datasets.Value("string"), datasets.ClassLabel(names=list(SECTIONS))
    features = datasets.Features({"text": text, "label": classes, "group": text})
    return Dataset.from_list(rows, features=features)


def _files(home: Path, name: str) -> list[Path]:
    """A module's file, a package's files; none where this version of Python has it not, or only in C."""
    files = [home / f"{name}.py", *sorted((home / name).rglob("*.py"))]
    return [file for file in files if file.exists() and not TESTS.intersection(file.relative_to(home).parts)]


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Those of a module, its classes, functions and methods, in order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= SHORTEST:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, HOLDS):
            yield from _docstrings(child)


BUILT_IN = {"python-docs": python_docs, "python-texts": python_texts, "stdlib-sections": stdlib_sections}


def _read_file(path: Path) -> DatasetDict:
    if not path.exists():
        others = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file{nearest(path.name, others)}")
    if path.suffix not in READERS:
        raise DataError(f"{path}: unknown type of file; it may be {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; at least two documents are needed")
    if path.suffix == ".jsonl":
        _check_lines(path)
    options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
    options["data_files"] = glob.escape(str(path))
    return _loaded(path, lambda: datasets.load_dataset(READERS[path.suffix], **options))


def _loaded(path: Path, load: Callable[[], DatasetDict | Dataset]) -> DatasetDict | Dataset:
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
            return datasets.load_dataset(config.source, config.subset)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        # ValueError: a subset must be named, or is not there
        raise DataError(
            f"{config.source}: no data set to be had by this name{nearest(config.source, BUILT_IN)}. It is "
            f"no file, no folder and no built-in name ({', '.join(BUILT_IN)}); as a hub id (its "
            f"configuration goes into data.subset): {error}"
        ) from error
