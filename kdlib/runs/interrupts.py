"""What asks a process to stop: Ctrl-C, and the polite kill of a scheduler, or of a machine taken away."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kdlib.runs.files import go_on

HEARD: list[int] = []  # signals that asked this process to stop; its exit status says so: 130, 143


@contextmanager
def heard(ask: Callable[[], object], again: Callable[[], object]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `ask`, once; a second Ctrl-C (SIGINT) calls `again`.

    A second SIGTERM is none: a scheduler sends one to a command and to all that it started, which pass it on.
    Under torchrun the same holds of SIGINT.  Python hears signals in its main thread alone; elsewhere this
    changes nothing.
    """
    asked: list[int] = []

    def hear(number: int, frame: object) -> None:
        is_again = number == signal.SIGINT and number in asked and "TORCHELASTIC_RUN_ID" not in os.environ
        asked.append(number)
        HEARD.append(number)
        if is_again:
            again()
        elif len(asked) == 1:
            ask()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted() -> None:
    """Raise as Ctrl-C does where nothing hears it."""
    raise KeyboardInterrupt(f"interrupted; {go_on()}")
