"""One source of dependencies: pyproject.toml's ranges, constraints.txt's pins, environment.yml's list."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kdlib.models.loading import BUILT_IN
from kdlib.runs.folder import project_root

ROOT = project_root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    """A package's name as indices compare it."""
    return re.sub("[._]", "-", name.lower())


PINS = {
    normal(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}


def test_every_pin_lies_in_its_range():
    extras = PROJECT["optional-dependencies"]
    for text in PROJECT["dependencies"] + extras["test"] + extras["bench"]:
        requirement = Requirement(text)
        assert PINS[normal(requirement.name)] in requirement.specifier, text


def test_the_conda_environment_is_the_same_installation():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(
        item.removeprefix("python=")
        for item in listed
        if isinstance(item, str) and item.startswith("python=")
    )
    assert f"{python}.7" in SpecifierSet(PROJECT["requires-python"])
    assert listed[-1] == {"pip": ["-c constraints.txt", "-e .[test]"]}
    assert set(listed[:-1]) == {f"python={python}", "pip"}


def test_built_in_models_have_the_version_that_is_pinned():
    for package, version in BUILT_IN.values():
        assert PINS[package] == version
