"""Two ranks under torchrun, with gloo on the CPU: what they do together is what one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import narrow_student, other_tokens, tiny_experiment
from fsdp_on_cpu import begin_from
from made_experts import folder_of_experts
from safetensors.torch import load_file
from tiny_training import comparable, train_file

from kdlib.config.terms import SPAN_TERMS
from kdlib.routing.student_aware import trained_router

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
ROUTED = {"ce": 0.2, "hidden": 0.5, "route_balance": 0.1, "route_entropy": 0.05, "contrastive": 0.1}
PHASES = [{"until": 0.5, "weights": {"hidden": 0.3}}, {"until": 1.0, "weights": {"hidden": 0.0}}]
FEATURES = ("ce", "hidden", "relational", "contrastive")
# uld has kinks, where rounding decides: see tests/test_training_spans.py, in float64
SMOOTH = [name for name in SPAN_TERMS if name != "uld"]
SAVED = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "optim_args": "momentum=0.9"}
# what is changed in the tiny experiment; where it is `own`, the student has other sizes and an untied head;
# where it has `tokens`, a tokenizer of its own; where `experts`, the teacher has a router that learns
CASES = {
    "tied": {"training": EVALUATED},
    "projections": {
        "own": True,
        "loss": {"weights": WEIGHTS, "curriculum": PHASES},
        "training": {"max_steps": 4, "eval_strategy": "no"},
    },
    "routed": {
        "own": True,
        "loss": {"weights": ROUTED, "features": {"layers": {"route": {"top_k": {"linear": [1, 3]}}}}},
        "training": EVALUATED,
    },
    "untied": {
        "own": True,
        "loss": {"weights": WEIGHTS},
        "training": {"max_steps": 4, "eval_strategy": "no"},
    },
    "spans": {
        "tokens": True,
        "loss": {"weights": {**dict.fromkeys((*SMOOTH, *FEATURES), 0.2), "span_kl": 0.5}},
        "training": EVALUATED,
    },
    "experts": {
        "experts": True,
        "loss": {"weights": {"kd": 0.7, "ce": 0.3}},
        "training": EVALUATED,
    },
    "streamed": {"data": {"streaming": True, "packing": True}, "training": EVALUATED},
    "sharded": {"training": {**EVALUATED, **SAVED, "max_grad_norm": 0.5}},
    "sharded, accumulated": {
        "own": True,
        "loss": {
            "weights": {**WEIGHTS, "hidden": 0.3, "attention": 0.1},
            "features": {"layers": {"route": {"student_layers": "last"}}},
        },
        "training": {"max_steps": 2, "eval_strategy": "no", "activation_checkpointing": True},
    },
}
pytestmark = pytest.mark.together


def settings_of(case: str, plain: dict, narrow: str, other: str, ranks: int) -> dict:
    """The experiment of a case for so many ranks, with as many rows in a step; shared where it says so."""
    students = {"own": {"from": narrow}, "tokens": {"from": other}}
    students["experts"] = {"from": plain["teacher"]["model"]}
    changes = {key: value for key, value in CASES[case].items() if key not in students}
    if "experts" in CASES[case]:
        moe = str(Path(other).with_name("moe"))
        changes["teacher"] = {"model": moe, "experts": {"student_aware": {"balance": 0.5}}}
    student = next((students[key] for key in CASES[case] if key in students), plain["student"])
    # rows of many lengths
    data = {**plain["data"], "packing": False, "max_length": 24, **changes.get("data", {})}
    raw = {**plain, **changes, "data": data, "launch": {"processes": ranks}}
    steps = 2 if "accumulated" in case else 1
    size = {"per_device_train_batch_size": 8 // ranks // steps, "gradient_accumulation_steps": steps}
    training = {**plain["training"], **SGD, **changes["training"], **size, "fsdp": case.startswith("sharded")}
    training["fsdp"] &= ranks > 1
    return {**raw, "student": student, "training": training}


@pytest.fixture(scope="module")
def ranked(teacher_folder, tmp_path_factory) -> Path:
    """A folder with each case trained by two ranks, in CASE/two, and by one process, in CASE/one; and from
    the checkpoint of two ranks that share the models by two, in sharded/again, and by one, in sharded/alone.
    """
    folder = tmp_path_factory.mktemp("ranks")
    plain, narrow = tiny_experiment(teacher_folder, folder), narrow_student(teacher_folder, folder / "narrow")
    other = other_tokens(folder / "other")
    folder_of_experts(teacher_folder, folder / "moe")
    words = [folder / "sharded.json"]
    for case in CASES:
        (folder / case).mkdir()
        for name, ranks in {"one": 1, "two": 2}.items():
            settings = settings_of(case, plain, narrow, other, ranks)
            (folder / case / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        train_file(folder / case / "one", folder / case / "one.yaml")
        words += [folder / case / "two", folder / case / "two.yaml"]
    shared = folder / "sharded"
    for name in ("again", "alone"):
        (shared / name).mkdir()
        (shared / name / "from").write_text(str(shared / "two" / "checkpoints" / "checkpoint-4"))
    words += [shared / "again", shared / "two.yaml", shared / "broken", shared / "broken.yaml"]
    broken = yaml.safe_load((shared / "two.yaml").read_text())
    broken["training"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0}
    (shared / "broken.yaml").write_text(yaml.safe_dump(broken))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "--master_port", "29611", Path(__file__).parent / "ranks.py", *words],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    begin_from(shared / "alone")
    train_file(shared / "alone", shared / "two.yaml")
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
    if "experts" in CASES[case]:
        one, two = (trained_router(ranked / case / name) for name in ("one", "two"))
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-5)


def test_a_step_sharded_by_fsdp2_over_two_processes_is_the_whole_step(ranked):
    differences = json.loads((ranked / "sharded.json").read_text())["gradients"]
    assert set(differences) == {"tied", "untied"}
    assert all(value < 1e-5 for value in differences.values())


def test_a_teacher_that_ranks_share_says_what_the_whole_one_says(ranked):
    """Tied, untied (in the CPU's memory), soft-capped, GPT-2; each rank asks it about rows of its own."""
    found = json.loads((ranked / "sharded.json").read_text())["teachers"]
    assert set(found) == {"tied", "untied", "soft-capped", "GPT-2"}
    for each in found.values():
        assert max(each["logits"], each["hidden"]) < 1e-5
        assert each["held"] < 0.51  # half, and a row more where their number is odd


@pytest.mark.parametrize("name", ["again", "alone"])
def test_a_checkpoint_of_shared_models_goes_on_with_two_ranks_and_with_one(ranked, name):
    """Momentum and all; the two oldest checkpoints are gone, and the student is one whole file."""
    kept = {path.name for path in (ranked / "sharded" / "two" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-6"}
    assert (ranked / "sharded" / "two" / "checkpoints" / "checkpoint-4" / "pytorch_model_fsdp_0").is_dir()
    whole, resumed = (
        load_file(ranked / "sharded" / each / "final_model" / "model.safetensors") for each in ("two", name)
    )
    assert whole.keys() == resumed.keys()
    for weight, tensor in whole.items():
        torch.testing.assert_close(resumed[weight], tensor, rtol=1e-6, atol=1e-6)


def test_ranks_that_share_a_student_stop_together_at_what_is_not_finite(ranked):
    """The second step of a learning rate of 1e30; no rank waits for another, and one report is written."""
    found = json.loads((ranked / "sharded" / "broken" / "nan_report" / "report.json").read_text())
    assert (found["step"], found["who"]) == (2, "gradient")
    assert not list((ranked / "sharded" / "broken" / "checkpoints").glob("*"))
