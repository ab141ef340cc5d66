"""Why an answer is not kept: the first reason that holds, in the order of REASONS."""

from collections.abc import Callable, Sequence
from typing import Protocol

from kdlib.filters.config import Filters
from kdlib.prompts.prompt import Prompt


class Said(Protocol):
    """What is looked at of an answer."""

    @property
    def text(self) -> str: ...

    @property
    def finish(self) -> str: ...


# reason → whether it holds of one answer
REASONS: dict[str, Callable[[Filters, Prompt, Said], bool]] = {
    "refusal": lambda config, prompt, answer: answer.finish == "refusal",
    "empty": lambda config, prompt, answer: not answer.text.strip(),
    "cut off": lambda config, prompt, answer: answer.finish == "length",
    "too short": lambda config, prompt, answer: len(answer.text) < config.shortest,
    "too long": lambda config, prompt, answer: len(answer.text) > (config.longest or len(answer.text)),
}


def sifted(config: Filters, answered: Sequence[tuple[Prompt, Said]]) -> list[str | None]:
    """For each answer, in the order of the prompts, why it is not kept; None where it is."""
    return [
        next((reason for reason, holds in REASONS.items() if holds(config, prompt, answer)), None)
        for prompt, answer in answered
    ]
