"""Kernels for notebooks that run in turn: while one is at work, the next starts and imports what it will
need.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync

from kdlib.runs.folder import PARENT

# nine seconds of one core: torch, transformers, matplotlib; what they make stays, and no collection need look
# at it
WARM_UP = (
    "import gc; gc.disable()",
    "import kdlib.workbench.dashboard, kdlib.reports.explorers, kdlib.workbench.session",
    "gc.freeze(); gc.enable()",
)


class Kernels:
    """Hands out fresh kernels; one waits from the start, and at most one beside the one in use, at some 0.5
    GiB.

    An import that fails is left to the notebook, whose own import says so.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: where the kernels work.
        """
        self.folder, self.waiting = folder, None

    def __enter__(self) -> "Kernels":
        self._start()
        return self

    def __exit__(self, *error) -> None:
        if self.waiting is not None:
            _end(self.waiting)

    @contextlib.contextmanager
    def taken(self, *, another: bool) -> Iterator[AsyncKernelManager]:
        """The kernel that waits, which ends with the block; `another` starts now, to wait in its turn."""
        kernel, self.waiting = self.waiting, None
        try:
            if another:
                self._start()
            yield kernel
        finally:
            _end(kernel)

    def _start(self) -> None:
        self.waiting = AsyncKernelManager(kernel_name="python3")
        lines = [f"--IPKernelApp.exec_lines={line}" for line in WARM_UP]
        options = ["--log-level=ERROR", "--HistoryManager.hist_file=:memory:", *lines]
        run_sync(self.waiting.start_kernel)(
            extra_arguments=options, cwd=str(self.folder), env={**os.environ, PARENT: "kd"}
        )


def _end(kernel: AsyncKernelManager) -> None:
    run_sync(kernel.shutdown_kernel)(now=True)  # nothing of it is needed any more: notebooks hand over files
