"""`kd`: a few lines each over the library."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kdlib.config import run as configs
from kdlib.config.run import Config, pairs
from kdlib.errors import ConfigError, KdlibError
from kdlib.runs import folder as runs
from kdlib.workbench.cli_checks import checks
from kdlib.workbench.cli_options import (
    ConfigFile,
    Overrides,
    ReportsFolder,
    RunName,
    RunsFolder,
    Smoke,
    folders,
)

BYTES = 4  # of a weight on disk

app = typer.Typer(
    help="kdlib: knowledge distillation of language models, seen term by term.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checks)


@app.callback()
def kd() -> None:
    """Knowledge distillation of language models, seen term by term."""


@app.command()
def run(
    config: ConfigFile,
    smoke: Smoke = False,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on with this run from its last checkpoint.")
    ] = None,
    name: RunName = None,
    override: Overrides = None,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", help="name=value for the notebooks.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option("--without", help="Leave this notebook out, e.g. 01_dry_run.")
    ] = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Run the numbered notebooks of CONFIG through papermill and render the report."""
    root, reports = folders(runs_folder, reports_folder)
    resolved = configs.load(config, override or [], smoke=smoke)
    extra = _parameters(parameter or [])
    if resume:
        if name:
            raise ConfigError("--name is for a new run; --resume goes on with one that has a name")
        opened = runs.open_run(root, resume, resolved)
    else:
        name = _free_name(root, name, config, smoke=smoke)
    from kdlib.workbench import runner
    from kdlib.workbench.kernels import Kernels

    notebooks = runner.without(without or [])
    given = _entered(config, override, smoke=smoke) | extra
    for notebook in notebooks:
        runner.check_parameters(Path("notebooks", f"{notebook}.ipynb"), {"run": "", **given})
    with Kernels(runs.project_root()) as kernels:  # the first gets ready meanwhile
        if not resume:
            from kdlib.workbench import session as workbench  # after the checks that need no torch

            print(f"checking {config}, its models and data …", flush=True)
            workbench.preflight(resolved)
            opened = _created(root, name, resolved, given)
        _through(notebooks, opened, given, reports, kernels)


@app.command()
def bench(
    config: Annotated[str, typer.Argument(help="What is measured: a YAML file.")] = "configs/benchmark.yaml",
    smoke: Smoke = False,
    name: RunName = None,
    override: Overrides = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Measure losses and training steps beside other packages' by the benchmark notebook, and render the
    report.
    """
    from kdlib.benchmarks.settings import BenchmarkConfig

    root, reports = folders(runs_folder, reports_folder)
    resolved = configs.load(config, override or [], smoke=smoke, kind=BenchmarkConfig)
    name = _free_name(root, name, config, smoke=smoke)
    from kdlib.benchmarks import study
    from kdlib.workbench import runner
    from kdlib.workbench.kernels import Kernels

    given = _entered(config, override, smoke=smoke)
    study.preflight(resolved)
    with Kernels(runs.project_root()) as kernels:
        _through(runner.BENCHMARK, _created(root, name, resolved, given), given, reports, kernels)


@app.command("dry-run")
def dry_run(
    config: ConfigFile,
    smoke: Smoke = False,
    name: RunName = None,
    override: Overrides = None,
    runs_folder: RunsFolder = None,
) -> None:
    """Try CONFIG, in the terminal: the doctor, shapes, what is learned from, the self-test, five steps,
    forecast and plan.
    """
    root, _ = folders(runs_folder, None)
    resolved = configs.load(config, override or [], smoke=smoke)
    name = _free_name(root, name, config, smoke=smoke)
    from kdlib.workbench import session as workbench

    given = _entered(config, override, smoke=smoke)
    workbench.preflight(resolved)
    opened = _created(root, name, resolved, given)
    bench = workbench.Workbench(opened)
    for part in (
        bench.setup,
        bench.doctor,
        bench.shapes,
        bench.example,
        bench.selftest,
        bench.dry_run,
        bench.forecast,
        bench.plan,
    ):
        made = part()  # or it has printed what it found
        print(
            "" if made is None else f"{made.to_string() if hasattr(made, 'to_string') else made}\n",
            flush=True,
        )
    words = [
        given["config"],
        *(f"--override={text}" for text in override or []),
        *["--smoke"] * smoke,
        "--resume",
        opened.name,
    ]
    print(
        "all of it, from here: kd run "
        f"{shlex.join(words)}{f' --runs {os.path.relpath(root)}' if runs_folder else ''}"
    )


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="A run's name, or its folder; 00_setup has prepared it.")],
) -> None:
    """Train the students of RUN without notebooks; under torchrun (-m kdlib train RUN) on several GPUs."""
    from kdlib.workbench import session as workbench

    opened = runs.open_run(*runs.locate(run))
    os.chdir(runs.project_root())  # from which a trained teacher's folder is named
    bench = workbench.Workbench(opened)
    bench.train()
    bench.train_baseline()


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="The sweep: a YAML file.")],
    smoke: Smoke = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="Runs side by side; as the file says unless given.", min=1)
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The sweep's name; that of its file unless given.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("-o", "--override", help="key=value in all runs, e.g. seed=1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and the forecast, and run nothing.")
    ] = False,
    no_forecast: Annotated[bool, typer.Option("--no-forecast", help="Start at once.")] = False,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Run what FILE lists over its base config, some side by side, and render their report; again: go on
    where it stopped.
    """
    from kdlib.reports import index, run as report
    from kdlib.sweeps.config import SweepConfig
    from kdlib.sweeps.run import Order, run_sweep

    root, reports = folders(runs_folder, reports_folder)
    settings = configs.load(file, kind=SweepConfig)
    order = Order(
        name=name or Path(file).stem + "-smoke" * (smoke and not settings.small),
        file=os.path.relpath(file, runs.project_root()),
        command=_command(),
        smoke=smoke,
        overrides=dict(pairs(override or [])),
        jobs=jobs or settings.jobs,
        root=root,
        reports=reports,
        render_run=report.render,
        render_index=index.render_index,
        forecast=None if no_forecast else _cost,
    )
    os.chdir(runs.project_root())
    run_sweep(settings, order, dry_run=dry_run)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The name of a run or a sweep, or its folder.")],
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Render the report of RUN again, from its files."""
    from kdlib.reports import index as overview, run as reports
    from kdlib.sweeps import report as sweep_report, results as sweeps

    root, folder = folders(runs_folder, reports_folder)
    root, name = runs.locate(run, root)
    if sweeps.exists(root, name):
        page = sweep_report.render(sweeps.Sweep(root / name), folder)
    else:
        page = reports.render(runs.open_run(root, name), folder)
    overview.render_index(root, folder)
    print(f"report: {os.path.relpath(page)}")


@app.command()
def clean(
    run: Annotated[str, typer.Argument(help="A run's name, or its folder.")], runs_folder: RunsFolder = None
) -> None:
    """Delete the checkpoints of RUN, which is done: models, figures and reports stay."""
    root, _ = folders(runs_folder, None)
    freed = runs.clean(runs.open_run(*runs.locate(run, root)))
    print(f"{run}: {freed / 2**30:.2f} GiB freed")


def main() -> None:
    """Entry point: what a user can act on is printed bare, with exit status 1."""
    try:
        app()
    except KdlibError as error:
        print(f"kd: {error}", file=sys.stderr)
        sys.exit(1)


def _free_name(root: Path, name: str | None, config: str, *, smoke: bool) -> str:
    """The name of a new run, given or made; refused where it is taken."""
    name = name or runs.new_name(config, smoke=smoke)
    runs.check_new(root, name)
    return name


def _entered(config: str, override: list[str] | None, *, smoke: bool) -> dict[str, Any]:
    """Goes to the project's folder, as relative paths in a config mean the same everywhere; the
    notebooks' parameters, seen from there.
    """
    given = {
        "config": os.path.relpath(config, runs.project_root()),
        "overrides": override or [],
        "smoke": smoke,
    }
    os.chdir(runs.project_root())
    return given


def _created(root: Path, name: str, config: Any, given: Mapping[str, Any]) -> runs.Run:
    origin = {"config_file": given["config"], "smoke": given["smoke"], "command": _command()}
    return runs.create(root, name, config, **origin)


def _through(
    notebooks: Sequence[str], run: runs.Run, given: Mapping[str, Any], reports: Path, kernels: Any
) -> None:
    """The notebooks through papermill, in fresh kernels, and the report."""
    from kdlib.workbench import runner

    folder = os.path.join(".", os.path.relpath(run.path))  # with a separator: a folder, not a name
    page = runner.run_notebooks(
        run, {**given, "run": folder}, reports_folder=reports, kernels=kernels, names=notebooks
    )
    print(f"report: {os.path.relpath(page)}    index: {os.path.relpath(reports / 'index.html')}")


def _cost(config: Config) -> Any:
    """What a run of a sweep takes: memory by tensors without data, time by a few real steps."""
    from kdlib.diagnostics import measurement, memory
    from kdlib.sweeps.run import Cost

    found = memory.forecast(config)
    seconds = measurement.measured(config).seconds
    weights = BYTES * found.parameters["student"]
    return Cost(seconds, found.peak, found.peak * (1 + memory.MARGIN), found.free, weights)


def _command() -> str:
    return shlex.join(["kd", *sys.argv[1:]])


def _parameters(texts: list[str]) -> dict:
    """Further notebook parameters: name=value, read as overrides are."""
    given = dict(pairs(texts))
    for name in given:
        if name in ("config", "run", "overrides", "smoke"):
            raise ConfigError(
                f"-p {name}: this parameter has a way of its own: CONFIG, --resume, -o, --smoke"
            )
    return given


if __name__ == "__main__":
    main()
