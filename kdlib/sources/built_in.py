"""Texts that come with every Python, by name."""

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path

import datasets
from datasets import Dataset

from kdlib.config.sections import read_beside
from kdlib.errors import DataError

SECTIONS: dict[str, str] = read_beside(__file__)  # section of the library reference → its modules
SHORTEST = 20  # characters of a docstring
TESTS = {"test", "tests", "idle_test"}
HOLDS = (ast.stmt, ast.excepthandler, ast.match_case)  # what definitions may stand in


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
