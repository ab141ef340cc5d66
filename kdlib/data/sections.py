"""Docstrings of Python's standard library, each labelled by the section of the library reference in which its
module stands.

Read from the sources with `ast`; nothing of it is imported.  The sections are those of
https://docs.python.org/3.12/library/index.html, with two joined.  A docstring is left as it is, so some name
their module; the split is by module, so that such a name is never one that was trained on.
"""

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import datasets
from datasets import Dataset

from kdlib.errors import DataError

SECTIONS = {
    "text processing": "string re difflib textwrap stringprep rlcompleter",
    "data types": "datetime _pydatetime _strptime zoneinfo calendar collections _collections_abc heapq "
    "bisect weakref _weakrefset types "
    "copy pprint reprlib enum graphlib",
    "numeric and mathematical": "numbers decimal _pydecimal fractions random statistics",
    "file and directory access": (
        "pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch linecache shutil"
    ),
    "data persistence and file formats": (
        "pickle copyreg shelve dbm sqlite3 csv configparser tomllib netrc plistlib"
    ),
    "data compression and archiving": "gzip bz2 lzma _compression zipfile tarfile",
    "operating system services": "os io _pyio argparse getopt logging getpass curses platform ctypes",
    "concurrent execution": "threading _threading_local multiprocessing concurrent subprocess sched queue",
    "networking": "asyncio socket ssl selectors signal",
    "internet data handling": "email json mailbox mimetypes base64 quopri",
    "structured markup": "html xml _markupbase",
    "internet protocols": (
        "webbrowser wsgiref urllib http ftplib poplib imaplib smtplib uuid socketserver xmlrpc ipaddress"
    ),
    "graphical user interfaces": "tkinter",
    "development tools": "typing pydoc doctest unittest",
    "debugging and profiling": "bdb pdb profile cProfile pstats timeit trace tracemalloc",
    "runtime services": "sysconfig warnings dataclasses contextlib abc _py_abc traceback inspect site",
    "importing": "zipimport pkgutil modulefinder runpy importlib",
    "language services": (
        "ast token keyword tokenize tabnanny pyclbr py_compile compileall dis opcode pickletools"
    ),
}
"""Section → its modules and packages.  Joined are data persistence and file formats, 110 rows together.  Left
out are sections with fewer than 80 rows or 3 modules in Python 3.11 (binary data, functional programming,
cryptographic services, multimedia, internationalization, packaging, interpreters, those of one system alone),
program frameworks, which is nearly all `turtle`, and IDLE.
"""
SHORTEST = 20  # characters
TESTS = {"test", "tests", "idle_test"}
HOLDS = (ast.stmt, ast.excepthandler, ast.match_case)  # what definitions may stand in


@cache  # a few seconds
def stdlib_sections() -> Dataset:
    """{"text", "label", "group"}: some 6,200 docstrings in 18 sections, 6,000 of them different; the group is
    the module.

    Raises:
        DataError: this Python comes without the sources of its library.
    """
    home = Path(sysconfig.get_path("stdlib"))
    rows = [
        {"text": text, "label": label, "group": module}
        for label, names in SECTIONS.items()
        for name in names.split()
        for file in _files(home, name)
        for module in [_module(file.relative_to(home))]
        for text in _docstrings(file)
    ]
    if not rows:
        raise DataError(
            f"stdlib-sections: no sources of the standard library in {home}; use a Python that comes with "
            "them"
        )
    features = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=list(SECTIONS)),
        "group": datasets.Value("string"),
    }
    return Dataset.from_list(rows, features=datasets.Features(features))


def _files(home: Path, name: str) -> list[Path]:
    """A module's file, a package's files; none where this version of Python has it not, or only in C."""
    files = [home / f"{name}.py", *sorted((home / name).rglob("*.py"))]
    return [file for file in files if file.exists() and not TESTS.intersection(file.relative_to(home).parts)]


def _module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def _docstrings(file: Path) -> Iterator[str]:
    """Those of the module, its classes, functions and methods, in order."""
    waiting: list[ast.AST] = [ast.parse(file.read_bytes())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= SHORTEST:
                yield text
        waiting.extend(reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, HOLDS)]))
