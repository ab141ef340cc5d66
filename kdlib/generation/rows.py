"""What comes back from a teacher, and the row that is made of it and its prompt."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kdlib.prompts.prompt import Prompt, plain_row


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
    cost: (
        float | None
    )  # dollars; the most that it can have been where there is no usage; None: no price known
    model: str = ""  # as the endpoint calls it


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    reason: str
    cost: float | None = 0.0  # dollars at most, of the last try
    paid: bool = False  # whether that may have been paid: it was sent, and not refused


def key_of(prompt: Prompt, teacher: Mapping[str, Any], sampling: Mapping[str, Any]) -> str:
    """By what an answer is known again: 32 hexadecimal digits of what was sent, to whom, drawn how."""
    asked = [prompt.as_sent(), teacher, sampling]
    plain = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def answered_row(prompt: Prompt, answer: Answer, teacher: str, *, alone: bool) -> dict[str, Any]:
    """A row as `task: question-answering` reads it: prompt and response, or messages to the assistant's."""
    row = plain_row(prompt, alone=alone)
    if not alone:
        row["messages"] = [*row["messages"], {"role": "assistant", "content": answer.text}]
    about = {"teacher": teacher, "finish": answer.finish, "cost": answer.cost}
    return row | {"response": answer.text, **about, "usage": answer.usage and asdict(answer.usage)}
