"""As a person: the explorers in JupyterLab; sliders move, a token under the cursor shows its candidates,
text from data stays text.
"""

import nbformat
import pytest
from browser import MARKS, choose, open_notebook
from made_predictions import EVIL, evil_facts
from nbformat.v4 import new_code_cell, new_notebook

from kdlib.config.run import parse
from kdlib.runs import folder as runs

pytestmark = MARKS
CELLS = (
    "from kdlib.workbench import explorers; from kdlib.workbench import session\n\nbench = "
    'session.open_run("configs/quickstart.yaml", "one")\n'
    'predictions = bench.explore("untrained")',
    "explorers.temperature_and_top_k(predictions, bench.config)",
    "explorers.token_heat_map(bench.run)",
    "explorers.schedule_designer(bench.run)",
    'evil = session.open_run("configs/quickstart.yaml", "evil").run\nexplorers.token_heat_map(evil)',
    'import os\n\nos.environ["KDLIB_RUN_BY"] = "a test"\nexplorers.token_heat_map(evil)',
    'print("every cell", "has run")',
)


@pytest.fixture
def notebook(project, raw_config):
    """A notebook with every explorer on a tiny teacher, and one on a text that nobody should trust."""
    config = parse(raw_config)
    runs.create(project / "runs", "one", config).add_to_manifest(student_layers=[0, 3])
    runs.write_json(runs.create(project / "runs", "evil", config).path / "explorers.json", evil_facts())
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(
        new_notebook(cells=[new_code_cell(text) for text in CELLS], metadata=python),
        project / "notebooks" / "look.ipynb",
    )


def test_sliders_move_pictures_and_tokens_show_their_candidates(lab, notebook, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1400, "height": 4500})
    open_notebook(page, lab, "look")
    choose(page, "Run", "Run All Cells")
    page.locator(".jp-OutputArea-output", has_text="every cell has run").first.wait_for(timeout=120_000)
    page.wait_for_timeout(1500)
    assert page.locator(".jp-OutputArea-output", has_text="Traceback").count() == 0

    for handle, picture in (("temperature T", 0), ("token", 0), ("top k", 0), ("warm-up", 1)):
        before = page.locator(".widget-image").nth(picture).get_attribute("src")
        page.locator(".widget-hslider", has_text=handle).first.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "([number, old]) => document.querySelectorAll('.widget-image')[number].src !== old",
            arg=[picture, before],
            timeout=20_000,
        )

    token = page.locator(".kd-heat").first.locator(".t").nth(6)
    assert not token.locator(".card").is_visible()
    token.hover()
    assert token.locator(".card").is_visible()
    assert "came, token 7" in token.locator(".card").inner_text()
    page.screenshot(path=str(tmp_path / "explorers.png"))

    still = page.locator(".kd-heat").last
    for measure in ("ce", "differs", "kl"):
        still.locator(f"input[value={measure}]").check()
        assert still.locator(f"p.of.{measure}").is_visible()
        assert still.locator("p.of:visible").count() == 1
    for heat_map in (page.locator(".kd-heat").nth(1), still):
        assert heat_map.locator(".t").nth(0).inner_text().startswith(EVIL[0])
        assert heat_map.locator("script").count() == 0
    assert page.locator("mjx-container").count() == 0
