"""The built wheel by itself, in a folder and an environment of its own: begin a project, run, report."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from kdlib.runs.folder import project_root
from kdlib.workbench.runner import shipped


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git has, so that what lies about here cannot mend it."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = [
        "git",
        "ls-files",
        "kdlib",
        "notebooks",
        "configs",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    ]
    for name in subprocess.run(
        listed, cwd=project_root(), capture_output=True, text=True, check=True
    ).stdout.split("\n"):
        if name:
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "clone" / name).write_bytes((project_root() / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "clone", capture_output=True, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_all_that_the_package_reads_and_a_project_begins_with(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    root = shipped()
    needed = {
        str(path.relative_to(root))
        for path in (root / "kdlib").rglob("*")
        if path.suffix in (".py", ".yaml", ".css", ".j2")
    }
    needed |= {f"kdlib/project/notebooks/{path.name}" for path in (root / "notebooks").glob("*.ipynb")}
    needed |= {f"kdlib/project/configs/{path.name}" for path in (root / "configs").glob("*.*")}
    assert not needed - names


@pytest.mark.slow
def test_installed_by_itself_it_begins_a_project_runs_it_and_reports(wheel, raw_config, tmp_path):
    """The wheel is unpacked where Python looks first, and what it depends on is found where it is here."""
    site, project = tmp_path / "site", tmp_path / "project"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}

    def kd(*words: str, where: Path = project) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kdlib", *words],
            cwd=where,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    kd("init", "project", where=tmp_path)
    assert (project / "notebooks" / "00_setup.ipynb").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.yaml").write_text(yaml.safe_dump(raw_config))
    kd(
        "run",
        "mine.yaml",
        "--smoke",
        "--name",
        "mine",
        "--without",
        "01_dry_run",
        where=tmp_path / "elsewhere",
    )
    page = tmp_path / "elsewhere" / "reports" / "mine" / "report.html"
    page.unlink()
    kd("report", "mine", where=tmp_path / "elsewhere")
    assert "mine" in page.read_text()
