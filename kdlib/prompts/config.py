"""What prompts are asked for."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from kdlib.config.sections import Count, Positive, Section, number
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


def _shares(value: Any) -> Any:
    """A list of categories, or {category: share}."""
    if not isinstance(value, list | dict) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"found {value!r}; it is a list of categories, or {{category: share}}")
    for name in value:
        known_category(name)
    if isinstance(value, list) and len(set(value)) < len(value):
        raise ValueError("a category stands there twice; for more of it give {category: share}")
    if isinstance(value, dict):
        shares = {name: number(share) for name, share in value.items()}
        if wrong := [name for name, share in shares.items() if not _is_share(share)]:
            raise ValueError(f"{wrong[0]}: found {value[wrong[0]]!r}; a share is a number above 0, as 2")
        return shares
    return value


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < float("inf")


class Prompts(Section):
    """What is asked: prompts of a file as they are, or templates × seeds."""

    source: str | None = Field(None, alias="from")  # .jsonl of {prompt or messages, category}
    seeds: str | None = None  # stdlib, a .py or .jsonl file, or a folder of such: snippets or problems
    count: Positive | None = None  # how many; of a file all where None
    categories: Annotated[Any, AfterValidator(_shares)] | None = None  # all, and as many of each, where None
    templates: str | None = None  # your own: a YAML file; kdlib/prompts/templates.yaml has its form
    evolve: Annotated[Count, Field(ge=0, le=5)] = 0  # rounds in which the teacher makes them harder first

    @model_validator(mode="after")
    def _one_way(self):
        if (self.source is None) == (self.seeds is None):
            raise ValueError("give either from (a file of prompts) or seeds (what they are made of)")
        if self.seeds is not None and self.count is None:
            raise ValueError("seeds: count is needed too: how many prompts are to be made of them")
        idle = [name for name in ("categories", "templates") if getattr(self, name) is not None]
        if idle and self.source is not None:
            raise ValueError(f"{idle[0]}: prompts of a file are asked as they are; leave it out")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Category → its share, in the order in which they are asked."""
        asked = self.categories if self.categories is not None else CATEGORIES
        return dict(asked) if isinstance(asked, dict) else dict.fromkeys(asked, 1.0)
