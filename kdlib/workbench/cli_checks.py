"""The commands of `kd` that look at a config, make one, or compare models, and train nothing."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdlib.config import run as configs
from kdlib.errors import ConfigError
from kdlib.runs import folder as runs
from kdlib.workbench.cli_options import ConfigFile, Overrides, Smoke

checks = typer.Typer()


@checks.command()
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


@checks.command()
def doctor(
    config: ConfigFile,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Write the fixes that are unambiguous, and the overrides, into --output."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="The file that --fix writes; may be CONFIG itself.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 where there are warnings.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what needs the models' weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    override: Overrides = None,
) -> None:
    """Say what is wrong with CONFIG before it trains.  Exit status 2 with critical findings, else 0; see
    --strict.
    """
    if fix != (output is not None):
        raise ConfigError(
            "--fix and --output go together: --fix --output FILE writes the mended config, and nothing is "
            "written without"
        )
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


@checks.command()
def forecast(
    config: ConfigFile,
    override: Overrides = None,
    memory: Annotated[
        float | None, typer.Option("--memory", help="GiB of the device; what is here unless given.", min=0.1)
    ] = None,
    devices: Annotated[
        int | None, typer.Option("--devices", help="Devices that share the training.", min=1)
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows",
            help="Training rows, where they are known: whether compiling pays depends on them.",
            min=1,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Also train a few steps in processes of their own: how long it takes."
        ),
    ] = False,
    cards: Annotated[
        bool, typer.Option("--cards", help="Also which of the usual cards would do, and with which change.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as JSON, in bytes and seconds.")
    ] = False,
) -> None:
    """Say how much memory CONFIG will take, moment by moment, what would make it fit, and with
    --measure how long it takes.
    """
    resolved = configs.load(config, override or [])
    from kdlib.diagnostics import forecast, memory as memories
    from kdlib.workbench import measurement

    options = {"memory": memory, "devices": devices, "rows": rows}
    data = forecast.advised(resolved, memories.forecast, every_card=cards, **options)
    if measure:
        peak = measurement.measured_peak(resolved)
        data |= {"time": measurement.measured(resolved).as_dict(), "measured": {"peak_bytes": peak}}
    print(json.dumps(data, indent=1) if as_json else forecast.as_text(data))


@checks.command("import")
def migrate(
    file: Annotated[
        str, typer.Argument(help="Another project's settings: JSON, YAML, or a text with command-line flags.")
    ],
    alpha_on: Annotated[
        str | None, typer.Option("--alpha-on", help="kd or ce: the term that its `alpha` weights.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="A new YAML file; printed unless given.")
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Where FILE does not name it.")] = None,
    student: Annotated[str | None, typer.Option("--student", help="Likewise.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Likewise.")] = None,
) -> None:
    """Turn another project's FILE of settings into a config of ours; what has no counterpart is listed."""
    from kdlib.config.imports import migrated

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


@checks.command()
def compare(
    teacher: Annotated[
        str, typer.Option("--teacher", help="A hub id, a folder, a .gguf file or a built-in name.")
    ],
    student: Annotated[
        list[str],
        typer.Option(
            "--student", help="Likewise, or name=MODEL; several: the comparison is about the first."
        ),
    ],
    data: Annotated[str, typer.Option("--data", help="Rows: a file, a folder, a hub id or a built-in name.")],
    task: Annotated[
        str, typer.Option("--task", help="Or causal-lm, question-answering.")
    ] = "sequence-classification",
    override: Annotated[
        list[str] | None,
        typer.Option("-o", "--override", help="key=value of a config, e.g. data.text=content."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder; reports/compare_<student> in the project unless given."),
    ] = None,
) -> None:
    """Compare models that were trained elsewhere, on the same rows: quality with intervals, cost, paired
    differences.

    Measured are the rows of the source's own test split (of text: validation split), else of its validation
    split, else all its rows. Students of a run on the run's own data: give its split, -o data.test=0.2 -o
    data.split_seed=0, so that what they were trained on stays out; kd compare cannot know. Columns by other
    names: -o data.text=content -o data.label=topic.  What is written: report.html with figures and tables.
    """
    from kdlib.evaluation import compare
    from kdlib.plots import comparison as plots
    from kdlib.reports.run import render_comparison

    students = compare.named_students(student)
    folder = compare.folder_for(output or runs.project_root() / "reports" / f"compare_{next(iter(students))}")
    results = compare.compare(teacher, students, data, task=task, overrides=override or [])
    runs.write_json(folder / "comparison_results.json", results)
    render_comparison(results, folder)
    for table in (plots.quality_table(results), plots.cost_table(results), plots.difference_table(results)):
        print(f"\n{table.to_string()}")
    print(f"\nmeasured: {results['rule']}\nwritten: {os.path.relpath(folder)}")
