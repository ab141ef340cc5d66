"""How a run stands: all states, and which can follow on which.  Who sets or shows a state asks here.

created → running → trained → running → done     by hand, a notebook after the other
created → running → done                         by `kd`
          running → stopped, failed, died        and from each of these, and from done, → running again
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class State:
    """One way for a run to stand."""

    means: str  # of the run, in a sentence
    then: tuple[str, ...]  # what can be noted next


STATES = {
    "running": State("is running", ("created", "trained", "done", "stopped", "failed", "died")),
    "created": State("is not at its end", ("running", "failed", "died")),  # its process may say no word
    "trained": State("is trained and not compared", ("running",)),
    "done": State("is done", ("running",)),
    "stopped": State("was stopped", ("running", "failed")),  # by who held it to its time, which says so
    "failed": State("failed", ("running",)),
    "died": State("died", ("running", "failed", "died")),  # the same; or its last words are known now
}
"""In the order in which a list of runs shows them."""
ENDED = ("done", "stopped", "failed", "died")  # nobody works on such a run, nor is expected to
ILL = ("stopped", "failed", "died")


def check(before: str, after: str) -> None:
    """Raise a ValueError, an error in kdlib itself, where no such state can be noted after that one."""
    if after not in STATES[before].then:
        raise ValueError(
            f"a run that is {before} is never {after} next, but {', '.join(STATES[before].then)}"
        )


def noted(said: str, *, lives: bool) -> str:
    """What status.json says, where it can be so: a kill notes nothing; `lives`: who said it does."""
    return "died" if said == "running" and not lives else said


def seen(noted: str, *, by: str, is_begun: bool, is_trained: bool) -> str:
    """How a run stands for all who look at it.

    Args:
        by: whether a process that noted nothing `lives` and works on it, or is `gone`; else "".
        is_begun: its training has left something.
        is_trained: its training reached its end.
    """
    if by == "lives":
        return "running"
    if noted != "created":
        return noted
    return "trained" if is_trained else "died" if by == "gone" else "stopped" if is_begun else "created"


def put(status: Mapping[str, Any], state: str) -> dict[str, Any]:
    """A status as it is noted, with the state that is true in its place."""
    if state == status["state"]:
        return {**status}
    return {**status, "state": state, "message": "the process that ran it is gone" * (state == "died")}


def at_rest(before: str, *, is_begun: bool, is_trained: bool) -> str:
    """Where a part of a run leads that ended well: a step further, or back to where a training stands."""
    if before == "done":
        return before
    if is_trained:
        return "trained"
    if is_begun:
        return before if before in ILL else "stopped"
    return "created"


def of_student(run: str, *, is_begun: bool, is_trained: bool) -> str:
    """How one of a run's students stands, where the run as a whole stands so."""
    if is_trained:
        return run if run == "done" else "trained"
    if run in ("trained", "done"):  # the other student is
        return "stopped" if is_begun else "created"
    return run
