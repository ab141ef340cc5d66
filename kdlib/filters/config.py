"""What an answer must be, to be kept."""

from typing import Annotated

from pydantic import Field

from kdlib.config.sections import Number, Positive, Section


class Filters(Section):
    """What is kept of the answers; empty ones, cut off ones and refusals never are."""

    shortest: Positive = 1  # characters
    longest: Positive | None = None
    language: bool = True  # the prose is in the prompt's script, the code in the language that was asked for
    parses: list[str] = ["python"]  # code in these languages must; all but Python need kdlib[treesitter]
    near_duplicates: Annotated[Number, Field(gt=0, le=1)] | None = 0.85  # shared shingles from which one goes
    overlap: list[str] = ["humaneval"]  # benchmarks that no row may hold: humaneval, mbpp or a JSONL file
    tests: bool = False  # run each answer's code with its prompt's tests, fenced; nothing is run unasked
    lowest_score: Number = 6.0  # that is kept, of the judge's, from 1 to 10, where there is one
