"""What a training logs, made without one, and read line by line."""

import json
import time

from kdlib.config.run import parse
from kdlib.runs import folder as runs
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import append_metrics
from kdlib.runs.processes import this_process


def logged(step, *, steps=20, **changes):
    terms = {"kd": 4 / step, "ce": 2.0}
    figures = {
        "loss": 0.7 * terms["kd"] + 0.3 * terms["ce"],
        "kd_loss": terms["kd"],
        "kd_weight": 0.7,
        "ce_loss": 2.0,
        "ce_weight": 0.3,
        "temperature": 2.0,
        "learning_rate": 1e-4,
        "grad_norm": 1.0 + step,
        "tokens_per_s": 100.0,
        "memory_gib": 1.0,
        **changes,
    }
    moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(1.8e9 + 2 * step))
    return {
        "train/step": step,
        "train/epoch": step / steps,
        **{f"train/{name}": value for name, value in figures.items()},
        "time": moment,
    }


def evaluated(step, **changes):
    figures = {"loss": 2.0, "kl_to_teacher": 3 / step, "perplexity": 50.0 - step, "agreement": 0.4, **changes}
    return {
        "train/step": step,
        "train/epoch": step / 20,
        **{f"eval/{name}": value for name, value in figures.items()},
    }


def read_metrics(folder: StudentFolder) -> list[dict]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    text = folder.metrics.read_text() if folder.metrics.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def stands(run: Run, state: str, message: str = "", **process) -> None:
    """Make a run's files say this of it, whatever they said before; where it is running, in this process."""
    run._note(state, message)
    status = runs.read_json(run.path / "status.json") | process
    runs.write_json(run.path / "status.json", status)
    note = run.path.with_name(f".{run.name}.lock.json")
    note.unlink(missing_ok=True)
    if state == "running":
        runs.write_json(note, {name: status[name] for name in (*this_process(), "since")})


def logged_run(raw_config, folder) -> Run:
    """Half of a training of 20 steps, planned, and evaluated twice, which goes on."""
    raw_config["training"]["max_steps"] = 20
    run = runs.create(folder / "runs", "first", parse(raw_config))
    for step in range(1, 11):
        append_metrics(run, logged(step))
        if step % 5 == 0:
            append_metrics(run, evaluated(step))
    runs.write_json(
        run.plan,
        [
            {"step": step, "learning_rate": 1e-4, "temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3}
            for step in (1, 10, 20)
        ],
    )
    stands(run, "running")
    return run
