"""Errors that a user can act on: found, needed, do; the command line prints them bare.  No keys in files."""

import difflib
import html
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

LONGEST_LINE, LONGEST = 2_000, 8_000  # characters of a message
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # and what else a terminal is told


class KdlibError(Exception):
    """Base of all errors whose cause lies outside kdlib's code: a config, a file, a model.

    Whatever it repeats of what was given, it prints, and ends within 10 kB.
    """

    def __init__(self, message: object = "", *more: object) -> None:
        lines = [
            cut(line, LONGEST_LINE) for line in without_controls(cut(str(message), 50 * LONGEST)).split("\n")
        ]
        super().__init__(cut("\n".join(lines), LONGEST), *more)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: the message alone, as where in the code it arose is of no help."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(KdlibError):
    """A config that cannot be run."""


class RunError(KdlibError):
    """A run's folder that cannot be made, opened or written."""


class Stopped(RunError):
    """A run that was asked to stop, and can go on."""


class Died(RunError):
    """A run whose process is gone: killed, or out of memory."""


class DataError(KdlibError):
    """Text that cannot be read or trained on."""


class ModelError(KdlibError):
    """A model or tokenizer that cannot be loaded or does not fit its partner."""


class TeacherError(KdlibError):
    """A teacher that cannot be asked: no key, no such model, nobody there."""


class NonFiniteLoss(KdlibError):
    """A loss term that is nan or infinite."""


def listed(faults: Sequence[str], shown: int = 10) -> str:
    """The first faults, each on a line of its own, and how many more there are: for the end of a message."""
    more = f"\n  … and {len(faults) - shown} more" if len(faults) > shown else ""
    return "".join(f"\n  {fault}" for fault in faults[:shown]) + more


def printable(text: str) -> str:
    """The text where it prints as one line, else with escapes: a name that someone else chose."""
    return text if text.isprintable() else ascii(text)


def without_controls(text: str) -> str:
    """The text without colours, and with escapes in place of what moves a cursor or is not seen."""
    text = COLOURS.sub("", text)
    return "\n".join(line if line.isprintable() else _escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() or c in "\t\xa0" else ascii(c)[1:-1] for c in line)


def cut(text: str, most: int) -> str:
    """The text's beginning and end, where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail]} … ({len(text) - most:,} characters left out) … {text[-tail:]}"


def shown(value: Any) -> str:
    """A value as a message shows it: what was given, or its beginning and end."""
    return cut(repr(value), 200)


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'temperature'?`, or nothing where no name is near; `names`: ours, never a user's."""
    near = difflib.get_close_matches(name[:100], list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest_file(path: Path, pattern: str = "*") -> str:
    """`nearest` of the files beside one that is not there: by what tells them apart, not by the ending."""
    try:
        others = {each.stem: each.name for each in path.parent.glob(pattern)}
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.stem[:100], list(others), n=1, cutoff=0.5)
    return f"; did you mean {others[near[0]]!r}?" if near else ""


# Keys and tokens stay in the environment: refused in what is asked for, left out of what is written.  Their
# forms are their makers' own; where detect-secrets 1.5.0 (https://github.com/Yelp/detect-secrets) has a
# rule, it is followed.  It is no dependency: it knows none of the Hugging Face hub's, Google's, Anthropic's,
# Weights & Biases' and GitHub's newer keys.

# HF_TOKEN, HF_TOKEN_READ, OPENAI_APIKEY, DB_PASSWORD_2; not HF_TOKEN_PATH, not TOKENIZERS_PARALLELISM
SECRET_NAMES = re.compile(
    r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|_PASS|_PAT)S?(_|\d|$)", re.IGNORECASE
)
PLAIN_NAMES = re.compile(r"_(PATH|FILE|DIR|FOLDER|NAME|URL|URI|HOST|SOCK|TYPE)$", re.IGNORECASE)
SHORTEST = 12  # characters of a variable's value; a shorter one may stand in a text by chance

FORMS = {
    **{"hf_": r"[A-Za-z0-9]{30,}", "api_org_": r"[A-Za-z0-9]{30,}"},  # Hugging Face
    **{"gh": r"[pousr]_[A-Za-z0-9]{30,}", "github_pat_": r"\w{30,}"},
    "gl": r"(?:pat|dt|ft|soat|rt|cbt|ptt)-[\w-]{20,}",  # GitLab
    # OpenAI, Anthropic and others; sk-wikipedia-20231101-clean is a data set in Slovak
    "sk-": r"(?:[A-Za-z0-9]{20,}|(?:proj|svcacct|admin|ant|or|lf)-[\w-]{30,}|[\w-]{1,200}T3BlbkFJ\w+)",
    **{"AIza": r"[\w-]{35}", "ya29.": r"[\w-]{20,}"},  # Google
    "A": r"(?:3T[A-Z0-9]|BIA|CCA|KIA|SIA)[A-Z0-9]{16}\b",  # Amazon
    "x": r"(?:ox[abceprs]|app)-[\w-]{20,}",  # Slack
    **{"wandb_v": r"\d_\w{30,}", "gsk_": r"[A-Za-z0-9]{40,}", "r8_": r"[A-Za-z0-9]{37}"},
    **{"nvapi-": r"[\w-]{40,}", "npm_": r"[A-Za-z0-9]{36}", "pypi-Ag": r"[\w-]{50,}"},
    **{
        "eyJ": r"[\w-]{10,999}\.eyJ[\w-]{10,999}\.[\w-]{10,}",
        "Bearer ": r"([\w.~+/-]{20,})",
    },  # of web requests
    "-----BEGIN ": r"[A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=\s\\]*",
    # of an URL: user and password, or a long name alone
    "://": r"((?![$<{*])(?:[^\s/?#@:\"'<>]{0,200}:(?![$<{*])[^\s/?#@\"'<>]{1,500}|[^\s/?#@:\"'<>]{20,500}))@",
}
NAMES = (
    *("KEY", "TOKEN", "SECRET", "PASSWORD", "secret", "password", "passwd", "?token", "&token", "api_key"),
    *("apikey", "access_key", "AccountKey", "access_token", "auth_token", "hf_token", "hub_token"),
)
# what one of these names has: letters and digits mixed; no variable, no path, nothing in brackets
NAMED = (
    r"S?(?:_\w{0,80})?[\"']?\s{0,9}[:=]\s{0,9}[\"']?"
    r"((?![$<{*/.])(?=[^\s\"']{0,200}\d)(?=[^\s\"']{0,200}[A-Za-z])[^\s\"',;&)}\]]{12,})"
)
KEYS = {
    start: re.compile(re.escape(start) + rest)
    for start, rest in (FORMS | dict.fromkeys(NAMES, NAMED)).items()
}
"""By how each begins: a text without that need not be searched."""
# 40 hexadecimal digits are a key of Weights & Biases, unless their name says that they are something else's
HEX = re.compile(r"[\"']?\s{0,9}[:=]\s{0,9}[\"']?(?P<key>[0-9a-f]{40})(?![\w.-])")
NAME = re.compile(r"[\w.-]*$")
DIGESTS = re.compile(r"revision|commit|sha|hash|digest|checksum|fingerprint|etag|version", re.IGNORECASE)
PICTURE = re.compile(r"(;base64,[A-Za-z0-9+/=]+)")


def refuse_existing(path: str | Path) -> None:
    """A ConfigError where there is something at a path that a command is to make."""
    if Path(path).exists():
        raise ConfigError(f"{path}: is there already, and would be lost; name a new folder")


def refuse_keys(found: Any, where: str = "a setting or parameter") -> None:
    """Raise where settings hold a key of the environment, or what looks like one.

    Args:
        found: a text, or plain data, which is searched to its leaves.
        where: what `found` is, in words.

    Raises:
        ConfigError: they do; the message names the variable, or the key's first letters.
    """
    secrets = _of_environment()
    texts = [(name, f"{name}={value}" if name else value) for name, value in _leaves(found)]
    whole = "\n".join(text for _, text in texts)
    if not any(start in whole for start in (*secrets, *KEYS)) and not HEX.search(whole):
        return
    for name, text in texts:
        held = [f"the value of ${known}" for secret, known in secrets.items() if secret in text]
        forms = [*_keys_in(text), *_hexadecimal(text)]
        held += [f"what looks like a key, {key[:4]}…" for key in forms]
        if held:
            raise ConfigError(
                f"{where}{name and f': {name}'} holds {held[0]}; what is set is kept in files and shown in "
                "reports: leave it out; keys are read from the environment"
            )


def without_keys(text: str) -> str:
    """A text to be written or printed, with $NAME in place of a variable's key, and no other key in full.

    It may hold what others said: an error of another package, a cell of a notebook, a row of the data.
    """
    for value, name in _of_environment().items():
        for form in {value, json.dumps(value)[1:-1], html.escape(value), quote(value, safe="")}:
            text = text.replace(form, f"${name}")
    parts = PICTURE.split(text)
    for number in range(0, len(parts), 2):
        for key in _keys_in(parts[number]):
            parts[number] = parts[number].replace(key, f"{key[:4]}…(key left out)")
    return "".join(parts)


def _of_environment() -> dict[str, str]:
    """Value → name of each variable that holds a key, by its name; the path of one's file is none."""
    named = {x.strip(): name for name, x in os.environ.items() if SECRET_NAMES.search(name)}
    return {
        x: name
        for x, name in named.items()
        if len(x) >= SHORTEST and not PLAIN_NAMES.search(name) and not os.path.exists(x)
    }


def _keys_in(text: str) -> list[str]:
    """What looks like a key, at the beginning of a word."""
    found = [match for start, form in KEYS.items() if start in text for match in form.finditer(text)]
    whole = (m for m in found if m.lastindex or not text[max(m.start() - 1, 0) : m.start()].isalnum())
    return [m[m.lastindex or 0] for m in whole]


def _hexadecimal(text: str) -> list[str]:
    """40 digits that are given a name which does not say that they are no key."""
    named = ((m["key"], NAME.search(text, max(m.start() - 80, 0), m.start())) for m in HEX.finditer(text))
    return [key for key, name in named if not DIGESTS.search(name[0] if name else "")]


def _leaves(found: Any) -> Iterator[tuple[str, str]]:
    """(dotted name, value) of plain data, each name by itself before; a container comes once."""
    left, seen = [("", found)], set()
    while left:
        place, value = left.pop()
        if not isinstance(value, Mapping | list | tuple):
            yield place, str(value)
        elif id(value) not in seen:
            seen.add(id(value))
            inner = value.items() if isinstance(value, Mapping) else [("", each) for each in value]
            for name, each in inner:
                yield "", str(name)
                left.append((f"{place}.{name}".strip("."), each))
