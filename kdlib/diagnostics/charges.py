"""What a training of a config holds at each moment, part by part: the rehearsed step, and what stays
between steps.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, TrainingArguments

from kdlib.diagnostics.allocations import Allocations, Block
from kdlib.diagnostics.fake_step import PHASES, Outline, Rehearsal, at_layers, bytes_of
from kdlib.hardware import as_asked
from kdlib.losses.buffers import Workspace
from kdlib.losses.features import feature_terms
from kdlib.losses.objective import ObjectiveAt
from kdlib.models.hooks import layers_of
from kdlib.models.loading import parameters
from kdlib.training.plan import compared_layers, objective_of

GIB = 2**30
FRAMEWORK = {"cpu": 0.7 * GIB, "cuda": 0.6 * GIB}
"""Python with torch and transformers loaded; or CUDA's context and cuBLAS's workspace."""
COMPILED_SCRATCH = 2  # [rows, V] in float32 that the compiled row arithmetic needs beside its arguments
STATE_BYTES = {
    "adamw": 8,
    "adamw_torch_8bit": 2,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adamw_torch_4bit": 1,
    "adamw_anyprecision": 8,
    "paged_adamw_32bit": 8,
    "sgd": 0,
    "adagrad": 4,
    "rmsprop": 4,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "paged_lion_32bit": 4,
}
"""Bytes of optimizer state per parameter, by `training.optim`."""
SHARDED = ("student's parameters", "gradients", "optimizer state")  # by FSDP


class RehearsedWorkspace(Workspace):
    """A workspace whose compiled arithmetic is not run but charged, and which takes pieces as the device
    would.
    """

    def __init__(self, chunk: int, *, compiled: bool, kind: str) -> None:
        super().__init__(chunk, compiled=compiled)
        self.kind = kind

    @property
    def buffers(self) -> Iterable[Tensor]:
        return self._buffers.values()

    def piece(self, products: Tensor) -> int:
        return super().piece(products) if self.kind == "cpu" else max(len(products), 1)

    def arithmetic(self, functions, student, teacher):
        plain, run = super().arithmetic(functions, student, teacher), 0

        def charged(products, others, targets, temperatures, weights):
            nonlocal run
            run += 1
            if not self.compiled and run <= 2:  # further pieces hold no more
                return plain(products, others, targets, temperatures, weights)
            scratch = [torch.empty(products.shape, device=products.device) for _ in range(COMPILED_SCRATCH)]
            return weights.new_zeros(len(functions), len(scratch[0]))

        return charged


@dataclass
class Charges:
    """What one config is charged for."""

    plan: Outline
    args: TrainingArguments
    kind: str  # of the device: cpu or cuda
    dtype: torch.dtype
    workspace: RehearsedWorkspace
    dense: bool
    every_layer: bool = False  # rehearse them all: the slow reference
    flops: float = 0.0  # of an optimizer step
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The two models in full, without memory: what is counted in them is exact."""
        config = self.plan.config
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # `compared_layers` seeds it
            self.student, self.teacher = self.plan.blank_student(), self.plan.blank_teacher(self.dtype)
            compared_layers(config, self.student, self.teacher, objective_of(config))  # adds projections

    def moments(self) -> dict[str, dict[str, int]]:
        """{moment: {part: bytes}} for one device that holds everything."""
        full = self.plan.layers
        small, large = self.sizes()
        with FakeTensorMode(allow_non_fake_inputs=True), nullcontext() if self.kind == "cpu" else as_asked():
            low = self.rehearsed(self.plan.with_layers(*small))
            high = low if small == large else self.rehearsed(self.plan.with_layers(*large))
        found = {
            name: {
                part: round(at_layers(full, part, low[name].get(part, 0), size, small, large))
                for part, size in parts.items()
            }
            for name, parts in high.items()
        }
        flops = found.pop("flops")
        self.flops = sum(flops.values()) * self.args.gradient_accumulation_steps
        beginning, end = found.pop("backward's beginning"), found.pop("backward's end")
        found["backward"] = max(beginning, end, key=lambda parts: sum(parts.values()))
        standing = self.standing()
        order = (*PHASES, "optimizer step", "evaluation")
        found["optimizer step"] = self.optimizer_step()
        return {name: standing | found[name] for name in order if name in found}

    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Two numbers of layers of student and teacher, from which the rest follows; all layers, where they
        are not alike.

        Two at least: the first layer's input is also the embeddings, and so is no tensor of its own.
        """
        full = self.plan.layers
        alike = all(map(_layers_are_alike, (self.student, self.teacher)))
        if self.every_layer or not alike or feature_terms(objective_of(self.plan.config).weights):
            return full, full
        return tuple(min(count, 2) for count in full), tuple(min(count, 3) for count in full)

    def rehearsed(self, plan: Outline) -> dict[str, dict[str, float]]:
        """{moment: {part: bytes}} of what comes and goes, at the most demanding moment of the training;
        and "flops" by phase.
        """
        found: dict[str, dict[str, float]] = {"flops": {}}
        with Allocations():
            self.rehearsal = Rehearsal(plan, dtype=self.dtype, workspace=self.workspace, dense=self.dense)
        for at in self.rehearsal.objectives:
            for name, parts in self.step(at).items():
                found[name] = max(parts, found.get(name, {}), key=lambda parts: sum(parts.values()))
        if str(self.args.eval_strategy.value) != "no" or self.args.eval_on_start:
            found["evaluation"] = self.evaluation()
        return found

    def watch(self) -> Allocations:
        """A fresh watch.  On CUDA the loss multiplies its gradient by a scale, on a CPU only if that is
        not 1.
        """
        watch = Allocations(answer=1.0 if self.kind == "cpu" else 2.0)
        watch.hold([*_tensors(self.rehearsal.student), *_tensors(self.rehearsal.teacher)])
        return watch

    def standing(self) -> dict[str, int]:
        """What stays from step to step."""
        return {
            "framework": round(FRAMEWORK[self.kind]),
            "teacher's weights": bytes_of(list(_tensors(self.teacher))),
            "student's parameters": bytes_of(list(_tensors(self.student))),
            "optimizer state": self.optimizer_state(),
        }

    def optimizer_state(self) -> int:
        name = self.optimizer
        if name == "adafactor":  # a row and a column per matrix
            return sum(
                4 * (sum(p.shape[-2:]) * p[..., 0, 0].numel() if p.ndim > 1 else p.numel())
                for p in self.student.parameters()
            )
        each = STATE_BYTES.get(name, STATE_BYTES["adamw"] if name.startswith("adamw") else None)
        if each is None:
            self.notes.append(
                f"training.optim {name}: its state is not known here; 8 bytes per parameter, as AdamW's, are "
                "assumed"
            )
        return (8 if each is None else each) * parameters(self.student)

    @property
    def optimizer(self) -> str:
        return getattr(self.args.optim, "value", self.args.optim)

    def step(self, at: ObjectiveAt) -> dict[str, dict[str, float]]:
        """The parts at the highest point of each phase of a micro-batch: the second, where gradients
        accumulate.
        """
        rehearsal, accumulation = self.rehearsal, self.args.gradient_accumulation_steps
        batch = rehearsal.batch(self.args.per_device_train_batch_size)
        count = batch["labels"].numel() * accumulation
        if accumulation > 1:
            with self.watch():
                rehearsal.train(batch, at, count=count)
        with self.watch() as watch:
            watch.blocks_of(self.gradients())
            rehearsal.train(batch, at, count=count, phase=watch.phase)
            kept = self.kept_logits(watch) | {
                id(block): "gradients" for block in watch.blocks_of(self.gradients())
            }
        begin, end = watch.spans.pop("backward")
        spans = watch.spans | {
            "backward's beginning": (begin, (begin + end) // 2),
            "backward's end": ((begin + end) // 2, end),
        }
        rehearsal.student.zero_grad(set_to_none=True)
        watch.spans["backward"] = (begin, end)
        return {name: self.parts(watch, span, kept) for name, span in spans.items()} | {"flops": watch.flops}

    def kept_logits(self, watch: Allocations) -> dict[int, str]:
        """The workspace's buffers, which are from the step before."""
        blocks = watch.blocks_of(self.workspace.buffers)
        for block in blocks:
            block.born = 0
        return {id(block): "logits" for block in blocks}

    def gradients(self) -> list[Tensor]:
        return [
            parameter.grad for parameter in self.rehearsal.student.parameters() if parameter.grad is not None
        ]

    def parts(self, watch: Allocations, span: tuple[int, int], kept: Mapping[int, str]) -> dict[str, float]:
        """{part: bytes} at the highest point of a span."""
        parts: dict[str, float] = {}
        for block in watch.held(watch.peak(*span)):
            name = kept.get(id(block)) or self.part(block, watch)
            parts[name] = parts.get(name, 0) + block.bytes
        return parts

    def part(self, block: Block, watch: Allocations) -> str:
        """What a block is, from its shape and from the phase in which it was made and whether it outlived
        it.
        """
        head = self.rehearsal.student.get_output_embeddings()  # None of a classifier
        rows = 0 if head is None else head.weight.shape[0]
        lasting = block.phase in watch.spans and block.died > watch.spans[block.phase][1]
        if len(block.shape) > 1 and block.shape[-1] in (self.plan.vocabulary, rows):
            return "logits"
        if block.phase == "teacher's forward":
            return "teacher's activations"
        if block.phase == "student's forward" and lasting:
            return "cast weights" if self.is_cast(block) else "activations"
        return "head's gradient" if block.phase == "loss" and lasting else "temporaries"

    def is_cast(self, block: Block) -> bool:
        """Whether autocast made it from a weight: it keeps these until the forward pass ends, autograd
        for longer.
        """
        if self.dtype is torch.float32:
            return False
        shapes = {tuple(p.shape) for p in self.rehearsal.student.parameters() if p.ndim > 1}
        return block.shape in shapes or block.shape[::-1] in shapes

    def optimizer_step(self) -> dict[str, int]:
        """All gradients and what the optimizer needs while it works, beside the state that it keeps."""
        sizes = [bytes_of([parameter]) for parameter in self.student.parameters()]
        # CUDA: all in one go
        scratch = 0 if "fused" in self.optimizer else sum(sizes) if self.kind == "cuda" else 2 * max(sizes)
        return {
            "gradients": sum(sizes),
            "logits": bytes_of(list(self.workspace.buffers)),
            "temporaries": scratch,
        }

    def evaluation(self) -> dict[str, float]:
        batch = self.rehearsal.batch(self.args.per_device_eval_batch_size)
        with self.watch() as watch:
            self.rehearsal.evaluate(batch, self.rehearsal.objectives[-1], watch.phase)
            kept = self.kept_logits(watch)
        return self.parts(watch, watch.spans["evaluation"], kept)


def spread(parts: Mapping[str, int], charges: Charges, devices: int) -> dict[str, int]:
    """The parts on each of several devices: shards with FSDP, and a second copy of the gradients without."""
    if devices == 1:
        return dict(parts)
    if not charges.args.fsdp:
        return {**parts, "gradient buckets": parameters(charges.student) * 4}
    student = charges.student
    whole = bytes_of(list(student.parameters()))
    layer = (whole - bytes_of([student.get_input_embeddings().weight])) // max(
        student.config.num_hidden_layers, 1
    )
    shards = {name: -(-size // devices) for name, size in parts.items() if name in SHARDED}
    outside = bytes_of([student.get_input_embeddings().weight])
    return {**parts, **shards, "gathered weights": 2 * layer + outside}


def _layers_are_alike(model: PreTrainedModel) -> bool:
    """Whether each layer has the same matrices as the first, and none a kind of its own."""
    shapes = [sorted(tuple(p.shape) for p in layer.parameters()) for layer in layers_of(model)]
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return len(kinds) < 2 and all(each == shapes[0] for each in shapes)


def _tensors(model: torch.nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers, each once."""
    yield from model.parameters()
    yield from model.buffers()
