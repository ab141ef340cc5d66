"""`kd`: a few lines each over the library."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kdlib import config as configs
from kdlib import runs
from kdlib.errors import ConfigError, KdlibError
from kdlib.overrides import pairs

app = typer.Typer(help="kdlib: knowledge distillation of language models, seen term by term.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False)

ConfigFile = Annotated[str, typer.Argument(help="The experiment: a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Option("-o", "--override", help="key=value, e.g. loss.temperature=3.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="The same with few steps and short rows.")]
RunName = Annotated[str | None, typer.Option("--name", help="The run's name; <config>_<time> unless given.")]
RunsFolder = Annotated[Path | None, typer.Option("--runs", help="Folder of runs; runs/ in the project unless given.")]
ReportsFolder = Annotated[Path | None, typer.Option("--reports", help="Folder of reports; reports/ in the project unless given.")]


@app.callback()
def kd() -> None:
    """Knowledge distillation of language models, seen term by term."""


@app.command()
def run(
    config: ConfigFile,
    smoke: Smoke = False,
    resume: Annotated[str | None, typer.Option("--resume", help="Go on with this run from its last checkpoint.")] = None,
    name: RunName = None,
    override: Overrides = None,
    parameter: Annotated[list[str] | None, typer.Option("-p", "--parameter", help="name=value for the notebooks.")] = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Run the numbered notebooks of CONFIG through papermill and render the report."""
    root, reports = _folders(runs_folder, reports_folder)
    resolved = configs.load(config, override or [], smoke=smoke)
    extra = _parameters(parameter or [])
    if resume:
        if name:
            raise ConfigError("--name is for a new run; --resume goes on with one that has a name")
        opened = runs.open_run(root, resume, resolved)
    else:
        name = _free_name(root, name, config, smoke=smoke)
    from kdlib import runner, workbench  # after the checks that need no torch

    given = _entered(config, override, smoke=smoke) | extra
    for notebook in runner.NOTEBOOKS:
        runner.check_parameters(Path("notebooks", f"{notebook}.ipynb"), {"run": "", **given})
    if not resume:
        print(f"checking {config}, its models and data …", flush=True)
        workbench.preflight(resolved)
        opened = _created(root, name, resolved, given)
    _through(runner.NOTEBOOKS, opened, given, reports)


@app.command()
def bench(
    config: Annotated[str, typer.Argument(help="What is measured: a YAML file.")] = "configs/benchmark.yaml",
    smoke: Smoke = False,
    name: RunName = None,
    override: Overrides = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Measure losses and training steps beside other packages' by the benchmark notebook, and render the report."""
    from kdlib.benchmarks.settings import BenchmarkConfig

    root, reports = _folders(runs_folder, reports_folder)
    resolved = configs.load(config, override or [], smoke=smoke, kind=BenchmarkConfig)
    name = _free_name(root, name, config, smoke=smoke)
    from kdlib import runner
    from kdlib.benchmarks import study

    given = _entered(config, override, smoke=smoke)
    study.preflight(resolved)
    _through(runner.BENCHMARK, _created(root, name, resolved, given), given, reports)


@app.command("dry-run")
def dry_run(
    config: ConfigFile,
    smoke: Smoke = False,
    name: RunName = None,
    override: Overrides = None,
    runs_folder: RunsFolder = None,
) -> None:
    """Try CONFIG, in the terminal: the doctor, shapes, what is learned from, the self-test, five steps, forecast and plan."""
    root, _ = _folders(runs_folder, None)
    resolved = configs.load(config, override or [], smoke=smoke)
    name = _free_name(root, name, config, smoke=smoke)
    from kdlib import workbench

    given = _entered(config, override, smoke=smoke)
    workbench.preflight(resolved)
    opened = _created(root, name, resolved, given)
    bench = workbench.Workbench(opened)
    for part in (bench.setup, bench.doctor, bench.shapes, bench.example, bench.selftest, bench.dry_run, bench.forecast, bench.plan):
        made = part()  # or it has printed what it found
        print("" if made is None else f"{made.to_string() if hasattr(made, 'to_string') else made}\n", flush=True)
    words = [given["config"], *(f"--override={text}" for text in override or []), *["--smoke"] * smoke, "--resume", opened.name]
    print(f"all of it, from here: kd run {shlex.join(words)}{f' --runs {os.path.relpath(root)}' if runs_folder else ''}")


@app.command()
def train(run: Annotated[str, typer.Argument(help="A run's name, or its folder; 00_setup has prepared it.")]) -> None:
    """Train the students of RUN without notebooks; under torchrun (-m kdlib.cli train RUN) on several GPUs."""
    from kdlib import workbench

    bench = workbench.Workbench(runs.open_run(*runs.locate(run)))
    os.chdir(runs.project_root())
    bench.train()
    bench.train_baseline()


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's name, or its folder.")],
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Render the report of RUN again, from its files."""
    from kdlib import reports

    root, folder = _folders(runs_folder, reports_folder)
    found = runs.open_run(*runs.locate(run, root))
    page = reports.render(found, folder)
    reports.render_index(found.path.parent, folder)
    print(f"report: {os.path.relpath(page)}")


@app.command()
def clean(run: Annotated[str, typer.Argument(help="A run's name, or its folder.")], runs_folder: RunsFolder = None) -> None:
    """Delete the checkpoints of RUN, which is done: models, figures and reports stay."""
    from kdlib import checkpoints

    root, _ = _folders(runs_folder, None)
    freed = checkpoints.clean(runs.open_run(*runs.locate(run, root)))
    print(f"{run}: {freed / 2**30:.2f} GiB freed")


@app.command()
def selftest(
    config: ConfigFile,
    smoke: Smoke = False,
    override: Overrides = None,
) -> None:
    """Compare what must be equal on CONFIG, its models and data; exit status 1 where something is not."""
    resolved = configs.load(config, override or [], smoke=smoke)
    from kdlib.diagnostics import parity

    table = parity.selftest(resolved)
    print(table.to_string(index=False))
    if (table["result"] == "fail").any():
        raise typer.Exit(1)


@app.command("import")
def migrate(
    file: Annotated[str, typer.Argument(help="Another project's settings: JSON, YAML, or a text with command-line flags.")],
    alpha_on: Annotated[str | None, typer.Option("--alpha-on", help="kd or ce: the term that its `alpha` weights.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="A new YAML file; printed unless given.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Where FILE does not name it.")] = None,
    student: Annotated[str | None, typer.Option("--student", help="Likewise.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Likewise.")] = None,
) -> None:
    """Turn another project's FILE of settings into a config of ours; what has no counterpart is listed."""
    from kdlib.migration import migrated

    made = migrated(file, alpha_on=alpha_on, teacher=teacher, student=student, data=data)
    if output is None:
        print(made.as_yaml(), end="")
    else:
        made.write(output)
        print(f"{output}: {len(made.values)} settings")
    for line in made.left_out:
        print(f"left out: {line}", file=sys.stderr)
    for path in made.missing:
        print(f"to be filled in: {path}", file=sys.stderr)


@app.command()
def doctor(
    config: ConfigFile,
    fix: Annotated[bool, typer.Option("--fix", help="Write the fixes that are unambiguous, and the overrides, into --output.")] = False,
    output: Annotated[Path | None, typer.Option("--output", help="The file that --fix writes; may be CONFIG itself.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 1 where there are warnings.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what needs the models' weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    override: Overrides = None,
) -> None:
    """Say what is wrong with CONFIG before it trains.  Exit status 2 with critical findings, else 0; see --strict."""
    if fix != (output is not None):
        raise ConfigError("--fix and --output go together: --fix --output FILE writes the mended config, and nothing is written without")
    from kdlib.diagnostics import doctor

    path, target = Path(config).absolute(), output and output.absolute()
    print(f"looking at {config}, its data and models …", file=sys.stderr, flush=True)
    os.chdir(runs.project_root())
    with contextlib.redirect_stdout(sys.stderr):  # what loading says
        visit = doctor.visit(path, override or [], quick=quick, fix=fix)
    if target and visit.text is not None:
        runs.write_text(target, visit.text)
    print(json.dumps(visit.as_data(), indent=1, ensure_ascii=False) if as_json else visit)
    raise typer.Exit(visit.exit_status(strict=strict))


@app.command()
def forecast(
    config: ConfigFile,
    override: Overrides = None,
    memory: Annotated[float | None, typer.Option("--memory", help="GiB of the device; what is here unless given.", min=0.1)] = None,
    devices: Annotated[int | None, typer.Option("--devices", help="Devices that share the training.", min=1)] = None,
    rows: Annotated[int | None, typer.Option("--rows", help="Training rows, for the time of so many epochs.", min=1)] = None,
    no_time: Annotated[bool, typer.Option("--no-time", help="Memory alone: seconds, and nothing is computed.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Also train a few steps in processes of their own, and compare.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="Also which of the usual cards would do, and with which change.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, in bytes and seconds.")] = False,
) -> None:
    """Say how much memory CONFIG will take, moment by moment, what would make it fit, and how long it takes."""
    resolved = configs.load(config, override or [])
    from kdlib.diagnostics import outlook

    data = outlook.outlook(resolved, memory=memory, devices=devices, rows=rows, timed=not no_time, measure=measure, every_card=cards)
    print(json.dumps(data, indent=1) if as_json else outlook.described(data))


def main() -> None:
    """Entry point: what a user can act on is printed bare, with exit status 1."""
    try:
        app()
    except KdlibError as error:
        print(f"kd: {error}", file=sys.stderr)
        sys.exit(1)


def _folders(runs_folder: Path | None, reports_folder: Path | None) -> tuple[Path, Path]:
    return (runs_folder or runs.default_root()).absolute(), (reports_folder or runs.project_root() / "reports").absolute()


def _free_name(root: Path, name: str | None, config: str, *, smoke: bool) -> str:
    """The name of a new run, given or made; refused where it is taken."""
    name = name or runs.new_name(config, smoke=smoke)
    runs.check_new(root, name)
    return name


def _entered(config: str, override: list[str] | None, *, smoke: bool) -> dict[str, Any]:
    """Goes to the project's folder, as relative paths in a config mean the same everywhere; the notebooks' parameters, seen from there."""
    given = {"config": os.path.relpath(config, runs.project_root()), "overrides": override or [], "smoke": smoke}
    os.chdir(runs.project_root())
    return given


def _created(root: Path, name: str, config: Any, given: Mapping[str, Any]) -> runs.Run:
    command = shlex.join(["kd", *sys.argv[1:]])
    return runs.create(root, name, config, config_file=given["config"], smoke=given["smoke"], command=command)


def _through(notebooks: Sequence[str], run: runs.Run, given: Mapping[str, Any], reports: Path) -> None:
    """The notebooks through papermill, and the report."""
    from kdlib import runner

    folder = os.path.join(".", os.path.relpath(run.path))  # with a separator: a folder, not a name
    page = runner.run_notebooks(run, {**given, "run": folder}, reports_folder=reports, names=notebooks)
    print(f"report: {os.path.relpath(page)}    index: {os.path.relpath(reports / 'index.html')}")


def _parameters(texts: list[str]) -> dict:
    """Further notebook parameters: name=value, read as overrides are."""
    given = dict(pairs(texts))
    for name in given:
        if name in ("config", "run", "overrides", "smoke"):
            raise ConfigError(f"-p {name}: this parameter has a way of its own: CONFIG, --resume, -o, --smoke")
    return given


if __name__ == "__main__":
    main()
