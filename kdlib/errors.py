"""Errors that a user can act on: found, needed, do; the command line prints them bare.  No keys in files."""

import difflib
import os
import re
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


# Keys and tokens belong in the environment, as a run's config, command and notebooks are kept and shown.
KEY_NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
KEY_FORMS = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b")
SHORTEST_KEY = 12  # characters; a shorter value may stand in a text by chance


def refuse_keys(text: str) -> None:
    """Raise where the text holds a key of the environment, or what looks like a well-known one.

    Raises:
        ConfigError: it does; the message names the variable, or the key's first letters.
    """
    found = [
        f"the value of ${name}"
        for name, value in os.environ.items()
        if KEY_NAMES.search(name) and len(value) >= SHORTEST_KEY and value in text
    ]
    found += [f"what looks like a key, {match[0][:4]}…" for match in KEY_FORMS.finditer(text)]
    if found:
        raise ConfigError(
            f"a setting or parameter holds {found[0]}; what is set there is kept in the run's files and "
            "shown in its report: leave it out, keys are read from the environment"
        )
