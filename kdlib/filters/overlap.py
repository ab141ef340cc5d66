"""Overlap with benchmarks: 13 tokens in a row, as in GPT-3's decontamination, whatever the spaces and names.

White space, case and brackets are left out, and every name that code binds (functions, arguments, variables)
is one mark, so that a problem is found after its names were changed.  As that makes much code alike, a run
counts only with seven different tokens beside the mark.  A problem whose whole solution is shorter than 13
tokens is found by its text alone.

Brown et al. 2020, appendix C, https://arxiv.org/abs/2005.14165.
"""

import keyword
import re
from collections import Counter
from collections.abc import Iterable, Mapping

N = 13  # tokens
TELLING = 7  # different ones among them that are no names
TOKENS = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?|[=!<>+*/%&|^-]=|\*\*|//|<<|[^\w\s]")
LEFT_OUT = frozenset("()[]{},:;\"'`.>\\")
PARAMETERS = r"[^()]*(?:\([^()]*\)[^()]*)*"
BINDS = re.compile(
    rf"\bdef\s+(?P<function>\w+)\s*\((?P<parameters>{PARAMETERS})\)"
    r"|^[ \t]*(?P<assigned>[\w, \t]+?)\s*(?::[^=\n]+)?(?:[-+*/%&|^]|//|\*\*)?=(?!=)"
    r"|\bfor\s+(?P<each>[\w, ()]+?)\s+in\b"
    r"|\blambda\s+(?P<arguments>[\w, ]+):",
    re.MULTILINE,
)
NAME = re.compile(r"[^\W\d]\w*")
BRACKETS = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]")  # of an annotation
PARAMETER = re.compile(r"(?:^|,)\s*\*{0,2}([^\W\d]\w*)")
NOT_NAMES = frozenset(keyword.kwlist)
MARK = "_"


def bound_names(text: str) -> frozenset[str]:
    """The names that Python code binds in a text, by their form: the text need not parse."""
    found: set[str] = set()
    for match in BINDS.finditer(text):
        for group in ("function", "assigned", "each", "arguments"):
            found.update(NAME.findall(match[group] or ""))
        found.update(PARAMETER.findall(BRACKETS.sub("", match["parameters"] or "")))
    return frozenset(found - NOT_NAMES)


def grams(text: str) -> set[int]:
    """The runs of N tokens that tell something, with and without regard to names, each as its hash."""
    tokens = [token for token in TOKENS.findall(text) if token not in LEFT_OUT]
    return {
        hash(run)
        for names in (bound_names(text), frozenset[str]())
        for marked in [[MARK if token in names else token.lower() for token in tokens]]
        for run in zip(*(marked[start:] for start in range(N)), strict=False)
        if len({*run} - {MARK}) >= TELLING
    }


class Benchmarks:
    """The problems that no row may hold: name → text."""

    def __init__(self, problems: Mapping[str, str] | Iterable[tuple[str, str]]):
        self._names: dict[int, list[str]] = {}
        for name, text in dict(problems).items():
            for gram in grams(text):
                self._names.setdefault(gram, []).append(name)

    def in_text(self, text: str) -> str | None:
        """The name of the problem that a text has most of; None where it has something of none."""
        counts = Counter(name for gram in grams(text) for name in self._names.get(gram, ()))
        return min(counts, key=lambda name: (-counts[name], name), default=None)
