"""A measurement in a process of its own, asked and answered in JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from kdlib.errors import RunError


def in_fresh_process(
    module: str, asked: Mapping[str, Any], *, what: str, memory: bool = True
) -> dict[str, Any]:
    """What `python -m module` prints as its last line, given `asked`, both in JSON.

    Args:
        what: is done there, for the message of an error.
        memory: is measured there, and not time, which giving blocks back takes.

    Raises:
        RunError: that process failed; its last words are in the message.
    """
    # measured is what is held, not how a heap happened to be cut up: glibc gives blocks back when asked so
    returned = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if memory else {}
    command = [sys.executable, "-m", module, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | returned)
    if done.returncode != 0:
        raise RunError(f"{what} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
