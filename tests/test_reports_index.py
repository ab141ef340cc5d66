import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from made_log import stands
from made_runs import EVIL, RAW, made_run

from kdlib.config.run import parse
from kdlib.reports import index as overview, run as reports
from kdlib.reports.index import small_curve
from kdlib.reports.summary import Summary, summaries, summary
from kdlib.runs import folder as runs


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def index_of(root, tmp_path) -> str:
    return overview.render_index(root, tmp_path / "reports").read_text()


def test_the_index_lists_every_run_with_its_state_and_links_to_what_has_a_report(root, tmp_path):
    done = made_run(root, "first", steps=0, kl=None)
    made_run(root, "second", state="failed", message="02_train: OutOfMemoryError", steps=4, kl=None)
    reports.render(done, tmp_path / "reports")
    page = index_of(root, tmp_path)
    assert 'href="first/report.html"' in page
    assert 'href="second/report.html"' not in page
    rows = page.split("<tbody")[1].split("<tr")[1:]
    assert {state: sum(f'class="state {state}"' in row for row in rows) for state in ("done", "failed")} == {
        "done": 1,
        "failed": 1,
    }
    assert "02_train: OutOfMemoryError" in page


def test_a_run_on_its_way_shows_how_far_it_is_and_its_figures_so_far(root):
    going = summary(made_run(root, "going", state="running", steps=4, kl=None))
    assert (going.state, going.step, going.steps, going.progress) == ("running", 4, 6, pytest.approx(4 / 6))
    assert going.key("kl_to_teacher") == "0.750"
    assert going.stage == "training"
    done = summary(made_run(root, "done"))
    assert done.key("kl_to_teacher") == "1.00 [0.900, 1.10]"
    assert done.stage == "compared"


def test_a_run_whose_process_is_gone_is_shown_as_died(root, tmp_path):
    run = made_run(root, "gone", state="running", steps=0, kl=None)
    stands(run, "running", pid_started=0.0)
    assert 'class="state died"' in index_of(root, tmp_path)
    assert "the run died" in reports.render(run, tmp_path / "reports").read_text()


def test_a_torn_file_costs_one_row_and_not_the_index(root, tmp_path):
    made_run(root, "whole")
    for name, content in {"manifest.json": '{"run": ', "metrics.jsonl": "{\n", "status.json": "[]"}.items():
        torn = runs.create(root, f"torn-{name}", parse(RAW))
        (torn.path / name).write_text(content)
    assert {each.name: each.state for each in summaries(root)} == {
        "whole": "done",
        "torn-manifest.json": "unreadable",
        "torn-metrics.jsonl": "unreadable",
        "torn-status.json": "unreadable",
    }
    page = index_of(root, tmp_path)
    for words in (
        "manifest.json: found no JSON",
        "metrics.jsonl: found a line that is no JSON",
        "status.json: found list",
    ):
        assert words in page
    assert str(root) not in page


def test_places_rise_and_fall_and_what_is_missing_is_last_in_both():
    assert overview._places([0.3, None, 0.1, 0.3]) == [(1, 0), (2, 2), (0, 1), (1, 0)]


def test_curves_stay_within_their_picture_and_mark_where_they_broke():
    values = np.array([[0, 10, 20, 30], [3.0, np.inf, 1.0, 2.0]])
    svg = ElementTree.fromstring(str(small_curve({"distilled": values}, "KL & <more>")))
    points = [tuple(map(float, point.split(","))) for point in svg.find("polyline").get("points").split()]
    assert [y for _, y in points] == [3.0, 25.0, 14.0]  # highest at the top, lowest at the bottom
    assert [x for x, _ in points] == [3.0, pytest.approx(79.0), 117.0]
    assert svg.find("title").text == "KL & <more>"
    assert svg.find("path").get("class") == "broken"
    assert small_curve({"distilled": values[:, :1]}, "") == ""


def test_settings_that_differ_have_a_column_each_and_what_is_unusual_is_marked():
    found = [
        Summary(
            str(i), "done", settings={"seed": str(i), "same": "1", **({"only": "here"} if i == 2 else {})}
        )
        for i in range(5)
    ]
    found.append(Summary("machine", "done", settings={"heads.chunk": "512"}, kind="benchmark"))
    columns = overview.settings_that_differ(found)
    assert set(columns) == {"seed", "only"}
    assert [cell.text for cell in columns["seed"]] == ["0", "1", "2", "3", "4", ""]
    assert [cell.text for cell in columns["only"]] == ["—", "—", "here", "—", "—", ""]
    assert [cell.is_marked for cell in columns["only"]] == [False, False, True, False, False, False]


def test_runs_beside_each_other_show_figures_settings_scorecard_and_cost(root, tmp_path):
    for temperature in (1.0, 2.0):
        raw = {**RAW, "loss": {**RAW["loss"], "temperature": temperature}}
        made_run(root, f"t{temperature:g}", raw, kl=temperature)
    page = index_of(root, tmp_path)
    assert '<th role="columnheader" class="settings">loss.temperature</th>' in page
    assert re.findall(r'class="settings(?: differs)?">([^<]*)</td>', page) == ["2", "1"]
    for expected in (
        "1.00<small>[0.900, 1.10]</small>",
        "of 10 pass, ",
        "1.0 M",
        "+0.500 [+0.400, +0.600]",
        "peak",
    ):
        assert expected in page
    assert "<script" not in page


def test_two_hundred_runs_make_a_page_of_a_sensible_size(root, tmp_path, monkeypatch):
    made_run(root, "r0")
    original = summaries(root)[0]
    found = [
        Summary(**{**vars(original), "name": f"r{i}", "settings": {**original.settings, "seed": str(i)}})
        for i in range(200)
    ]
    monkeypatch.setattr(overview, "summaries", lambda root: found)
    assert len(index_of(root, tmp_path)) < 1_000_000


def test_text_from_runs_stays_text(root, tmp_path):
    raw = {**RAW, "data": {**RAW["data"], "text": EVIL}}
    made_run(root, "evil", raw, state="failed", message=EVIL, config_file=f"configs/{EVIL}", sweep=EVIL)
    made_run(root, "good")
    page = index_of(root, tmp_path)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;window.hit = 1" in page


def test_reading_many_runs_loads_no_package_that_takes_seconds_to_load():
    slow = ("nbconvert", "scipy", "sklearn", "IPython", "torch")
    code = f"import sys, kdlib.reports.run, kdlib.reports.index; print(*(sys.modules.keys() & {set(slow)}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
