import torch
from tiny_training import pieces
from transformers import TrainerState

from kdlib.config.run import parse
from kdlib.runs import log as metrics
from kdlib.runs.files import StudentFolder, read_json
from kdlib.training import run as training
from kdlib.training.callbacks import PlanFile


def test_a_training_follows_its_plan_step_by_step(raw_config, tmp_path):
    changes = {
        "training.warmup_steps": 3,
        "training.lr_scheduler_type": "cosine",
        "training.logging_steps": 1,
        "loss.weights": {"kd": {"linear": [0.2, 0.8]}, "ce": 0.3},
        "loss.temperature": {"linear": [4, 1]},
        "training.save_strategy": "no",
    }
    config, folder = parse(raw_config, changes), StudentFolder(tmp_path / "planned")
    training.train(config, folder, **pieces(config))
    plan, logged = (
        metrics.plan_table(folder).set_index("step"),
        metrics.training_table(folder).set_index("step"),
    )
    assert list(plan.index) == list(logged.index) == list(range(1, 13))
    for column in plan:
        assert torch.allclose(
            torch.tensor(plan[column].to_numpy()), torch.tensor(logged[column].to_numpy()), rtol=1e-6
        ), column
    assert set(plan) == {"learning_rate", "kd_weight", "ce_weight", "temperature"}


def test_a_learning_rate_that_depends_on_the_training_is_not_planned(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    plan = PlanFile(StudentFolder(tmp_path), lambda fraction: {"done": fraction})
    for scheduler, rate in (
        (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), {}),
        (torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)), {"learning_rate": 0.05}),
    ):
        plan.on_train_begin(None, TrainerState(max_steps=2), None, lr_scheduler=scheduler)
        assert read_json(plan.folder.plan)[1] == {"step": 2, "done": 0.5, **rate}
