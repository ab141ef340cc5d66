"""What asks a process to stop, Ctrl-C or the polite kill of a scheduler; and how a command ends."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kdlib.errors import KdlibError, Stopped, refuse_keys, without_keys
from kdlib.runs.files import go_on

LAUNCHED = "KDLIB_LAUNCHED"  # set where a launch of ranks began this process, whose words go to files
INTERRUPTED = 130  # exit status
OTHERS_S = 5.0  # that a rank waits for the first to say what is wrong
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


@contextmanager
def bare_errors() -> Iterator[None]:
    """What a user can act on is printed bare, with exit status 1; a key in the command comes to nothing.

    A command that was asked to stop ends with 128 and the signal's number, as shells have it: 130 of Ctrl-C.

    Of several ranks with the same fault the first says it, and torchrun ends the others while they wait.
    """
    HEARD.clear()
    try:
        refuse_keys(sys.argv[1:], "the command")
        yield
    except KdlibError as error:
        who = "kd"
        if (rank := os.environ.get("RANK", "0")) != "0":
            time.sleep(OTHERS_S)
            who += f", rank {rank}"
        if LAUNCHED not in os.environ:  # else who launched it says so
            print(without_keys(f"{who}: {error}"), file=sys.stderr)
        sys.exit(128 + HEARD[-1] if HEARD and isinstance(error, Stopped) else 1)
    except (KeyboardInterrupt, SystemExit) as error:  # of Ctrl-C typer makes the latter, without a word
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:
            raise
        logging.getLogger("asyncio").disabled = True  # it tells of kernels that nobody waits for any more
        print("kd: interrupted" + (f"; {go_on()}" if HEARD else ""), file=sys.stderr)
        sys.exit(INTERRUPTED)
