"""A seed of prompts: a piece of code or a problem, as named texts that templates can ask for.

Of Python code the texts are found with `ast`; nothing is imported or run.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Snippet:
    """One seed.

    Attributes:
        name: where it is from, as `textwrap.dedent` or `mine.jsonl:3`.
        fields: by name: language, code, name, signature; description: the docstring's text, or a problem's;
            bare: the code without docstrings and comments; head: its first half; buggy: with a bug planted;
            tests: code that raises where an answer is wrong; and whatever else a row has.
    """

    name: str
    fields: Mapping[str, str]

    @property
    def language(self) -> str:
        return self.fields["language"]

    @property
    def is_python(self) -> bool:
        return self.language.lower() == "python"


def python_fields(code: str) -> dict[str, str]:
    """What can be told of Python code; name, signature, description and head are its first function's.

    Raises:
        SyntaxError, ValueError: it is no Python.
    """
    code = code.replace("\r\n", "\n")
    tree = ast.parse(code)
    fields = {"code": code.strip("\n")}
    function = next((node for node in tree.body if isinstance(node, FUNCTIONS)), None)
    if function is not None:
        lines = code.split("\n")  # a form feed ends no line
        fields |= {"name": function.name, "signature": signature(function), "head": head(function, lines)}
        if docstring := (ast.get_docstring(function) or "").strip():
            fields["description"] = docstring
    fields["bare"] = bare(tree)
    return {name: text for name, text in fields.items() if text}


def signature(function: Any) -> str:
    """A function's first line, without the colon."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    start = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    return f"{start} {function.name}({ast.unparse(function.args)}){returns}"


def bare(tree: ast.AST) -> str:
    """The code of a tree, which is changed, without docstrings and comments."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and has_docstring(node):
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.unparse(tree)


def has_docstring(node: Any) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def head(function: Any, lines: list[str]) -> str:
    """All that comes before the middle of a function's body, cut between two statements; "" of one line."""
    body = function.body[has_docstring(function) :]
    if not body:
        return ""
    starts = {node.lineno for node in ast.walk(function) if isinstance(node, ast.stmt)}
    first, last = body[0].lineno, function.end_lineno
    if between := [line for line in starts if first < line <= last]:
        middle = (first + last + 1) / 2
        first = min(between, key=lambda line: (abs(line - middle), line))
    return "\n".join(lines[: first - 1]).strip("\n")
