"""Two ranks under torchrun, with gloo on the CPU: what they do together is what one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import narrow_student, tiny_experiment
from safetensors.torch import load_file
from tiny_training import comparable, train_file

SGD = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
}
EVALUATED = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}
WEIGHTS = {"kd": 0.5, "ce": 0.2, "relational": 0.1}
PHASES = [{"until": 0.5, "weights": {"hidden": 0.3}}, {"until": 1.0, "weights": {"hidden": 0.0}}]
# what is changed in the tiny experiment; the last two have a student of other sizes, with an untied head
CASES = {
    "tied": {"training": EVALUATED},
    "projections": {
        "loss": {"weights": WEIGHTS, "curriculum": PHASES},
        "training": {"max_steps": 4, "eval_strategy": "no"},
    },
    "untied": {"loss": {"weights": WEIGHTS}, "training": {"max_steps": 4, "eval_strategy": "no"}},
}
pytestmark = pytest.mark.together


@pytest.fixture(scope="module")
def ranked(teacher_folder, tmp_path_factory) -> Path:
    """A folder with each case trained by two ranks, in CASE/two, and by one process, in CASE/one."""
    folder = tmp_path_factory.mktemp("ranks")
    plain, narrow = tiny_experiment(teacher_folder, folder), narrow_student(teacher_folder, folder / "narrow")
    words = [folder / "sharded.json"]
    for name, changes in CASES.items():
        (folder / name).mkdir()
        # rows of many lengths
        raw = {**plain, **changes, "data": {**plain["data"], "packing": False, "max_length": 24}}
        raw["student"] = plain["student"] if name == "tied" else {"from": narrow}
        for ranks, size in {"one": 8, "two": 4}.items():
            training = {
                **plain["training"],
                **SGD,
                **changes["training"],
                "per_device_train_batch_size": size,
            }
            (folder / name / f"{ranks}.yaml").write_text(yaml.safe_dump({**raw, "training": training}))
        train_file(folder / name / "one", folder / name / "one.yaml")
        words += [folder / name / "two", folder / name / "two.yaml"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29611",
    ]
    done = subprocess.run(
        [*torchrun, Path(__file__).parent / "ranks.py", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(ranked, case):
    """The same final weights, logged losses and evaluation.

    The second phase of `projections` has no term that is projected: DDP must not wait for the projections'
    gradients.
    """
    one, two = (
        load_file(ranked / case / name / "final_model" / "model.safetensors") for name in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6)
    for line, other in zip(comparable(ranked / case / "one"), comparable(ranked / case / "two"), strict=True):
        assert other == pytest.approx(line, rel=1e-5)


def test_a_step_sharded_by_fsdp2_over_two_processes_is_the_whole_step(ranked):
    differences = json.loads((ranked / "sharded.json").read_text())
    assert set(differences) == {"tied", "untied"}
    assert all(value < 1e-5 for value in differences.values())
