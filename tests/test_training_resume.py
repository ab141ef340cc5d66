"""A training that was stopped or killed ends as if nothing had been, wherever it was."""

from pathlib import Path

import pytest
from tiny_training import comparable, pieces
from transformers import TrainerCallback

from kdlib.config.run import parse
from kdlib.errors import Stopped
from kdlib.runs.files import StudentFolder
from kdlib.training import run as training
from kdlib.training.run import train

EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 80, "logging_steps": 2}


class Killed(BaseException):
    """Stands for kill -9: no one catches it."""


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, deed) -> None:
        self.step, self.deed = step, deed

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.deed()


def trained(raw, folder: Path, *, callbacks=(), early_stopping=None, **changes):
    config = parse({**raw, "early_stopping": early_stopping, "training": {**raw["training"], **changes}})
    return train(config, StudentFolder(folder), callbacks=callbacks, **pieces(config))


def killed(deed, *args, **options) -> None:
    with pytest.raises(Killed):
        deed(*args, **options)


def dies(*args, **options):
    raise Killed


def same(one: Path, other: Path, *, lines: bool = True) -> None:
    """Weights, best model and log are those of an undisturbed training."""
    for model in ("best_model", "final_model"):
        assert (one / model / "model.safetensors").read_bytes() == (
            other / model / "model.safetensors"
        ).read_bytes(), model
    if lines:
        assert comparable(one) == comparable(other)


@pytest.mark.parametrize("save_steps", [2, 3, 4], ids=["at every evaluation", "between", "at the stop"])
def test_a_training_killed_after_its_early_stop_does_not_train_on(
    raw_config, tmp_path, monkeypatch, save_steps
):
    how = {"early_stopping": {"patience": 1}, "learning_rate": 0.0, "eval_steps": 2, "save_steps": save_steps}
    trained(raw_config, tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_finish", dies)
        killed(trained, raw_config, tmp_path / "killed", **how)
    again = trained(raw_config, tmp_path / "killed", **how)
    assert again.state.global_step == 4
    same(tmp_path / "whole", tmp_path / "killed")


def test_an_evaluation_at_an_epochs_end_is_in_the_checkpoint_of_that_step(raw_config, tmp_path, monkeypatch):
    """Saved by steps and evaluated by epochs: the checkpoint waits for the evaluation."""
    how = {**EPOCHS, "eval_strategy": "epoch", "save_steps": 1}
    whole = trained(raw_config, tmp_path / "whole", **how)
    per_epoch = whole.state.max_steps // 2
    with monkeypatch.context() as patch:
        patch.setattr("kdlib.training.trainer.DistillationTrainer.evaluate", dies)
        killed(trained, raw_config, tmp_path / "killed", **how)
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "killed/checkpoints").iterdir())
    assert saved[-1] == per_epoch - 1
    trained(raw_config, tmp_path / "killed", **how)
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("step", [2, 3], ids=["within an epoch", "at its end"])
def test_a_stop_adds_no_evaluation_that_an_undisturbed_training_has_not(raw_config, tmp_path, step):
    how = {**EPOCHS, "eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 3}
    whole = trained(raw_config, tmp_path / "whole", **how)
    assert whole.state.max_steps == 9
    stop = At(step, lambda: (tmp_path / "stopped" / "STOP").touch())
    with pytest.raises(Stopped, match=f"stopped at step {step} with a checkpoint"):
        trained(raw_config, tmp_path / "stopped", callbacks=[stop], **how)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == [f"checkpoint-{step}"]
    units = tmp_path / "stopped" / "evaluations"
    units.mkdir(exist_ok=True)
    (units / "99.npz").touch()  # of a step whose log line goes too
    trained(raw_config, tmp_path / "stopped", **how)
    assert {path.name for path in units.iterdir()} == {"3.npz", "6.npz", "9.npz"}
    same(tmp_path / "whole", tmp_path / "stopped", lines=False)
    evaluations = [
        [line for line in comparable(tmp_path / name) if "eval/loss" in line] for name in ("whole", "stopped")
    ]
    assert evaluations[0] == evaluations[1]
