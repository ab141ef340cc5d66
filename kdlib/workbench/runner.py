"""Running notebooks headless: papermill, one after another, with a status that survives a dead kernel."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

import kdlib
from kdlib.errors import Died, RunError, Stopped, nearest, refuse_keys
from kdlib.runs.files import go_on, without_keys_in, write_error, writing
from kdlib.runs.folder import Run, project_root, working
from kdlib.runs.processes import PARENT, heard, interrupted, is_stoppable
from kdlib.runs.verdict import refuse_unsound

NOTEBOOKS = ("00_setup", "01_dry_run", "02_train", "03_compare")
EXPERTS = "04_student_aware"  # after these, where 00_setup found a teacher with experts
EVERY = (*NOTEBOOKS, EXPERTS)
START_TIMEOUT = 600  # seconds; on a busy machine a kernel needs a minute to import torch
# nine seconds of one core: torch, transformers, matplotlib; no collection need look at what they make
WARM_UP = (
    "import gc; gc.disable()",
    "import kdlib.workbench.dashboard, kdlib.workbench.explorers, kdlib.workbench.session",
    "gc.freeze(); gc.enable()",
)


def shipped() -> Path:
    """The folder with the notebooks/ and configs/ that came with kdlib: in its wheel, or in its clone."""
    inside = Path(kdlib.__file__).parent
    return inside / "project" if (inside / "project").is_dir() else inside.parent


def notebook_of(name: str) -> Path:
    """The project's own notebook of this name; outside a project, and where it has none, kdlib's."""
    own = project_root() / "notebooks" / f"{name}.ipynb"
    return own if own.exists() else shipped() / "notebooks" / f"{name}.ipynb"


def begin_project(folder: Path) -> None:
    """Copy notebooks and configs into a folder, to be changed there.

    Raises:
        RunError: it has one of them already, or the disk refuses.
    """
    for part, pattern in (("notebooks", "*.ipynb"), ("configs", "*.*")):
        if (folder / part).exists():
            raise RunError(f"{folder / part}: is there already; name another folder")
        with writing(folder / part):
            (folder / part).mkdir(parents=True)
            for file in sorted((shipped() / part).glob(pattern)):
                shutil.copyfile(file, folder / part / file.name)


def without(names: Sequence[str]) -> tuple[str, ...]:
    """The numbered notebooks but these; a RunError where one is unknown, or the others need it."""
    for name in names:
        if name not in EVERY[1:]:
            unknown = f"there is none of this name{nearest(name, EVERY)}"
            why = "the others need it" if name in EVERY else unknown
            raise RunError(f"--without {name}: {why}; it is one of {', '.join(EVERY[1:])}")
    return tuple(name for name in EVERY if name not in names)


class Kernels:
    """Fresh kernels that work in a folder; while one is at work, the next imports what notebooks need.

    An import that fails is left to the notebook, whose own import says so.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.waiting = folder, None

    def __enter__(self) -> "Kernels":
        self._start()
        return self

    def __exit__(self, *error) -> None:
        if self.waiting is not None:
            _end(self.waiting)

    @contextlib.contextmanager
    def taken(self, *, another: bool) -> Iterator[AsyncKernelManager]:
        """The kernel that waits, which ends with the block; `another` starts meanwhile."""
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
        environment = {**os.environ, PARENT: "kd"}
        start = run_sync(self.waiting.start_kernel)
        start(extra_arguments=options, cwd=str(self.folder), env=environment)


def _end(kernel: AsyncKernelManager) -> None:
    run_sync(kernel.shutdown_kernel)(now=True)  # notebooks hand over files: nothing of it is needed any more


def run_notebooks(
    run: Run,
    given: Mapping[str, Any],
    kernels: Kernels,
    render: Callable[[Run], Path],
    names: Sequence[str] = EVERY,
) -> Path:
    """Execute these notebooks for a run, but for those that an earlier try has finished, and report.

    Whatever happens, status.json says how it ended and a report, if only a partial one, is written.

    Args:
        given: the notebooks' parameters, but for `run`.
        render: makes the run's report, and returns its path, as this does.

    Raises:
        ConfigError: a parameter holds a key.
        Stopped: by Ctrl-C or a STOP file.
        RunError: a notebook failed, its kernel died, or the doctor found something critical in 00_setup.
    """
    refuse_keys(given)  # they stand in the executed notebooks
    folder = os.path.join(".", os.path.relpath(run.path))  # with a separator: a folder, not a name
    with working(run, failed=render), _stop_file(run):
        _run_in_turn(run, {**given, "run": folder}, names, kernels)
    return render(run)


def _run_in_turn(run: Run, parameters: Mapping[str, Any], names: Sequence[str], kernels: Kernels) -> None:
    done = run.manifest.get("stages", [])
    for number, name in enumerate(names, 1):
        if not _is_of_use(name, run, done):
            continue
        if name in done:
            print(f"— {name}: done before", flush=True)
            continue
        if (run.path / "STOP").exists():  # asked for while no training was there to hear it
            raise Stopped(f"stopped before {name}; {go_on()}")
        if done:
            refuse_unsound(run.manifest)
        print(f"— {name}", flush=True)
        notebook, copy = notebook_of(name), run.notebooks / f"{name}.ipynb"
        another = any(_is_of_use(each, run, done) for each in names[number:])
        with kernels.taken(another=another) as kernel:
            execute(notebook, copy, parameters, kernel)
        done = [*done, name]
        run.add_to_manifest(stages=done)


def _is_of_use(name: str, run: Run, done: Sequence[str]) -> bool:
    """Whether a notebook has something to show of this run, as far as is known yet."""
    return name != EXPERTS or NOTEBOOKS[0] not in done or "experts" in run.manifest


def execute(
    notebook: Path, output: Path, parameters: Mapping[str, Any], kernel: KernelManager | None = None
) -> None:
    """Execute one notebook; what its cells print appears here as it comes, and the executed copy is kept.

    Args:
        kernel: one that is running, and that nothing ran in; a new one where None.

    Raises:
        Stopped: its training was asked to.
        RunError: it does not declare one of the parameters, a cell failed, or the kernel died.
    """
    check_parameters(notebook, parameters)
    root = project_root()
    paths = [os.path.relpath(path, root) for path in (notebook, output)]  # they stand in the executed copy
    try:
        with contextlib.chdir(root):
            papermill.execute_notebook(
                *paths,
                parameters=dict(parameters),
                progress_bar=False,
                log_output=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                extra_arguments=["--log-level=ERROR"],
                km=kernel,
                start_timeout=START_TIMEOUT,
            )
    except PapermillExecutionError as error:
        if kind := {each.__name__: each for each in (Stopped, Died)}.get(error.ename):
            raise kind(f"{notebook.stem}: {error.evalue}") from error
        raise RunError(f"{notebook.stem}: {error.ename}: {error.evalue}") from error
    except OSError as error:
        raise write_error(output, error) from error
    except DeadKernelError as error:
        why = f"its kernel died (killed, or out of memory); {go_on()}"
        raise Died(f"{notebook.stem}: {why}") from error
    finally:
        without_keys_in(output)


def check_parameters(notebook: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse names that the notebook does not declare; papermill only warns and runs with the defaults."""
    if not notebook.exists():
        raise RunError(f"{notebook}: no such notebook; run kd inside the project's folder")
    declared = papermill.inspect_notebook(str(notebook))
    for name in parameters:
        if name not in declared:
            hint = f"{nearest(name, declared)}; it has {', '.join(declared)}"
            raise RunError(f"{notebook.name} declares no parameter {name!r}{hint}")


@contextlib.contextmanager
def _stop_file(run: Run) -> Iterator[None]:
    """Ctrl-C asks a training for a checkpoint by a file named STOP; a second one, or one amid anything else
    than a training, ends all at once.
    """
    stop = run.path / "STOP"
    stop.unlink(missing_ok=True)

    def ask() -> None:
        if not is_stoppable(run.path):
            interrupted()
        stop.touch()
        print("stopping after this step, with a checkpoint; Ctrl-C again to stop at once", flush=True)

    try:
        with heard(ask, interrupted):
            yield
    finally:
        stop.unlink(missing_ok=True)
