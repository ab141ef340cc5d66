"""What trackers are told: the lines of metrics.jsonl, in a run for each student, and nothing of a network
when offline.
"""

import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from made_log import read_metrics
from tiny_training import pieces
from transformers import TrainerCallback

from kdlib.config.run import load, parse
from kdlib.errors import ConfigError
from kdlib.runs import folder as runs
from kdlib.runs.files import StudentFolder
from kdlib.runs.folder import Run
from kdlib.training import run as training, trackers

KEY = "0123456789abcdef" * 2 + "01234567"
SCRIPT = Path(__file__).parent / "tiny_training.py"
NO_TRACKIO = pytest.mark.skipif(
    find_spec("trackio") is None,
    reason="trackio (pip install trackio) needs pillow<13: not in the test extra",
)


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory) -> Path:
    """Trackio reads TRACKIO_DIR once, when imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch, trackio_folder):
    """No settings, keys or folders of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it reads its settings once


def wandb_records(file: Path):
    """An offline run's file: LevelDB's log format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no room for a header: padding
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def told_wandb(run: Run) -> dict[str, dict]:
    # a run that is finished may yet be on its way from wandb's process to its file
    sys.modules["wandb"].teardown()
    told = {}
    for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.HasField("run"):
                one = told.setdefault(record.run.display_name, {"rows": {}, "ids": set()})
                one["ids"].add(record.run.run_id)
                one |= {"group": record.run.run_group, "project": record.run.project}
                one["entity"] = record.run.entity
                one["facts"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.HasField("history"):
                row = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                one["rows"].setdefault(row["_step"], {}).update(
                    {k: v for k, v in row.items() if not k.startswith("_")}
                )
    return told


def told_tensorboard(run: Run) -> dict[str, dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = {}
    for folder in sorted((run.path / "tensorboard").iterdir()):
        events, rows = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload(), {}
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                row = rows.setdefault(event.step, {})
                # nothing else stands in both lines of a step
                assert name not in row or name in ("train/step", "train/epoch")
                row[name] = event.value
        (text,) = events.Tensors("facts/text_summary")[0].tensor_proto.string_val
        facts = json.loads(text.decode().strip("`\n"))
        told[f"{run.name}/{folder.name}"] = {
            "rows": rows,
            "facts": facts,
            "group": run.name,
            "project": "kdlib",
            "ids": {0},
        }
    return told


def told_trackio(run: Run) -> dict[str, dict]:
    from trackio.sqlite_storage import SQLiteStorage

    told = {}
    for record in SQLiteStorage.get_run_records("kdlib"):
        if not record["name"].startswith(f"{run.name}/"):
            continue
        one = told.setdefault(record["name"], {"rows": {}, "ids": set(), "project": "kdlib"})
        one["ids"].add(record["id"])
        config = SQLiteStorage.get_run_config("kdlib", record["name"], run_id=record["id"])
        one |= {
            "group": config["_Group"],
            "facts": {k: v for k, v in config.items() if not k.startswith("_")},
        }
        for row in SQLiteStorage.get_logs("kdlib", record["name"], run_id=record["id"]):
            one["rows"].setdefault(row["step"], {}).update({k: v for k, v in row.items() if "/" in k})
    return told


TOLD = {"wandb": told_wandb, "tensorboard": told_tensorboard, "trackio": told_trackio}
EACH = pytest.mark.parametrize("name", ["wandb", "tensorboard", pytest.param("trackio", marks=NO_TRACKIO)])


def logged(folder: StudentFolder) -> dict[int, dict]:
    """What metrics.jsonl holds, by step."""
    rows = {}
    for line in read_metrics(folder):
        rows.setdefault(line["train/step"], {}).update(
            {name: value for name, value in line.items() if name != "time"}
        )
    return rows


def trained(
    raw_config, run: Run, folder: StudentFolder, label: str, *callbacks: TrainerCallback, **settings
) -> None:
    config = parse({**raw_config, "training": {**raw_config["training"], **settings}})
    weights = {"ce": 1.0} if label == "baseline" else None
    training.train(config, folder, **pieces(config), weights=weights, label=label, callbacks=callbacks)


def same_rows(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for step, figures in one.items():
        assert figures == pytest.approx(other[step], rel=1e-6), step


@EACH
def test_a_tracker_has_the_lines_of_metrics_in_a_run_for_each_student(raw_config, tmp_path, name, capsys):
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    for folder, label in ((run, "kd"), (run.baseline, "baseline")):
        trained(raw_config, run, folder, label, report_to=name, eval_on_start=True)
    told = TOLD[name](run)
    assert set(told) == {"first/kd", "first/baseline"}
    for folder, label in ((run, "kd"), (run.baseline, "baseline")):
        one = told[f"first/{label}"]
        same_rows(one["rows"], logged(folder))
        assert (one["group"], one["project"]) == ("first", "kdlib")
        assert one["facts"]["loss"]["weights"] == {"kd": 0.7, "ce": 0.3}
        assert one["facts"]["training"]["max_steps"] == 12
    assert told["first/kd"]["facts"]["formula"] == "loss = 0.7·T²·KL(teacher ‖ student; T=2) + 0.3·CE"
    assert told["first/baseline"]["facts"]["formula"] == "loss = 1·CE"
    assert told["first/kd"]["ids"].isdisjoint(told["first/baseline"]["ids"]) or name == "tensorboard"
    assert f"{name}: first/kd; " in capsys.readouterr().out


def test_the_olmo2_preset_gives_wandb_the_original_names(raw_config, tmp_path, capsys):
    preset = load("configs/olmo2_fsdp.yaml").as_dict()
    assert preset["loss"]["weights"] == {"ce": 0.5, "kd": 0.5}
    loss = {**raw_config["loss"], "weights": preset["loss"]["weights"], "temperature": 1.0}
    mine = {"entity": "team", "alias": {**preset["trackers"]["alias"], "train/loses": "train/lost"}}
    raw_config = {**raw_config, "loss": loss, "trackers": mine}
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    settings = {"report_to": "wandb", "project": preset["training"]["project"], "run_name": "1B_from_7B"}
    trained(raw_config, run, run, "kd", **settings)
    one = told_wandb(run)["1B_from_7B/kd"]
    assert (one["project"], one["entity"], one["group"]) == ("slm-distillation", "team", "first")
    ours = logged(run)
    for step, row in one["rows"].items():
        same = {theirs: row[theirs] for theirs in mine["alias"] if theirs in row}
        assert same["train/kl_loss"] == pytest.approx(ours[step]["train/kd_loss"], rel=1e-6)
        assert {name: row[name] for name in row if name not in same} == pytest.approx(ours[step], rel=1e-6)
        evaluated = {"eval/kl_loss", "eval/epoch", "eval/step"} if step % 4 == 0 else set()
        assert set(same) == {"train/kl_loss"} | evaluated
        if evaluated:
            assert same["eval/kl_loss"] == pytest.approx(ours[step]["eval/kd_loss"], rel=1e-6)
            assert (same["eval/step"], same["eval/epoch"]) == (step, pytest.approx(ours[step]["train/epoch"]))
    assert (
        capsys.readouterr().out.count("trackers.alias: train/loses: this log has no train/lost; it has") == 1
    )


class Break(TrainerCallback):
    """What a kill leaves: logs after the last checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@EACH
def test_a_resumed_training_goes_on_in_its_trackers_run(raw_config, tmp_path, name):
    run = runs.create(tmp_path / "runs", "resumed", parse(raw_config))
    with pytest.raises(KeyboardInterrupt):
        trained(raw_config, run, run, "kd", Break(), report_to=[name])
    assert list(logged(run)) == [2, 4, 6]
    trained(raw_config, run, run, "kd", report_to=[name])
    told = TOLD[name](run)
    assert set(told) == {"resumed/kd"}
    assert len(told["resumed/kd"]["ids"]) == 1
    same_rows(told["resumed/kd"]["rows"], logged(run))


def test_a_tracker_that_cannot_begin_is_left_behind_aloud(raw_config, tmp_path, capsys):
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    (run.path / "tensorboard").write_text("in the way")
    trained(raw_config, run, run, "kd", report_to=["tensorboard", "wandb"])
    assert run.is_trained
    assert "tensorboard: NotADirectoryError" in (said := capsys.readouterr().out)
    assert "going on without it, metrics.jsonl has every figure" in said
    same_rows(told_wandb(run)["first/kd"]["rows"], logged(run))


def test_a_tracker_that_fails_on_the_way_is_left_behind_aloud(raw_config, tmp_path, monkeypatch, capsys):
    honest = trackers.WandbRun.log

    def lost_at_step_6(self, figures, step):
        if step == 6:
            raise ConnectionError("the line is dead")
        honest(self, figures, step)

    monkeypatch.setattr(trackers.WandbRun, "log", lost_at_step_6)
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    trained(raw_config, run, run, "kd", report_to="wandb")
    assert list(logged(run)) == [2, 4, 6, 8, 10, 12]
    assert capsys.readouterr().out.count("wandb: ConnectionError: the line is dead; going on without it") == 1


def test_wandb_out_of_reach_is_recorded_offline_to_be_sent_later(raw_config, tmp_path, monkeypatch, capsys):
    for name, value in {
        "MODE": "online",
        "API_KEY": KEY,
        "BASE_URL": "http://127.0.0.1:9",
        "INIT_TIMEOUT": "3",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = runs.create(tmp_path / "runs", "first", parse(raw_config))
    trained(raw_config, run, run, "kd", report_to="wandb")
    same_rows(told_wandb(run)["first/kd"]["rows"], logged(run))
    said = capsys.readouterr().out
    assert "wandb: cannot be reached" in said
    assert "send it with: wandb sync " in said
    assert not [file for file in run.path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def test_wandb_without_a_key_is_refused_before_anything_is_written(raw_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(
        ConfigError, match="has no API key; run `wandb login` or .* or record offline with WANDB_MODE=offline"
    ):
        trained(raw_config, None, StudentFolder(tmp_path / "run"), "kd", report_to="wandb")
    assert not (tmp_path / "run").exists()
    (tmp_path / "netrc").write_text(f"machine wandb.example login user password {KEY}\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    trackers.check_key(["wandb"])


class Asked(socketserver.BaseRequestHandler):
    """A proxy that counts who comes, and hangs up."""

    def handle(self):
        self.server.asked += 1


@pytest.fixture
def proxy():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Asked) as server:
        server.asked = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_nothing_is_asked_of_a_network_when_offline(raw_config, tmp_path, proxy):
    """All traffic is sent to a proxy that counts; wandb by itself, online, does ask."""
    raw_config["training"] |= {"report_to": [name for name in trackers.TRACKERS if find_spec(name)]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw_config))
    there = dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), f"http://127.0.0.1:{proxy.server_address[1]}"
    )
    there |= {name.lower(): value for name, value in there.items()}
    kept = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment = {**kept, **there, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "3"}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run"), str(tmp_path / "config.yaml")]
    subprocess.run(
        command, env={**environment, "WANDB_MODE": "offline"}, check=True, timeout=200, capture_output=True
    )
    assert StudentFolder(tmp_path / "run").is_trained
    assert proxy.asked == 0
    command, deadline = [sys.executable, "-c", "import wandb; wandb.init()"], time.monotonic() + 100
    with subprocess.Popen(
        command, env={**environment, "WANDB_MODE": "online"}, cwd=tmp_path, start_new_session=True
    ) as process:
        while not proxy.asked:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
