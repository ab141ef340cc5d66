"""A config in the making out of another project's settings: its values, their origins, what is left out."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlib.config.import_table import MEANT
from kdlib.config.run import Config
from kdlib.config.sections import flow, number
from kdlib.errors import ConfigError, printable

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
        if not isinstance(found := self.theirs[key], bool):
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
