"""What prompts are asked for."""

from pydantic import Field

from kdlib.config.sections import Positive, Section
from kdlib.errors import nearest, printable

CATEGORIES = (
    *("function", "completion", "docstring", "explanation"),
    *("bug_fix", "refactoring", "unit_tests", "translation"),
)
"""What a teacher of code is asked for; rows of a file of the user's may have others."""


def known_category(name: str) -> str:
    """The name, where it is one of CATEGORIES; a ValueError with the nearest else."""
    if name not in CATEGORIES:
        near = nearest(name, CATEGORIES)
        raise ValueError(f"unknown category {printable(name)}{near}; it is one of {', '.join(CATEGORIES)}")
    return name


class Prompts(Section):
    """What is asked."""

    source: str = Field(alias="from")  # .jsonl of {prompt or messages, category}
    count: Positive | None = None  # so many of the file's first rows; all where None
