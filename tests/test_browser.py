"""As a person: the four notebooks in JupyterLab, Run All, one after another; then the report, which must
ask for nothing.
"""

from browser import MARKS, choose, open_notebook

from kdlib.reports import run as reports
from kdlib.runs.folder import all_runs
from kdlib.workbench.runner import NOTEBOOKS

pytestmark = MARKS


def test_the_notebooks_run_by_hand_and_leave_a_run(lab, project, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1300, "height": 1600})
    last_words = {
        "00_setup": "the doctor: ",
        "01_dry_run": "forecast for",
        "02_train": "baseline step 12/12",
        "03_compare": "now: kd report",
    }
    for name in NOTEBOOKS:
        open_notebook(page, lab, name)
        choose(page, "Run", "Run All Cells")
        page.locator(".jp-OutputArea-output", has_text=last_words[name]).first.wait_for(timeout=120_000)
        page.wait_for_function(
            "!document.title.startsWith('(') && "
            "!document.querySelector('.jp-InputPrompt')?.innerText.includes('*')"
        )
        page.wait_for_timeout(1500)
        assert (
            page.locator('[data-mime-type="application/vnd.jupyter.stderr"]', has_text="Error").count() == 0
        )
        page.screenshot(path=str(tmp_path / f"{name}.png"))
    (run,) = all_runs(project / "runs")
    assert run.status["state"] == "done"
    assert (run.path / "teacher_student_comparison.png").exists()

    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    path = reports.render(run, project / "reports")
    page.goto(path.as_uri())
    page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
    assert page.locator("h1").inner_text().startswith("quickstart_")
    pictures = page.locator("section > figure img, section .pictures img")
    # the training, KL to the teacher, the comparison, temperature and top k, the course
    assert pictures.count() == 5
    assert all(pictures.nth(i).evaluate("image => image.naturalWidth") > 500 for i in range(5))
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
