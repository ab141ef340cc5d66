"""What a person writes, a YAML file or `key=value`, as plain data; and plain data as YAML.

YAML as its version 1.2 has it: `yes`, `010` and `1:30` are what they look like, where PyYAML by itself reads
true, 8 and 90; `2024-01-01` is a text, and a key that stands twice is refused.

Reference: https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import yaml

from kdlib.errors import ConfigError, nearest_file, refuse_keys, shown

Overrides = Sequence[str] | Mapping[str, Any]
MOST = 100_000  # values in one text, each alias written out
DEEPEST = 1000  # lists and mappings in one text, were each within the one before
INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.nan$"
)
CORE = {  # tag → its form, and what it may begin with
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]),
    "int": (INT, [*"-+0123456789"]),
    "float": (FLOAT, [*"-+0123456789."]),
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "merge": (re.compile(r"^<<$"), ["<"]),
}


class _Core(yaml.constructor.SafeConstructor, yaml.resolver.Resolver):
    """What PyYAML's safe loaders make of nodes, with YAML 1.2's words and numbers; no key twice."""

    yaml_implicit_resolvers: dict = {}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if (name := key.value) in lines:
                what = f"{shown(name)} stands twice here, first in line {lines[name]}; keep one"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Core.add_constructor("tag:yaml.org,2002:int", _Core.construct_int)
for _tag, (_form, _first) in CORE.items():
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _form, _first)


class _Loader(_Core, yaml.SafeLoader):
    """Of any text."""


class _Quick(_Core, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same, ten times faster where libyaml is there, which dies of a deeply nested text."""


def read_yaml(text: str, name: str) -> Any:
    """Plain data from YAML; a ConfigError, in which `name` says where the text stood, where it is none.

    Also where the text holds a key, were it in a comment: it is copied, and shown where it is at fault.
    """
    refuse_keys(text, name)
    try:
        found = _loaded(text)
        if _size(found, {}) > MOST:
            raise ConfigError(f"{name}: its aliases unfold to over {MOST:,} values; write out what is meant")
        return found
    except RecursionError:
        raise ConfigError(f"{name}: not valid YAML: nested too deeply, or within itself") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # all but the first from PyYAML's own conversions: !!timestamp 2026-13-45, !!bool x
        raise ConfigError(f"{name}: not valid YAML: {error}") from None


def _loaded(text: str) -> Any:
    """What libyaml refuses, as halves of characters, PyYAML's own parser may read, or says why not."""
    if sum(map(text.count, ("[", "{", "- ", "? "))) <= DEEPEST:
        with suppress(yaml.YAMLError):
            return yaml.load(text, Loader=_Quick)
    return yaml.load(text, Loader=_Loader)


def _size(value: Any, sizes: dict[int, int]) -> int:
    """How many values there are in all; a RecursionError where one holds itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = 0
        inner = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_size(each, sizes) for each in inner)
    elif not sizes[id(value)]:
        raise RecursionError
    return sizes[id(value)]


def read_text(path: Path) -> str:
    """What a text file says; a ConfigError where there is none, or no text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{nearest_file(path, '*.y*ml')}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None


def overridden(raw: dict, overrides: Overrides, name: str, kind: Any = None) -> dict:
    """`raw` with every override put in, the last one winning; `kind`: what it describes."""
    for key, value in pairs(overrides, kind):
        raw = with_override(raw, key, value, name)
    return raw


def pairs(overrides: Overrides, kind: Any = None) -> list[tuple[str, Any]]:
    """`["loss.temperature=3"]` or `{"loss.temperature": 3}` as [("loss.temperature", 3)].

    Args:
        kind: the section that is overridden: a field that takes a text gets what stands there as it stands.
    """
    refuse_keys(overrides, "an override")
    if isinstance(overrides, Mapping):
        return [(str(key), value) for key, value in overrides.items()]
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        form = 'a list like ["loss.temperature=3"] or a mapping'
        raise ConfigError(f"overrides are {form}; found {shown(overrides)}")
    found = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {shown(text)}: write it as key=value, e.g. loss.temperature=3")
        where = f"override {shown(text)}"
        found.append((key.strip(), _value(value.strip(), types_at(key.strip().split("."), kind), where)))
    return found


def _value(text: str, types: Sequence[Any], where: str) -> Any:
    """What an override sets a field of these types to: `#` and `: ` are a file's as well as YAML's."""
    try:
        found = read_yaml(text, where)
    except ConfigError:
        if str not in types:
            raise
        refuse_keys(text, where)
        return text
    is_quoted, is_null = text[:1] in ("'", '"'), text in ("", "~", "null")
    if isinstance(found, str):
        return found if is_quoted or text[:1] in "!&|>" else text
    if found is None:
        return None if is_null else text  # all of it a comment
    is_wanted = type(found) in types or (type(found) is int and float in types)
    return found if is_wanted or str not in types else text


def types_at(path: Sequence[str], kind: Any) -> list[Any]:
    """The plain types that a field below a section takes; [] where that is not known."""
    annotation = kind
    for part in path:
        inner = sections_in(annotation)
        fields = {field.alias or name: field for each in inner for name, field in each.model_fields.items()}
        if part not in fields:
            return []
        annotation = fields[part].annotation
    return _plain(annotation)


def _plain(annotation: Any) -> list[Any]:
    """`Annotated[str, …] | list[str] | None` as [str, list]."""
    if isinstance(annotation, type):
        return [annotation]
    if (origin := getattr(annotation, "__origin__", None)) in (list, dict):
        return [origin]
    return [each for inner in get_args(annotation) for each in _plain(inner)]


def sections_in(annotation: Any) -> list[Any]:
    """The section that a field holds, be it one, a list of them, or none at all."""
    if isinstance(annotation, type):
        return [annotation] if hasattr(annotation, "model_fields") else []
    return [found for inner in get_args(annotation) for found in sections_in(inner)]


def with_override(raw: dict, key: str, value: Any, name: str) -> dict:
    """`raw` with the value at this dotted path; sections on the way are made where they are missing."""
    head, dot, rest = key.partition(".")
    if not dot:
        return {**raw, head: value}
    inner = raw.get(head)
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"{name}: override {key}: `{head}` is {shown(inner)}, it has no `{rest}`")
    return {**raw, head: with_override(inner or {}, rest, value, name)}


def merged(raw: dict, change: Mapping) -> dict:
    """`raw` with the leaves of `change` put in; a section that is no mapping is left for the checks."""
    result = dict(raw)
    for key, value in change.items():
        if not isinstance(value, Mapping):
            result[key] = value
        elif isinstance(inner := raw.get(key) or {}, dict):
            result[key] = merged(inner, value)
    return result


def differences(one: Mapping, other: Mapping, prefix: str = "") -> list[str]:
    """`loss.temperature: 2.0 -> 3.0`, a line per value that differs between two nested mappings."""
    lines = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} -> {b}")
    return lines
