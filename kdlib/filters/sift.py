"""Why an answer is not kept: the first reason that holds, in the order of `filters_on`.

Nothing is deleted: what is not kept goes with its reason into a file of its own.  A reason is its kind, or
`kind: detail`.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kdlib.code import sandbox
from kdlib.code.problems import read_problems
from kdlib.code.scoring import run_all
from kdlib.filters import code_blocks
from kdlib.filters.config import Filters
from kdlib.filters.duplicates import earlier_alike
from kdlib.filters.overlap import Benchmarks
from kdlib.prompts.prompt import Prompt

KINDS = (
    *("refusal", "empty", "cut off", "too short", "too long", "wrong language", "no code"),
    *("does not parse", "overlap", "near duplicate", "tests fail", "low score"),
)
REFUSAL = re.compile(
    r"\W*(?:(?:(?:i['’]?m|i am)(?: very| so)? sorry|sorry|i apologi[sz]e|unfortunately|as an ai\b)"
    r"[^.\n]{0,60}?)?"
    r"\bi(?:['’]m| am)? (?:can['’]?t|can ?not|unable to|not able to|won['’]?t|will not|must decline)"
    r"[^.\n]{0,40}\b(?:help|assist|provide|comply|fulfil|do|write|create|generate|answer|complete|share)\b",
    re.IGNORECASE,
)
SCRIPT_OF = 2000  # characters of a prose by which its script is told
LETTERS = 20  # at least
SHOWN = 3  # examples of each kind of reason


class Said(Protocol):
    """What is looked at of an answer."""

    @property
    def text(self) -> str: ...

    @property
    def finish(self) -> str: ...


class Ran(Protocol):
    """What became of a program."""

    @property
    def passed(self) -> bool: ...

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Row:
    """One answered prompt, and its number among all."""

    number: int
    prompt: Prompt
    answer: Said

    @property
    def code(self) -> list[str]:
        return code_blocks.code_in(self.answer.text, self.prompt.language)


Look = Callable[[Sequence[Row]], list[str | None]]
"""For each row what is wrong with it, "" where its kind says all; None where nothing is."""


def sifted(
    config: Filters,
    answered: Sequence[tuple[Prompt, Said]],
    *,
    scores: Sequence[float | None] | None = None,
    run: Callable[[str], Ran] = sandbox.run,
) -> list[str | None]:
    """For each answer, in the order of the prompts, why it is not kept; None where it is.

    Args:
        scores: the judge's for each answer, None where it gave none; without them none is asked for.
        run: runs a program in its fence.

    Raises:
        ConfigError, DataError, RunError: as `check`.
    """
    rows = [Row(number, prompt, answer) for number, (prompt, answer) in enumerate(answered)]
    reasons: list[str | None] = [None] * len(rows)
    for kind, look in filters_on(config, scores, run):
        left = [row for row in rows if reasons[row.number] is None]
        for row, detail in zip(left, look(left), strict=True):
            if detail is not None:
                reasons[row.number] = f"{kind}: {detail}" if detail else kind
    return reasons


def filters_on(
    config: Filters, scores: Sequence[float | None] | None, run: Callable[[str], Ran]
) -> Iterator[tuple[str, Look]]:
    """Those that are on, the cheap ones first."""
    yield "refusal", _each(lambda row: "" if _refuses(row) else None)
    yield "empty", _each(lambda row: None if row.answer.text.strip() else "")
    yield "cut off", _each(lambda row: "" if row.answer.finish == "length" else None)
    yield "too short", _each(lambda row: "" if len(row.answer.text) < config.shortest else None)
    if (longest := config.longest) is not None:
        yield "too long", _each(lambda row: "" if len(row.answer.text) > longest else None)
    if config.language:
        yield "wrong language", _each(_in_other_language)
    yield "no code", _each(lambda row: "" if row.prompt.language and not row.code else None)
    if config.parses:
        yield "does not parse", _each(lambda row: _fault(row, config.parses))
    if config.overlap:
        yield "overlap", _overlaps(config.overlap)
    if (threshold := config.near_duplicates) is not None:
        yield "near duplicate", lambda rows: _repeats(rows, threshold)
    if config.tests:
        yield "tests fail", lambda rows: _run_all(rows, run)
    if scores is not None:
        yield "low score", _each(lambda row: _low(scores[row.number], config.lowest_score))


def check(config: Filters, run: Callable[[str], Ran] = sandbox.run) -> None:
    """Raise what would stop the filters, before an answer is paid.

    Raises:
        ConfigError: a package is missing, or a language has no grammar.
        DataError: a benchmark cannot be read.
        RunError: programs are to be run, and this system gives no fence for them.
    """
    for language in set(config.parses) - {"python"}:
        code_blocks.parser(language)
    if config.near_duplicates is not None:
        earlier_alike([], config.near_duplicates)
    _benchmarks(config.overlap)
    if config.tests:
        run("")


def thrown_out(rejected: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of rejected.jsonl's rows, for each kind of reason how many there are, and the first few of them."""
    of: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in KINDS}
    for row in rejected:
        of.setdefault(kind_of(row["reason"]), []).append(row)
    return [{"reason": kind, "count": len(rows), "examples": rows[:SHOWN]} for kind, rows in of.items()]


def kind_of(reason: str) -> str:
    return reason.partition(":")[0]


def _each(look: Callable[[Row], str | None]) -> Look:
    return lambda rows: [look(row) for row in rows]


def _refuses(row: Row) -> bool:
    """Said by the endpoint, or by an answer that begins like one and has no code."""
    text = row.answer.text
    return row.answer.finish == "refusal" or bool(REFUSAL.match(text) and not code_blocks.blocks(text))


def _in_other_language(row: Row) -> str | None:
    if row.prompt.language and (other := code_blocks.other_language(row.answer.text, row.prompt.language)):
        return f"{other}, not {row.prompt.language}"
    asked, said = (_script(code_blocks.prose(x)) for x in (row.prompt.messages[-1][1], row.answer.text))
    return f"{said.lower()} letters, not {asked.lower()}" if asked and said and asked != said else None


def _script(text: str) -> str | None:
    """The script of most of a text's letters, as LATIN or CJK; None of a few letters."""
    letters = [letter for letter in text[:SCRIPT_OF] if letter.isalpha()]
    names = (unicodedata.name(letter, "?").split()[0] for letter in letters)
    counts = Counter("CJK" if name in ("HIRAGANA", "KATAKANA") else name for name in names)
    return counts.most_common(1)[0][0] if len(letters) >= LETTERS else None


def _fault(row: Row, languages: Sequence[str]) -> str | None:
    if row.prompt.language not in languages:
        return None
    faults = (code_blocks.fault(row.prompt.language, code) for code in row.code)
    return next((fault for fault in faults if fault is not None), None)


def _overlaps(benchmarks: Sequence[str]) -> Look:
    known = _benchmarks(benchmarks)

    def look(row: Row) -> str | None:
        return known.in_text("\n".join([*(text for _, text in row.prompt.messages), row.answer.text]))

    return _each(look)


def _benchmarks(names: Sequence[str]) -> Benchmarks:
    problems = [problem for name in names for problem in read_problems(name)]
    return Benchmarks((each.task_id, each.prompt + (each.solution or "")) for each in problems)


def _repeats(rows: Sequence[Row], threshold: float) -> list[str | None]:
    """Within a category: a corrected function and the same one with a docstring answer different prompts."""
    found: dict[int, str] = {}
    for category in dict.fromkeys(row.prompt.category for row in rows):
        own = [row for row in rows if row.prompt.category == category]
        for row, other in zip(own, earlier_alike([row.answer.text for row in own], threshold), strict=True):
            if other is not None:
                found[row.number] = f"of answer {own[other].number}"
    return [found.get(row.number) for row in rows]


def _run_all(rows: Sequence[Row], run: Callable[[str], Ran]) -> list[str | None]:
    tested = [row for row in rows if row.prompt.tests and row.prompt.language == "python"]
    verdicts = run_all([f"{_program(row.code)}\n\n{row.prompt.tests}\n" for row in tested], run)
    failed = {row.number: each.name for row, each in zip(tested, verdicts, strict=True) if not each.passed}
    return [failed.get(row.number) for row in rows]


def _program(code: Sequence[str]) -> str:
    """The first block that defines something: what comes after it is how to use it."""
    return next((each for each in code if re.search(r"^\s*(async def|def|class)\b", each, re.M)), code[0])


def _low(score: float | None, lowest: float) -> str | None:
    if score is None:
        return "the judge gave none"
    return f"{score:g} of 10" if score < lowest else None
