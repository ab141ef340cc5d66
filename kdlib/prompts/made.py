"""Prompts made of templates and seeds; the same config makes the same ones wherever Python is the same."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kdlib.errors import ConfigError, DataError, listed, nearest
from kdlib.prompts.bugs import planted
from kdlib.prompts.config import Prompts
from kdlib.prompts.prompt import Prompt, read_prompts
from kdlib.prompts.seeds import seeds
from kdlib.prompts.snippets import Snippet
from kdlib.prompts.templates import Template, templates

BUGGY = "buggy"
TESTED = ("function", "completion", "docstring", "bug_fix", "refactoring")
"""Categories whose answer is the seed's own code, so that it must pass the seed's tests."""
WITHOUT_CODE = ("explanation",)


def made(config: Prompts, seed: int) -> list[Prompt]:
    """What is to be asked, categories taking turns, so that a part of it is a fair part.

    Raises:
        DataError: seeds or prompts cannot be read, or too few prompts can be made of them.
        ConfigError: a template asks for a field that the seeds have not, or cannot be filled.
    """
    if config.source is not None:
        return read_prompts(Path(config.source), config.count)
    assert config.seeds is not None
    assert config.count is not None
    counts = _divided(config.count, config.shares)
    every, snippets = templates(config.templates), seeds(config.seeds)
    asked = {category: every[category] for category in counts}
    _refuse_missing(asked, snippets, config)
    lists = [_of_category(category, asked[category], snippets, n, seed) for category, n in counts.items()]
    turns = [
        ((place + 0.5) / len(each), order) for order, each in enumerate(lists) for place in range(len(each))
    ]
    rows = [iter(each) for each in lists]
    return [next(rows[order]) for _, order in sorted(turns)]


def _divided(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Category → how many; what rounding leaves over goes to the largest remainders."""
    exact = {name: count * share / sum(shares.values()) for name, share in shares.items()}
    counts = {name: int(number) for name, number in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: count - sum(counts.values())]:
        counts[name] += 1
    return {name: number for name, number in counts.items() if number}


def _of_category(
    category: str, ways: Sequence[Template], snippets: Sequence[Snippet], count: int, seed: int
) -> list[Prompt]:
    """So many prompts of one category, no two alike."""
    found: dict[tuple[tuple[str, str], ...], Prompt] = {}
    for template, snippet in _pairs(ways, snippets, f"{seed}/{category}"):
        prompt = _prompt(category, template, snippet, seed)
        if prompt is not None:
            found.setdefault(prompt.messages, prompt)
        if len(found) == count:
            return list(found.values())
    raise DataError(
        f"prompts.count: {count} are asked for in {category}, and {len(found)} can be made of "
        f"{len(snippets)} seeds and {len(ways)} templates; lower it, or give more seeds or templates"
    )


def _pairs(
    ways: Sequence[Template], snippets: Sequence[Snippet], seed: str
) -> Iterator[tuple[Template, Snippet]]:
    """Each template with each seed that fits it, once; no seed comes again before all others have come."""
    order = list(snippets)
    random.Random(seed).shuffle(order)
    fitting = [[way for way in ways if not _missing(way, snippet)] for snippet in order]
    for turn in range(len(ways)):
        for place, (snippet, own) in enumerate(zip(order, fitting, strict=True)):
            if turn < len(own):
                yield own[(place + turn) % len(own)], snippet


def _prompt(category: str, template: Template, snippet: Snippet, seed: int) -> Prompt | None:
    """None where no bug can be planted in this seed."""
    fields, drawing = dict(snippet.fields), f"{seed}/{template.name}/{snippet.name}"
    if BUGGY in template.needs and BUGGY not in fields:
        if (buggy := planted(fields["code"], drawing)) is None:
            return None
        fields[BUGGY] = buggy
    text, language = template.filled(fields, drawing)
    is_same = language == snippet.language.lower()
    return Prompt(
        (("user", text),),
        category,
        template=template.name,
        seed=snippet.name,
        language="" if category in WITHOUT_CODE else language,
        tests=fields.get("tests", "") if category in TESTED and is_same else "",
    )


def _missing(template: Template, snippet: Snippet) -> frozenset[str]:
    """The fields that a template asks for and a seed has not."""
    has_bugs = snippet.is_python and "code" in snippet.fields
    return template.needs - snippet.fields.keys() - ({BUGGY} if has_bugs else set())


def _refuse_missing(
    asked: Mapping[str, Sequence[Template]], snippets: Sequence[Snippet], config: Prompts
) -> None:
    """Raise where a template fits no seed, or a seed no template; of our own templates one must fit."""
    faults = []
    for ways in asked.values():
        unfit = [way for way in ways if all(_missing(way, snippet) for snippet in snippets)]
        if unfit and (config.templates or len(unfit) == len(ways)):
            faults += [_fault(way, snippets) for way in unfit]
    if faults:
        have = ", ".join(sorted({name for snippet in snippets for name in snippet.fields}))
        do = f"the seeds have {have}; give them that field, or leave the category out"
        raise ConfigError(f"prompts: templates ask for what no seed has; {do}{listed(faults)}")
    ways = [way for each in asked.values() for way in each]
    idle = [snippet.name for snippet in snippets if all(_missing(way, snippet) for way in ways)]
    if idle:
        needed = ", ".join(sorted({name for way in ways for name in way.needs}))
        raise DataError(
            f"{config.seeds}: {len(idle)} seeds fit no template of {', '.join(asked)}; those ask for {needed}"
            f"{listed(idle)}"
        )


def _fault(template: Template, snippets: Sequence[Snippet]) -> str:
    has = {name for snippet in snippets for name in snippet.fields}
    missing = sorted(template.needs - has) or sorted(_missing(template, snippets[0]))
    return f"template {template.name}: no field {missing[0]!r}{nearest(missing[0], has)}"
