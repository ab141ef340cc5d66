"""What the commands of `kd` have in common: options by their names, and the folders they mean."""

from pathlib import Path
from typing import Annotated

import typer

from kdlib.runs import folder as runs

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
    return (runs_folder or runs.default_root()).absolute(), (
        reports_folder or runs.project_root() / "reports"
    ).absolute()
