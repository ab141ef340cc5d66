"""As a person: the dashboard in JupyterLab, while a training goes on in the same kernel or in another
process.
"""

import os
import time

import nbformat
import pytest
import yaml
from browser import MARKS, choose, kernel_waits, no_cell_runs, open_notebook
from conftest import kd_process
from made_log import read_metrics
from nbformat.v4 import new_code_cell, new_notebook

from kdlib.config.run import parse
from kdlib.runs import folder as runs
from kdlib.workbench.session import Workbench

pytestmark = MARKS
IMAGE = "img.widget-image"


@pytest.fixture
def raw_config(raw_config) -> dict:
    """Long enough to be looked at, with a curriculum and each term's gradient."""
    raw_config["training"] |= {"max_steps": 4000, "eval_steps": 100, "save_steps": 100}
    raw_config["loss"]["curriculum"] = [
        {"until": 0.3, "weights": {"hidden": 0}},
        {"until": 1.0, "weights": {"hidden": 0.5}, "ramp": 0.2},
    ]
    return raw_config | {"diagnostics": {"grad_norms_every": 20}}


@pytest.fixture
def run(project, monkeypatch) -> runs.Run:
    """Set up, and not yet trained."""
    monkeypatch.chdir(project)
    config = parse(yaml.safe_load((project / "configs" / "quickstart.yaml").read_text()))
    made = runs.create(project / "runs", "tiny", config, config_file="configs/quickstart.yaml", smoke=False)
    Workbench(made).setup()
    return made


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1500, "height": 1900})
    yield page
    page.close()


def write_notebook(project, name: str, *cells: str) -> None:
    notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, project / "notebooks" / f"{name}.ipynb")


def picture(page) -> str:
    """The dashboard shown last: a restart leaves what was shown before it."""
    return page.locator(IMAGE).last.get_attribute("src")


def becomes_another(page, before: str, timeout: float = 40_000) -> str:
    page.wait_for_function(
        f"before => [...document.querySelectorAll('{IMAGE}')].at(-1).src !== before",
        arg=before,
        timeout=timeout,
    )
    return picture(page)


def is_running(page) -> bool:
    return page.locator(".jp-InputPrompt", has_text="*").count() > 0


def test_the_dashboard_moves_obeys_and_stops_while_the_training_cell_runs(lab, run, page, tmp_path):
    open_notebook(page, lab, "02_train")
    choose(page, "Run", "Run All Cells")
    page.wait_for_selector(IMAGE, timeout=120_000)
    first = becomes_another(page, picture(page))
    second = becomes_another(page, first)
    page.screenshot(path=str(tmp_path / "running.png"))
    page.get_by_role("button", name="ce", exact=True).click()
    third = becomes_another(page, second)
    page.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.locator(".widget-readout", has_text="3%").wait_for(timeout=20_000)
    becomes_another(page, third)
    assert is_running(page)  # all of that happened beside the cell
    page.locator("button.mod-danger").click()
    page.locator(".jp-OutputArea-output", has_text="with a checkpoint; go on with --resume").first.wait_for(
        timeout=60_000
    )
    page.locator(".widget-html", has_text="--resume tiny").first.wait_for(timeout=20_000)
    page.wait_for_timeout(1500)
    page.screenshot(path=str(tmp_path / "stopped.png"))
    assert not (run.path / "STOP").exists()
    assert list(run.checkpoints.iterdir())


@pytest.mark.parametrize("theme", ["JupyterLab Dark"])
def test_after_a_restart_the_dashboard_shows_all_that_was_logged_and_follows_and_stops_another_process(
    lab, project, run, page, tmp_path
):
    write_notebook(
        project,
        "restart",
        "from kdlib.runs import folder\nfrom kdlib.workbench import dashboard, session\n"
        "run = folder.open_run(folder.default_root(), 'tiny')",
        "with dashboard.watch(run):\n    session.Workbench(run).train()",
        "board = dashboard.watch('runs/tiny')\nboard",
        "print('steps', board.live.progress.step, 'of', len(run.metrics.read_text().splitlines()), 'lines')",
    )
    open_notebook(page, lab, "restart")
    choose(page, "Run", "Run All Cells")
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < 30:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    choose(page, "Kernel", "Restart Kernel…")
    page.locator(".jp-Dialog button.jp-mod-warn").click()
    kernel_waits(page)
    logged = read_metrics(run)
    assert not run.is_trained
    for number in (0, 2, 3):
        page.locator(".jp-CodeCell").nth(number).locator(".jp-InputArea-editor").click()
        choose(page, "Run", "Run Selected Cell and Do not Advance")
        no_cell_runs(page)
    words = page.locator(".jp-OutputArea-output", has_text="steps ").last.inner_text()
    page.screenshot(path=str(tmp_path / "restarted.png"))
    last = max(line["train/step"] for line in logged if "train/loss" in line)
    assert words.split()[1] == str(last)

    with kd_process("train", run.path, env={**os.environ}) as process:  # goes on in a process of its own
        first = becomes_another(page, picture(page), timeout=90_000)
        becomes_another(page, first)
        page.screenshot(path=str(tmp_path / "watched.png"))
        page.locator("button.mod-danger").last.click()
        _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "with a checkpoint" in said
