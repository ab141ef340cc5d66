"""metrics.jsonl: read on as it grows, thinned without losing a spike; the time that a training took."""

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from made_log import evaluated, logged, logged_run, read_metrics
from made_runs import made_run

from kdlib.errors import RunError
from kdlib.plots.axes import few_rows, thinned
from kdlib.reports.index import render_index
from kdlib.reports.run import render
from kdlib.runs import log as metrics
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.runs.log import Tail, append_metrics, duration, time_left
from kdlib.runs.progress import seconds_taken

MADE_AT = 1.8e9


def lines(*seconds: float) -> pd.DataFrame:
    """A line so many seconds after the training began, each."""
    times = [pd.Timestamp(MADE_AT + each, unit="s", tz="Europe/Berlin").isoformat() for each in seconds]
    return pd.DataFrame({"step": range(len(times)), "time": times})


def test_a_training_in_two_sittings_took_no_night():
    first, second = (0, 10, 20, 30), (28_830, 28_840, 28_850, 28_860)  # eight hours between
    assert seconds_taken(lines(*first, *second)) == 70
    assert seconds_taken(lines(0, 28_800, 28_810)) == 20


def test_a_long_evaluation_is_no_pause():
    train, evaluation = lines(0, 1, 2, 503, 504, 1005), lines(502, 1004)
    assert seconds_taken(train, evaluation) == 1005
    assert seconds_taken(train) < 100  # it cannot be told from a pause without its line


def test_a_minute_in_a_training_of_short_steps_is_no_pause():
    assert seconds_taken(lines(0, 0, 1, 1, 30, 31)) == 31


@pytest.mark.parametrize("train", [pd.DataFrame(), lines(3), pd.DataFrame({"step": [1, 2]})])
def test_lines_that_do_not_tell_a_time_have_none(train):
    assert seconds_taken(train) is None


def test_the_lines_of_a_file_have_their_time(tmp_path):
    folder, own = StudentFolder(tmp_path), lines(0, 60)["time"]
    rows = [
        {"train/step": 1, "train/epoch": 0.5, "train/loss": 1.0, "time": own[0]},
        {"train/step": 1, "train/epoch": 0.5, "eval/loss": 1.0, "time": own[0]},
        {"train/step": 2, "train/epoch": 0.5, "train/loss": 1.0, "time": own[1]},
    ]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tail = Tail(folder)
    assert seconds_taken(tail.train, tail.evaluation) == 60


def test_what_is_left_goes_by_the_pace_of_what_is_done():
    assert time_left(30.0, 10, 5) == 15.0
    assert time_left(30.0, 0, 5) is None


@pytest.mark.parametrize(("seconds", "words"), [(45.2, "45 s"), (720, "12 min"), (12_600, "3.5 h")])
def test_a_duration_has_the_unit_that_one_would_say(seconds, words):
    assert duration(seconds) == words


@pytest.fixture
def run(raw_config, tmp_path) -> Run:
    return logged_run(raw_config, tmp_path)


def test_a_planted_spike_survives_sampling_in_every_curve():
    curves = np.random.default_rng(0).normal(size=(3, 100_000))
    spikes = {0: (4_321, 50.0), 1: (77_777, -60.0), 2: (99_998, 70.0)}
    for curve, (position, value) in spikes.items():
        curves[curve, position] = value
    kept = thinned(curves)
    assert len(kept) < 1100
    assert {0, 99_999, 4_321, 77_777, 99_998} <= set(kept)
    assert (np.diff(kept) > 0).all()


def test_short_curves_are_drawn_whole_and_an_empty_one_too():
    assert thinned(np.arange(1000.0)).tolist() == list(range(1000))
    assert len(thinned(np.array([]))) == 0


def test_sampling_keeps_where_values_end_to_be_finite():
    curve = np.ones(10_000)
    curve[5_000:5_500], curve[7_000] = np.nan, np.inf
    assert {5_000, 5_500, 7_000, 7_001} <= set(thinned(curve))


def test_a_tail_read_in_pieces_is_the_file_read_at_once(run):
    whole = run.metrics.read_bytes()
    piecewise = StudentFolder(run.path / "piecewise")
    piecewise.path.mkdir()
    tail = Tail(piecewise)
    assert not tail.read()
    for start in range(0, len(whole), 97):  # lines are torn nearly everywhere
        with piecewise.metrics.open("ab") as file:
            file.write(whole[start : start + 97])
        tail.read()
    at_once = Tail(run)
    assert tail.train.equals(at_once.train)
    assert tail.evaluation.equals(at_once.evaluation)
    assert tail.figures == at_once.figures > 100
    assert not tail.read()


def test_a_torn_line_waits_for_its_rest(run):
    tail, line = Tail(run), json.dumps(logged(11))
    with run.metrics.open("a") as file:
        file.write(line[:40])
    assert not tail.read()
    with run.metrics.open("a") as file:
        file.write(line[40:] + "\n")
    assert tail.read()
    assert tail.train["step"].tolist() == list(range(1, 12))


def test_a_file_cut_for_a_training_that_goes_on_is_read_anew(run):
    tail = Tail(run)
    metrics.cut_metrics(run, 6)
    assert tail.read()
    assert tail.train["step"].tolist() == [1, 2, 3, 4, 5, 6]
    metrics.cut_metrics(run, 4)
    for step in range(5, 30):  # longer than before when it is looked at again
        append_metrics(run, logged(step, kd_loss=9.0))
    assert tail.read()
    assert tail.train["kd_loss"].tolist()[3:5] == [1.0, 9.0]


@pytest.mark.parametrize("line", ["{oops}", "null", "[1]", "step,loss"])
def test_a_line_that_is_no_json_is_named_as_such(run, line):
    tail = Tail(run)
    with run.metrics.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(RunError, match=r"metrics.jsonl: found a line that is no JSON .*delete it"):
        tail.read()


def test_a_thinned_curve_keeps_its_peaks_and_what_is_not_finite():
    values = np.linspace(2, 1, 100_000)
    values[54_321], values[70_000], values[90_000] = 99.0, -99.0, np.nan
    kept = thinned(values, points=120)
    assert len(kept) <= 130
    assert {54_321, 70_000, 90_000, 0, 99_999} <= set(kept)


def test_metrics_survive_a_torn_line_and_are_cut_to_a_step(tmp_path):
    folder = StudentFolder(tmp_path)
    for step in (1, 2, 3):
        metrics.append_metrics(folder, {"train/step": step, "train/loss": 0.5})
    with folder.metrics.open("a") as file:
        file.write('{"train/step": 4, "tra')  # a kill in the middle of a write
    metrics.cut_metrics(folder, 2)
    metrics.append_metrics(folder, {"train/step": 3})
    assert [line["train/step"] for line in read_metrics(folder)] == [1, 2, 3]


def test_a_disk_that_is_full_says_so(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="No space left on device; free some space, then go on with --resume"):
        metrics.append_metrics(StudentFolder(tmp_path), {"train/step": 1})


def long_log(folder: StudentFolder, lines: int) -> None:
    with folder.metrics.open("w") as file:
        for step in range(1, lines + 1):
            file.write(json.dumps(logged(step, steps=lines)) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps(evaluated(step)) + "\n")


def test_a_report_and_the_index_after_it_parse_a_log_once(tmp_path, monkeypatch):
    run, parsed, parse = made_run(tmp_path / "runs", "long"), [], metrics.pyarrow.json.read_json
    long_log(run, 20_000)

    def counted(source, **form):
        parsed.append(source.size())
        return parse(source, **form)

    monkeypatch.setattr(metrics.pyarrow.json, "read_json", counted)
    page = render(run, tmp_path / "reports")
    render_index(tmp_path / "runs", tmp_path / "reports")
    assert sum(parsed) == run.metrics.stat().st_size + run.baseline.metrics.stat().st_size
    assert max(parsed) < 5e6 < sum(parsed)  # block by block
    rows = (page.parent / "tables" / "metrics.csv").read_text().splitlines()
    assert rows[1].startswith("0,1,")
    assert rows[-1].startswith("19999,20000,")
    assert len(rows) < 2000


def test_a_table_with_few_rows_keeps_ends_and_spikes():
    table = pd.DataFrame({"loss": np.ones(50_000), "norm": np.arange(50_000.0), "time": "now"})
    table.loc[31_415, "loss"] = 9.0
    assert {0, 31_415, 49_999} <= set(few_rows(table).index)
    assert few_rows(table[:1000]).equals(table[:1000])


def test_cutting_a_log_holds_a_line_at_a_time_and_writes_nothing_where_nothing_is_after_the_step(tmp_path):
    folder = StudentFolder(tmp_path)
    long_log(folder, 20_000)
    whole, before = folder.metrics.read_bytes(), folder.metrics.stat()
    tracemalloc.start()
    metrics.cut_metrics(folder, 10_000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < len(whole)
    kept = folder.metrics.read_bytes()
    assert whole.startswith(kept)
    assert read_metrics(folder)[-1]["train/step"] == 10_000
    after = folder.metrics.stat()
    assert after.st_ino != before.st_ino
    metrics.cut_metrics(folder, 10_000)
    assert (folder.metrics.stat().st_ino, folder.metrics.stat().st_mtime_ns) == (
        after.st_ino,
        after.st_mtime_ns,
    )


def test_a_step_that_logged_both_kinds_is_kept_and_a_line_without_a_step_is_named(tmp_path):
    folder = StudentFolder(tmp_path)
    folder.metrics.write_text(
        '{"train/step": 1}\n{"train/step":2, "train/loss": 1.0}\n\n{"train/step": 12}\n'
    )
    metrics.cut_metrics(folder, 2)
    assert [line["train/step"] for line in read_metrics(folder)] == [1, 2]
    folder.metrics.write_text('{"train/loss": 1.0}\n')
    for read in (Tail, lambda folder: metrics.cut_metrics(folder, 2)):
        with pytest.raises(RunError, match="found a line .*train/step is missing.*; delete it"):
            read(folder)


def test_a_table_once_given_stays_as_it_was_when_the_log_grows(run):
    before = metrics.tail_of(run)
    append_metrics(run, logged(11))
    assert len(metrics.training_table(run)) == 11
    assert len(before.train) == 10
