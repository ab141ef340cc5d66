"""How far a long wait is, in lines: where `datasets` draws no bar, as in a headless run."""

import time
from typing import Any

import datasets

FIRST_S, SLOWER = 1.5, 1.5  # seconds until the first line; by how much the time until each next one grows


class Told:
    """To be called with how many are done: prints a line now and then, and none of a short wait.

    To `datasets`, which knows what it has made by all that a function holds, two of the same words are the
    same.
    """

    def __init__(self, what: str, total: int, unit: str, *, has_bar: bool = False) -> None:
        """`has_bar`: it is shown otherwise, unless bars are switched off."""
        self.told = (what, total, unit, has_bar)
        self.begun, self.due = time.monotonic(), FIRST_S

    def __call__(self, done: int) -> None:
        what, total, unit, has_bar = self.told
        passed = time.monotonic() - self.begun
        if passed < self.due or done >= total or (has_bar and not datasets.are_progress_bars_disabled()):
            return
        print(f"{what}: {done:,} of {total:,} {unit} in {passed:.0f} s", flush=True)
        self.due = passed * SLOWER

    def __reduce__(self) -> tuple[Any, ...]:
        return _of, self.told


def _of(what: str, total: int, unit: str, has_bar: bool) -> Told:
    return Told(what, total, unit, has_bar=has_bar)
