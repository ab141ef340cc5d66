"""How long the picture of a long training takes: from its metrics file, and after one more line.  Imports
no torch.
"""

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdlib.config.run import parse
from kdlib.plots.training_panels import View
from kdlib.runs import folder as runs
from kdlib.runs.folder import Run
from kdlib.runs.log import append_metrics
from kdlib.workbench.dashboard import Picture, card_html

UPDATES = 9  # of each round; their median counts
CONFIG = {  # of a training that is never made
    "teacher": {"model": "none"},
    "student": {"from": "teacher", "layers": 1},
    "data": {"source": "none"},
    "loss": {"weights": {"kd": 0.7, "ce": 0.3, "hidden": 0.1}},
    "training": {"max_steps": 1},
}


def rounds(steps: int, count: int) -> Iterator[dict[str, Any]]:
    """One line per round: wall seconds of the first drawing of a file with a line for each step, half of
    the training, and of an update.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = runs.create(Path(folder), "long", parse(CONFIG))
        generator, planned = (
            random.Random(0),
            {f"{term}_weight": weight for term, weight in CONFIG["loss"]["weights"].items()},
        )
        runs.write_json(
            run.plan,
            [
                {"step": 1, "learning_rate": 1e-4, **planned},
                {"step": 2 * steps, "learning_rate": 0.0, **planned},
            ],
        )
        run.metrics.write_text(
            "".join(
                json.dumps(_line(step, steps, generator)) + "\n"
                for step in range(1, steps + 1 - count * UPDATES)
            )
        )
        for number in range(count):
            first_s, picture = _timed(lambda: _drawn(run))
            updates = []
            for extra in range(1, UPDATES + 1):
                append_metrics(run, _line(steps - (count - number) * UPDATES + extra, steps, generator))
                updates.append(_timed(lambda picture=picture: _redrawn(picture))[0])
            yield {"round": number, "first_s": first_s, "update_s": statistics.median(updates)}


def _drawn(run: Run) -> Picture:
    picture = Picture(run, View())
    picture.png()
    card_html(picture.scorecard())
    return picture


def _redrawn(picture: Picture) -> None:
    if not picture.read():
        raise AssertionError("a line was added, but nothing new was read")
    picture.png()
    card_html(picture.scorecard())


def _timed(work) -> tuple[float, Any]:
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


def _line(step: int, steps: int, generator: random.Random) -> dict[str, Any]:
    """What a training of three terms logs, with noise and a rare spike."""
    done = step / steps
    values = {
        term: (rest + 4 * math.exp(-5 * done)) * math.exp(generator.gauss(0, 0.06))
        for term, rest in (("kd", 0.9), ("ce", 2.2), ("hidden", 0.2))
    }
    weights = CONFIG["loss"]["weights"]
    norm = math.exp(generator.gauss(0, 0.25)) * (30 if generator.random() < 5e-4 else 1)
    figures = {
        "loss": sum(weights[term] * value for term, value in values.items()),
        **{f"{term}_loss": value for term, value in values.items()},
        **{f"{term}_weight": weight for term, weight in weights.items()},
        "temperature": 4 - 3 * done,
        "learning_rate": 1e-4 * (1 - done),
        "grad_norm": norm,
        "tokens_per_s": generator.gauss(1500, 90),
        "memory_gib": 3 + 0.2 * done,
    }
    moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(1.7e9 + step / 2))
    return {
        "train/step": step,
        "train/epoch": 3 * done,
        **{f"train/{name}": value for name, value in figures.items()},
        "time": moment,
    }
