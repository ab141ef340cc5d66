"""What kills, interrupts and repetition do to a run, and what it may not let slip into its files."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kdlib.config.run import parse
from kdlib.reports import index as overview, run as reports
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.runs.processes import HEARS, this_process

RUN = """
import sys
from pathlib import Path
from kdlib.reports.index import render_index
from kdlib.reports.run import render
from kdlib.runs.folder import Run
from kdlib.workbench import runner
from kdlib.runs.processes import bare_errors
def rendered(run):
    render_index(run.path.parent, Path("reports"))
    return render(run, Path("reports"))
runner.WARM_UP = ("pass",)  # these notebooks import nothing
with bare_errors(), runner.Kernels(Path.cwd()) as kernels:
    runner.run_notebooks(Run(Path(sys.argv[1])), {}, kernels, rendered, ("first", "second"))
"""


@pytest.fixture
def waiting(raw_config, tmp_path):
    """A run whose first notebook waits until it is told to go on, in a process of its own: (process, run)."""
    for folder in ("notebooks", "configs"):
        (tmp_path / folder).mkdir()
    wait = (
        "import pathlib, time\npathlib.Path('begun').touch()\nwhile not pathlib.Path('go').exists(): "
        "time.sleep(0.05)"
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, source in {"first": wait, "second": "print('here')"}.items():
        parameters = new_code_cell("run = None", metadata={"tags": ["parameters"]})
        notebook = new_notebook(cells=[parameters, new_code_cell(source)], metadata=kernel)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    run = runs.create(tmp_path / "runs", "waiting", parse(raw_config))
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(run.path)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        until(
            lambda: (tmp_path / "begun").exists() or process.poll() is not None,
            "the first notebook has begun",
        )
        yield process, run
    finally:
        process.kill()
        process.communicate()


def until(true, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)


def kernels(process: subprocess.Popen) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "ipykernel" in " ".join(child.cmdline())
    ]


def gone(processes: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


def shown(run: Run, folder: Path) -> tuple[str, str]:
    """The run's report and the index, freshly rendered."""
    return reports.render(run, folder).read_text(), overview.render_index(run.path.parent, folder).read_text()


def test_a_run_whose_command_is_killed_has_died_wherever_one_looks_and_leaves_no_kernel(waiting, tmp_path):
    process, run = waiting
    left = kernels(process)
    assert len(left) == 2  # at work, and getting ready
    process.send_signal(signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL
    assert run.status["state"] == "died"
    page, index = shown(run, tmp_path / "reports")
    assert '<span class="state died">died</span>' in page
    assert "the process that ran it is gone" in page
    assert '<span class="state died">died</span>' in index
    until(lambda: gone(left), "the kernel ends with its parent")


def test_an_interrupted_run_stops_before_its_next_notebook_and_says_how_to_go_on(waiting, tmp_path):
    process, run = waiting
    runs.write_json(run.path / HEARS, this_process())  # as a training does
    process.send_signal(signal.SIGINT)
    until((run.path / "STOP").exists, "the interrupt is heard")
    (tmp_path / "go").touch()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C again to stop at once" in out
    assert run.status["state"] == "stopped"
    assert run.status["message"] == "stopped before second; go on with --resume, or run this cell again"
    assert run.manifest["stages"] == ["first"]
    assert not (run.path / "STOP").exists()
    assert '<span class="state stopped">stopped</span>' in (tmp_path / "reports" / "index.html").read_text()
    assert "the run was stopped" in (tmp_path / "reports" / "waiting" / "report.html").read_text()


@pytest.mark.parametrize(("trains", "times"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_amid_setup_or_a_second_time_an_interrupt_stops_at_once_and_leaves_no_kernel(waiting, trains, times):
    process, run = waiting
    left = kernels(process)
    if trains:
        runs.write_json(run.path / HEARS, this_process())
        process.send_signal(signal.SIGINT)
        until((run.path / "STOP").exists, "the interrupt is heard")
    for _ in range(times):
        process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("kd: interrupted; go on with --resume, or run this cell again\n")
    assert run.status["state"] == "stopped"
    assert run.status["message"] == "interrupted; go on with --resume, or run this cell again"
    until(lambda: gone(left), "the kernel ends with its parent")
