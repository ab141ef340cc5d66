"""What goes to a teacher, and the files that it is read from."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlib.errors import DataError, listed, nearest, nearest_file

ROLES = ("system", "user", "assistant")
COLUMNS = ("prompt", "messages", "category", "template", "seed", "language", "tests")


@dataclass(frozen=True)
class Prompt:
    """What is asked, and where it came from."""

    messages: tuple[tuple[str, str], ...]  # (role, content), the user's last
    category: str
    template: str = ""  # the name of what it was written with
    seed: str = ""  # the name of what it was made from; rows of one seed belong on one side of a split
    language: str = ""  # that the answer's code is in; "" where it has none, or none is named
    tests: str = ""  # that the answer's code is to pass, as code; never run unasked

    def as_sent(self) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def characters(self) -> int:
        return sum(len(content) for _, content in self.messages)

    @property
    def bytes(self) -> int:
        return sum(len(content.encode()) for _, content in self.messages)


def plain_row(prompt: Prompt, *, alone: bool) -> dict[str, Any]:
    """A prompt as a line of a file: a lone text as `prompt`, else `messages`."""
    asked = {"prompt": prompt.messages[0][1]} if alone else {"messages": prompt.as_sent()}
    rest = asdict(prompt)
    del rest["messages"]
    return asked | rest


def are_alone(prompts: Sequence[Prompt]) -> bool:
    """Whether each is one text of the user's, so that rows need no roles."""
    return all([role for role, _ in prompt.messages] == ["user"] for prompt in prompts)


def read_prompts(path: Path, count: int | None = None) -> list[Prompt]:
    """The prompts of a .jsonl file.

    Raises:
        DataError: there is no such file, or rows are at fault: the first of them by line.
    """
    if not path.is_file():
        near = nearest_file(path, "*.jsonl")
        raise DataError(f"{path}: no such file{near}; prompts.from names a .jsonl file")
    found, faults = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_prompt(json.loads(line)))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults or not found:
        needed = 'each line is like {"prompt": "…", "category": "function"}, or has messages'
        what = f"{len(faults)} broken lines" if faults else "no rows"
        raise DataError(f"{path}: {what}; {needed}{listed(faults)}")
    return found[:count]


def _prompt(row: Any) -> Prompt:
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, not an object")
    if unknown := sorted(set(row) - set(COLUMNS)):
        allowed = f"{nearest(unknown[0], COLUMNS)}; a row has {', '.join(COLUMNS)}"
        raise ValueError(f"unknown column {unknown[0]!r}{allowed}")
    texts = {name: value for name, value in row.items() if name != "messages"}
    if wrong := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise ValueError(f"{wrong[0]} = {row[wrong[0]]!r}; a text is needed")
    if not row.get("category", "").strip():
        raise ValueError("no category; it needs a name")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("it needs either prompt or messages")
    messages = _messages(row.get("messages", [{"role": "user", "content": texts.pop("prompt", "")}]))
    return Prompt(messages, **texts)


def _messages(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages = {messages!r}; needed is a list of {{role, content}}")
    for message in messages:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise ValueError(f"found {message!r} in messages; needed is {{role, content}}")
        if message["role"] not in ROLES:
            raise ValueError(f"found the role {message['role']!r}; it is one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError("a message is empty; it needs a text")
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s; it needs the user's")
    return tuple((message["role"], message["content"]) for message in messages)
