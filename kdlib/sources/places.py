"""Where texts and questions come from: a built-in name, files, a folder, an archive, or the hub.

What was read lies in the cache of `datasets`, by what the files were: not by their names alone, by which
`datasets` itself knows a folder with a card.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetBuilder, DatasetDict
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError
from yaml import YAMLError

from kdlib.config.data import HUB_IDS, DataConfig
from kdlib.errors import DataError, nearest, shown
from kdlib.sources.built_in import BUILT_IN
from kdlib.sources.files import OF_CODE, folder_of, form_of, has_card, is_local, is_saved, splits_of, stamp
from kdlib.sources.readers import BROKEN, HAS_ZSTD, READERS

VERSION = "1"  # of what the readers make of a file
SETTINGS = {  # setting → the readers that know it, and what they call it
    "separator": (("csv",), "sep"),
    "header": (("csv",), "names"),
    "encoding": (("csv", "json", "text"), "encoding"),
    "field": (("json",), "field"),
}


def read_splits(config: DataConfig) -> DatasetDict:
    """The source's splits: "train", which is not empty, and others where it has them; or streams of these.

    `config.source` is a built-in name, a file, a pattern of files, a folder or archive of such, a folder that
    `datasets` saved, or a hub id; "train" is the split that `config.train` names.
    """
    path = os.path.expanduser(config.source)
    if config.source in BUILT_IN or is_saved(path):
        _options(config, "", {})
        with _told(config), _at_its_word(config):
            found = BUILT_IN[config.source]() if config.source in BUILT_IN else datasets.load_from_disk(path)
    else:
        builder = _builder(config)
        with _told(config):
            if config.streaming:
                found = builder.as_streaming_dataset()
            else:
                builder.download_and_prepare()
                found = builder.as_dataset()
    if isinstance(found, Dataset):
        found = DatasetDict(train=found)
    if config.train not in found:
        asked = "" if config.train == "train" else f" and none of the name {config.train!r}"
        has = f"has the splits {', '.join(found)}{asked}; name the one to train on in data.train"
        raise DataError(f"{config.source}: {has}")
    others = {name: rows for name, rows in found.items() if name not in ("train", config.train)}
    found = type(found)({"train": found[config.train], **others})
    if isinstance(found, DatasetDict) and len(found["train"]) == 0:
        raise DataError(f"{config.source}: is empty; at least two documents are needed")
    return found


def identity(config: DataConfig) -> str:
    """What changes when the source does: its files as they are, or the hub's revision of it."""
    path = os.path.expanduser(config.source)
    if config.source in BUILT_IN:
        return config.source
    if is_saved(path):
        return str([(file, stamp(file)) for file in sorted(map(str, Path(path).rglob("*")))])
    builder = _builder(config)
    files = (builder.config.data_files or {}).items()
    return str([builder.hash, *((str(split), [*each], each.origin_metadata) for split, each in files)])


def _builder(config: DataConfig) -> DatasetBuilder:
    """What reads the source: of JSON, tables and text a reader of ours."""
    if not is_local(config.source):
        return _of_hub(config)
    path, card = os.path.expanduser(config.source), None
    with _told(config):
        folder = folder_of(path)
        if folder and has_card(folder):
            with _at_its_word(config):
                card = datasets.load_dataset_builder(folder, config.subset)
            splits = {str(name): [*files] for name, files in (card.config.data_files or {}).items()}
        else:
            splits = splits_of(folder or path)
        if config.subset and not card:
            what = f"data.subset: found {config.subset!r}, and these files have no card that names any"
            raise DataError(f"{config.source}: {what}; leave it out")
        every = [file for files in splits.values() for file in files]
        reader, options = form_of(every, config.source)
        if not HAS_ZSTD and any(file.lower().endswith(".zst") for file in every):
            raise DataError(f"{config.source}: needs backports.zstd; run: pip install 'kdlib[zstd]'")
        if not any(map(os.path.getsize, every)):
            raise DataError(f"{config.source}: is empty; at least two documents are needed")
        told = _options(config, reader, {**options, **(_of_card(card) if card else {})})
        stamped = {name: DataFilesList(each, [(stamp(x),) for x in each]) for name, each in splits.items()}
        own = {"dataset_name": f"kdlib_{reader}", "hash": VERSION}
        return READERS[reader](data_files=DataFilesDict(stamped), **own, **told)


def _of_card(card: DatasetBuilder) -> dict[str, Any]:
    """What a card says of its rows, and of how they are read, where that is not as usual."""
    usual, own = vars(type(card.config)()), READERS.get(card.name, type(card)).BUILDER_CONFIG_CLASS
    known = {name: each for name, each in vars(card.config).items() if hasattr(own, name)}
    apart = ("name", "version", "data_dir", "data_files", "description", "features")
    told = {name: each for name, each in known.items() if name not in apart and each != usual[name]}
    return {**told, "features": card.info.features}


def _of_hub(config: DataConfig) -> DatasetBuilder:
    """A hub's rows are read as others are, and lie where `datasets` looks for them without a network."""
    try:
        with _no_script(config.source):
            found = datasets.load_dataset_builder(config.source, config.subset)
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        # ValueError: a subset must be named, or is not there
        known = HUB_IDS.get(config.source.lower())
        hint = f"; on the hub it is {known}" if known else nearest(config.source, BUILT_IN)
        raise DataError(
            f"{config.source}: no data set to be had by this name{hint}. It is "
            f"no file, no folder and no built-in name ({', '.join(BUILT_IN)}); as a hub id (its "
            f"configuration goes into data.subset): {error}"
        ) from error
    told = _options(config, found.name, {})
    if found.name not in ("json", "csv"):
        return found
    where = {
        name: getattr(found, name) for name in ("dataset_name", "config_id", "hash", "base_path", "repo_id")
    }
    return READERS[found.name](data_files=found.config.data_files, **where, **{**_of_card(found), **told})


def _options(config: DataConfig, reader: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How a reader reads, with what the config says of it; a DataError where that is not its to know."""
    told = {name: value for name in SETTINGS if (value := getattr(config, name)) is not None}
    for name, value in told.items():
        if reader not in SETTINGS[name][0]:
            what = f"data.{name}: found {shown(value)}, which is of {' and '.join(SETTINGS[name][0])} files"
            raise DataError(f"{config.source}: {what}; leave it out")
    named = {SETTINGS[name][1]: value for name, value in told.items() if value is not False}
    return {**options, **named, **({"header": None} if "header" in told else {})}


@contextlib.contextmanager
def _no_script(source: str) -> Iterator[None]:
    """Where `datasets` (4 and later) finds a loading script, which it never runs: an error that says so."""
    try:
        yield
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        raise DataError(f"{source}: {OF_CODE.format(error)}") from error


@contextlib.contextmanager
def _told(config: DataConfig) -> Iterator[None]:
    """A DataError of what cannot be read."""
    try:
        with _no_script(config.source):
            yield
    except (DatasetGenerationError, *BROKEN) as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError):
            raise cause from None
        raise DataError(f"{config.source}: cannot be read: {' '.join(str(cause).split())}") from error


@contextlib.contextmanager
def _at_its_word(config: DataConfig) -> Iterator[None]:
    """A DataError where `datasets` believes a description that is none."""
    try:
        yield
    except (AttributeError, TypeError, YAMLError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"{config.source}: its card or description is damaged: {what}") from error
