"""What the commands have in common: options by their names, folders, a new run, errors printed bare."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kdlib.errors import KdlibError
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run

ConfigFile = Annotated[str, typer.Argument(help="The experiment: a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("-o", "--override", help="key=value, e.g. loss.temperature=3.")
]
Smoke = Annotated[bool, typer.Option("--smoke", help="The same with few steps and short rows.")]
RunName = Annotated[str | None, typer.Option("--name", help="The run's name; <config>_<time> unless given.")]
RunsFolder = Annotated[
    Path | None, typer.Option("--runs", help="Folder of runs; runs/ in the project unless given.")
]
ReportsFolder = Annotated[
    Path | None, typer.Option("--reports", help="Folder of reports; reports/ in the project unless given.")
]


def folders(runs_folder: Path | None, reports_folder: Path | None) -> tuple[Path, Path]:
    """Where runs and reports are: as given, seen from here, or in the project."""
    reports = reports_folder or runs.project_root() / "reports"
    return (runs_folder or runs.default_root()).absolute(), reports.absolute()


def free_name(root: Path, name: str | None, config: str, *, smoke: bool) -> str:
    """The name of a new run, given or made; refused where it is taken."""
    name = name or runs.new_name(config, smoke=smoke)
    runs.check_new(root, name)
    return name


def entered(config: str, override: list[str] | None, *, smoke: bool) -> dict[str, Any]:
    """The notebooks' parameters, seen from the project's folder, to which this goes.

    There relative paths in a config mean the same everywhere.
    """
    file = os.path.relpath(config, runs.project_root())
    os.chdir(runs.project_root())
    return {"config": file, "overrides": override or [], "smoke": smoke}


def created(root: Path, name: str, config: Any, given: Mapping[str, Any], *, program: str = "kd") -> Run:
    """The new run of this command, `given` what `entered` returned."""
    origin = {"config_file": given["config"], "smoke": given["smoke"], "command": command(program)}
    return runs.create(root, name, config, **origin)


def command(program: str = "kd") -> str:
    """What was typed."""
    return f"{program} {shlex.join(sys.argv[1:])}"


@contextlib.contextmanager
def bare_errors() -> Iterator[None]:
    """What a user can act on is printed bare, with exit status 1."""
    try:
        yield
    except KdlibError as error:
        print(f"kd: {error}", file=sys.stderr)
        sys.exit(1)
