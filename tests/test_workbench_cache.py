"""`kd cache`, and what else of the workbench knows that a teacher may be asked once."""

import gc
import os
import re
import sys
from contextlib import suppress

import pytest
from made_log import read_metrics
from tiny_training import pieces

from kdlib.cache.shards import Shards
from kdlib.cache.stock import keep
from kdlib.config.run import parse
from kdlib.evaluation import caching
from kdlib.reports import run as reports
from kdlib.runs import folder as runs
from kdlib.tasks import base as tasks
from kdlib.workbench import cli, session


@pytest.fixture
def kd(tmp_path, monkeypatch, capsys):
    """Runs `kd …` on the runs of this test: (exit status, what it said)."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kd", *map(str, words), "--runs", str(tmp_path / "runs")])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code or 0, said.out + said.err

    return call


@pytest.fixture
def loaded(monkeypatch):
    """A list that grows by one where a teacher is loaded."""
    found, honest = [], tasks.load_teacher
    monkeypatch.setattr(tasks, "load_teacher", lambda *a, **o: (found.append(a), honest(*a, **o))[1])
    return found


def caches(tmp_path):
    return sorted(path.parent for path in tmp_path.glob("runs/.signals/*/cache.json"))


def test_kd_cache_asks_once_says_what_it_kept_and_finds_what_is_damaged(kd, config_file, tmp_path, loaded):
    command = ("cache", config_file, "--check")
    status, said = kd(*command)
    assert status == 0, said
    (folder,) = caches(tmp_path)  # hidden states are exact: those of held-out rows lie beside the others
    found = Shards(folder)
    assert len(found) == sum(note["rows"] for note in found.notes) > 20
    line = f"{folder.name}: hidden, {len(found)} rows, {found.tokens:,} tokens"
    assert line in said
    assert "every byte is as it was written" in said
    each = sum(note["bytes"] for note in found.notes) / found.tokens
    assert f"{each:.1f} bytes a token, and the teacher's head" in said
    assert len(loaded) == 2  # for the training's rows, and for the held-out ones

    assert kd(*command)[0] == 0
    assert len(loaded) == 2  # nothing is missing

    assert kd("cache", config_file, "-o", "loss.top_k=8")[0] == 0
    assert [path.name.split("_")[1] for path in caches(tmp_path)] == ["hidden", "top"]

    path = folder / found.notes[0]["file"]
    content = path.read_bytes()
    path.write_bytes(
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    )
    status, said = kd(*command)
    assert status == 1
    assert re.search(rf"kd: .*damaged are {path.name}.*delete it", said)


def test_kd_cache_refuses_what_no_cache_serves_before_anybody_is_asked(kd, config_file, loaded, tmp_path):
    for override, expected in (
        ("teacher=null", "needs a teacher, and there is none"),
        ("loss.weights={kd: 1, attention: 0.5}", "loss.weights.attention looks at is not kept"),
        ("teacher.cache=topk", "teacher.cache.form: found 'topk'"),
        ("loss={weights: {kd: 1}, top_k: 8, temperature: {linear: [4, 1]}}", "takes 12 values in 12 steps"),
        ("data.source=missing.jsonl", "missing.jsonl: no such file"),
    ):
        status, said = kd("cache", config_file, "-o", override, "-o", "baseline=null")
        assert (status, expected in said, "Traceback" in said) == (1, True, False), said
    assert not loaded
    assert not caches(tmp_path)


def test_kd_clean_lists_caches_and_deletes_those_that_nobody_uses(kd, config_file, tmp_path):
    assert "no caches" in kd("clean", "--caches")[1]
    assert kd("clean")[0] == 1
    for override in ("loss.top_k=8", "loss.samples=4"):
        assert kd("cache", config_file, "-o", override)[0] == 0
    exact, samples, likeliest = caches(tmp_path)
    (likeliest / "notes.txt").write_text("mine")
    gc.collect()
    used = Shards(samples)
    keep(used)
    for words in (["--caches"], ["--caches", "--yes"]):
        status, said = kd("clean", *words)
        assert status == 0
        lines = {line.split()[0]: line for line in said.splitlines() if "tiny-teacher" in line}
        assert len(lines) == 3
        assert [name for name, line in lines.items() if line.endswith("in use")] == [samples.name]
        assert re.search(rf" samples +{len(used)} +0.\d+ +20\d\d-\d\d-\d\d \d\d:\d\d", lines[samples.name])
        assert ("2 of 3 deleted" in said) == ("--yes" in words)
    assert caches(tmp_path) == [samples]
    assert not exact.exists()
    assert [path.name for path in likeliest.iterdir()] == ["notes.txt"]
    del used
    assert "1 of 1 deleted" in kd("clean", tmp_path / "runs" / ".signals", "--caches", "--yes")[1]


@pytest.mark.slow
def test_a_run_that_asks_its_teacher_once_goes_to_its_report_and_trains_without_it(
    raw_config, narrow, tmp_path, loaded
):
    teacher = {**raw_config["teacher"], "cache": True}
    run = runs.create(
        tmp_path / "runs", "run", parse({**raw_config, "student": {"from": narrow}, "teacher": teacher})
    )
    bench = session.Workbench(run)
    said = bench.setup()[""]["teacher asked once"]
    bench.doctor()
    bench.dry_run()
    (folder,) = caches(tmp_path)
    (expected,) = re.findall(rf"{folder.name}, (.*) MB before it is compressed", said)
    assert float(expected) == pytest.approx(2 * 32 * Shards(folder).tokens / 1e6, abs=0.06)
    asked = len(loaded)
    again = session.Workbench(run)
    again.train()
    again.train_baseline()
    assert len(loaded) == asked
    for student in (run, run.baseline):
        assert len([row for row in read_metrics(student) if "eval/kl_to_teacher" in row]) == 3
    assert again.compare()["models"]["distilled"]["kl_to_teacher"]["value"] > 0
    assert "cannot be read whole" not in reports.render(run, tmp_path / "reports").read_text()


def test_of_two_processes_that_need_the_same_cache_at_once_one_asks(raw_config, tmp_path):
    """As two trials of a sweep do."""
    config = parse({**raw_config, "teacher": {**raw_config["teacher"], "cache": "top_k"},
                    "loss": {**raw_config["loss"], "top_k": 8}})  # fmt: skip
    made = pieces(config)
    asked = tmp_path / "asked"

    def load():
        with asked.open("a") as file:
            file.write("once\n")
        return made["teacher"]

    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                found = caching.in_training(config, made["prepared"], tmp_path / "runs", load)
                os._exit(0 if len(found.taught.shards) else 1)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert asked.read_text().split() == ["once"] * 2  # about the training's rows, and the held-out ones
