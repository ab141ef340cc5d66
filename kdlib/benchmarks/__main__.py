"""`python -m kdlib.benchmarks`: measure losses and training steps beside other packages'."""

import os
from pathlib import Path

import typer

from kdlib.benchmarks.settings import BenchmarkConfig
from kdlib.config import run as configs
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.runs.processes import bare_errors
from kdlib.workbench.cli_checks import (
    Overrides,
    ReportsFolder,
    RunName,
    RunsFolder,
    Smoke,
    argument,
    created,
    entered,
    folders,
    free_name,
    option,
)

NOTEBOOK = "90_benchmark"
PROGRAM = "python -m kdlib.benchmarks"


def benchmark(
    config: argument("What is measured: a YAML file.") = "configs/benchmark.yaml",
    smoke: Smoke = False,
    name: RunName = None,
    override: Overrides = None,
    report: option(str | None, "--report", help="Measure nothing: the page of this study again.") = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Measure losses and training steps beside other packages' by the benchmark notebook, and report."""
    from kdlib.benchmarks.figures import render
    from kdlib.reports.index import render_index

    root, reports = folders(runs_folder, reports_folder)

    def rendered(study: Run) -> Path:
        page = render(study, reports)
        render_index(study.path.parent, reports)
        return page

    if report:
        page = rendered(runs.open_run(*runs.locate(report, root)))
        print(f"report: {os.path.relpath(page)}")
        return
    resolved = configs.load(config, override or [], smoke=smoke, kind=BenchmarkConfig)
    name = free_name(root, name, config, smoke=smoke)
    from kdlib.benchmarks.study import preflight
    from kdlib.workbench.runner import Kernels, run_notebooks

    given = entered(config, override, smoke=smoke)
    preflight(resolved)
    with Kernels(runs.project_root()) as kernels:
        study = created(root, name, resolved, given, program=PROGRAM)
        page = run_notebooks(study, given, kernels, rendered, [NOTEBOOK])
    print(f"report: {os.path.relpath(page)}    index: {os.path.relpath(reports / 'index.html')}")


if __name__ == "__main__":
    with bare_errors():
        typer.run(benchmark)
