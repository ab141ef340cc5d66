"""How other projects write their settings (names: table.yaml), and what became of a file of theirs."""

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlib.config.reading import read_text, read_yaml
from kdlib.config.run import Config
from kdlib.config.sections import flow, number, read_beside
from kdlib.config.training_arguments import switched
from kdlib.errors import ConfigError, printable, refuse_keys

TABLE = read_beside(__file__)
OURS, MEANT, REASONS, DTYPES = (
    {name: what for what, names in TABLE[part].items() for name in names}
    for part in ("as it is", "by meaning", "left out", "dtypes")
)
"""{a name of theirs: ours}; our setting that is worked out of it; why it is left out; our precision."""
MAKES_DATA = re.compile(r"(generat|synthesi[sz]|creat|collect|prepar)\w*?_?(data|samples|rows|answers)", re.I)
CODE = re.compile(r"^(?:from \w[\w.]* )?import \w|^class \w+.*:$|^def \w+\(|^@dataclass", re.MULTILINE)


def read_settings(path: str | Path) -> dict[str, Any]:
    """{name: value} of a file: names with _ and no leading dashes; of nested ones the innermost.

    Raises:
        ConfigError: it is none of JSON, YAML with names, or flags.
    """
    text, name = read_text(Path(path)), str(path)
    refuse_keys(text, name)  # what has no counterpart here is repeated, with its value
    if name.endswith(".py") or CODE.search(text):
        do = "have it print them, as json.dumps(vars(config)), into a .json file, and give that"
        raise ConfigError(f"{name}: a Python program, which makes its settings when it runs; {do}")
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
        if not given and MAKES_DATA.search(word):
            do = "kd generate asks a teacher for rows: notebooks/guides/generating.md"
            raise ConfigError(f"{name}: {word} makes data, and trains nothing; {do}")
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


TO_FILL_IN = "TO-BE-FILLED-IN"
LARGEST = sys.float_info.max  # whole numbers have no end, and floats have


@dataclass
class Migration:
    """Our values by their path (`section.key`) with their origins, out of their settings by name."""

    name: str  # the file they came from
    theirs: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # `key = value: why`

    @property
    def missing(self) -> list[str]:
        """The settings that only a person can name."""
        return [path for path, value in self.values.items() if value == TO_FILL_IN]

    def put(self, path: str, value: Any, origin: str) -> None:
        """Set one of our values; a second origin must agree with the first."""
        if path in self.values and self.values[path] != value:
            one, other = f"{self.values[path]!r} ({self.origins[path]})", f"{value!r} ({_one_line(origin)})"
            raise self.fault(path, f"found {one} and {other}; leave one out")
        self.replace(path, value, origin)

    def replace(self, path: str, value: Any, origin: str) -> None:
        """Put a value in the place of one that it was made from."""
        before = [self.origins[path]] if path in self.origins else []
        self.values[path], self.origins[path] = value, ", ".join([*before, _one_line(origin)])

    def put_usual(self, path: str, value: Any, origin: str, unless: str | None = None) -> None:
        """Set one of our values where it is not set yet; `unless` another path is."""
        if not {path, unless} & set(self.values):
            self.put(path, value, origin)

    def leave_out(self, key: str, why: str) -> None:
        self.left_out.append(f"{_one_line(key)} = {_one_line(self.theirs[key])}: {why}")

    def fault(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{self.name}: {_one_line(key)}: {what}")

    def named(self, path: str) -> list[str]:
        """Their settings out of which this one of ours is worked out."""
        return [key for key, ours in MEANT.items() if ours == path and key in self.theirs]

    def number(self, key: str, most: float = float("inf")) -> float:
        """The number of 0 or more that one of their settings is."""
        found = self.theirs[key]
        value = None if isinstance(found, bool) else number(found)
        if not isinstance(value, (int, float)) or not 0 <= value <= most or value > LARGEST:
            needed = "from 0 to 1" if most == 1 else "of 0 or more"
            raise self.fault(key, f"found {found!r}, needs a number {needed}")
        return float(value)

    def is_on(self, key: str) -> bool:
        if not isinstance(found := switched(self.theirs[key]), bool):
            raise self.fault(key, f"found {found!r}, needs true or false")
        return found

    def as_yaml(self) -> str:
        """The config, each line with its origin; before it what must be filled in and what was left out."""
        lines = [
            f"# Made by `kd import` from {_one_line(self.name)}; "
            "each comment says which of its settings a value comes from."
        ]
        if self.missing:
            lines += [f"# To be filled in: {', '.join(self.missing)}"]
        if self.left_out:
            lines += ["# Without a counterpart here, so left out:", *(f"#   {x}" for x in self.left_out)]
        for section in Config.model_fields:
            of_section = [path for path in self.values if path.partition(".")[0] == section]
            if of_section:
                lines += ["", f"{section}:"] if "." in of_section[0] else [""]
            for path in of_section:
                key = path.replace(f"{section}.", "  ", 1)
                lines.append(f"{key}: {flow(self.values[path])}  # {self.origins[path]}")
        return "\n".join(lines) + "\n"

    def write(self, output: Path) -> None:
        """`as_yaml` into a new file; a ConfigError where it is there already, or cannot be written."""
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(self.as_yaml())
        except FileExistsError:
            raise ConfigError(f"{output}: is there already; name a new file") from None
        except OSError as error:
            raise ConfigError(f"{output}: cannot be written: {error}") from None


def _one_line(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value))
