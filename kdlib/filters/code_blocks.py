"""The code in an answer: its fenced blocks, and whether they parse."""

import ast
import importlib
import re
import textwrap
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

from kdlib.errors import ConfigError, nearest

BLOCK = re.compile(
    r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\n`]*)\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
NAMES = {
    **{"py": "python", "python3": "python", "js": "javascript", "node": "javascript", "jsx": "javascript"},
    **{"ts": "typescript", "tsx": "typescript", "cpp": "c++", "cc": "c++", "cxx": "c++", "golang": "go"},
    **{"rs": "rust", "cs": "c#", "csharp": "c#", "rb": "ruby", "kt": "kotlin"},
}
"""Names of languages on blocks → the one that is used here."""
NO_CODE = (
    "",
    "text",
    "txt",
    "plaintext",
    "output",
    "console",
    "bash",
    "sh",
    "shell",
    "diff",
    "markdown",
    "md",
)
"""On blocks that say nothing of the language that was asked for."""
GRAMMARS = {
    **{"javascript": "tree_sitter_javascript", "java": "tree_sitter_java", "go": "tree_sitter_go"},
    **{"rust": "tree_sitter_rust", "c": "tree_sitter_c", "c++": "tree_sitter_cpp"},
    "typescript": "tree_sitter_typescript",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, "" where none is named, and its text."""

    language: str
    text: str


def blocks(answer: str) -> list[Block]:
    """The fenced blocks of an answer in Markdown, in order; one that does not end ends with the answer."""
    found = BLOCK.findall(answer)
    names = [(name.split() or [""])[0].strip("{}.").lower() for _, name, _ in found]
    return [
        Block(NAMES.get(name, name), textwrap.dedent(text))
        for name, (_, _, text) in zip(names, found, strict=True)
    ]


def prose(answer: str) -> str:
    """What stands around the blocks."""
    return BLOCK.sub("", answer)


def code_in(answer: str, language: str) -> list[str]:
    """The code of an answer in a language: its blocks of that name, or else those without one.

    An answer without any block is code as a whole where it is Python that parses.
    """
    found = blocks(answer)
    for name in (language, ""):
        if code := [block.text for block in found if block.language == name and not _is_session(block.text)]:
            return code
    return [answer] if not found and language == "python" and fault("python", answer) is None else []


def other_language(answer: str, language: str) -> str | None:
    """The language that the answer's code is in, where it is not the one that was asked for."""
    named = {block.language for block in blocks(answer)} - {*NO_CODE}
    return None if not named or language in named else sorted(named)[0]


def fault(language: str, code: str) -> str | None:
    """Where code does not parse; None where it does.

    Raises:
        ConfigError: the grammar of this language is not installed, or there is none.
    """
    if language == "python":
        return _python_fault(code)
    tree = parser(language).parse(code.encode())
    if not tree.root_node.has_error:
        return None
    return f"line {_first_error(tree.root_node).start_point[0] + 1}"


@cache
def parser(language: str) -> Any:
    """tree-sitter's parser of a language."""
    if language not in GRAMMARS:
        known = ", ".join(("python", *GRAMMARS))
        raise ConfigError(
            f"filters.parses: no grammar for {language!r}{nearest(language, GRAMMARS)}; there are {known}"
        )
    try:
        import tree_sitter

        module = importlib.import_module(GRAMMARS[language])
    except ImportError as error:
        raise ConfigError(
            f"filters.parses: {language} needs {error.name}, which is not installed; run: "
            "pip install 'kdlib[treesitter]'"
        ) from None
    grammar = getattr(module, "language_typescript" if language == "typescript" else "language")
    return tree_sitter.Parser(tree_sitter.Language(grammar()))


def _python_fault(code: str) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(code)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}" if error.lineno else error.msg
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; brackets without end
        return str(error) or type(error).__name__
    return None


def _first_error(node: Any) -> Any:
    """The deepest first node with an error."""
    below = next((child for child in node.children if child.has_error or child.is_missing), None)
    return node if below is None else _first_error(below)


def _is_session(text: str) -> bool:
    return text.lstrip().startswith(">>>")
