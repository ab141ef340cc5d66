"""What the commands of `kd` have in common, and those that look at a config or models, make one, or clean."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kdlib.config import run as configs
from kdlib.errors import ConfigError, refuse_existing
from kdlib.runs import folder as runs
from kdlib.runs.files import write_json, write_text
from kdlib.runs.folder import Run

checks = typer.Typer()


def option(kind: Any, *names: str, **about: Any) -> Any:
    """The type of a command's option, by its names."""
    return Annotated[kind, typer.Option(*names, **about)]


def argument(text: str) -> Any:
    """The type of a command's argument, which is a text."""
    return Annotated[str, typer.Argument(help=text)]


Texts = list[str] | None
ConfigFile = argument("The experiment: a YAML file.")
Overrides = option(Texts, "-o", "--override", help="key=value, e.g. loss.temperature=3.")
Smoke = option(bool, "--smoke", help="The same with few steps and short rows.")
Anyway = option(bool, "--anyway", help="Train in spite of the doctor's critical findings.")
Processes = option(
    str | None, "--processes", help="So many share the training: a number, or auto, one for each GPU."
)
RunName = option(str | None, "--name", help="The run's name; <config>_<time> unless given.")
RunsFolder = option(Path | None, "--runs", help="Folder of runs; runs/ in the project unless given.")
ReportsFolder = option(
    Path | None, "--reports", help="Folder of reports; reports/ in the project unless given."
)


def folders(runs_folder: Path | None, reports_folder: Path | None) -> tuple[Path, Path]:
    """Where runs and reports are: as given, seen from here, or in the project."""
    reports = reports_folder or runs.project_root() / "reports"
    return (runs_folder or runs.default_root()).absolute(), reports.absolute()


def free_name(root: Path, name: str | None, config: str, *, smoke: bool) -> str:
    """The name of a new run, given or made; refused where it is taken."""
    name = name or runs.new_name(root, config, smoke=smoke)
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


@checks.command()
def selftest(config: ConfigFile, smoke: Smoke = False, override: Overrides = None) -> None:
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
    fix: option(bool, "--fix", help="Write unambiguous fixes, and the overrides, into --output.") = False,
    output: option(Path | None, "--output", help="The file that --fix writes; may be CONFIG itself.") = None,
    strict: option(bool, "--strict", help="Exit with status 1 where there are warnings.") = False,
    quick: option(bool, "--quick", help="Leave out what needs the models' weights.") = False,
    as_json: option(bool, "--json", help="Print JSON.") = False,
    override: Overrides = None,
) -> None:
    """Say what is wrong with CONFIG before it trains.  Exit status 2 with critical findings, else 0."""
    if fix != (output is not None):
        raise ConfigError("--fix and --output go together: --fix --output FILE writes the mended config")
    from kdlib.diagnostics import doctor

    path, target = Path(config).absolute(), output and output.absolute()
    print(f"looking at {config}, its data and models …", file=sys.stderr, flush=True)
    os.chdir(runs.project_root())
    with contextlib.redirect_stdout(sys.stderr):  # what loading says
        visit = doctor.visit(path, override or [], quick=quick, fix=fix)
    if target and visit.text is not None:
        write_text(target, visit.text)
    print(json.dumps(visit.as_data(), indent=1, ensure_ascii=False) if as_json else visit)
    raise typer.Exit(visit.exit_status(strict=strict))


@checks.command()
def forecast(
    config: ConfigFile,
    override: Overrides = None,
    memory: option(float | None, "--memory", help="GiB of the device; else what is here.", min=0.1) = None,
    ranks: option(
        int | None, "--ranks", "--devices", help="Processes, a device each, that share the training.", min=1
    ) = None,
    rows: option(int | None, "--rows", help="Training rows; they tell whether compiling pays.", min=1) = None,
    measure: option(bool, "--measure", help="Also train a few steps: how long it takes.") = False,
    cards: option(bool, "--cards", help="Also which usual cards would do, with which change.") = False,
    as_json: option(bool, "--json", help="Everything as JSON, in bytes and seconds.") = False,
) -> None:
    """Say how much memory CONFIG will take, what would make it fit, and with --measure how long it takes."""
    resolved = configs.load(config, override or [])
    from kdlib.diagnostics import forecast, memory as memories
    from kdlib.workbench import measurement

    options = {"memory": memory, "devices": ranks, "rows": rows}
    data = forecast.advised(resolved, memories.forecast, every_card=cards, **options)
    data |= measurement.caches(resolved, runs.default_root())
    if measure:
        peak = measurement.measured_peak(resolved)
        data |= {"time": measurement.measured(resolved).as_dict(), "measured": {"peak_bytes": peak}}
    print(json.dumps(data, indent=1) if as_json else forecast.as_text(data))


@checks.command("import")
def migrate(
    file: argument("Another project's settings: JSON, YAML, or a text with command-line flags."),
    alpha_on: option(str | None, "--alpha-on", help="kd or ce: the term that its `alpha` weights.") = None,
    output: option(Path | None, "--output", help="A new YAML file; printed unless given.") = None,
    teacher: option(str | None, "--teacher", help="Where FILE does not name it.") = None,
    student: option(str | None, "--student", help="Likewise.") = None,
    data: option(str | None, "--data", help="Likewise.") = None,
) -> None:
    """Turn another project's FILE of settings into a config of ours; what has no counterpart is listed."""
    from kdlib.migration.settings import migrated

    made = migrated(file, alpha_on=alpha_on, teacher=teacher, student=student, data=data)
    if output is None:
        print(made.as_yaml(), end="")
    else:
        made.write(output)
        print(f"{output}: {len(made.values)} settings")
    left = [*(f"left out: {x}" for x in made.left_out), *(f"to be filled in: {x}" for x in made.missing)]
    print("".join(f"{line}\n" for line in left), end="", file=sys.stderr)


@checks.command()
def compare(
    teacher: option(str, "--teacher", help="A hub id, a folder, a .gguf file or a built-in name."),
    student: option(list[str], "--student", help="Likewise, or name=MODEL; several: about the first."),
    data: option(str, "--data", help="Rows: a file, a folder, a hub id or a built-in name."),
    task: option(str, "--task", help="Or causal-lm, question-answering.") = "sequence-classification",
    override: option(Texts, "-o", "--override", help="key=value, e.g. data.text=content.") = None,
    output: option(Path | None, "--output", help="Folder; reports/compare_<student> unless given.") = None,
) -> None:
    """Compare models that were trained elsewhere, on the same rows: quality, cost, paired differences.

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
    write_json(folder / "comparison_results.json", results)
    render_comparison(results, folder)
    for table in (plots.quality_table(results), plots.cost_table(results), plots.difference_table(results)):
        print(f"\n{table.to_string()}")
    print(f"\n{plots.decided_by(results)}\nmeasured: {results['rule']}\nwritten: {os.path.relpath(folder)}")


@checks.command()
def clean(
    run: Annotated[str | None, typer.Argument(help="A run's name, or its folder; or of caches.")] = None,
    caches: option(bool, "--caches", help="List what teachers said that is kept on the disk.") = False,
    yes: option(bool, "--yes", help="With --caches: delete those that no process uses.") = False,
    runs_folder: RunsFolder = None,
) -> None:
    """Delete the checkpoints of RUN, which is done, no models or figures; or look at --caches of all runs."""
    root, _ = folders(runs_folder, None)
    if caches:
        from kdlib.cache import stock

        print(stock.cleaned(Path(run) if run else root / stock.FOLDER, delete=yes))
    elif run is None:
        raise ConfigError("kd clean: found no RUN, needs a run's name; or --caches, of all runs")
    else:
        freed = runs.clean(runs.open_run(*runs.locate(run, root)))
        print(f"{run}: {freed / 2**30:.2f} GiB freed")


@checks.command()
def evaluate(
    model: Annotated[list[str], typer.Argument(help="A run; or models, against the first; also name=MODEL.")],
    benchmark: option(list[str], "--benchmark", help="humaneval, mbpp or a JSONL file; also several."),
    allow_code_execution: option(bool, "--allow-code-execution", help="Run what the models write.") = False,
    samples: option(int, "--samples", help="Programs for each problem.") = 1,
    k: option(list[int] | None, "-k", help="Of pass@k; 1 unless given; also several.") = None,
    temperature: option(float, "--temperature", help="0: the likeliest token always.") = 0.0,
    limit: option(int | None, "--limit", help="The first problems alone.") = None,
    override: option(Texts, "-o", "--override", help="key=value of `code`, e.g. chat=true.") = None,
    output: option(Path | None, "--output", help="Of models: a folder; reports/evaluate_<last>.") = None,
    runs_folder: RunsFolder = None,
    reports_folder: ReportsFolder = None,
) -> None:
    """Let models write programs, run these fenced, and say how many pass: pass@k, with intervals.

    Of a run: its teacher, baseline and student.  The same command goes on where it stopped.
    """
    from kdlib.evaluation import code
    from kdlib.plots.comparison import code_tables
    from kdlib.reports import run as pages

    asked = {"benchmarks": benchmark, "allow_execution": allow_code_execution, "k": k or [1]}
    asked |= {"samples": samples, "temperature": temperature, "limit": limit}
    root, reports = folders(runs_folder, reports_folder)
    found, place = code.evaluate(model, asked, override or [], root, reports, output)
    is_run = isinstance(place, Run)
    page = pages.render(place, reports) if is_run else pages.render_code(place.name, found, place)
    for table in code_tables(found).values():
        print(f"\n{table.to_string()}")
    print(f"\nintervals: {found[0]['interval']}\nreport: {os.path.relpath(page)}")


@checks.command()
def init(folder: argument("Where the project shall be: a new folder, or `.`.")) -> None:
    """Begin a project in FOLDER: the notebooks and configs that came with kdlib, to be changed there."""
    from kdlib.workbench.runner import begin_project

    begin_project(Path(folder))
    print(f"{folder}: notebooks/ and configs/; next, in it: kd run configs/quickstart.yaml, or jupyter lab")


@checks.command()
def tokenizer(
    source: argument("Text: a file, a folder, a hub id or a built-in name, as data.source."),
    folder: argument("A new folder, which a config names as student.tokenizer."),
    vocabulary: option(int, "--vocabulary", help="So many tokens.") = 8000,
    text: option(str, "--text", help="The column with the text.") = "text",
) -> None:
    """Train a tokenizer on the text of SOURCE: byte-level BPE, digits one by one; the same each time.

    All documents are read but those of the source's own validation split.
    """
    refuse_existing(folder)
    from kdlib.config.data import DataConfig
    from kdlib.sources.documents import read_documents
    from kdlib.sources.rows import columns_of
    from kdlib.tokens.vocabulary import ids_of, trained_tokenizer

    documents = read_documents(DataConfig(source=source, text=text))["train"]
    made = trained_tokenizer((texts.to_pylist() for texts in columns_of(documents, text)), vocabulary)
    made.save_pretrained(folder)
    size, tokens = 0, 0
    for texts in (each.to_pylist() for each in columns_of(documents, text)):
        size += len("".join(texts).encode())
        tokens += sum(map(len, ids_of(made, texts)))
    print(f"{folder}: {len(made):,} tokens, {size / max(tokens, 1):.2f} bytes of this text each")


@checks.command()
def experts(
    source: argument("A dense model of Llama's kind: a hub id, a folder or a built-in name."),
    folder: argument("A new folder, which a config names as teacher.model."),
    count: option(int, "--experts", help="Of each layer.") = 4,
    top_k: option(int, "--top-k", help="That a token asks.") = 2,
    text: option(str | None, "--calibrate", help="Text whose kinds of tokens the routers part.") = None,
    seed: option(int, "--seed", help="Of the routers, which are random without --calibrate.") = 0,
) -> None:
    """Make a mixture of experts (Mixtral) of SOURCE, each a copy of its MLPs; says the same until trained."""
    from kdlib.routing import upcycle

    print(f"{folder}: {upcycle.make(source, folder, count, top_k, seed=seed, text=text)}")
