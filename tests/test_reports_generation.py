"""The page, the index's line and the notebook of a run that makes rows.

Run: pytest tests/test_reports_generation.py
"""

import json
import sys

import nbformat
import pandas as pd
import pytest
import yaml
from made_generations import KEY, asked, rows_in

from kdlib.errors import RunError
from kdlib.generation.run import wanted
from kdlib.reports import run as of_trainings
from kdlib.reports.generation import LINES, cut, render
from kdlib.reports.index import render_index
from kdlib.runs.folder import Run, project_root
from kdlib.runs.processes import PARENT
from kdlib.workbench import cli
from kdlib.workbench.runner import execute

EVIL = "<script>window.hit=1</script><img src=x onerror=hit=2>"
TEXTS = [
    f"{EVIL} & more",
    *(f"plain {n}" for n in range(5)),
    "[500] a",
    "[json] b",
    "[cut] c",
    f"[cut] {EVIL}",
]


@pytest.fixture
def run(generations, endpoint, monkeypatch):
    said = endpoint.said
    monkeypatch.setattr(
        endpoint, "said", lambda prompt, mode: said(prompt, mode) + (EVIL if EVIL in prompt else "")
    )
    config = generations.config(TEXTS, budget={"usd": 5})
    made = generations.run(config)
    asked(made, config)
    return made


def test_the_page_shows_what_came_of_the_prompts_and_all_of_it_as_text(run, tmp_path):
    text = render(run, tmp_path / "reports").read_text()
    assert "6 of 10 prompts that were asked gave a row that is kept" in text
    assert "rejected: cut off (2)" in text
    assert "failed: status 500 (1)" in text
    assert text.count("&lt;script&gt;window.hit=1") >= 4  # prompt and answer, kept and rejected
    assert "<script" not in text
    assert "<img src=x" not in text
    assert KEY not in text
    tables = tmp_path / "reports" / run.name / "tables"
    found = pd.read_csv(tables / "yield.csv", index_col=0).loc["function"]
    assert found[["kept", "rejected", "failed", "not answered"]].tolist() == [6, 2, 2, 0]
    spent = json.loads((run.path / "progress.json").read_text())["spent_usd"]
    assert pd.read_csv(tables / "cost.csv")["usd"].iloc[-1] == pytest.approx(spent)


def test_a_page_is_made_before_anything_is_asked_too(generations, tmp_path):
    page = render(generations.run(generations.config(["plain"])), tmp_path / "reports")
    assert "Nothing has been asked yet" in page.read_text()


def test_the_index_says_what_came_of_it_and_kd_report_makes_its_page(run, tmp_path, monkeypatch, capsys):
    index = render_index(run.path.parent, tmp_path / "reports").read_text()
    assert "6 kept, 2 rejected, 2 failed" in index
    assert "generation, spent" in index
    with pytest.raises(RunError, match="made made rows: `kd report made`"):
        of_trainings.render(run, tmp_path / "reports")
    folders = ["--runs", str(run.path.parent), "--reports", str(tmp_path / "reports")]
    monkeypatch.setattr(sys, "argv", ["kd", "report", run.name, *folders])
    with pytest.raises(SystemExit):
        cli.main()
    assert "report.html" in capsys.readouterr().out
    assert f'href="{run.name}/report.html"' in (tmp_path / "reports" / "index.html").read_text()


def test_a_long_text_is_cut_and_says_so():
    assert cut("short") == "short"
    assert cut("a\n" * 100).endswith(f"\n… {200 - 2 * LINES + 1} characters left out")


def test_a_notebook_takes_the_newest_run_that_asked_the_same(generations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(generations.config(["plain"]).as_dict()))
    first = wanted("made.yaml")
    assert not first.goes_on
    first.begin()
    again = wanted("made.yaml", overrides=["limits.at_once=2"])
    assert (again.name, again.goes_on) == (first.name, True)
    assert again.prompts == first.prompts
    assert not wanted("made.yaml", overrides=["seed=1"]).goes_on
    assert wanted("made.yaml", str(tmp_path / "runs" / "other")).name == "other"
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        wanted("made.yaml", first.name, ["seed=1"]).begin()


@pytest.mark.slow
def test_the_notebook_asks_shows_and_goes_on_without_paying_twice(
    generations, endpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv(PARENT, "kd")
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(generations.config(TEXTS).as_dict()))
    given = {"config": str(tmp_path / "made.yaml"), "run": str(tmp_path / "runs" / "one")}
    for name, larger in (("first", 0.01), ("again", 5)):  # dollars: it stops, and goes on
        given["overrides"] = [f"budget.usd={larger}"]
        execute(project_root() / "notebooks" / "05_generate.ipynb", tmp_path / f"{name}.ipynb", given)
    run = Run(tmp_path / "runs" / "one")
    assert run.status["state"] == "done"
    assert len(rows_in(run, "kept")) == 6
    assert max(endpoint.paid.values()) == 1
    first, again = ((tmp_path / f"{name}.ipynb").read_text() for name in ("first", "again"))
    assert "the budget of $0.01 has no room" in first
    assert KEY not in first + again
    outputs = [out for cell in nbformat.reads(again, 4).cells for out in cell.get("outputs", [])]
    shown = "".join(out.get("text", "") for out in outputs)
    assert "tiny-teacher (this config)" in shown
    assert f"{EVIL} & more" in shown  # as plain text
    assert "cut off (2 such)" in shown
    assert not [out for out in outputs if "text/html" in out.get("data", {}) and EVIL in str(out)]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 5  # the live one, yield, reasons, cost, lengths
    page = render(run, tmp_path / "reports").read_text()
    assert page.count("<img alt=") == 4
