"""Findings: what the doctor says about a config, and how it is shown: as text or as JSON.  Imports no
torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

SEVERITIES = ("critical", "warning", "note")  # it will fail or teach nothing; it may go wrong; good to know


@dataclass(frozen=True)
class Finding:
    """One thing that a config does, or that follows from it."""

    severity: Literal["critical", "warning", "note"]
    where: str  # dotted path in the config: loss.curriculum.0.weights.hidden
    what: str  # was found, with figures
    why: str  # it matters
    fix: str  # what to do
    # {dotted path: new value}, where there is one fix that anybody would choose
    change: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        change = "".join(f"\n  --fix  {path}: {value}" for path, value in (self.change or {}).items())
        return (
            f"{self.severity.upper()}  {self.where}\n  found  {self.what}\n  why    {self.why}\n  do     "
            f"{self.fix}{change}"
        )


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Each once, the gravest first, else as they came."""
    unique = {(each.severity, each.where, each.what): each for each in findings}
    return sorted(unique.values(), key=lambda each: SEVERITIES.index(each.severity))


def text(findings: Sequence[Finding]) -> str:
    """How many there are, and a paragraph for each."""
    counts = [
        f"{n} {name}{'s' * (n > 1 and name != 'critical')}"
        for name in SEVERITIES
        if (n := sum(each.severity == name for each in findings))
    ]
    return "\n\n".join([", ".join(counts) or "no findings", *map(str, findings)])


def as_data(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Plain data, for JSON."""
    return [asdict(each) for each in findings]


def exit_status(findings: Iterable[Finding], *, strict: bool = False) -> int:
    """2 with a critical finding, 1 with a warning where `strict`, else 0; notes do not count."""
    found = {each.severity for each in findings}
    return 2 if "critical" in found else 1 if strict and "warning" in found else 0
