"""How other projects write their settings: their names (import_table.yaml), their files and flags."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdlib.config.run import read_text, read_yaml
from kdlib.config.sections import read_beside
from kdlib.errors import ConfigError, refuse_keys

TABLE = read_beside(__file__)
OURS, MEANT, REASONS, DTYPES = (
    {name: what for what, names in TABLE[part].items() for name in names}
    for part in ("as it is", "by meaning", "left out", "dtypes")
)
"""{a name of theirs: ours}; our setting that is worked out of it; why it is left out; our precision."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """{name: value} of a file: names with _ and no leading dashes; of nested ones the innermost.

    Raises:
        ConfigError: it is none of JSON, YAML with names, or flags.
    """
    text, name = read_text(Path(path)), str(path)
    refuse_keys(text, name)  # what has no counterpart here is repeated, with its value
    try:
        if text.lstrip().startswith("{") or name.endswith(".json"):
            found = json.loads(text, object_pairs_hook=_once)
        elif re.search(r"^(?!\s*#)(.*\s)?--\w", text, re.MULTILINE):
            found = _flags(text, name)
        else:
            found = read_yaml(text, name)
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise ConfigError(
                f"{name}: settings are needed, as {{name: value}} or --name value; found {kind}"
            )
        pairs = list(_leaves(found))
        times = Counter(keys[-1] for keys, _ in pairs)
        return _once([(keys[-1] if times[keys[-1]] == 1 else ".".join(keys), value) for keys, value in pairs])
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply, or within itself") from None
    except ValueError as error:
        raise ConfigError(f"{name}: cannot be read as settings: {error}") from None


def _flags(text: str, name: str) -> dict[str, Any]:
    """`train.py --alpha 0.5 --bf16 --lr=2e-5` as {alpha: 0.5, bf16: True, lr: 2e-5}."""
    given: dict[str, list[str]] = {}
    values: list[str] = []  # of the flag before; what stands before the first is the command
    for word in shlex.split(text.replace("\\\n", " "), comments=True):
        if flag := re.fullmatch(r"--?([A-Za-z_][\w.-]*)(?:=(.*))?", word, re.DOTALL):
            if flag[1] in given:
                raise ValueError(f"--{flag[1]} stands twice")
            values = given[flag[1]] = [] if flag[2] is None else [flag[2]]
        else:
            values.append(word)
    read = {flag: [read_yaml(word, f"{name}: --{flag}") for word in words] for flag, words in given.items()}
    return {flag: words[0] if len(words) == 1 else words or True for flag, words in read.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).items():
        if times > 1:
            raise ValueError(f"{key!r} stands {times} times in one place")
    return dict(pairs)


def _leaves(found: Mapping, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value with the keys that lead to it."""
    for key, value in found.items():
        keys = (*above, str(key).strip().lstrip("-").replace("-", "_"))
        if isinstance(value, dict) and value:
            yield from _leaves(value, keys)
        else:
            yield keys, value
