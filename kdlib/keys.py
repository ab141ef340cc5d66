"""Keys and tokens: they belong in the environment, since a run's config, command and notebooks are kept
and shown.
"""

import os
import re

from kdlib.errors import ConfigError

NAMES = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
FORMS = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b")
SHORTEST = 12  # characters; a shorter value may stand in a text by chance


def refuse_keys(text: str) -> None:
    """Raise where the text holds a key of the environment's, or what looks like one of the well-known
    services'.

    Raises:
        ConfigError: it does; the message names the variable, or the key's first letters.
    """
    held = {
        name: value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST
    }
    found = [f"the value of ${name}" for name, value in held.items() if value in text]
    found += [f"what looks like a key, {match[0][:4]}…" for match in FORMS.finditer(text)]
    if found:
        raise ConfigError(
            f"a setting or parameter holds {found[0]}; what is set there is kept in the run's files and "
            "shown in its report: "
            "leave it out, keys are read from the environment"
        )
