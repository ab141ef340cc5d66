"""Figures of a run that makes rows show what its files say.

Run: pytest tests/test_plots_generation.py
"""

import json

import pandas as pd
import pytest
from made_log import stands

from kdlib.generation.answers import Answer, AnswerLog, Failure, Usage
from kdlib.plots import generation as plots
from kdlib.plots.axes import png
from kdlib.runs.files import write_json
from kdlib.runs.folder import Run

PROMPTS = [{"prompt": f"p{n}", "category": "bug_fix" if n % 2 else "function"} for n in range(8)]
ENDS = {
    "kept": [PROMPTS[n] | {"response": "x" * 10 * (n + 1)} for n in (0, 1, 2)],
    "rejected": [
        PROMPTS[3] | {"response": "", "reason": "empty"},
        PROMPTS[4] | {"response": "x", "reason": "does not parse: line 1"},
        PROMPTS[6] | {"response": "y", "reason": "does not parse: line 2"},
    ],
    "failed": [PROMPTS[5] | {"reason": "status 500: <b>$x$</b>"}],
}
ASKED = {
    "stage": "answers",
    "prompts": 8,
    "answered": 5,
    "failed": 1,
    "under_way": 2,
    "spent_usd": 0.25,
    "budget_usd": 1.0,
    "by_category": {
        "function": {"prompts": 4, "answered": 3, "failed": 0},
        "bug_fix": {"prompts": 4, "answered": 2, "failed": 1},
    },
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "made")
    made.path.mkdir()
    write_rows(made.path / "prompts.jsonl", PROMPTS)
    for name, rows in ENDS.items():
        write_rows(made.path / f"{name}.jsonl", rows)
    write_json(made.path / "progress.json", ASKED | {name: len(rows) for name, rows in ENDS.items()})
    stands(made, "done")
    return made


def widths(axes):
    """Label → the lengths of its bars."""
    return {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}


def log(path, *events, minutes=None):
    """A log by hand, its events so many minutes after its beginning."""
    start = pd.Timestamp("2026-01-01T00:00:00+00:00")
    minutes = minutes or range(len(events))
    times = [(start + pd.Timedelta(minutes=m)).isoformat() for m in minutes]
    write_rows(path, [event | {"at": at} for event, at in zip(events, times, strict=True)])


def test_bars_are_the_counts_of_rows(run):
    found = plots.generated(run)
    figure = plots.yield_figure(found)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["function", "bug_fix"]
    assert widths(axes) == {"kept": [2, 1], "rejected": [2, 1], "failed": [0, 1], "not answered": [0, 1]}
    assert figure.get_suptitle() == (
        "3 of 7 prompts that were asked gave a row that is kept, the smallest share of bug_fix: 1 of 3"
    )
    assert plots.yield_table(found)["share kept of those asked, 95 %"]["function"].startswith("0.500 [0.")


def test_reasons_are_counted_by_kind_and_the_most_frequent_is_named(run):
    figure = plots.reasons_figure(plots.generated(run))
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["does not parse", "empty", "status 500 (failed)"]
    assert [bar.get_width() for bar in axes.containers[0]] == [2, 1, 1]
    assert figure.get_suptitle() == "3 are rejected and 1 failed, most often for: does not parse"


def test_lengths_are_those_of_answers(run):
    figure = plots.lengths_figure(plots.generated(run))
    assert "half" in figure.get_suptitle().lower()
    assert "20 characters or more, the longest 30" in figure.get_suptitle()
    heights = [sum(bar.get_height() for bar in bars) for bars in figure.axes[0].containers]
    assert heights == [3, 3]


def test_while_it_asks_the_rows_of_before_are_not_shown(run):
    write_json(run.path / "progress.json", ASKED)  # a run that goes on, after rows were written
    stands(run, "running")
    found = plots.generated(run)
    assert found.counts == {"answered": 5, "failed": 1, "not answered": 2}
    left = plots.live_figure(found).axes[0]
    assert widths(left) == {"answered": [3, 2], "failed": [0, 1], "not answered": [1, 1]}
    assert plots.headline(found) == (
        "made  ·  running  ·  answers: 5 answered, 1 failed, 2 not answered  ·  2 under way  ·  "
        "$0.250 of $1.00"
    )


def test_before_anything_is_asked_the_picture_says_so(tmp_path):
    run = Run(tmp_path / "new")
    run.path.mkdir()
    found = plots.generated(run)
    assert plots.headline(found) == "new  ·  nothing asked yet"
    assert plots.figures_of(found) == {}
    assert png(plots.live_figure(found))[1:4] == b"PNG"


def test_the_curve_ends_at_what_the_log_says_was_spent(tmp_path):
    file = tmp_path / "answers.jsonl"
    opened = AnswerLog(file)
    opened.add("asked", key="a", at_most=0.5)
    opened.add_answer("a", Answer("text", "stop", Usage(10, 20), 0.125))
    opened.add("asked", key="b", at_most=0.5)  # a kill, then it is asked again, and lost a try before
    opened.add("asked", key="b", at_most=0.5)
    opened.add("lost", key="b", at_most=0.5)
    opened.add_failure("b", Failure("timed out", 0.25, paid=True))
    opened.add("asked", key="b", at_most=0.5)
    opened.add_answer("b", Answer("text", "stop", Usage(1, 2), 0.0625))
    opened.add("asked", key="c", at_most=0.5)
    opened.add("withdrawn", key="c")
    opened.add("hours", usd=0.03125)
    opened.add("asked", key="d", at_most=1.0)
    last = plots.costs_over_time(file).iloc[-1]
    assert last["usd"] == AnswerLog(file).spent
    assert (last["answers"], last["input"], last["output"]) == (2, 11, 22)
    assert plots.costs_over_time(file, is_over=False)["usd"].iloc[-1] == last["usd"] - 1.0


def test_a_pause_between_sittings_is_left_out_and_a_batch_is_waited_for(tmp_path):
    began = {"event": "began", "stage": "answers"}
    answer = {"event": "answered", "key": "k", "answer": {"text": "", "cost": 0.1}}
    log(tmp_path / "log", began, answer, answer, began, answer, minutes=[0, 2, 3, 1000, 1001])
    assert plots.costs_over_time(tmp_path / "log")["seconds"].tolist() == [0, 120, 180, 180, 240]
    sent = {"event": "batch_sent", "name": "b", "id": "i"}
    log(tmp_path / "batch", began, sent, answer, minutes=[0, 0, 1000])
    assert plots.costs_over_time(tmp_path / "batch")["seconds"].tolist() == [0, 0, 60_000]


def test_names_from_data_are_no_formulas(run):
    rows = [PROMPTS[0] | {"category": "$\\bad$", "reason": "$\\bad$: x", "response": "x"}]
    write_rows(run.path / "rejected.jsonl", rows)
    write_rows(run.path / "prompts.jsonl", rows)
    for figure in plots.figures_of(plots.generated(run)).values():
        assert png(figure)[1:4] == b"PNG"
