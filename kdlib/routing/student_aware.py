"""A teacher's router that learns, from what the student says, how its experts speak so that it can follow."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdlib.config.terms import TEMPERATURES
from kdlib.errors import ModelError, RunError
from kdlib.losses.alignment import Counts, SpanSignal, TeacherSignal, alm
from kdlib.losses.buffers import Workspace
from kdlib.losses.chunked import Weighted, differentiable_values, term_sums
from kdlib.losses.divergences import KNOWN
from kdlib.losses.signals import Signal, wide
from kdlib.losses.terms import SoftTargets, cross_entropy
from kdlib.routing.experts import AllExperts, Answer, Augmented, Routing, routers_of, spread
from kdlib.runs.files import synced, writing

FILE = "router.safetensors"


class StudentAware(AllExperts):
    """All experts take part, by a copy of the router that is trained on the student's feedback.

    Before each optimizer step the copy is moved, once, to lower

        KL(teacher ‖ student) + balance · Σ_e E · load_e · share_e + anchor · |w - w0|² / |w0|²

    over the kept tokens of the whole step, the student as it is and without dropout, the experts frozen; the
    teacher's own weights are never written.  Where the paper leaves a choice open:

    - the feedback is forward KL at the temperature of kd, which is what the student pays for what it cannot
      follow; where it follows everywhere nothing moves.  Across tokenizers, whose tokens cannot be compared
      one by one, it is `alm` of the spans;
    - the load of the balance term (Fedus 2021) is of the step before, a number: so the term is a sum over
      tokens, and the same however a step is cut into batches;
    - the anchor holds the copy w to the router w0 as it was made, a relative distance, the mean over routers:
      without one a teacher could say what the student says, and teach nothing;
    - Adam, as routers' gradients differ by orders of magnitude between layers.

    Costs, in each step, one forward pass of the student, and one forward and backward of the teacher.

    Reference: Kim, Chu & Yang 2025, https://arxiv.org/abs/2502.12947
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, balance: float, anchor: float) -> None:
        super().__init__(model)
        self.learning_rate, self.balance, self.anchor = learning_rate, balance, anchor
        self.shares: dict[str, Tensor] | None = None  # [N, E] by router, while it learns
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.weights = {
            name: each.detach().to(wide(each.dtype), copy=True) for name, each in self._own().items()
        }
        self.loads = {
            name: torch.full((router.num_experts,), 1 / router.num_experts, device=router.weight.device)
            for name, router in self.routers.items()
        }
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=self.learning_rate)
        self._begin()

    def changes(self) -> list[tuple[Any, str, Any]]:
        learns = self.shares is not None
        self.leaves = {
            name: nn.Parameter(self.weights[name].to(each.dtype), requires_grad=learns)
            for name, each in self._own().items()
        }
        places = [(name, *name.rpartition(".")) for name in self.leaves]
        parts = [(self.routers[router], part, self.leaves[name]) for name, router, _, part in places]
        return [*super().changes(), *parts]

    def hear(self, tokens: Tensor, name: str, answer: Answer) -> Answer:
        if self.shares is None:
            return super().hear(tokens, name, answer)
        given = spread(answer).index_select(0, tokens)
        self.shares[name] = given / given.sum(-1, keepdim=True)
        return answer

    def feed(
        self,
        ask: Callable[[], TeacherSignal],
        student: Signal,
        targets: Tensor,
        *,
        temperatures: Mapping[str, float],
        count: Tensor | int | Counts,
        workspace: Workspace,
    ) -> None:
        """Take in what a micro-batch of a step says: `step` then moves the router.

        Args:
            ask: asks the teacher about it, with gradient.
            student: what the student says, without.
            temperatures: of the objective's terms.
            count: as of a ledger.
        """
        with self._learning() as shares, torch.enable_grad():
            teacher = ask()
            gap = _gap(student, teacher, targets, temperatures=temperatures, count=count, workspace=workspace)
            tokens = count.tokens if isinstance(count, Counts) else count
            even = [(given @ self.loads[name]).sum() * given.shape[1] for name, given in shares.items()]
            loss = gap + self.balance * torch.stack(even).mean() / tokens
            made = torch.autograd.grad(loss, [*self.leaves.values()], materialize_grads=True)
        for name, gradient in zip(self.leaves, made, strict=True):
            self.gradients[name] += gradient
        for name, given in shares.items():
            self.heard[name] += given.detach().sum(0)

    @torch.no_grad()
    def step(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Move the router by what was fed since the last step, on every rank the same."""
        for (name, weight), own in zip(self.weights.items(), self._own().values(), strict=True):
            pull = (weight - own) / own.float().square().sum().clamp(min=1e-12)
            weight.grad = over_ranks(self.gradients[name]) + 2 * self.anchor / len(self.weights) * pull
        self.optimizer.step()
        for name in self.loads:
            heard = over_ranks(self.heard[name])
            self.loads[name] = heard / heard.sum().clamp(min=1e-12)
        self._begin()

    @property
    def has_learned(self) -> bool:
        return bool(self.optimizer.state)

    def figures(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """And `router_drift`: how far the router has moved, by its own length, mean over routers."""
        moved = [
            (weight - own).norm() / own.float().norm().clamp(min=1e-12)
            for weight, own in zip(self.weights.values(), self._own().values(), strict=True)
        ]
        return {**super().figures(over_ranks), "router_drift": float(torch.stack(moved).mean())}

    def save(self, folder: Path, *, whole: bool = True) -> None:
        """Write router.safetensors, by the names of the teacher's weights; `whole`: to go on from."""
        state = {name: weight.clone() for name, weight in self.weights.items()}
        if whole:
            state |= {f"load.{name}": load for name, load in self.loads.items()}
            for name, weight in self.weights.items():
                moments = self.optimizer.state[weight]
                state |= {f"adam.{kind}.{name}": value for kind, value in moments.items()}
        half_made = folder / f"{FILE}.tmp"
        with writing(half_made):
            save_file({name: each.contiguous().cpu() for name, each in state.items()}, half_made)
            synced(half_made)
            half_made.rename(folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            RunError: it is not there, or is of another teacher.
        """
        state = trained_router(folder)
        if missing := [name for name in self.weights if name not in state]:
            do = "go on with the teacher that this run began with"
            raise RunError(f"{folder / FILE}: has no {missing[0]}, which the teacher has; {do}")
        self.reset()
        for name, weight in self.weights.items():
            weight.copy_(state[name])
            prefix, suffix = "adam.", f".{name}"
            kinds = [key for key in state if key.startswith(prefix) and key.endswith(suffix)]
            moments = {key[len(prefix) : -len(suffix)]: state[key] for key in kinds}
            self.optimizer.state[weight] = {
                kind: value if kind == "step" else value.to(weight.device) for kind, value in moments.items()
            }
        self.loads = {name: state[f"load.{name}"].to(load.device) for name, load in self.loads.items()}

    @contextmanager
    def _learning(self) -> Iterator[dict[str, Tensor]]:
        self.shares = {}
        try:
            yield self.shares
        finally:
            self.shares = None

    def _begin(self) -> None:
        self.gradients = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.heard = {name: torch.zeros_like(load) for name, load in self.loads.items()}

    def _own(self) -> dict[str, Tensor]:
        """The teacher's own routers' weights, by their names in it."""
        return {
            f"{name}.{part}": each
            for name, router in self.routers.items()
            for part, each in router.named_parameters(recurse=False)
        }

    def __str__(self) -> str:
        return f"{super().__str__()}; the router learns from the student (rate {self.learning_rate:g})"


def trained_router(folder: Path) -> dict[str, Tensor]:
    """What a student-aware training left in a folder; a RunError where it left nothing."""
    if not (folder / FILE).exists():
        found = f"found no {FILE} beside the student"
        raise RunError(f"{folder}: {found}; a run with `teacher.experts: {{student_aware: …}}` writes it")
    return load_file(folder / FILE)


def routing_of(model: PreTrainedModel, experts: Any) -> Routing | None:
    """How a config's `teacher.experts` asks this model; None where it is dense.

    Raises:
        ModelError: experts are asked for, and it has none.
    """
    name, settings = experts, None
    if isinstance(experts, dict):
        ((name, settings),) = experts.items()
    if not routers_of(model):
        if name == "topk":
            return None
        raise ModelError(
            f"teacher.experts: found {name}, but {type(model).__name__} has no experts to choose from; leave "
            "it out, or name a teacher that has (Mixtral, Qwen-MoE, OLMoE, …; `kd experts` makes one)"
        )
    if name == "augment":
        return Augmented(model, settings)
    if name == "student_aware":
        return StudentAware(model, **settings)
    return {"topk": Routing, "all": AllExperts}[name](model)


def _gap(
    student: Signal,
    teacher: TeacherSignal,
    targets: Tensor,
    *,
    temperatures: Mapping[str, float],
    count: Tensor | int | Counts,
    workspace: Workspace,
) -> Tensor:
    """KL(teacher ‖ student) of a micro-batch per kept token of the step; gradient flows into the teacher."""
    if not isinstance(teacher, SpanSignal):
        temperature = temperatures.get("kd", 1.0)
        swapped = [Weighted(SoftTargets(KNOWN["reverse_kl"].function), temperature=temperature)]
        how = {"terms": swapped, "count": count, "workspace": workspace}
        return term_sums(teacher, student, targets, **how)[0] / torch.as_tensor(count).clamp(min=1)
    assert isinstance(count, Counts)
    said = -differentiable_values(teacher.said, teacher.targets, cross_entropy, workspace)
    with torch.no_grad():
        ours = -differentiable_values(student, targets, cross_entropy, workspace)
    spans = teacher.alignment.sums(ours, said)
    return alm(*spans, temperatures.get("alm", TEMPERATURES["alm"])).sum() / count.spans
