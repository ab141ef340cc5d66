"""A checkpoint is gone on from only if every file of it is as it was written; else from the one before."""

import json
import os
import shutil
from pathlib import Path

import pytest

from kdlib.runs.checkpoints import (
    MANIFEST,
    begin,
    checkpoints,
    fault,
    last_whole,
    restore_best,
    seal,
    step_of,
    thin_out,
)
from kdlib.runs.files import StudentFolder

OLD = Path(__file__).parent / "data" / "old_run" / "runs" / "stopped" / "checkpoints" / "checkpoint-6"


def put(folder: StudentFolder, step: int, *, best: str = "", manifest: bool = True) -> Path:
    """A checkpoint of real files, as if made at this step; `best`: what best_model/ holds by then."""
    if best:
        folder.best_model.mkdir(exist_ok=True)
        (folder.best_model / "model.safetensors").unlink(missing_ok=True)  # written anew, never in place
        (folder.best_model / "model.safetensors").write_text(best)
        (folder.best_model / "config.json").write_text(f"{{}} {best}")
    made = folder.checkpoints / f"checkpoint-{step}"
    if manifest:
        begin(made)
    shutil.copytree(OLD, made, dirs_exist_ok=True)
    state = json.loads((made / "trainer_state.json").read_text())
    (made / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    if manifest:
        seal(folder, made)
    return made


@pytest.fixture
def folder(tmp_path) -> StudentFolder:
    made = StudentFolder(tmp_path)
    made.metrics.write_text("{}\n")
    return made


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    """As after a power cut: the length is there, and nothing in it."""
    path.write_bytes(bytes(path.stat().st_size))


FILES = sorted(path.name for path in OLD.iterdir())
ESSENTIAL = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("deed", [Path.unlink, torn, altered, zeroed])
@pytest.mark.parametrize("name", FILES)
def test_whatever_happens_to_a_file_the_checkpoint_before_is_taken_aloud(folder, name, deed):
    put(folder, 4)
    last = put(folder, 8)
    assert last_whole(folder) == (last, [])
    deed(last / name)
    found, said = last_whole(folder)
    assert found.name == "checkpoint-4"
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint-8 is not whole and is passed over: {name} ")


@pytest.mark.parametrize("deed", [Path.unlink, torn, zeroed])
@pytest.mark.parametrize("name", ESSENTIAL)
def test_of_an_older_kdlibs_checkpoints_what_can_be_told_is_told(folder, name, deed):
    put(folder, 4, manifest=False)
    last = put(folder, 8, manifest=False)
    found, said = last_whole(folder)
    assert (found, len(said)) == (last, 1)
    assert said[0].startswith("checkpoint-8 has no manifest.json")
    deed(last / name)
    found, said = last_whole(folder)
    assert found.name == "checkpoint-4"
    assert "checkpoint-8 is not whole and is passed over: " in said[0]


def test_a_shard_that_is_missing_is_found_without_a_manifest(folder):
    made = put(folder, 4, manifest=False)
    (made / "model.safetensors").rename(made / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fault(made) == "model-00002-of-00002.safetensors is missing"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": null}', '{"files": {"x": 1}}', "null"])
def test_a_manifest_that_is_torn_or_was_not_finished_counts_as_no_checkpoint(folder, content):
    put(folder, 4)
    (put(folder, 8) / MANIFEST).write_text(content)
    assert last_whole(folder)[0].name == "checkpoint-4"


def test_what_only_goes_by_a_checkpoints_name_is_passed_over(folder, tmp_path):
    put(folder, 4)
    there = folder.checkpoints
    shutil.copytree(there / "checkpoint-4", there / "checkpoint-8.bak")
    shutil.copytree(there / "checkpoint-4", there / "checkpoint-x")
    (there / "checkpoint-9").write_text("a file")
    (there / "checkpoint-10").symlink_to(tmp_path / "nowhere")
    (there / "checkpoint-11").mkdir()
    (there / "checkpoint-").mkdir()
    (there / "checkpoint-12").mkdir(mode=0o700)
    found, said = last_whole(folder)
    assert found.name == "checkpoint-4"
    assert [line.split()[0] for line in said] == ["checkpoint-12", "checkpoint-11"]


def test_a_link_to_a_checkpoint_elsewhere_is_one_and_what_it_points_to_stays(folder, tmp_path):
    made = put(folder, 4)
    made.rename(tmp_path / "scratch")
    made.symlink_to(tmp_path / "scratch")
    assert last_whole(folder) == (made, [])
    begin(made)
    assert not made.is_symlink()
    assert (tmp_path / "scratch" / "model.safetensors").exists()


def test_a_file_in_a_checkpoints_place_makes_way(folder):
    folder.checkpoints.mkdir()
    (folder.checkpoints / "checkpoint-4").write_text("in the way")
    assert fault(put(folder, 4)) == ""


def test_whole_checkpoints_are_kept_and_damaged_ones_do_not_count(folder):
    for step in (2, 4, 6, 8):
        last = put(folder, step)
    (folder.checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    (folder.checkpoints / "checkpoint-4.bak").mkdir()
    thin_out(folder, last, 3)
    assert [step_of(path) for path in checkpoints(folder)] == [8, 6, 4, 2]
    thin_out(folder, last, 2)
    assert [step_of(path) for path in checkpoints(folder)] == [8, 6]
    thin_out(folder, last, None)
    assert [step_of(path) for path in checkpoints(folder)] == [8, 6]
    assert (folder.checkpoints / "checkpoint-4.bak").exists()


def test_what_was_passed_over_goes_once_training_has_gone_on(folder):
    put(folder, 4)
    altered(put(folder, 8) / "optimizer.pt")
    thin_out(folder, put(folder, 5), 2)
    assert [step_of(path) for path in checkpoints(folder)] == [5, 4]


def test_the_best_model_is_that_of_the_checkpoint(folder):
    first, second = put(folder, 4, best="at 3"), put(folder, 8)
    shutil.rmtree(folder.best_model)
    third = put(folder, 12, best="at 11")
    assert (second / "best_model" / "config.json").read_text() == "{} at 3"
    assert restore_best(folder, third) == ""
    assert restore_best(folder, second) == "best_model/ is again the best up to step 8"
    assert (folder.best_model / "model.safetensors").read_text() == "at 3"
    (folder.best_model / "README.md").write_text("mine")
    assert restore_best(folder, first) == ""
    assert (folder.best_model / "README.md").exists()
    shutil.rmtree(folder.best_model)  # killed while it was replaced
    assert restore_best(folder, third)
    assert (folder.best_model / "config.json").read_text() == "{} at 11"
    assert restore_best(folder, None) == ""
    assert not folder.best_model.exists()


def test_a_best_model_later_than_a_checkpoint_without_one_goes(folder):
    none = put(folder, 4)
    put(folder, 8, best="at 7")
    assert restore_best(folder, none) == "best_model/ is again the best up to step 4"
    assert not folder.best_model.exists()
    assert restore_best(folder, none) == ""


def test_a_best_model_that_was_changed_by_hand_spoils_no_checkpoint(folder):
    made = put(folder, 4, best="at 3")
    (folder.best_model / "model.safetensors").write_text("quantised in place")
    assert last_whole(folder) == (made, [])
    assert restore_best(folder, made) == (
        "checkpoint-4: best_model/model.safetensors has 18 bytes, and 4 were written; "
        "best_model/ stays as it is"
    )


def test_the_best_model_in_a_checkpoint_takes_no_room_of_its_own(folder):
    made = put(folder, 4, best="at 3")
    both = [made / "best_model" / "model.safetensors", folder.best_model / "model.safetensors"]
    assert os.path.samefile(*both)


def test_of_a_checkpoint_without_a_manifest_the_best_model_is_left_as_it_is(folder):
    put(folder, 4, best="at 3")
    assert restore_best(folder, put(folder, 8, manifest=False)) == ""
    assert (folder.best_model / "model.safetensors").read_text() == "at 3"
