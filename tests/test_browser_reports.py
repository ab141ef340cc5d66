"""As a person: a run's report and the index in Chromium; texts that would like to act,
and cannot.
"""

import json

import nbformat
import pytest
from browser import MARKS
from made_generations import asked as generated
from made_log import stands
from made_runs import EVIL, RAW, made_run, results
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kdlib.plots.tokens import SpanView
from kdlib.reports import index as overview, run as reports
from kdlib.reports.generation import render as rows_page
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.sweeps import report as swept
from kdlib.sweeps.results import Sweep

pytestmark = MARKS


def opened(browser, path, **options):
    """The page, with what it asked for and what it complained of."""
    page = browser.new_page(**options)
    page.asked, page.said = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.goto(path.as_uri())
    return page


def asks_for_nothing(page) -> bool:
    page.wait_for_timeout(500)
    assert page.evaluate("window.hit") is None
    assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in page.asked if url.startswith("file:")]) == 1
    assert page.said == []  # nothing even tried what the policy forbids
    assert (
        page.locator(
            "a[href^='javascript'], iframe, object, embed, script, svg svg, base, [onload], [onerror]"
        ).count()
        == 0
    )
    return True


def evil_notebook(path) -> None:
    outputs = [
        new_output("stream", name="stdout", text=f"printed {EVIL}"),
        new_output("error", ename="E", evalue=EVIL, traceback=[f"raised {EVIL}"]),
        *(
            new_output("display_data", data={kind: content, "text/plain": "in words"})
            for kind, content in {
                "text/html": f"{EVIL}<p>html</p></div></details></body>",
                "text/markdown": f"# md\n\n{EVIL}",
                "text/latex": EVIL,
                "application/javascript": "window.hit = 6",
                "image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'><script>hit=7</script></svg>",
            }.items()
        ),
    ]
    nbformat.write(
        new_notebook(cells=[new_markdown_cell(EVIL), new_code_cell(f"print({EVIL!r})", outputs=outputs)]),
        path,
    )


def test_nothing_in_a_run_acts_or_fetches_and_all_of_it_is_seen_as_text(browser, tmp_path, monkeypatch):
    raw = {**RAW, "data": {**RAW["data"], "text": EVIL}}
    run = made_run(
        tmp_path / "runs",
        "evil",
        raw,
        state="failed",
        message=f"said {EVIL}",
        steps=0,
        kl=None,
        formula=f"formula {EVIL}",
        config_file=f"configs/{EVIL}",
        sweep=f"sweep {EVIL}",
        note=f"note {EVIL}",
    )
    made_run(tmp_path / "runs", "other", steps=4, kl=None)
    runs.write_json(run.path / "comparison_results.json", results(text=f"sample {EVIL}"))
    evil_notebook(run.notebooks / "00_setup.ipynb")

    def figures(run, results):
        figure = Figure()
        axes = figure.subplots()
        axes.set(title=f"title {EVIL}", xlabel=EVIL, ylabel=EVIL)
        axes.set_xticks([0, 1], [EVIL, "$"])
        axes.plot([0, 1], label=EVIL)
        axes.legend()
        return {"dashboard": figure}

    monkeypatch.setattr(reports, "run_figures", figures)
    page = opened(browser, reports.render(run, tmp_path / "reports"))
    assert asks_for_nothing(page)
    page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
    text = " ".join(page.inner_text("body").split())
    for where in ("said", "formula", "note", "sweep", "sample", "printed", "raised"):
        assert f"{where} {EVIL}" in text, where
    assert page.locator("figure img").first.get_attribute("alt") == f"title {EVIL}"
    assert page.locator("figure img").first.evaluate("image => image.naturalWidth") > 300
    assert page.locator("main > section#notebooks").count() == 1  # no output has closed what it is in

    index = overview.render_index(tmp_path / "runs", tmp_path / "reports")
    page = opened(browser, index)
    assert asks_for_nothing(page)
    assert EVIL in " ".join(page.inner_text("body").split())


def test_nothing_in_a_sweep_a_comparison_programs_or_an_edited_config_acts(browser, tmp_path, monkeypatch):
    root, folder = tmp_path / "runs", tmp_path / "reports"
    texts = {"done": f"done {EVIL}", "failed": f"failed {EVIL}"}
    for state, text in texts.items():
        raw = {**RAW, "data": {**RAW["data"], "text": text}}
        made_run(root, f"s_{state}", raw, state=state, message=f"said {EVIL}", kl=1.0, sweep=f"sweep {EVIL}")
    sweep = Sweep(root / "s")
    sweep.path.mkdir()
    about = {name: f"{name} {EVIL}" for name in ("sweep", "file", "base", "command", "forecast", "created")}
    trials = [{"run": f"s_{state}", "parameters": {"data.text": text}} for state, text in texts.items()]
    about |= {"settings": {"base": EVIL}, "parameters": {"data.text": [*texts.values()]}, "trials": trials}
    about |= {"metric": "kl_to_teacher", "smoke": False, "repeated": [f"repeated {EVIL}"]}
    runs.write_json(sweep.path / "sweep.json", about)
    stands(sweep, "failed", f"ended {EVIL}")

    found = results(text=f"sample {EVIL}")
    brief = "<img src=x onerror=hit()>$x_{"  # a folder's name, which is given to kd compare
    named = {"distilled": f"mine {brief}", "teacher": f"theirs {brief}"}
    found |= {"student": named["distilled"], "sources": {named["teacher"]: f"source {EVIL}"}}
    found |= {"rule": f"rule {EVIL}", "precision": f"precision {EVIL}"}
    for each in (found["models"], found["samples"]):
        for name, other in named.items():
            each[other] = each.pop(name)
    for each in found["differences"]:
        each |= {side: named.get(each[side], each[side]) for side in ("model", "against")}

    for part in ("code_figures", "code_tables"):
        monkeypatch.setattr(reports.plots, part, lambda every: {})
    answer = {"verdict": f"verdict {EVIL}", "text": f"program {EVIL}", "message": f"raised {EVIL}"}
    shown = {"task_id": f"task {EVIL}", "prompt": f"asked {EVIL}", "answers": {f"model {EVIL}": answer}}
    code = {"benchmark": "mine", "problems": 1, "of": 1, "samples": 1, "interval": EVIL, "shown": [shown]}
    code |= {"settings": {"temperature": 0, "chat": False, "allow_network": False}, "sources": {EVIL: EVIL}}

    edited = root / "s_done" / "config.yaml"
    edited.write_text(edited.read_text().replace("done <script>", "edited <script>"))
    pages = {
        swept.render(sweep, folder): ("base", "ended", "repeated", "done", "failed", "said"),
        reports.render_comparison(found, tmp_path / "compared"): (
            "sample",
            "mine",
            "theirs",
            "source",
            "precision",
        ),
        reports.render_code(f"name {EVIL}", [code], tmp_path / "code"): ("name", *answer, "task", "asked"),
        reports.render(Run(root / "s_done"), folder): ("edited", "sweep", "said"),
    }
    words = {"text": "program", "message": "raised"}
    for path, places in pages.items():
        page = opened(browser, path)
        page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
        assert asks_for_nothing(page)
        text = " ".join(page.inner_text("body").split())
        for place in places:
            evil = brief if place in ("mine", "theirs") else EVIL
            assert f"{words.get(place, place)} {evil}" in text, (path, place)


@pytest.fixture
def index(tmp_path):
    for name, kl, temperature in (("a", 2.0, 1.0), ("b", 1.0, 2.0), ("c", 3.0, 1.0)):
        raw = {**RAW, "loss": {**RAW["loss"], "temperature": temperature}}
        made_run(
            tmp_path / "runs", name, raw, kl=kl, config_file=f"configs/{'x' if name == 'a' else 'y'}.yaml"
        )
    made_run(tmp_path / "runs", "d", state="died", steps=0, kl=None, config_file="configs/x.yaml")
    return overview.render_index(tmp_path / "runs", tmp_path / "reports")


def names(page) -> list[str]:
    """The runs as they are seen, from top to bottom."""
    rows = page.locator(".runs tbody tr").all()
    seen = [
        (row.bounding_box()["y"], row.locator(".name").inner_text().strip())
        for row in rows
        if row.is_visible()
    ]
    return [name for _, name in sorted(seen)]


def test_the_index_sorts_and_filters_without_scripts(browser, index):
    page = opened(browser, index, viewport={"width": 1500, "height": 900})
    assert sorted(names(page)) == ["a", "b", "c", "d"]
    page.get_by_label("sort by KL to the teacher, rising").check(force=True)
    assert names(page) == ["b", "a", "c", "d"]
    page.get_by_label("sort by KL to the teacher, falling").check(force=True)
    assert names(page) == ["c", "a", "b", "d"]
    page.get_by_label("x", exact=True).check()
    assert names(page) == ["a", "d"]
    page.get_by_label("died", exact=True).check()
    assert names(page) == ["d"]
    page.get_by_role("button", name="show all").click()
    assert len(names(page)) == 4
    assert asks_for_nothing(page)


def test_ticked_runs_stand_beside_each_other_with_the_settings_that_differ(browser, index):
    page = opened(browser, index, viewport={"width": 1500, "height": 900})
    temperature = page.locator(".runs thead .settings", has_text="loss.temperature")
    assert not temperature.is_visible()
    for name in "bc":
        page.get_by_label(f"tick {name}").check()
    page.get_by_label("only the ticked runs").check()
    page.get_by_label("settings that differ").check()
    assert sorted(names(page)) == ["b", "c"]
    assert temperature.is_visible()
    cells = page.locator(".runs tbody .settings").all()
    tints = {
        cell.inner_text(): cell.evaluate("cell => getComputedStyle(cell).backgroundColor")
        for cell in cells
        if cell.is_visible()
    }
    assert len(tints) == len(set(tints.values())) == 2  # one of the two values is marked
    heads = [head for head in page.locator(".runs thead th").all() if head.is_visible()]
    first = page.locator(".runs tbody tr").filter(visible=True).first
    for head, cell in zip(heads, first.locator("td").filter(visible=True).all(), strict=True):
        assert head.bounding_box()["x"] == cell.bounding_box()["x"]
    page.get_by_label("scorecard").check()
    page.get_by_label("cost, and").check()
    assert page.get_by_text("pass", exact=False).filter(visible=True).count() >= 2
    page.get_by_role("button", name="show all").click()
    assert len(names(page)) == 4
    assert not temperature.is_visible()
    assert asks_for_nothing(page)


def test_a_report_suits_dark_screens_and_paper(browser, tmp_path):
    path = reports.render(made_run(tmp_path / "runs", "a", steps=4, kl=None), tmp_path / "reports")
    page = opened(browser, path, viewport={"width": 1300, "height": 900}, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(15, 20, 26)"
    nav = page.locator("nav")
    page.mouse.wheel(0, 3000)
    page.wait_for_timeout(300)
    assert 0 <= nav.bounding_box()["y"] < 100  # stays in view
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    assert not nav.is_visible()
    page.emulate_media(media="screen", color_scheme="light")
    page.set_viewport_size({"width": 500, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 500


def test_nothing_in_rows_acts_or_fetches(browser, generations, endpoint, monkeypatch):
    said = endpoint.said
    monkeypatch.setattr(endpoint, "said", lambda prompt, mode: f"answer {EVIL} {said(prompt, mode)}")
    config = generations.config(["unused"])
    rows = [
        {"prompt": f"{mode} prompt {EVIL}", "category": f"{mode}{EVIL}"} for mode in ("", "[cut]", "[500]")
    ]
    (generations.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = generations.run(config)
    generated(run, config)
    page = opened(browser, rows_page(run, generations.folder / "reports"))
    page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
    assert asks_for_nothing(page)
    text = " ".join(page.inner_text("body").split())
    assert text.count(f"prompt {EVIL}") == 3
    assert text.count(f"answer {EVIL}") == 2  # kept, and cut off
    assert page.locator("figure img").count() == 4


def test_a_text_that_two_tokenizers_cut_stays_within_a_narrow_page_and_stays_text(browser, tmp_path):
    prompt, ruler = ("apart", [" word"] * 400, []), ("several", ["-" * 300], ["-" * 100] * 3)
    view = SpanView([prompt, ("apart", [], [EVIL] * 9), ("single", ["x"], ["x"]), ruler])
    path = tmp_path / "spans.html"
    path.write_text(f"<meta charset='utf-8'>{view._repr_html_()}", encoding="utf-8")
    page = opened(browser, path, viewport={"width": 600, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 600
    assert asks_for_nothing(page)
