"""Templates that prompts are written with: Jinja, in its sandbox; a table of ours, and the user's own."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from kdlib.config.reading import read_text, read_yaml
from kdlib.config.sections import read_beside
from kdlib.errors import ConfigError, printable
from kdlib.prompts.config import known_category

DRAWN, TARGET = "drawn", "target"
SANDBOX = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@dataclass(frozen=True)
class Template:
    """One way to ask.

    Attributes:
        name: category/name.
        needs: the fields of a seed that it asks for.
        drawn: what is drawn for it, by name, each from a list.
    """

    name: str
    text: str
    needs: frozenset[str]
    drawn: Mapping[str, tuple[str, ...]]

    def filled(self, fields: Mapping[str, str], seed: str) -> tuple[str, str]:
        """The prompt for one seed's fields, and the language of its answer's code.

        Raises:
            ConfigError: the sandbox forbids it, or it fails.
        """
        drawing, language, chosen = random.Random(seed), fields["language"], {}
        for name, choices in sorted(self.drawn.items()):
            others = [x for x in choices if name != TARGET or x.lower() != language.lower()]
            chosen[name] = drawing.choice(others or choices)
        try:
            text = _compiled(self.text).render({**fields, **chosen})
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ConfigError(f"template {self.name}: cannot be filled: {error}; look at its text") from None
        return text.strip(), chosen.get(TARGET, language).lower()


def templates(path: str | None) -> dict[str, list[Template]]:
    """Category → its templates; a file's replace ours in the categories that it has.

    Raises:
        ConfigError: there is no such file, it has another form, or a template is no Jinja.
    """
    ours = _read(read_beside(__file__), {}, "templates.yaml")
    if path is None:
        return ours
    file = Path(path).expanduser()
    raw = read_yaml(read_text(file), f"prompts.templates: {path}")
    return ours | _read(raw, read_beside(__file__)[DRAWN], path)


@cache
def _compiled(text: str) -> Any:
    return SANDBOX.from_string(text)


def _read(raw: Any, drawn: Mapping[str, list[str]], where: str) -> dict[str, list[Template]]:
    lists = {**drawn, **(raw.get(DRAWN) or {})} if isinstance(raw, dict) else {}
    is_drawn = all(isinstance(each, list) and each and _all_texts(each) for each in lists.values())
    tables = {name: table for name, table in raw.items() if name != DRAWN} if isinstance(raw, dict) else {}
    if not tables or not is_drawn or not all(isinstance(x, dict) and x for x in tables.values()):
        form = "{category: {name: text}}, and under drawn {name: [a text, …]}"
        raise ConfigError(f"{where}: templates are {form}; kdlib/prompts/templates.yaml is an example")
    found = {}
    for category, table in tables.items():
        try:
            known_category(str(category))
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        found[category] = [
            _template(f"{category}/{name}", text, lists, where) for name, text in table.items()
        ]
    return found


def _template(name: str, text: Any, lists: Mapping[str, list[str]], where: str) -> Template:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: template {printable(name)}: found {text!r}; a text is needed")
    try:
        asked = meta.find_undeclared_variables(SANDBOX.parse(text))
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        at = f", line {line}" if line else ""
        raise ConfigError(f"{where}: template {printable(name)}{at}: no Jinja: {error}") from None
    drawn = {each: tuple(lists[each]) for each in asked if each in lists}
    return Template(name, text, frozenset(asked - drawn.keys()), drawn)


def _all_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
