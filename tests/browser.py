"""JupyterLab as a person sees it, driven by Debian's Chromium; the fixtures are in conftest.py."""

import json
import shutil
import socket
from urllib.request import Request, urlopen

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
MARKS = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def asked(address: str, method: str = "GET") -> list | None:
    """What JupyterLab's server answers, if anything."""
    with urlopen(Request(address, method=method, headers={"Authorization": "token t"}), timeout=30) as answer:
        return json.loads(answer.read() or "null")


def open_notebook(page, lab: str, name: str) -> None:
    """Show a notebook of the project, with a kernel that is ready."""
    page.goto(f"{lab}/notebooks/{name}.ipynb?token=t&reset")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    kernel_waits(page)


def kernel_waits(page) -> None:
    """Wait for a kernel that has nothing to do."""
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)


def choose(page, menu: str, entry: str) -> None:
    """Click an entry of one of the menus at the top."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_text(entry, exact=True).first.click()


def no_cell_runs(page) -> None:
    busy = "[...document.querySelectorAll('.jp-InputPrompt')].some(prompt => prompt.innerText.includes('*'))"
    page.wait_for_function(f"!{busy}", timeout=180_000)
