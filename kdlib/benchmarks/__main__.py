"""`python -m kdlib.benchmarks`: measure losses and training steps beside other packages'."""

from typing import Annotated

import typer

from kdlib.benchmarks.settings import BenchmarkConfig
from kdlib.config import run as configs
from kdlib.runs import folder as runs
from kdlib.workbench.cli_options import (
    Overrides,
    ReportsFolder,
    RunName,
    RunsFolder,
    Smoke,
    bare_errors,
    created,
    entered,
    folders,
    free_name,
    run_through,
)

NOTEBOOK = "90_benchmark"
PROGRAM = "python -m kdlib.benchmarks"


def benchmark(
    config: Annotated[str, typer.Argument(help="What is measured: a YAML file.")] = "configs/benchmark.yaml",
    smoke: Smoke = False,
    name: RunName = None,
    override: Overrides = None,
    report: Annotated[
        str | None, typer.Option("--report", help="Measure nothing: the page of this study again.")
    ] = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Measure losses and training steps beside other packages' by the benchmark notebook, and report."""
    from kdlib.benchmarks.report import render
    from kdlib.reports.index import render_index

    root, reports = folders(runs_folder, reports_folder)
    if report:
        opened = runs.open_run(*runs.locate(report, root))
        page = render(opened, reports)
        render_index(opened.path.parent, reports)
        print(f"report: {page}")
        return
    resolved = configs.load(config, override or [], smoke=smoke, kind=BenchmarkConfig)
    name = free_name(root, name, config, smoke=smoke)
    from kdlib.benchmarks.study import preflight
    from kdlib.workbench.runner import Kernels

    given = entered(config, override, smoke=smoke)
    preflight(resolved)
    with Kernels(runs.project_root()) as kernels:
        study = created(root, name, resolved, given, program=PROGRAM)
        run_through([NOTEBOOK], study, given, reports, kernels, render)


if __name__ == "__main__":
    with bare_errors():
        typer.run(benchmark)
