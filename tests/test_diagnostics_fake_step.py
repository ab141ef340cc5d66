"""A micro-batch without data holds what the same one holds with data."""

import pytest
import torch
from test_diagnostics_memory import parsed, plan_of, raw
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlib.diagnostics.fake_step import Allocations, FakeStep
from kdlib.losses.buffers import FakeWorkspace, Workspace

__all__ = ["raw"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__activation_checkpointing": True},
        {"loss__weights": {"kd": 1.0, "attention": 0.5}},
        {"loss__weights": {"hidden": 1.0, "relational": 0.5}},
        {"data__packing": False},
    ],
)
def test_a_step_without_data_holds_what_the_same_step_holds_with_data(raw, changes):
    plan, peaks = plan_of(parsed(raw, **changes)), []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad()):
        with mode:
            with Allocations():
                step = FakeStep(plan, dtype=torch.float32, workspace=Workspace(64))
            batch = step.batch(4)
            with Allocations() as watch:
                watch.hold(
                    [
                        *step.student.parameters(),
                        *step.student.buffers(),
                        *step.teacher.parameters(),
                    ]
                )
                step.train(batch, step.objectives[-1], count=60, phase=watch.phase)
            peaks.append(
                [sum(block.bytes for block in watch.held(watch.peak(*span))) for span in watch.spans.values()]
            )
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_compiled_arithmetic_is_counted_and_not_run():
    workspace = FakeWorkspace(64, compiled=True, kind="cpu")
    products = torch.zeros(64, 10)
    sums = workspace.sums([None], None, None)(
        products, None, torch.zeros(50, dtype=torch.long), None, torch.ones(1)
    )
    assert sums.tolist() == [0.0]
