"""A sweep's trials as tests have them run: apart, as a dask worker imports the module of what it is given.

That of a test would take torch with it, a quarter of a minute where nothing else computes.
"""

import sys

from kdlib.runs.folder import Run
from kdlib.sweeps import processes

FAKE = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
deed = json.loads((run.parent / "deeds.json").read_text()).get(run.name, "done")
def status(state, message=""):
    (run / "whole.json").write_text(json.dumps({"state": state, "message": message}))
    os.replace(run / "whole.json", run / "status.json")
    (run.parent / f".{run.name}.lock.json").unlink(missing_ok=True)
def stopped(*_):
    status("stopped", "stopped at step 3 with a checkpoint")
    sys.exit(1)
signal.signal(signal.SIGINT, signal.SIG_IGN if deed == "deaf" else stopped)
with (run / "starts").open("a") as file:
    file.write("x")
print("in", os.getcwd(), "\\nsaid by", run.name, flush=True)
if deed == "vanish":
    os.kill(os.getpid(), signal.SIGKILL)
if deed == "fail":
    status("failed", "02_train: no luck")
    sys.exit(1)
if deed in ("sleep", "deaf"):
    time.sleep(60)
if deed == "wait":
    while not (run.parent / "go").exists():
        time.sleep(0.05)
if deed == "together":  # ends only beside another
    until = time.monotonic() + 30
    while len(list(run.parent.glob("*/starts"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
(run / "checkpoints").mkdir(exist_ok=True)
figure = {"value": 1.0, "low": 0.9, "high": 1.1}
distilled = {"kl_to_teacher": figure, "parameters": 1, "forward_tokens_per_s": figure}
difference = {"model": "distilled", "against": "teacher", "metric": "kl_to_teacher", **figure}
found = {"models": {"teacher": distilled, "distilled": distilled}, "differences": [difference]}
(run / "comparison_results.json").write_text(json.dumps(found))
status("done")
"""


class Trained(processes.Work):
    """Without notebooks: what `setup` has made ready is trained."""

    def command(self, run: Run) -> list[str]:
        return [sys.executable, "-m", "kdlib", "train", str(run.path)]


class Acted(processes.Work):
    """Its processes only pretend."""

    def command(self, run: Run) -> list[str]:
        return [sys.executable, "-S", "-c", FAKE, str(run.path)]


def unseen(*paths: str) -> list[str]:
    """As on a machine that sees none of them."""
    return [*paths]
