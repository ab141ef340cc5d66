"""Kills of `kd generate` at random moments: gone on with, it ends with the same files, nothing paid twice.

KILLS=50 pytest -m slow -s tests/test_generation_kills.py   makes so many, and prints a line of each.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from made_teacher import made_teacher

from kdlib.runs.folder import Run

KILLS = int(os.environ.get("KILLS", "3"))
FILES = ("kept.jsonl", "rejected.jsonl", "failed.jsonl", "prompts.jsonl")
MODES = ("plain",) * 6 + ("[429x1]", "[500x1]", "[halfx1]", "[empty]", "[json]", "[500]")
COUNT = 72
AT_ONCE = 4
pytestmark = [pytest.mark.together, pytest.mark.timeout(120 + 30 * KILLS)]


def settings(folder, teacher):
    rows = [{"prompt": f"{MODES[n % len(MODES)]} {n}", "category": "function"} for n in range(COUNT)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    endpoint = {"model": "tiny-teacher", "base_url": f"{teacher.url}/v1"}
    raw = {
        "teacher": {"endpoint": endpoint},
        "prompts": {"from": str(folder / "prompts.jsonl")},
        "limits": {"at_once": AT_ONCE, "retries": 1, "timeout": 5},
        "sampling": {"max_tokens": 200},
        "prices": {"input": 3, "output": 15},
        "budget": {"usd": 5},
    }
    (folder / "made.yaml").write_text(yaml.safe_dump(raw))
    return folder / "made.yaml"


def command(config, *words):
    folders = ["--runs", str(config.parent / "runs"), "--reports", str(config.parent / "reports")]
    words = ["generate", str(config), *folders, *words]
    return subprocess.Popen(
        [sys.executable, "-m", "kdlib", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process):
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


def answered(run: Path) -> set[str]:
    """Keys that the log has an answer for, as whole lines tell."""
    log = run / "answers.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return {entry["key"] for line in lines if (entry := json.loads(line))["event"] == "answered"}


def killed_once(config, teacher, run, moment, number, *, words):
    """Kills it once so many more requests have come; returns whether it was still at work."""
    begun = sum(teacher.tries.values())
    process = command(config, *words)
    while process.poll() is None and sum(teacher.tries.values()) < begun + moment:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL if number % 3 else signal.SIGTERM)
    return ended(process)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path):
    with made_teacher() as teacher:
        config = settings(tmp_path, teacher)
        status, said = ended(command(config, "--name", "whole"))
        assert status == 0, said
        whole = tmp_path / "runs" / "whole"
        assert sorted(set(teacher.paid.values())) == [1]
    chosen, left = random.Random(os.environ.get("SEED", "1")), KILLS
    scene = 0
    while left:
        scene += 1
        with made_teacher() as teacher:
            teacher.seconds = 0.02
            folder = tmp_path / f"scene{scene}"
            folder.mkdir()
            config = settings(folder, teacher)
            run, words, here = folder / "runs" / "one", ("--name", "one"), 0
            for number in range(min(left, 3)):
                moment = chosen.randint(1, 20)
                status, said = killed_once(config, teacher, run, moment, number, words=words)
                assert status == -signal.SIGKILL or (status == 143 and "stopped; go on with kd" in said), said
                words, here = ("--resume", "one"), here + 1
                print(
                    f"scene {scene}, kill {number + 1} after {moment} requests: {len(answered(run))} answers"
                )
            left -= here
            paid, before = dict(teacher.paid), len(answered(run))
            status, said = ended(command(config, "--resume", "one"))
            assert status == 0, said
            for name in FILES:
                assert (run / name).read_bytes() == (whole / name).read_bytes(), name
            twice = {text: times for text, times in teacher.paid.items() if times > 1}
            # what was under way at a kill may have been paid unheard: at most so many a kill
            assert sum(times - 1 for times in twice.values()) <= AT_ONCE * here
            assert sum(teacher.paid.values()) - sum(paid.values()) <= COUNT - before
            spent = json.loads((run / "progress.json").read_text())["spent_usd"]
            bill = sum(
                times * (read * 3 + written * 15) / 1e6
                for text, times in teacher.paid.items()
                for read, written in [
                    teacher.usage(text, teacher.said(text, "empty" if "[empty" in text else ""))
                ]
            )
            assert bill <= spent + 1e-9
            assert Run(run).status["state"] == "done"


def test_a_signal_waits_for_what_is_under_way_and_ends_resumable(tmp_path):
    with made_teacher() as teacher:
        teacher.seconds = 0.3
        config = settings(tmp_path, teacher)
        process = command(config, "--name", "one")
        while sum(teacher.tries.values()) < AT_ONCE + 1:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        status, said = ended(process)
        run = tmp_path / "runs" / "one"
        assert status == 130
        assert "go on with kd generate" in said
        assert "Traceback" not in said
        assert Run(run).status["state"] == "stopped"
        assert len(answered(run)) == sum(teacher.paid.values())
        assert max(teacher.paid.values()) == 1
        assert len((run / "kept.jsonl").read_text().splitlines()) >= AT_ONCE
