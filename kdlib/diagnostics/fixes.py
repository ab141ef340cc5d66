"""Changes written into a config's YAML, with its comments, its order and every untouched line as they
were.  Imports no torch.
"""

import io
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from kdlib.errors import ConfigError

LAYOUTS = [
    {"mapping": deep, "sequence": offset + dash, "offset": offset}
    for deep in (2, 4)
    for offset in (0, 2, 4)
    for dash in (2, 4)
]
"""How files are indented: a mapping, a list's dashes, and what stands after a dash."""


def rewritten(text: str, changes: Mapping[str, Any]) -> str:
    """The YAML text with each value put in at its dotted path; sections on the way are made where they are
    missing.

    A new key stands before the last of its section, since what follows the last may be the next section's
    comment.

    Raises:
        ConfigError: ruamel.yaml, stricter than the reader of configs, refuses the file: a key stands there
            twice.
    """
    try:
        tree = YAML().load(text)
    except YAMLError as error:
        raise ConfigError(f"the config cannot be changed in place: {error}") from error
    layout = max(
        LAYOUTS,
        key=lambda each: sum(
            a == b for a, b in zip(text.splitlines(), _written(tree, each).splitlines(), strict=False)
        ),
    )
    before = _written(tree, layout)
    for path, value in changes.items():
        _put(tree, path.split("."), value)
    return _own_lines(text, before, _written(tree, layout))


def _written(tree: Any, layout: Mapping[str, int]) -> str:
    round_trip, stream = YAML(), io.StringIO()
    round_trip.indent(**layout)
    round_trip.preserve_quotes, round_trip.width = True, 2**20
    round_trip.representer.add_representer(
        type(None), lambda writer, _: writer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    round_trip.dump(tree, stream)
    return stream.getvalue()


def _put(tree: Any, path: Sequence[str], value: Any) -> None:
    head, *rest = path
    key = int(head) if isinstance(tree, list) else head
    if isinstance(tree, CommentedMap) and key not in tree:
        tree.insert(max(len(tree) - 1, 1), key, None)
    if not rest:
        tree[key] = value
        return
    if tree[key] is None:
        tree[key] = CommentedMap()
    if not tree[key]:
        tree[key].fa.set_flow_style()
    _put(tree[key], rest, value)


def _own_lines(text: str, before: str, after: str) -> str:
    """`after`, with the lines that no change touched as they stand in the text, however that is laid out.

    Args:
        before: the text as it is written again without any change; where it has as many lines, they belong
            together.
    """
    own, plain, changed = (each.splitlines(keepends=True) for each in (text, before, after))
    if len(own) != len(plain):
        return after
    lines: list[str] = []
    for kind, start, end, other_start, other_end in SequenceMatcher(
        None, plain, changed, autojunk=False
    ).get_opcodes():
        lines += own[start:end] if kind == "equal" else changed[other_start:other_end]
    merged = "".join(lines)
    try:
        same = yaml.safe_load(merged) == yaml.safe_load(after)
    except yaml.YAMLError:  # lines of two layouts beside each other
        same = False
    return merged if same else after
