"""What the sections of a config are made of: the strict base class, and numbers as YAML writes them.
Imports no torch.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of a config, or all of one: frozen, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    smoke: ClassVar[Mapping[str, Any]] = {}  # what `smoke` changes

    @classmethod
    def smoke_changes(cls, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `smoke` changes in this config, as it stands in the YAML."""
        return cls.smoke

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as it would stand in the YAML."""
        return self.model_dump(by_alias=True)

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)


def number(value: Any) -> Any:
    """Takes 1e-4 and 1e3, which YAML reads as strings, and refuses true, which pydantic reads as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def whole(value: Any) -> int | None:
    """The value as a whole number of 1 or more, or None where it is none."""
    if isinstance(value, bool):
        return None
    found = number(value)
    return int(found) if isinstance(found, (int, float)) and found >= 1 and found % 1 == 0 else None


def fraction(value: Any) -> float | None:
    """The value as a number from 0 to 1, or None where it is none."""
    if isinstance(value, bool):
        return None
    found = number(value)
    return float(found) if isinstance(found, (int, float)) and 0 <= found <= 1 else None


def refuse(faults: Sequence[str]) -> None:
    """Raises all faults as one ValueError, a line each; nothing where there are none."""
    if faults:
        raise ValueError("\n".join(faults))


Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(number)]
