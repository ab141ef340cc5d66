"""A bug planted in Python code: one comparison, operator or number is another's.

It nearly always changes what the code does; that it does for some input is not proven.
"""

import ast
import copy
import random
import re
from collections.abc import Iterator
from typing import Any

SWAPPED: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq},
    **{ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.FloorDiv, ast.FloorDiv: ast.Div},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
    **{ast.And: ast.Or, ast.Or: ast.And},
}
"""An operator → the one that is written for it."""
LISTS = (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr)


def planted(code: str, seed: str) -> str | None:
    """The code with one bug, the same for the same seed; None where there is no place for one."""
    tree = ast.parse(code)
    bodies = [
        node.body for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    places = [
        place for body in bodies[:1] or [tree.body] for statement in body for place in _places(statement)
    ]
    random.Random(seed).shuffle(places)
    for node, changed in places:
        found = _replaced(code, node, ast.unparse(changed))
        if _tree(found) not in (None, ast.dump(tree)):
            return found
    return None


def _places(node: ast.AST) -> Iterator[tuple[Any, ast.AST]]:
    """(node, what is to stand there) below a node, in the order of the text; not in f-strings."""
    if (changed := _changed(node)) is not None:
        yield node, changed
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.JoinedStr):
            yield from _places(child)


def _changed(node: ast.AST) -> ast.AST | None:
    other: Any = copy.copy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        other.ops = [SWAPPED[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        if any(isinstance(side, LISTS) or _is_text(side) for side in (node.left, node.right)):
            return None  # where no text or list would be seen to be wrong at once
        other.op = SWAPPED[type(node.op)]()
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED:
        if isinstance(node.value, LISTS) or _is_text(node.value):
            return None
        other.op = SWAPPED[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        other.op = SWAPPED[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        other.value = node.value + 1
    else:
        return None
    return other


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _replaced(code: str, node: Any, text: str) -> str:
    """The code with this text in a node's place; columns are counted in bytes."""
    lines = [line.encode() for line in re.split(r"(?<=\n)", code)]  # a form feed ends no line
    first, last = node.lineno - 1, node.end_lineno - 1
    changed = lines[first][: node.col_offset] + text.encode() + lines[last][node.end_col_offset :]
    return b"".join([*lines[:first], changed, *lines[last + 1 :]]).decode()


def _tree(code: str) -> str | None:
    try:
        return ast.dump(ast.parse(code))
    except SyntaxError:
        return None
