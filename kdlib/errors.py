"""Errors that a user can act on: what was found, what is needed, what to do.  The command line prints
them bare.
"""

import difflib
from collections.abc import Iterable, Sequence


class KdlibError(Exception):
    """Base of all errors whose cause lies outside kdlib's code: a config, a file, a model."""


class ConfigError(KdlibError):
    """A config that cannot be run."""


class RunError(KdlibError):
    """A run's folder that cannot be made, opened or written."""


class Stopped(RunError):
    """A run that was asked to stop, and can go on."""


class DataError(KdlibError):
    """Text that cannot be read or trained on."""


class ModelError(KdlibError):
    """A model or tokenizer that cannot be loaded or does not fit its partner."""


class NonFiniteLoss(KdlibError):
    """A loss term that is nan or infinite."""


def listed(faults: Sequence[str], shown: int = 10) -> str:
    """The first faults, each on a line of its own, and how many more there are: for the end of a message."""
    more = f"\n  … and {len(faults) - shown} more" if len(faults) > shown else ""
    return "".join(f"\n  {fault}" for fault in faults[:shown]) + more


def printable(text: str) -> str:
    """The text where it prints as one line, else with escapes: a name that someone else chose."""
    return text if text.isprintable() else ascii(text)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'temperature'?`, or nothing where no name is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
