"""A run whose files are torn, or of another shape: said of it, with file and remedy, and of no other run."""

import pytest
from made_log import stands

from kdlib.config.run import parse
from kdlib.errors import KdlibError, RunError
from kdlib.reports.index import render_index
from kdlib.reports.summary import UNREADABLE, summaries
from kdlib.runs import folder as runs
from kdlib.runs.processes import lives, this_process
from kdlib.runs.progress import progress

JSON = [f"{name}.json" for name in ("manifest", "status", "plan", "comparison_results")]
FILES = ["config.yaml", "metrics.jsonl", *JSON]
CONTENTS = {
    "empty": b"",
    "a list": b"[1]\n",
    "a number": b"3\n",
    "torn": b'{"a": [\n',
    "no text": b"\xff\xfe\x00\n",
    "other fields": b'{"state": 3, "run": {"a": 1}}\n',
    "too deep": b"[" * 100_000 + b"\n",
}


@pytest.fixture
def root(raw_config, tmp_path):
    root = tmp_path / "runs"
    for name in ("broken", "sound"):
        runs.create(root, name, parse(raw_config))
    return root


def message_of(use) -> str:
    try:
        use()
    except KdlibError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("file", FILES)
def test_a_broken_file_is_named_with_a_remedy_and_harms_no_other_run(root, tmp_path, file, content):
    path = root / "broken" / file
    path.write_bytes(content)
    uses = (lambda: runs.open_run(root, "broken").config, lambda: progress(runs.Run(root / "broken")))
    for message in filter(None, map(message_of, uses)):
        assert str(path) in message
        assert any(remedy in message for remedy in ("delete", "missing", "needed", "bring back"))
    found = {each.name: each for each in summaries(root)}
    assert found["sound"].state == "created"
    if found["broken"].state == UNREADABLE:
        assert file in found["broken"].message
    assert {run.name for run in runs.all_runs(root)} == {"broken", "sound"}
    render_index(root, tmp_path / "reports")
    with pytest.raises(RunError, match="no run 'sonud'.*did you mean 'sound'"):
        runs.open_run(root, "sonud")


@pytest.mark.parametrize("change", [{"pid": 2**40}, {"pid": -1}, {"pid": "x"}, {"pid_started": None}, {}])
def test_a_process_that_is_gone_or_not_told_apart_does_not_run(root, change):
    process = {**this_process(), **change}
    if not change:
        del process["pid_started"]
    assert not lives(process)
    run = runs.Run(root / "sound")
    stands(run, "running", **{"pid_started": None, **process})
    assert run.status["state"] == "died"


def test_a_run_that_was_stopped_within_a_second_of_its_last_line_is_shown_as_stopped(root):
    run = runs.Run(root / "sound")
    run.metrics.write_text('{"train/step": 1, "train/epoch": 0.1, "train/loss": 1.0, "time": "x"}\n')
    stands(run, "stopped", "as asked")
    assert progress(run).state == "stopped"
