import re
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from made_log import stands
from made_runs import EVIL, RAW, made_run, results
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kdlib.config.run import parse
from kdlib.errors import RunError
from kdlib.metrics.names import with_interval
from kdlib.plots import comparison as plots
from kdlib.reports import html as pages, index, run as reports
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return whole_run(tmp_path / "runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The report of a run that has everything."""
    place = tmp_path_factory.mktemp("whole")
    return reports.render(whole_run(place / "runs"), place / "reports").parent


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text()


def whole_run(root: Path) -> Run:
    run = made_run(root, "first")
    run.add_to_manifest(
        formula="loss = 0.7·T²·KL + 0.3·CE", seed=0, versions={"torch": "2.13.0"}, command="kd run x.yaml"
    )
    return run


def test_a_report_is_one_file_that_asks_for_nothing_outside(folder, page):
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//|file:|/)""", page)
    assert "<script" not in page
    for expected in (
        "loss = 0.7·T²·KL + 0.3·CE",
        "max_length: 16",
        "2.13.0",
        "kd run x.yaml",
        "distilled student",
        "state done",
    ):
        assert expected in page
    assert {p.name for p in (folder / "figures").iterdir()} == {
        "dashboard.png",
        "learning_curves.png",
        "teacher_student_comparison.png",
    }
    assert {p.stem for p in (folder / "tables").iterdir()} == {
        "metrics",
        "evaluation",
        "quality",
        "cost",
        "differences",
        "scorecard",
    }


def test_text_from_data_and_models_stays_text(run, tmp_path):
    runs.write_json(run.path / "comparison_results.json", results(text=EVIL))
    run.add_to_manifest(note=EVIL, formula=EVIL, config_file=EVIL, sweep=EVIL)
    stands(run, "failed", EVIL)
    said = [
        new_output("stream", name="stdout", text=EVIL),
        new_output("error", ename="E", evalue=EVIL, traceback=[EVIL]),
    ]
    cells = [new_markdown_cell("# A question"), new_code_cell("print(x)", outputs=said)]
    nbformat.write(new_notebook(cells=cells), run.notebooks / "00_setup.ipynb")
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;window.hit = 1") >= 9
    assert '<details class="code">' in page


def test_what_comes_first_stands_first(page):
    sections = re.findall(r'<section id="(\w+)">', page)
    assert sections == [
        "summary",
        "scorecard",
        "training",
        "comparison",
        "samples",
        "config",
        "formula",
        "environment",
        "reproduce",
    ]
    assert re.findall(r'<a href="#(\w+)">', page) == sections


def test_every_picture_says_in_words_what_it_shows(page):
    alts = re.findall(r'<img alt="([^"]*)" src="data:image/svg', page)
    assert len(alts) == 3
    assert any(
        "The kd loss goes from 2 to 0.667 nats per token: too few lines for a trend" in alt for alt in alts
    )
    assert any(alt.startswith("Against the CE-only baseline, the distilled student shows") for alt in alts)


def test_the_key_figures_stand_beside_those_of_the_baseline(page):
    assert re.search(
        r"<dt>KL to the teacher</dt><dd>1.00</dd><small>\[0.900, 1.10\]</small><small>best_model/</small>"
        r"<small>CE-only baseline 1.50 "
        r"\[",
        page,
    )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("died", "the run died"),
        ("running", "the run is running"),
        ("created", "the run is not at its end"),
        ("stopped", "the run was stopped"),
    ],
)
def test_a_run_that_is_not_at_its_end_is_said_to_be_so(tmp_path, state, words):
    page = reports.render(
        made_run(tmp_path / "runs", "a", state=state, steps=0, kl=None), tmp_path / "reports"
    ).read_text()
    assert f"This report is partial: {words}. It shows what there was on 20" in page
    assert f'class="state {state}"' in page


def test_a_night_between_two_sittings_is_no_part_of_the_time_a_training_took(tmp_path):
    run = made_run(tmp_path / "runs", "a", steps=16, kl=None)
    text = run.metrics.read_text()
    for step in range(10, 18, 2):  # eight hours later
        text = text.replace(f"T10:{step:02d}", f"T18:{step:02d}")
    run.metrics.write_text(text)
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "<dt>training, time</dt><dd>14 min</dd>" in page


def test_a_report_of_a_failed_run_shows_what_there_is(tmp_path):
    run = made_run(
        tmp_path / "runs", "a", state="failed", message="02_train: \x1b[31mOutOfMemoryError", steps=4, kl=None
    )
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "This report is partial: the run failed." in page
    assert "02_train: OutOfMemoryError" in page
    assert "<dt>steps</dt><dd>4</dd><small>of 6</small>" in page
    assert "The kd loss goes from 2 to 1" in page
    assert 'id="comparison"' not in page


def test_a_report_of_a_run_without_any_figure_shows_its_config(tmp_path):
    run = runs.create(tmp_path / "runs", "broken", parse(RAW))
    stands(run, "failed", "00_setup: no such file")
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "00_setup: no such file" in page
    assert "max_length: 16" in page
    assert "<figure>" not in page


def test_a_run_of_another_version_has_a_report_that_says_what_is_not_read(tmp_path):
    run = made_run(tmp_path / "runs", "older", steps=2, kl=None)
    config = run.path / "config.yaml"
    config.write_text(config.read_text() + "outdated: 1\n")
    page = reports.render(run, tmp_path / "reports").read_text()
    assert "outdated: unknown key" in page
    assert str(tmp_path) not in page.split('id="config"')[0]


def test_a_benchmark_is_told_who_makes_its_page(tmp_path):
    run = made_run(tmp_path / "runs", "measured", steps=0, kl=None)
    (run.path / "config.yaml").write_text("heads: {chunk: 512}\n")
    with pytest.raises(RunError, match="`python -m kdlib.benchmarks --report measured` makes its page"):
        reports.render(run, tmp_path / "reports")
    page = index.render_index(tmp_path / "runs", tmp_path / "reports").read_text()
    assert "benchmark (" not in page
    assert "<small>benchmark</small>" in page


def test_a_page_stays_small_when_notebooks_are_large(tmp_path):
    run = made_run(tmp_path / "runs", "large", steps=0, kl=None)
    picture = "A" * 900_000
    outputs = [
        new_output("display_data", data={"image/png": picture, "text/plain": "<Figure>"}),
        *(new_output("stream", name="stdout", text=f"{i} {'x' * 500_000}") for i in range(20)),
        new_output("display_data", data={"text/html": "<p>y</p>" * 5_000}),
    ]
    for name in ("00_setup", "01_dry_run", "02_train", "03_compare", "04_more"):
        cells = [new_code_cell("show()", outputs=outputs) for _ in range(3)]
        nbformat.write(new_notebook(cells=cells), run.notebooks / f"{name}.ipynb")
    page = reports.render(run, tmp_path / "reports")
    assert page.stat().st_size < 5_000_000
    assert "characters left out" in page.read_text()
    assert "outputs are left out here for the size; notebooks/02_train.ipynb has all" in page.read_text()


def test_a_dollar_in_a_figure_is_a_dollar():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 10], [1, 1000])
    axes.set_yscale("log")
    axes.set_title("costs $5 of $x_{")
    axes.set_xticks([1, 10], ["$\\frac{", "b"])
    picture = pages.picture(figure)
    ElementTree.fromstring(picture.svg)
    assert picture.alt == "costs $5 of $x_{"
    assert axes.title.get_parse_math() is False
    figure.draw_without_rendering()
    assert axes.yaxis.get_ticklabels()[2].get_parse_math()


def test_a_drawing_with_many_lines_is_embedded_as_a_picture():
    figure = Figure()
    figure.subplots().scatter(range(5_000), range(5_000))
    assert pages.picture(figure, "many").source.startswith("data:image/png")


def test_the_message_says_better_worse_or_no_clear_difference():
    assert "shows: better KL to the teacher (-0.500 [-0.600, -0.400])" in plots.comparison_message(
        results(distilled_kl=1.0)
    )
    assert "worse KL to the teacher" in plots.comparison_message(results(distilled_kl=2.0))
    assert "no clear difference in KL to the teacher" in plots.comparison_message(results(distilled_kl=1.5))


@pytest.mark.parametrize(("kl", "found"), [(1.0, "better"), (2.0, "worse"), (1.5, "open")])
def test_one_difference_is_named_as_the_one_that_decides_and_the_others_as_uncorrected(tmp_path, kl, found):
    table = plots.difference_table(results(distilled_kl=kl))
    assert table["metric"].tolist().count("KL to teacher (primary)") == 1
    first = table.reset_index().iloc[0]
    assert (first.iloc[0], first["metric"]) == ("CE-only baseline", "KL to teacher (primary)")
    assert (first["found"], set(table["found"])) == (found, {found, "better", "worse"} - {""})
    said = plots.decided_by(results(kl))
    assert "KL to the teacher is the primary measure: its difference to the CE-only baseline decides" in said
    assert f"The other {len(table) - 1} differences are each taken by itself" in said
    message = plots.comparison_message(results(kl))
    assert message.index(", the primary measure; beside it, uncorrected: ") < message.index("agreement")
    assert list(plots.quality_table(results(kl)).columns)[0] == "KL to teacher (primary)"
    page = reports.render(made_run(tmp_path / "runs", "r", kl=kl), tmp_path / "reports").read_text()
    assert said in page
    assert (
        plots.comparison_bars(results(kl)).axes[0].get_title(loc="left").startswith("KL to teacher (primary)")
    )


def test_a_speed_that_was_timed_once_is_not_shown():
    made = results()
    shown = plots.cost_table(made)["forward, tokens/s (median, middle half)"]
    assert set(shown) == {"100 [90.0, 105]"}
    for facts in made["models"].values():
        facts["forward_tokens_per_s"] = 1455.0
        facts["load_seconds"] = 1.0
    assert [name for name in plots.cost_table(made) if "tokens/s" in name or "load" in name] == []


def test_the_pace_of_a_training_has_its_spread(tmp_path):
    page = reports.render(made_run(tmp_path / "runs", "r"), tmp_path / "reports").read_text()
    assert "<dt>training, tokens/s</dt><dd>100</dd><small>middle half [100, 100]</small>" in page


def test_figures_have_three_digits_and_their_interval():
    assert with_interval({"value": 0.42, "low": 0.3961, "high": 0.441}) == "0.420 [0.396, 0.441]"
    assert with_interval({"value": -1234.5, "low": -2000.0, "high": 534.2}, "+") == "-1,234 [-2,000, +534]"
