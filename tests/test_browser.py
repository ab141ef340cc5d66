"""As a person: the four notebooks in JupyterLab, Run All, one after another; then the report, which must ask for nothing."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kdlib import reports
from kdlib.runner import NOTEBOOKS
from kdlib.runs import PARENT, all_runs, project_root

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
pytestmark = [
    pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
    yield browser
    browser.close()
    playwright.stop()


@pytest.fixture
def project(raw_config, tmp_path) -> Path:
    """A project folder of one's own: our notebooks, a tiny config by the name that they start with."""
    folder = tmp_path / "project"
    shutil.copytree(project_root() / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(raw_config))
    return folder


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def lab(project, tmp_path):
    """JupyterLab on that project; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = {name: value for name, value in os.environ.items() if name != PARENT}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         "--IdentityProvider.token=t", f"--ServerApp.root_dir={project}"],
        env={**environment, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not answers(port):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=30)


def test_the_notebooks_run_by_hand_and_leave_a_run(lab, project, browser, tmp_path):
    page = browser.new_page(viewport={"width": 1300, "height": 1600})
    last_words = {"00_setup": "the doctor: ", "01_dry_run": "forecast for", "02_train": "baseline step 12/12",
                  "03_compare": "now: kd report"}
    for name in NOTEBOOKS:
        page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?token=t&reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_timeout(4000)  # the kernel
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.locator(".jp-OutputArea-output", has_text=last_words[name]).first.wait_for(timeout=120_000)
        page.wait_for_function("!document.title.startsWith('(') && !document.querySelector('.jp-InputPrompt')?.innerText.includes('*')")
        page.wait_for_timeout(1500)
        assert page.locator('[data-mime-type="application/vnd.jupyter.stderr"]', has_text="Error").count() == 0
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
    assert page.locator("figure img").count() == 6
    assert all(page.locator("figure img").nth(i).evaluate("image => image.naturalWidth") > 500 for i in range(6))
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
