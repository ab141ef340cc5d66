"""Kills of `kd train`, at random and at named moments: gone on with, it ends as an undisturbed one.

KILLS=60 pytest -m slow -s tests/test_kills.py   makes so many, and prints a line of each.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_experiment
from made_classifiers import classification, classifier, source
from made_log import read_metrics
from tiny_training import comparable

from kdlib.config.run import parse
from kdlib.runs import checkpoints, folder as runs
from kdlib.runs.folder import Run
from kdlib.training import nan_guard, run as training, trackers
from kdlib.training.nan_guard import GuardedTrainer
from kdlib.workbench import cli, session, teacher_stage

KILLS = int(os.environ.get("KILLS", "6"))
STUDENTS = (".", "baseline")
TRAINING = {"max_steps": 20, "logging_steps": 3, "save_steps": 4, "eval_steps": 3, "eval_on_start": True}
SCENES: dict[str, dict[str, Any]] = {  # what is trained
    "by steps": {"training": TRAINING},
    "early stop": {
        "training": {**TRAINING, "save_steps": 3, "learning_rate": 0.0},
        "early_stopping": {"patience": 2},
    },
    "by epochs": {
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 40, "max_steps": -1}
        | {"eval_strategy": "epoch", "save_steps": 2, "logging_steps": 2},
    },
    "teacher's stage": {},
    "adapter": {"training": TRAINING},
}
OWN_BASE, ADAPTER = (
    {"teacher": {"from": "student"}},
    {"adapter": {"r": 4, "lora_dropout": 0.2, "merge": True}},
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 60 * KILLS)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def at(owner: object, name: str, deed: Callable[..., None], *, after: bool = False, when=None) -> Callable:
    """Installs: at the nth call of a function, `deed` with its arguments, before it or after, and death."""

    def install(nth: int) -> None:
        honest, calls = getattr(owner, name), [0]

        def called(*args, **options):
            calls[0] += when is None or when(*args)
            is_due = calls[0] == nth and (when is None or when(*args))
            if is_due and not after:
                deed(*args)
                die()
            result = honest(*args, **options)
            if is_due:
                deed(*args)
                die()
            return result

        setattr(owner, name, called)

    return install


def nothing(*args) -> None:
    pass


def is_renamed(name: str):
    return lambda path, target: path.name == f"{name}.tmp"


def half_a_line(folder, line) -> None:
    with folder.metrics.open("a") as file:
        file.write(json.dumps(line)[: len(json.dumps(line)) // 2])


def half_removed(path: Path) -> None:
    for file in sorted(path.glob("*"))[::2]:
        checkpoints.shutil.rmtree(file) if file.is_dir() else file.unlink()


def checkpoint_of(trainer) -> Path:
    return trainer.folder.checkpoints / f"checkpoint-{trainer.state.global_step}"


def is_sealed(path, content) -> bool:
    return path.name == checkpoints.MANIFEST and bool(content["files"])


MOMENTS: dict[str, Callable[[int], None]] = {
    "a checkpoint's model is half written": at(
        GuardedTrainer,
        "_save",
        lambda trainer, *_: half(checkpoint_of(trainer) / "model.safetensors"),
        after=True,
    ),
    "between a checkpoint's model and optimizer": at(
        GuardedTrainer, "_save_optimizer_and_scheduler", nothing
    ),
    "a checkpoint's optimizer is half written": at(
        GuardedTrainer,
        "_save_optimizer_and_scheduler",
        lambda trainer, *_: half(checkpoint_of(trainer) / "optimizer.pt"),
        after=True,
    ),
    "between a checkpoint and its manifest": at(checkpoints, "seal", nothing),
    "a manifest is half written": at(
        checkpoints,
        "write_json",
        lambda path, content: path.with_name("manifest.json.1.tmp").write_text(json.dumps(content)[:50]),
        when=is_sealed,
    ),
    "an old checkpoint is half deleted": at(
        checkpoints, "_removed", half_removed, when=lambda path: path.is_dir() and "checkpoint-" in path.name
    ),
    "best_model/ is half written": at(
        nan_guard,
        "synced",
        lambda path: half(path / "model.safetensors"),
        when=lambda path: path.name == "best_model.tmp",
    ),
    "best_model/ is away, the new one not yet there": at(
        Path, "rename", nothing, when=is_renamed("best_model")
    ),
    "best_model/ has just been written": at(
        Path, "rename", nothing, when=is_renamed("best_model"), after=True
    ),
    "a line of metrics.jsonl is half written": at(trackers, "append_metrics", half_a_line),
    "between a line and what follows it": at(trackers, "append_metrics", nothing, after=True),
    "after the last step, before the final model": at(training, "_finish", nothing),
    "final_model/ is away, the new one not yet there": at(
        Path, "rename", nothing, when=is_renamed("final_model")
    ),
    "after the final model, before history.json": at(training, "history", nothing),
    "between the students": at(session.Workbench, "train_baseline", nothing),
}
RANDOM = "at random"


def in_child(deed: Callable[[], object], log: Path, *, seconds: float | None = None) -> int:
    """The exit status of a process of its own that does this; killed after so many seconds."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            deed()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kd_train(folder: Path, moment: str | None = None, nth: int = 1) -> None:
    """Go on with the run, or set up what trains its teacher, to die at this moment."""
    os.chdir(folder.parent.parent)
    if moment:
        MOMENTS[moment](nth)
    run = Run(folder)
    if run.config.teacher_stage is not None:
        teacher_stage.taught(run.config, run)
        return
    sys.argv = ["kd", "train", str(folder)]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher_folder) -> Path:
    """By scene: a run that is set up, the same trained without a disturbance, and how long that took."""
    place = tmp_path_factory.mktemp("kills")
    for scene, changes in SCENES.items():
        folder = place / scene / "whole" / "runs" / "run"
        if changes:
            raw = tiny_experiment(teacher_folder, place)
            raw |= {**changes, "training": {**raw["training"], **changes["training"]}}
            raw |= (
                OWN_BASE | {"student": {"from": str(teacher_folder), **ADAPTER}} if scene == "adapter" else {}
            )
        else:
            classifier(place / "body", "bert", labels=["one", "two"], seed=3)
            rows = {"source": source(place, 160), "validation": 0.25, "max_length": 32, "split_seed": 0}
            stage = {**TRAINING, "eval_strategy": "steps", "use_cpu": True, "learning_rate": 3e-3}
            raw = {**classification(str(place / "body"), "teacher"), "data": rows}
            raw |= {"student": {"from": "teacher", "layers": 1}, "teacher_stage": {"training": stage}}
        config = parse(raw)
        made = runs.create(folder.parent, "run", config)
        if changes:
            assert in_child(session.Workbench(made).setup, place / "setup.txt") == 0
        shutil.copytree(place / scene / "whole", place / scene / "begun")
        began = time.monotonic()
        log = place / scene / "whole.txt"
        assert in_child(lambda folder=folder: kd_train(folder), log) == 0, log.read_text()[-3000:]
        (place / scene / "seconds").write_text(str(time.monotonic() - began))
    return place


def students(root: Path) -> list[Path]:
    """The folders of all students, and of a teacher in its stage, of a scene's runs."""
    return [
        folder for run in sorted(root.glob("runs/*")) for name in STUDENTS if (folder := run / name).is_dir()
    ]


def differing(whole: Path, found: Path) -> list[str]:
    """What is not as in the undisturbed run."""
    wrong = []
    for one in students(whole):
        name, other = one.relative_to(whole), found / one.relative_to(whole)
        if not (one / "metrics.jsonl").exists():  # the run whose teacher is trained
            continue
        files = [file for model in ("best_model", "final_model") for file in sorted((one / model).iterdir())]
        for file in files:
            there = other / file.relative_to(one)
            if not there.exists() or there.read_bytes() != file.read_bytes():
                wrong.append(str(name / file.relative_to(one)))
        if comparable(one) != comparable(other):
            wrong.append(f"{name}/metrics.jsonl")
        if not (other / "history.json").exists():
            wrong.append(f"{name}/history.json")
    return wrong


def ordered() -> list[tuple[str, str]]:
    """So many kills as were asked for: moment and scene; all moments come before one comes again."""
    generator = random.Random(0)
    named = [(moment, scene) for scene in SCENES for moment in MOMENTS]
    named = [
        (moment, scene)
        for moment, scene in named
        if (moment, scene) != ("between the students", "teacher's stage")
        and not (moment == "an old checkpoint is half deleted" and scene in ("early stop", "by epochs"))
    ]
    generator.shuffle(named)
    first = list({moment: (moment, scene) for moment, scene in reversed(named)}.values())
    kills = [*first, *(each for each in named if each not in first)]
    kills = [
        kill
        for pair in zip(kills, [(RANDOM, scene) for scene in SCENES] * len(kills), strict=False)
        for kill in pair
    ]
    return kills[:KILLS]


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_training_ends_as_an_undisturbed_one(place, tmp_path, number):
    moment, scene = ordered()[number]
    generator = random.Random(number)
    shutil.copytree(place / scene / "begun", tmp_path / "killed")
    run, log = tmp_path / "killed" / "runs" / "run", tmp_path / "log.txt"
    seconds = float((place / scene / "seconds").read_text())
    if moment == RANDOM:
        deaths = [
            in_child(lambda: kd_train(run), log, seconds=generator.uniform(0.0, 1.1) * seconds)
            for _ in range(generator.randint(1, 3))
        ]
    else:
        nth = 1 if moment == "between the students" else generator.choice([1, 1, 2, 3])
        deaths = [in_child(lambda: kd_train(run, moment, nth), log)]
        if deaths == [0]:  # it comes less often
            shutil.rmtree(tmp_path / "killed")
            shutil.copytree(place / scene / "begun", tmp_path / "killed")
            deaths = [in_child(lambda: kd_train(run, moment, 1), log)]
        assert deaths == [-signal.SIGKILL], log.read_text()[-3000:]
    steps = [max((line["train/step"] for line in read_metrics(runs.StudentFolder(folder))), default=0)
             for folder in students(tmp_path / "killed")]  # fmt: skip
    assert in_child(lambda: kd_train(run), log) == 0, log.read_text()[-3000:]
    wrong = differing(place / scene / "whole", tmp_path / "killed")
    said = [
        line for line in log.read_text().splitlines() if "passed over" in line or "again the best" in line
    ]
    print(f"\n{number + 1:2} | {scene} | {moment} | {len(deaths)} | {'/'.join(map(str, steps))} | "
          f"{'equal' if not wrong else ', '.join(wrong)} | {'; '.join(said)}")  # fmt: skip
    assert wrong == [], log.read_text()[-3000:]
    if scene != "teacher's stage":
        assert Run(run).status["state"] == "done"
