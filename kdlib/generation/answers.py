"""answers.jsonl: all that was asked and came back, a line each, never changed; a run goes on from it.

Each line is on disk before anything else is done with what it says.  A last line that a kill has torn is cut.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdlib.errors import RunError, without_keys
from kdlib.prompts.prompt import Prompt
from kdlib.runs.files import add_json_lines, is_torn, json_lines, now


@dataclass(frozen=True)
class Usage:
    """Tokens, as the endpoint counted them."""

    input: int  # all of the prompt's
    output: int
    cached: int = 0  # of the prompt's, read from a cache
    written: int = 0  # of the prompt's, written into one


@dataclass(frozen=True)
class Answer:
    """What a teacher said."""

    text: str
    finish: str  # stop; length: cut off; refusal; or the endpoint's own word
    usage: Usage | None  # None: the endpoint said nothing
    cost: float | None  # dollars; at most, where there is no usage; None: no price known
    model: str = ""  # as the endpoint calls it


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    reason: str
    cost: float | None = 0.0  # dollars at most, of the last try
    paid: bool = False  # whether that may have been paid: it was sent, and not refused


@dataclass(frozen=True)
class Batch:
    """Prompts that go to a Batch API together."""

    keys: tuple[str, ...]
    at_most: float  # dollars
    since: float  # seconds of the epoch: it was sent later
    id: str | None = None  # the endpoint's; None: a kill came before it was known, or it was never sent


class AnswerLog:
    """What is known of each prompt, by its key.

    Attributes:
        answers: what came.
        failures: why nothing did; asked again where nothing was paid, or where that is wished.
        asked: dollars at most of what was under way when a process died, by key; it may have been paid.
        batches: of a Batch API, by our own name: those that have not been read.
        lost: dollars at most of tries that ended without a word.
        hours: dollars of a local teacher's time.
    """

    def __init__(self, path: Path):
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.failures: dict[str, Failure] = {}
        self.asked: dict[str, float] = {}
        self.batches: dict[str, Batch] = {}
        self.lost = self.hours = 0.0
        self._read()

    @property
    def spent(self) -> float:
        """Dollars, with what may have been paid without an answer."""
        costs = [each.cost or 0.0 for each in (*self.answers.values(), *self.failures.values())]
        return sum(costs) + self.lost + self.hours + sum(self.asked.values())

    def add(self, event: str, **entry: Any) -> None:
        """Append a line, and have the disk take it in; a RunError where it refuses."""
        is_paid = event != "asked"  # which only says what may be lost in a power cut
        add_json_lines(self.path, [{"event": event, **entry, "at": now()}], at_once=is_paid)
        self._take(event, entry)

    def add_answer(self, key: str, answer: Answer) -> None:
        self.add("answered", key=key, answer=asdict(answer) | {"text": _plain(answer.text)})

    def add_failure(self, key: str, failure: Failure) -> None:
        self.add("failed", key=key, failure=asdict(failure) | {"reason": _plain(failure.reason)})

    def has(self, key: str, *, again: bool) -> bool:
        """Whether this needs not be asked: it has an answer, or a failure that was paid, unless `again`."""
        return key in self.answers or (key in self.failures and self.failures[key].paid and not again)

    def _take(self, event: str, entry: Mapping[str, Any]) -> None:
        key = entry.get("key", "")
        if event == "asked":
            self.lost += self.asked.get(key, 0.0)
            self._forget(key)
            self.asked[key] = entry["at_most"]
        elif event == "answered":
            self.asked.pop(key, None)
            self._forget(key)
            self.answers[key] = _answer(entry["answer"])
        elif event == "failed":
            self.asked.pop(key, None)
            self._forget(key)
            self.failures[key] = Failure(**entry["failure"])
        elif event == "withdrawn":  # before it was sent
            self.asked.pop(key, None)
        elif event == "lost":
            self.lost += entry["at_most"]
        elif event == "hours":
            self.hours += entry["usd"]
        elif event == "batch_made":
            self.batches[entry["name"]] = Batch(tuple(entry["keys"]), entry["at_most"], entry["since"])
        elif event == "batch_sent":
            batch = self.batches[entry["name"]]
            self.batches[entry["name"]] = replace(batch, id=entry["id"])
        elif event == "batch_read":
            del self.batches[entry["name"]]

    def _forget(self, key: str) -> None:
        """An earlier failure, whose cost stays counted."""
        if failure := self.failures.pop(key, None):
            self.lost += failure.cost or 0.0

    def _read(self) -> None:
        if is_torn(self.path):
            print(f"{self.path.name}: a last line that was torn by a kill is cut; its prompt is asked again")
        for number, entry in enumerate(json_lines(self.path), 1):
            try:
                self._take(entry["event"], entry)
            except (KeyError, TypeError) as error:
                do = "bring back a copy, or delete that line: what it says is then asked, and paid, again"
                raise RunError(
                    f"{self.path}, line {number}: found no line of its log ({error}); {do}"
                ) from None


def key_of(prompt: Prompt, teacher: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    """By what an answer is known again: 32 hexadecimal digits of what was sent, to whom, drawn how."""
    asked = [prompt.as_sent(), teacher, sampling]
    plain = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def _plain(text: str) -> str:
    """Without keys, and without halves of characters (as JSON can hold), which no file takes."""
    return without_keys(text.encode("utf-8", "replace").decode())


def _answer(entry: Mapping[str, Any]) -> Answer:
    usage = entry["usage"]
    return Answer(**{**entry, "usage": usage and Usage(**usage)})
