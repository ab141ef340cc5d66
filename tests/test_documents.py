"""README and the guides say what is there: commands, options, links, settings, packages."""

import ast
import importlib
import importlib.util
import re
import shlex
from itertools import pairwise

import pytest
import typer.main
import yaml

import kdlib
from kdlib.benchmarks.__main__ import benchmark
from kdlib.benchmarks.large import main as large
from kdlib.benchmarks.settings import BenchmarkConfig
from kdlib.config.run import load, parse
from kdlib.generation.config import GenerationConfig
from kdlib.runs.folder import project_root
from kdlib.sweeps.config import SweepConfig
from kdlib.workbench.cli import app

ROOT = project_root()
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "notebooks" / "guides").glob("*.md"))
CHANGES = ROOT / "CHANGELOG.md"  # which also says what was
DOCUMENTS = [README, *GUIDES, ROOT / "CONTRIBUTING.md"]
each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
every = pytest.mark.parametrize("document", [*DOCUMENTS, CHANGES], ids=lambda path: path.stem)
MEASURING = typer.Typer()
MEASURING.command("kdlib.benchmarks")(benchmark)
MEASURING.command("kdlib.benchmarks.large")(large)
COMMANDS = typer.main.get_command(app).commands | typer.main.get_command(MEASURING).commands
BASES = {"classification": "stdlib_sections", "questions": "quantumbench_qa"}
BASES |= {"two_tokenizers": "other_vocabulary"}  # else the quickstart
MADE = {"configs/mine.yaml"}  # by the reader


def blocks(document, language):
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def lines_of_code(document):
    """Indented lines without their comments, and what stands between backticks in prose."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    (\S.*)", text, re.MULTILINE)
    prose = re.sub(r"^    .*", "", text, flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [re.split(r"(?:^|\s)# ", line)[0].strip() for line in indented] + spans


def commands_in(document):
    """(command, its words) of every `kd …` that the document shows."""
    for line in lines_of_code(document):
        if found := re.search(r"(?:\bkd |-m kdlib |-m (?=kdlib\.))([a-z][\w.-]*)\b(?!:)(.*)", line):
            yield found[1], shlex.split(found[2])


def options_of(command):
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


@every
def test_lines_fit_beside_code(document):
    long = [line for line in document.read_text().splitlines() if len(line) > 110 and "](http" not in line]
    assert not long


def test_comments_of_configs_fit_too():
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert not [line for path in configs for line in path.read_text().splitlines() if len(line) > 110]


@each
def test_commands_and_their_options_exist(document):
    for command, words in commands_in(document):
        assert command in COMMANDS, f"kd {command}"
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert given <= options_of(COMMANDS[command]), f"kd {command}: {given}"
    known = set().union(*map(options_of, COMMANDS.values())) | {"--name"}
    alone = {line.split()[0] for line in lines_of_code(document) if line.startswith("--")}
    assert alone <= known


def test_every_command_is_shown_somewhere():
    shown = {command for document in [README, *GUIDES] for command, _ in commands_in(document)}
    assert set(COMMANDS) <= shown


@each
def test_configs_and_overrides_of_commands_are_read(document):
    for command, words in commands_in(document):
        overrides = [value for option, value in pairwise(words) if option == "-o"]
        for path in (word for word in words if word.startswith("configs/")):
            assert path in MADE or (ROOT / path).exists(), path
            if command == "run":
                load(ROOT / ("configs/quickstart.yaml" if path in MADE else path), overrides)
        if command == "kdlib.benchmarks":
            load(ROOT / "configs" / "benchmark.yaml", overrides, kind=BenchmarkConfig)


@each
def test_make_targets_modules_and_tests_exist(document):
    makefile = (ROOT / "Makefile").read_text()
    for line in lines_of_code(document):
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        for module in re.findall(r"-m (kdlib[\w.]*)", line):
            assert importlib.util.find_spec(module), line
        for path in re.findall(r"\b((?:kdlib|tests|configs|notebooks)/[\w/]+\.\w+)\b", line):
            assert path in MADE or (ROOT / path).exists(), line


@every
def test_links_point_to_files(document):
    text = document.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    for link in links:
        if not re.match(r"https?:|#", link):
            assert (document.parent / link.partition("#")[0]).exists(), link


def test_every_guide_is_in_readme():
    named = set(re.findall(r"notebooks/guides/\w+\.md", README.read_text()))
    assert named == {str(path.relative_to(ROOT)) for path in GUIDES}


def test_the_settings_in_readme_are_a_whole_config():
    (text,) = blocks(README, "yaml")
    assert len(text.splitlines()) == 10
    assert "…" not in text
    parse(yaml.safe_load(text), name="README.md")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_settings_in_guides_are_read(guide):
    base = yaml.safe_load((ROOT / "configs" / f"{BASES.get(guide.stem, 'quickstart')}.yaml").read_text())
    for text in blocks(guide, "yaml"):
        given = yaml.safe_load(text)
        if "base" in given:
            parse(given, name=guide.name, kind=SweepConfig)
            continue
        if "prompts" in given:
            parse(given, name=guide.name, kind=GenerationConfig)
            continue
        whole = {name: part for name, part in given.items() if {"from", "model"} & {*part}}  # a model, named
        rest = {name: part for name, part in given.items() if name not in whole}
        flat = {f"{section}.{key}": value for section, part in rest.items() for key, value in part.items()}
        parse(
            {**base, **whole},
            {"early_stopping": {"patience": 1}, **flat} if "early_stopping" in given else flat,
        )


def test_the_first_lines_of_python_in_readme_run():
    names = {}
    exec(blocks(README, "python")[0], names)
    assert names["forward_kl"](names["student"], names["teacher"]).shape == (5,)


@each
def test_python_names_what_there_is(document):
    for text in blocks(document, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.util.find_spec(
                        f"{node.module}.{name.name}"
                    )
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "bench":
                session = importlib.import_module("kdlib.workbench.session")
                assert hasattr(session.Workbench, node.attr), node.attr


def test_layout_is_the_packages_that_there_are():
    lines = README.read_text().partition("## Layout")[2].partition("## Tests")[0]
    found = {
        name
        for line in re.findall(r"^    kdlib/([\w, ]+?)  ", lines, re.MULTILINE)
        for name in line.split(", ")
    }
    folder = ROOT / "kdlib"
    there = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert found == there | {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}


def test_what_contributing_names_is_where_it_says():
    recipes = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where a thing goes")[2].split("\n\n**")[1:]
    assert len(recipes) == 8
    for recipe in recipes:
        names = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", recipe)]
        files = [
            path
            for name in names
            if name.endswith(".py")
            for path in ([ROOT / name] if "/" in name else (ROOT / "kdlib").rglob(name))
        ]
        there = "".join(path.read_text() for path in files)
        named = {found[1] for name in names if (found := re.fullmatch(r"@?([A-Za-z_]\w*)(\(.*)?", name))}
        assert not [name for name in named if name not in there], recipe


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kdlib.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f"[{kdlib.__version__}]" in CHANGES.read_text()
