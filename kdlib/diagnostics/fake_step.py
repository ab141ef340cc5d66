"""What one micro-batch of a config holds in memory, tensor by tensor, without its weights or its data.

Under a FakeTensorMode tensors have shapes and no data, so that a step of any size runs through its real code
in a second, and every tensor that it would make is seen; what a kernel needs inside itself is not.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from kdlib.losses.alignment import SPANS, Counts, TeacherSignal, spans_in
from kdlib.losses.buffers import Workspace
from kdlib.losses.objective import ObjectiveAt, eval_terms, ledger, row_sums
from kdlib.losses.signals import FOUND, Kept, Signal, kept, mean_of
from kdlib.models.heads import stated_form
from kdlib.models.sharing import GATHERED, SENT, held_here
from kdlib.models.teacher import beside, insides, signal_of
from kdlib.routing.experts import Routing
from kdlib.routing.gates import compared_layers
from kdlib.routing.student_aware import StudentAware, routing_of
from kdlib.students.student import Outline
from kdlib.tokens.vocabulary import vocabulary_sizes
from kdlib.training.plan import objective_of

PHASES = ("teacher's router", "student's forward", "teacher's forward", "loss", "backward")
FRACTIONS = 20  # of the training, at which the objective is looked at
NEVER = 2**62
ATEN = torch.ops.aten

Batch, Phase = Mapping[str, Tensor], Callable[[str], AbstractContextManager]


@dataclass
class Block:
    """The storage of a tensor, and of all its views."""

    bytes: int
    born: int  # both in births and deaths of blocks, counted from the start
    died: int
    phase: str  # in which it was born
    shape: tuple[int, ...]  # of the first tensor seen in it
    what: str = ""  # where that is known


class Allocations(TorchDispatchMode):
    """Notes when each storage is made and freed while it is active, of real tensors or of fake ones.

    Whole numbers that have data keep it even under a FakeTensorMode, so that code that asks for token ids,
    masks or positions takes its usual turns.  Of models that ranks share it sees what this rank holds.
    """

    def __init__(self, answer: float = 1.0, *, gloo: bool = False) -> None:
        """`answer`: what a number without data is taken to be where code asks for it; `gloo`: it sends."""
        super().__init__()
        self.answer, self.gloo, self.now, self.current = answer, gloo, 0, ""
        self.blocks: list[Block] = []
        self.spans: dict[str, tuple[int, int]] = {}  # phase -> when it began and ended, the last time
        self._known: dict[int, tuple[Block, weakref.ref]] = {}  # by the storage's address, while it lives

    def __enter__(self):
        usual = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            usual(storage, size)
            self._resized(storage)

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *raised):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*raised)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Blocks born inside bear this name."""
        before, began, self.current = self.current, self.now, name
        try:
            yield
        finally:
            self.current = before
            self.spans[name] = (began, self.now)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Take these for known, without counting them: parameters, counted by themselves."""
        for block in self.blocks_of(tensors):
            block.bytes = 0

    def blocks_of(self, tensors: Iterable[Tensor]) -> list[Block]:
        """Those in which these tensors lie."""
        return [self._note(held_here(tensor)) for tensor in tensors]

    def peak(self, begin: int, end: int) -> int:
        """When in a span most is held."""
        changes = [0] * (self.now + 1)
        for block in self.blocks:
            changes[block.born] += block.bytes
            if block.died < NEVER:
                changes[block.died] -= block.bytes
        return max(range(begin, end + 1), key=list(accumulate(changes)).__getitem__)

    def held(self, time: int) -> list[Block]:
        return [block for block in self.blocks if block.born <= time < block.died and block.bytes]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:  # asks again with this rank's part
            return NotImplemented
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in given)
        if function is ATEN._local_scalar_dense.default and is_fake:
            kind = given[0].dtype
            return True if kind is torch.bool else self.answer if kind.is_floating_point else int(self.answer)
        if function is ATEN._grouped_mm.default and is_fake:  # whose rule for shapes knows bfloat16 alone
            made = _grouped_product(*args[:3])
        elif function.name() == "_c10d_functional::wait_tensor":  # whose rule for shapes makes a copy
            made = args[0]
        else:
            whole = given and not any(is_fake or tensor.is_floating_point() for tensor in given)
            with unset_fake_temporarily() if whole else nullcontext():
                made = function(*args, **(kwargs or {}))
        self.blocks_of(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        self._pass(function.name(), args, kwargs or {}, made)
        return made

    def _pass(self, operator: str, args: Sequence[Any], named: Mapping[str, Any], made: Any) -> None:
        """Say what it is that passes between ranks; gloo has a copy of it while it sends."""
        passing = {"fsdp::split_with_sizes_copy": (GATHERED, named.get("out", ()))}
        passing |= {"fsdp::chunk_cat": ("gradients", args[0] if args else ())}
        if sent := SENT.get(operator):
            what, number = sent
            tensor = made if number is None else args[number]
            passing[operator] = (what, [tensor])
            if self.gloo:
                self.now += 2
                copy = Block(tensor.nbytes, self.now - 1, self.now, self.current, (), "gloo's copies")
                self.blocks.append(copy)
        what, tensors = passing.get(operator, ("", ()))
        for block in self.blocks_of(tensors):
            block.what = what

    def _note(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._begin(storage, tuple(tensor.shape))
        return self._known[storage._cdata][0]

    def _begin(self, storage: torch.UntypedStorage, shape: tuple[int, ...], what: str = "") -> None:
        self.now += 1
        block, address = Block(storage.nbytes(), self.now, NEVER, self.current, shape, what), storage._cdata
        self.blocks.append(block)
        self._known[address] = (block, weakref.ref(storage, lambda _: self._free(address)))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP alone does so: it gives a gathered weight its memory, and takes it back."""
        if storage._cdata in self._known:
            self._free(storage._cdata)
        if storage.nbytes():
            self._begin(storage, (), GATHERED)

    def _free(self, address: int) -> None:
        self.now += 1
        self._known.pop(address)[0].died = self.now


def _grouped_product(left: Tensor, right: Tensor, ends: Tensor | None) -> Tensor:
    """What a product of groups of rows, as experts make them, gives: without values."""
    groups = () if left.ndim != right.ndim else (left.shape[0] if left.ndim == 3 else len(ends),)
    return left.new_empty(*groups, left.shape[-2], right.shape[-1])


class FakeStep:
    """Student and teacher of an outline, made in whatever mode is active, and a micro-batch of theirs."""

    def __init__(
        self,
        plan: Outline,
        *,
        dtype: torch.dtype,
        workspace: Workspace,
        dense: bool = False,
        shared: Callable[[PreTrainedModel, PreTrainedModel | None], None] | None = None,
    ) -> None:
        """`dtype`: of products and teacher; `dense`: all logits at once; `shared` leaves a rank's part."""
        self.plan, self.dtype, self.workspace = plan, dtype, workspace
        self.student, self.teacher = plan.blank_student(dtype), plan.blank_teacher(dtype)
        self.objective = objective_of(plan.config, student=self.student)
        self.forms, self.pairs = [None if dense else stated_form(self.student), None], ()
        if self.teacher:
            self.forms[1] = stated_form(self.teacher.requires_grad_(False))
            with torch.random.fork_rng(devices=[]):  # `compared_layers` seeds it
                self.pairs = compared_layers(plan.config, self.student, self.teacher, self.objective)
        if shared:
            shared(self.student, self.teacher)
        self.routing = routing_of(self.teacher, plan.config.teacher.experts) if self.teacher else None
        if self.forms[0] is None and dtype is not torch.float32:
            self.student.forward = convert_outputs_to_fp32(self.student.forward)  # accelerate does so
        training, kinds = plan.config.training, ("activation_checkpointing", "gradient_checkpointing")
        if any(training.get(kind) for kind in kinds):
            asked = next(filter(None, (training.get(f"{kind}_kwargs") for kind in kinds)), {})
            # there is no dropout whose random numbers are to be repeated
            options = {"use_reentrant": False, **asked, "preserve_rng_state": False}
            every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
            self.student.activation_checkpointing_enable(options, every_n_layers=every, offload=offload)

    @cached_property
    def objectives(self) -> list[ObjectiveAt]:
        """The objective wherever in training it asks the models for something else, with the most terms."""
        found: dict[tuple, ObjectiveAt] = {}
        for at in (self.objective.at(number / FRACTIONS) for number in range(FRACTIONS + 1)):
            asks = (at.needs_teacher, at.needs_hidden, at.needs_attention, at.needs_router, at.needs_gate)
            if at.weights and len(at.weights) > len(getattr(found.get(asks), "weights", ())):
                found[asks] = at
        return list(found.values())

    def batch(self, rows: int) -> dict[str, Tensor]:
        """Rows of random tokens as long as the config allows; their ids have values even without data."""
        with unset_fake_temporarily():
            made = self.plan.task.random_batch(self.plan, rows, torch.Generator().manual_seed(0))
            return {**made, FOUND: {SPANS: spans_in(made)}} if SPANS in made else made

    def train(self, batch: Batch, at: ObjectiveAt, *, count: int, phase: Phase = nullcontext) -> None:
        """One micro-batch of a step with `count` kept tokens, `phase` entered for each of PHASES.

        The gradients stay in the student.
        """
        if isinstance(self.routing, StudentAware) and at.needs_teacher:
            with phase(PHASES[0]), self._autocast():
                self._feed(self.routing, batch, at, count)
        self.student.train()
        with self._autocast():
            tokens, student, teacher = self._signals(batch, at, at.needs_teacher, phase, self.routing)
            with phase("loss"):
                made = ledger(student, teacher, tokens.targets, at=at, count=count, workspace=self.workspace)
        del student, teacher  # as the trainer has them no longer
        with phase("backward"):
            made.total.backward()

    @torch.no_grad()
    def evaluate(self, batch: Batch, at: ObjectiveAt, phase: Phase = nullcontext) -> None:
        self.student.eval()
        with phase("evaluation"), self._autocast():
            tokens, student, teacher = self._signals(batch, at, self.teacher is not None, phase)
            how = {"row_count": len(batch["labels"]), "chunk": self.workspace.chunk_for(student)}
            row_sums(student, teacher, tokens.targets, tokens.rows, terms=eval_terms(teacher), at=at, **how)

    def _signals(
        self, batch: Batch, at: ObjectiveAt, with_teacher: bool, phase: Phase, routing: Routing | None = None
    ) -> tuple[Kept, Signal, TeacherSignal | None]:
        tokens, (ours, theirs) = kept(batch["labels"]), self._asked(batch, at)
        with phase("student's forward"):
            student = signal_of(self.student, batch, tokens, **ours)
        if not with_teacher:
            return tokens, student, None
        with phase("teacher's forward"), torch.no_grad():
            return tokens, student, self._ask(batch, tokens, routing, theirs)

    def _asked(self, batch: Batch, at: ObjectiveAt) -> list[dict[str, Any]]:
        """How student and teacher are asked."""
        sizes = vocabulary_sizes(self.plan.vocabulary, self.plan.vocabularies)
        reads = "", "teacher_" if "teacher_input_ids" in batch else ""
        each = zip(sizes, reads, self.forms, insides(at, self.pairs, self.student), strict=True)
        return [dict(zip(("vocabulary", "reads", "form", "inside"), how, strict=True)) for how in each]

    def _ask(self, batch: Batch, tokens: Kept, routing: Routing | None, how: Any) -> TeacherSignal:
        """What a LiveTeacher says."""

        def ask(tokens: Kept) -> Signal:
            draws = []
            for _ in range(routing.draws if routing else 1):
                with routing.asked(tokens.positions) if routing else nullcontext():
                    draws.append(signal_of(self.teacher, batch, tokens, **how))
            return mean_of(draws)

        known = self.plan.vocabularies
        return beside(batch, known, ask) if known else ask(tokens)

    def _feed(self, routing: StudentAware, batch: Batch, at: ObjectiveAt, count: int) -> None:
        nothing = ObjectiveAt({}, {})
        with torch.no_grad():
            tokens, student, _ = self._signals(batch, nothing, with_teacher=False, phase=nullcontext)
        ask = partial(self._ask, batch, tokens, routing, self._asked(batch, nothing)[1])
        units = Counts(count, count, count) if self.plan.vocabularies else count
        how = {"count": units, "workspace": self.workspace}
        routing.feed(ask, student, tokens.targets, temperatures=at.temperatures, **how)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype is not torch.float32)
