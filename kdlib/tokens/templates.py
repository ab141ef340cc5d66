"""Chat templates: conversations as models read them.

They are rendered in a process of its own, which may take some seconds for each: a template is a program.
"""

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kdlib.errors import ModelError

RENDERING = Path(__file__).with_name("rendering.py")
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
SECONDS = 2  # of the processor, for twenty texts of one conversation
AT_ONCE = 64  # conversations
LOCK = threading.Lock()


class Refused(Exception):
    """What a template says of messages that it does not take."""


def template_of(tokenizer: Any, *, name: str | None = None, tools: Sequence[Any] | None = None) -> str:
    """The tokenizer's chat template; of several the one of this name, that for tools, or the default.

    Raises:
        ModelError: several, and none of them is meant.
    """
    named = tokenizer.chat_template
    for_tools = not name and tools and "tool_use" in (named or ())
    if isinstance(named, Mapping) and (name or "default") not in named and not for_tools:
        raise ModelError(
            f"{tokenizer.name_or_path}: found the chat templates {', '.join(sorted(named))}, and "
            f"{name or 'none'} is the one to take; needed is one of them: name it in data.chat_template"
        )
    return tokenizer.get_chat_template(name if isinstance(named, Mapping) else None, tools)


@dataclass(frozen=True)
class Asked:
    """A conversation to be rendered.

    Attributes:
        cuts: for each text, how many messages, and whether the beginning of an answer follows.
        values: what the template reads beside the messages, as {"tools": […]}.
        marks: whether to find what the template marks as the assistant's, in the first text.
    """

    template: str
    messages: Sequence[Mapping[str, Any]]
    cuts: Sequence[tuple[int, bool]]
    values: Mapping[str, Any] = field(default_factory=dict)
    marks: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation as its template has it."""

    texts: Sequence[str]
    spans: Sequence[tuple[int, int]]  # start and end of each part that is marked


def rendered(tokenizer: Any, every: Sequence[Asked]) -> list[Rendered | Refused]:
    """Conversations as their templates have them, as `tokenizer.apply_chat_template` does; or why not.

    Raises:
        ModelError: a template does not come to an end within some seconds.
    """
    found = []
    for start in range(0, len(every), AT_ONCE):
        for each in _answers(tokenizer, every[start : start + AT_ONCE]):
            if "bound" in each:
                raise ModelError(
                    f"{tokenizer.name_or_path}: its chat template loops, recurses or grows: one conversation "
                    f"took more than some seconds or gigabytes ({each['bound']}); needed is one that ends: "
                    "read it (chat_template.jinja, or tokenizer_config.json), and mend it, or take another"
                )
            is_refused = "error" in each
            found.append(Refused(each["error"]) if is_refused else Rendered(each["texts"], each["spans"]))
    return found


def written(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, begins: bool = False) -> str:
    """One conversation, and where it `begins`, the beginning of an answer.

    Raises:
        Refused: the template does not take these messages.
        ModelError: as `rendered`.
    """
    (found,) = rendered(tokenizer, [Asked(template_of(tokenizer), messages, [(len(messages), begins)])])
    if isinstance(found, Refused):
        raise found
    return found.texts[0]


def _answers(tokenizer: Any, every: Sequence[Asked]) -> list[dict[str, Any]]:
    special, asked = tokenizer.special_tokens_map, []
    for each in every:
        given = [{key: value for key, value in one.items() if value is not None} for one in each.messages]
        asked.append({**vars(each), "messages": given, "values": {**special, **each.values}})
    with LOCK:
        child, answer = _child(os.getpid()), ""
        try:
            with contextlib.suppress(OSError):  # it has ended
                child.stdin.write(json.dumps({"asked": asked, "seconds": SECONDS}) + "\n")
                child.stdin.flush()
                answer = child.stdout.readline()
        finally:
            if not answer.endswith(
                "\n"
            ):  # or we were interrupted, and the next would read what is meant for us
                _child.cache_clear()
                _end(child)
    if not answer.endswith("\n"):
        return [{"bound": f"its process ended with {child.returncode}"}]
    return json.loads(answer)


@cache
def _child(process: int) -> Any:
    """The process that renders for this one; it ends when this one does, as nothing more is to be read."""
    out = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen([sys.executable, str(RENDERING)], text=True, start_new_session=True, **out)
    atexit.register(_end, child)
    return child


def _end(child: Any) -> None:
    child.kill()
    with contextlib.suppress(OSError):
        child.stdin.close()
    child.stdout.close()
    child.wait()
    atexit.unregister(_end)
