"""`kd`: a few lines each over the library."""

import os
import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import typer

from kdlib.config import run as configs
from kdlib.config.reading import pairs
from kdlib.config.run import Config
from kdlib.config.sections import LaunchConfig
from kdlib.errors import ConfigError
from kdlib.runs import folder as runs
from kdlib.runs.child_processes import as_rank
from kdlib.runs.files import go_on, going_on
from kdlib.runs.folder import Run
from kdlib.runs.processes import LAUNCHED, bare_errors, held
from kdlib.workbench.cli_checks import (
    Anyway,
    ConfigFile,
    Overrides,
    Processes,
    ReportsFolder,
    RunName,
    RunsFolder,
    Smoke,
    Texts,
    argument,
    checks,
    command,
    created,
    entered,
    folders,
    free_name,
    option,
)

RESUME = "After a stop, a crash or kill -9: go on with this run from its last checkpoint."

app = typer.Typer(
    help="kdlib: knowledge distillation of language models, seen term by term.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checks)


@app.command()
def run(
    config: ConfigFile,
    smoke: Smoke = False,
    resume: option(str | None, "--resume", help=RESUME) = None,
    name: RunName = None,
    override: Overrides = None,
    parameter: option(Texts, "-p", "--parameter", help="name=value for the notebooks.") = None,
    without: option(Texts, "--without", help="Leave this notebook out, e.g. 01_dry_run.") = None,
    processes: Processes = None,
    anyway: Anyway = False,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Run the numbered notebooks of CONFIG through papermill and render the report.

    Critical findings of the doctor end it before it trains, unless --anyway.  Ctrl-C, or a file STOP in the
    run's folder, saves a checkpoint and ends.
    """
    root, reports = folders(runs_folder, reports_folder)
    override = [*(override or []), *([f"launch.processes={processes}"] if processes else [])]
    resolved = configs.load(config, override, smoke=smoke)
    extra = dict(pairs(parameter or []))
    if own := sorted({"config", "run", "overrides", "smoke"} & set(extra)):
        ways = "this parameter has a way of its own: CONFIG, --resume, -o, --smoke"
        raise ConfigError(f"-p {own[0]}: {ways}")
    if resume:
        if name:
            raise ConfigError("--name is for a new run; --resume goes on with one that has a name")
        opened = runs.open_run(root, resume, resolved)
    else:
        name = free_name(root, name, config, smoke=smoke)
    from kdlib.workbench import runner

    notebooks, again = runner.without(without or []), f"go on with --resume {resume or name}"
    given = entered(config, override, smoke=smoke) | extra
    for notebook in notebooks:
        runner.check_parameters(runner.notebook_of(notebook), {"run": "", **given})
    # refused before anything is loaded; the first kernel gets ready meanwhile
    alone = held(opened.path) if resume else nullcontext()
    with alone, going_on(again), runner.Kernels(runs.project_root()) as kernels:
        if not resume:
            from kdlib.workbench import teacher_stage  # after the checks that need no torch

            print(f"checking {config}, its models and data …", flush=True)
            teacher_stage.preflight(resolved, trains=bool({"01_dry_run", "02_train"} & {*notebooks}))
            opened = created(root, name, resolved, given)
        if anyway:
            opened.add_to_manifest(anyway=True)
        page = runner.run_notebooks(opened, given, kernels, partial(_rendered, reports=reports), notebooks)
    print(f"report: {os.path.relpath(page)}    index: {os.path.relpath(reports / 'index.html')}")


@app.command("dry-run")
def dry_run(
    config: ConfigFile,
    smoke: Smoke = False,
    name: RunName = None,
    override: Overrides = None,
    runs_folder: RunsFolder = None,
) -> None:
    """Try CONFIG in the terminal: doctor, shapes, what is learned from, self-test, five steps, forecast."""
    root, _ = folders(runs_folder, None)
    resolved = configs.load(config, override or [], smoke=smoke)
    name = free_name(root, name, config, smoke=smoke)
    from kdlib.workbench import session, teacher_stage

    given = entered(config, override, smoke=smoke)
    teacher_stage.preflight(resolved, trains=False)
    opened = created(root, name, resolved, given)
    bench = session.Workbench(opened)
    for part in ("setup", "doctor", "shapes", "example", "selftest", "dry_run", "forecast", "plan"):
        made = getattr(bench, part)()  # or it has printed what it found
        text = made.to_string() if hasattr(made, "to_string") else made
        print("" if made is None else f"{text}\n", flush=True)
    words = [given["config"], *(f"--override={text}" for text in override or []), *["--smoke"] * smoke]
    words += ["--resume", opened.name, *(["--runs", os.path.relpath(root)] if runs_folder else [])]
    print(f"all of it, from here: kd run {shlex.join(words)}")


@app.command()
def train(
    run: argument("A run's name, or its folder; 00_setup has prepared it."),
    processes: Processes = None,
    dry_run: option(
        bool, "--dry-run", help="Five steps and an evaluation alone, as 01_dry_run does."
    ) = False,
    anyway: Anyway = False,
) -> None:
    """Train the students of RUN without notebooks; by torchrun -m kdlib train RUN also on many machines."""
    opened = runs.open_run(*runs.locate(run))
    os.chdir(runs.project_root())  # from which a trained teacher's folder is named
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    again = f"{'torchrun … -m kdlib' if ranks > 1 else 'kd'} train {run}"
    alone = nullcontext() if rank else held(opened.path) if dry_run else runs.working(opened)
    with as_rank(), going_on(go_on() if LAUNCHED in os.environ else f"go on with {again}"), alone:
        from kdlib.workbench import session

        launch = processes and LaunchConfig(processes=processes).processes
        bench = session.Workbench(opened, launch)
        if dry_run:
            bench.first_steps()
            return
        bench.train(anyway=anyway)
        bench.train_baseline()


@app.command()
def sweep(
    file: argument("The sweep: a YAML file."),
    smoke: Smoke = False,
    jobs: option(int | None, "--jobs", help="Runs side by side; else as the file says.", min=1) = None,
    name: option(str | None, "--name", help="The sweep's name; that of its file unless given.") = None,
    override: option(Texts, "-o", "--override", help="key=value in all runs, e.g. seed=1.") = None,
    dry_run: option(bool, "--dry-run", help="List the runs and the forecast, and run nothing.") = False,
    anyway: Anyway = False,
    no_forecast: option(bool, "--no-forecast", help="Start at once.") = False,
    on: option(str | None, "--on", help="A dask cluster's address, as tcp://host:8786; else here.") = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Run what FILE lists over its base config, and report; the same command goes on where it stopped."""
    from kdlib.reports import index, run as report
    from kdlib.sweeps.config import SweepConfig
    from kdlib.sweeps.pool import Order
    from kdlib.sweeps.run import run_sweep

    root, reports = folders(runs_folder, reports_folder)
    settings = configs.load(file, kind=SweepConfig)
    order = Order(
        name=name or Path(file).stem + "-smoke" * (smoke and not settings.small),
        file=os.path.relpath(file, runs.project_root()),
        command=command(),
        smoke=smoke,
        overrides=dict(pairs(override or [])),
        jobs=jobs or (0 if on else settings.jobs),
        on=on,
        root=root,
        reports=reports,
        render_run=report.render,
        render_index=index.render_index,
        forecast=None if no_forecast or on else _cost,  # it is this machine that it speaks of
        anyway=anyway,
    )
    os.chdir(runs.project_root())
    run_sweep(settings, order, dry_run=dry_run)


@app.command()
def report(
    run: argument("The name of a run or a sweep, or its folder."),
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Render the report of RUN again, from its files."""
    root, reports = folders(runs_folder, reports_folder)
    root, name = runs.locate(run, root)
    print(f"report: {os.path.relpath(_rendered(Run(root / name), reports))}")


@app.command()
def generate(
    config: argument("The teacher and its prompts: a YAML file."),
    dry_run: option(bool, "--dry-run", help="Tokens and dollars, for usual models too; ask nothing.") = False,
    resume: option(str | None, "--resume", help="Go on with this run; nothing is paid twice.") = None,
    again: option(bool, "--again", help="With --resume: also what failed and may be paid.") = False,
    name: RunName = None,
    override: option(Texts, "-o", "--override", help="key=value, e.g. budget.usd=20.") = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Ask a teacher for rows to learn from: kept.jsonl in the run's folder, which a training reads.

    Ctrl-C waits for what is under way and ends; a second one leaves it.  Limits, budget, prices and filters
    may be others when the run goes on.
    """
    from kdlib.generation import prices
    from kdlib.generation.config import GenerationConfig
    from kdlib.generation.run import Generation

    if again and not resume:
        raise ConfigError("--again goes with --resume RUN: a new run asks everything")
    root, reports = folders(runs_folder, reports_folder)
    resolved = configs.load(config, override or [], kind=GenerationConfig)
    given = entered(config, override, smoke=False)
    origin = {"config_file": given["config"], "command": command()}
    name = resume or name or runs.new_name(root, config)
    rows = Generation(resolved, root, name, goes_on=bool(resume), origin=origin)
    if dry_run:
        print(prices.as_text(resolved, rows.prompts))
        return
    opened = rows.begin()
    with going_on(f"go on with kd generate {given['config']} --resume {name}"):
        page = rows.ask(opened, again=again, render=partial(_rendered, reports=reports))
    print(f"rows: {os.path.relpath(opened.path / 'kept.jsonl')}    report: {os.path.relpath(page)}")


@app.command()
def cache(
    config: ConfigFile,
    check: option(bool, "--check", help="Also read every byte: are they as they were written?") = False,
    override: Overrides = None,
    runs_folder: RunsFolder = None,
) -> None:
    """Ask the teacher of CONFIG about each row once, and keep what it says on the disk for all trainings.

    Runs with `teacher: {cache: true}` do so by themselves; here it is taken as said.
    """
    root, _ = folders(runs_folder, None)
    resolved = configs.load(config, override or [])
    entered(config, override, smoke=False)
    from kdlib.workbench import teacher_stage

    with going_on("the same command goes on"):
        for made in teacher_stage.cached(resolved, root):
            print(made, "; every byte is as it was written" if check and made.check() else "", sep="")


def main() -> None:
    """Entry point."""
    with bare_errors():
        app()


def _rendered(run: Run, reports: Path) -> Path:
    """Make the report of a run or a sweep, and the index over all runs; returns the former's path."""
    from kdlib.reports import generation, run as run_report
    from kdlib.reports.index import render_index
    from kdlib.sweeps import report as sweep_report
    from kdlib.sweeps.results import Sweep

    root = run.path.parent
    if (swept := Sweep(run.path)).facts:
        page = sweep_report.render(swept, reports)
    else:
        opened = runs.open_run(root, run.name)
        makes_rows = opened.manifest.get("kind") == "generation"
        page = (generation if makes_rows else run_report).render(opened, reports)
    render_index(root, reports)
    return page


def _cost(config: Config) -> Any:
    from kdlib.sweeps.pool import Cost
    from kdlib.workbench import measurement

    return Cost(**measurement.cost(config))
