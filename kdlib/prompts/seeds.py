"""Seeds: a user's snippets and problems, and the functions of Python's own standard library."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from kdlib.config.sections import read_beside
from kdlib.errors import DataError, listed, nearest, nearest_file
from kdlib.prompts.snippets import FUNCTIONS, Snippet, has_docstring, python_fields

BUILT_IN = "stdlib"
READ = (".py", ".jsonl")
LINES = (3, 40)  # of a built-in function's body, at least and at most
SHORTEST = 30  # characters of its docstring


def seeds(source: str) -> list[Snippet]:
    """The seeds of `stdlib`, of a .py or .jsonl file, or of all such files in a folder, in one order.

    Raises:
        DataError: there is no such file, it cannot be read, or nothing is in it.
    """
    if source == BUILT_IN:
        return list(stdlib())
    path = Path(source).expanduser()
    if not path.exists():
        near = nearest(path.name, [BUILT_IN]) or nearest_file(path)
        raise DataError(f"{source}: no such file{near}; prompts.seeds is {BUILT_IN}, a file or a folder")
    if path.is_file() and path.suffix not in READ:
        raise DataError(f"{source}: unknown type of file; seeds are read from {' and '.join(READ)}")
    files = [path] if path.is_file() else sorted(each for end in READ for each in path.rglob(f"*{end}"))
    faults: list[str] = []
    found = [
        each
        for file in files
        for each in _read(file, str(file.relative_to(path if path.is_dir() else path.parent)), faults)
    ]
    if faults or not found:
        what = f"{len(faults)} cannot be read" if faults else f"no seeds in {len(files)} files"
        needed = "a .py file has functions, a line of .jsonl is an object of texts, as code or description"
        raise DataError(f"{source}: {what}; {needed}{listed(faults)}")
    return found


def _read(file: Path, name: str, faults: list[str]) -> Iterator[Snippet]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{name}: {error}")
        return
    if file.suffix == ".py":
        try:
            yield from functions(content, name)
        except (SyntaxError, ValueError) as error:
            faults.append(f"{name}: no Python ({error})")
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield _of_row(json.loads(line), f"{name}:{number}")
            except (SyntaxError, ValueError) as error:
                faults.append(f"{name}, line {number}: {error}")


def _of_row(row: object, name: str) -> Snippet:
    if not isinstance(row, dict) or not row:
        raise ValueError(f"found {type(row).__name__}; an object of texts is needed")
    if wrong := [key for key, value in row.items() if not isinstance(value, str) or not value.strip()]:
        raise ValueError(f"{wrong[0]} = {row[wrong[0]]!r}; a text is needed")
    fields = {"language": "Python"} | row
    if "code" in row and fields["language"].lower() == "python":
        with _quietly():
            fields = python_fields(row["code"]) | fields
    return Snippet(name, fields)


def functions(
    content: str, name: str, wanted: Callable[[Any], bool] = lambda node: True
) -> Iterator[Snippet]:
    """The functions of a module, as seeds `name:function`; methods, which need their class, are none.

    Args:
        wanted: says of a function's node whether it is one.

    Raises:
        SyntaxError, ValueError: it is no Python.
    """
    with _quietly():
        tree = ast.parse(content)
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and wanted(node):
            with _quietly():
                fields = python_fields(_source(content, node))
            yield Snippet(f"{name}:{node.name}", {"language": "Python"} | fields)


def _source(content: str, node: ast.AST) -> str:
    """A function's text, with its decorators."""
    lines = content.replace("\r\n", "\n").split("\n")
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return "\n".join(lines[first - 1 : node.end_lineno])


@cache  # a second
def stdlib() -> tuple[Snippet, ...]:
    """Documented functions of the standard library, whose sources come with every Python.

    Of a fixed list of modules, so that only the version of Python decides.
    """
    home = Path(sysconfig.get_path("stdlib"))
    found = []
    for module in read_beside(__file__):
        file = home / f"{module.replace('.', '/')}.py"
        if not file.exists():
            file = file.with_suffix("") / "__init__.py"
        if file.exists():
            found += functions(file.read_text(encoding="utf-8"), module, _is_apt)
    if not found:
        raise DataError(f"{BUILT_IN}: no sources of the standard library in {home}; use another Python")
    return tuple(found)


def _is_apt(function: Any) -> bool:
    """Whether a function is public, documented, and neither a line nor pages long."""
    body, docstring = function.body[has_docstring(function) :], ast.get_docstring(function) or ""
    if function.name.startswith("_") or not body or len(docstring) < SHORTEST:
        return False
    return LINES[0] <= function.end_lineno - body[0].lineno + 1 <= LINES[1]


def _quietly() -> warnings.catch_warnings:
    """Without what the compiler thinks of another's code, as of `\\d` in a text."""
    return warnings.catch_warnings(action="ignore")
