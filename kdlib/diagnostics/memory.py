"""How much memory a training will take, moment by moment and part by part, known before a weight is loaded.

Every tensor of a step without data (kdlib.diagnostics.fake_step) is counted; what stays between steps follows
from the models' sizes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, TrainingArguments

from kdlib.config.run import Config
from kdlib.diagnostics.fake_step import PHASES, Allocations, Block, FakeStep
from kdlib.diagnostics.forecast import GIB, Forecast, Moments, at_layers, copied, offloaded
from kdlib.hardware import as_asked, device_memory, precision_of, product_dtype, world_size
from kdlib.losses.buffers import FakeWorkspace, chunk_tokens
from kdlib.losses.features import feature_terms
from kdlib.losses.objective import ObjectiveAt
from kdlib.models.heads import stated_form
from kdlib.models.hooks import layers_are_alike
from kdlib.models.loading import device_of, parameters
from kdlib.models.sharing import fake_ranks, held_here, share, share_teacher
from kdlib.routing.gates import compared_layers
from kdlib.students.student import Outline, outline
from kdlib.tasks.base import task_of
from kdlib.tokens.vocabulary import vocabulary_sizes
from kdlib.training.plan import objective_of, training_arguments, workspace_of

# Python with torch and transformers loaded; or CUDA's context and cuBLAS's workspace
FRAMEWORK = {"cpu": round(0.7 * GIB), "cuda": round(0.6 * GIB)}
STATE_BYTES = {  # of optimizer state per parameter, by `training.optim`; whatever else begins with adamw: 8
    **dict.fromkeys(("adamw", "paged_adamw_32bit"), 8),
    **dict.fromkeys(("adagrad", "rmsprop", "lion_32bit", "paged_lion_32bit"), 4),
    **dict.fromkeys(("adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("adamw_torch_4bit", "lion_8bit", "paged_lion_8bit"), 1),
    "sgd": 0,
}

Sizes = Counter[str]  # part -> bytes
Half = tuple[str, int]  # of a moment: 0, or 1 for the second half of one of GROWING
GROWING = ("student's forward", "backward")  # what each layer leaves adds up, or goes again


def forecast(
    config: Config,
    *,
    memory: float | None = None,
    device: str | None = None,
    devices: int | None = None,
    rows: int | None = None,
    vocabulary: int | None = None,
    dense: bool = False,
) -> Forecast:
    """What a config's training will hold in memory, per device.

    Args:
        memory: GiB; what the present device has, and has free, where None.
        device: cpu or cuda; None: where the config would run here.  Elsewhere `precision: auto` is bfloat16.
        devices: over which the training is spread, a rank on each; torchrun's WORLD_SIZE where None.
        rows: of the training data: whether compiling pays depends on them.
        vocabulary: what the models choose among; of classes, what the config or the teacher says where None.
        dense: all logits at once, whatever the models' heads.

    Raises:
        ModelError: models do not exist or do not fit each other.
        ConfigError: transformers refuses the arguments.
    """
    present = device_of(config.wanted_device)
    here = "cuda" if present.type == "cuda" else "cpu"
    there = torch.device(kind := device or here)
    dtype, _ = precision_of(config.precision, present)
    if kind != here and config.precision == "auto":
        dtype = torch.bfloat16
    total, free = (round(memory * GIB),) * 2 if memory else device_memory(there)
    args, plan = training_arguments(config, Path("unused")), outline(config, task_of(config), vocabulary)
    largest, devices = max(vocabulary_sizes(plan.vocabulary, plan.vocabularies)), devices or world_size() or 1
    compiled = workspace_of(config, args, rows, largest).compiled
    if (chunk := config.loss.chunk) == "auto":
        chunk = chunk_tokens(largest, product_dtype(dtype, there).itemsize, there, free=free)

    def breakdown(mesh: DeviceMesh | None = None) -> Breakdown:
        workspace = FakeWorkspace(chunk, compiled=compiled, kind=kind)
        return Breakdown(plan, args, kind, dtype, workspace, dense, mesh)

    one = breakdown()
    student, teacher = one.student, one.teacher
    whole = one.moments()
    ways = {"DDP": copied(whole)} if devices > 1 else {}
    is_shared = student.get_output_embeddings() is not None and not config.student.adapter  # by FSDP
    if devices > 1 and is_shared:
        with fake_ranks(devices) as mesh:
            ways["FSDP"] = breakdown(mesh).moments()
        ways["FSDP, offloaded"] = offloaded(ways["FSDP"]) if kind == "cuda" else ways["FSDP"]
    fsdp = "FSDP, offloaded" if config.teacher and config.teacher.offload else "FSDP"
    return Forecast(
        device=kind,
        precision=str(dtype).removeprefix("torch."),
        total=total,
        free=free,
        devices=devices,
        moments=ways.get(fsdp if args.fsdp else "DDP", whole),
        layouts={
            each: max(sum(parts.values()) for parts in moments.values()) for each, moments in ways.items()
        },
        compiled=compiled,
        chunk=None if dense or stated_form(student) is None else chunk,
        notes=(*plan.notes, *one.notes),
        parameters={"student": parameters(student)} | ({"teacher": parameters(teacher)} if teacher else {}),
    )


@dataclass
class Breakdown:
    """The memory of one config's training, part by part."""

    plan: Outline
    args: TrainingArguments
    kind: str  # of the device: cpu or cuda
    dtype: torch.dtype
    workspace: FakeWorkspace
    dense: bool
    mesh: DeviceMesh | None = None  # of ranks that share student and teacher, whose first this is
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """The two models in full, without memory: what is counted in them is exact."""
        config = self.plan.config
        with torch.device("meta"), torch.random.fork_rng(devices=[]):  # `compared_layers` seeds it
            self.student = self.plan.blank_student(self.dtype)
            self.teacher = self.plan.blank_teacher(self.dtype)
            if self.teacher:
                compared_layers(config, self.student, self.teacher, objective_of(config))  # adds projections
        self.shared(self.student, self.teacher)

    def shared(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Leave of them what one rank holds, where there are several."""
        if self.mesh:
            share(student, self.mesh, self.args, self.dtype)
            share_teacher(teacher, self.mesh)

    def moments(self) -> Moments:
        """{moment: {part: bytes}} for one device: that holds everything, or a rank's."""
        full, (small, large) = self.plan.layers, self.layers_tried()
        with FakeTensorMode(allow_non_fake_inputs=True), nullcontext() if self.kind == "cpu" else as_asked():
            low = self.passing(self.plan.with_layers(*small))
            high = low if small == large else self.passing(self.plan.with_layers(*large))
        found: dict[str, Sizes] = {}
        for (name, half), parts in high.items():
            few = low[name, half]
            grown = {p: round(at_layers(full, p, few[p], size, small, large)) for p, size in parts.items()}
            found[name] = max(Counter(grown), found.get(name, Counter()), key=Counter.total)
        found["optimizer step"] = self.optimizer_step()
        is_base = self.teacher and self.plan.config.teacher.source  # the student's, which are there once
        lasting = {
            "framework": FRAMEWORK[self.kind],
            "teacher's weights": 0 if is_base else bytes_of(_tensors(self.teacher)),
            "student's parameters": bytes_of(_tensors(self.student)),
            "optimizer state": self.optimizer_state(),
        }
        order = (*PHASES, "optimizer step", "evaluation")
        return {name: {**lasting, **found[name]} for name in order if name in found}

    def layers_tried(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Two numbers of layers of student and teacher, from which the rest follows; all, where they differ.

        Two at least: the first layer's input is also the embeddings, and so is no tensor of its own.
        """
        models = [model for model in (self.student, self.teacher) if model]
        full, alike = self.plan.layers, all(map(layers_are_alike, models))
        if not alike or feature_terms(objective_of(self.plan.config).weights):
            return full, full
        return tuple(min(count, 2) for count in full), tuple(min(count, 3) for count in full)

    def passing(self, plan: Outline) -> dict[Half, Sizes]:
        """{half of a moment: {part: bytes}} of what comes and goes, where in training most is asked for."""
        found: dict[Half, Sizes] = {}
        with Allocations():
            how = {"dtype": self.dtype, "workspace": self.workspace, "dense": self.dense}
            self.step = FakeStep(plan, **how, shared=self.shared)
        for at in self.step.objectives:
            for name, parts in self.micro_batch(at).items():
                found[name] = max(parts, found.get(name, Counter()), key=Counter.total)
        if str(self.args.eval_strategy.value) != "no" or self.args.eval_on_start:
            found |= self.evaluation()
        return found

    def micro_batch(self, at: ObjectiveAt) -> dict[Half, Sizes]:
        """The parts at the highest point of each phase: of the second, where gradients accumulate."""
        step, accumulation = self.step, self.args.gradient_accumulation_steps
        batch = step.batch(self.args.per_device_train_batch_size)
        count = batch["labels"].numel() * accumulation
        if accumulation > 1:
            with self.watch():
                step.train(batch, at, count=count)
        with self.watch() as watch:
            watch.blocks_of(self.gradients())
            step.train(batch, at, count=count, phase=watch.phase)
            kept = self.kept_logits(watch)
            kept |= {id(block): "gradients" for block in watch.blocks_of(self.gradients())}
        step.student.zero_grad(set_to_none=True)
        return self.halves(watch, PHASES, kept)

    def evaluation(self) -> dict[Half, Sizes]:
        batch = self.step.batch(self.args.per_device_eval_batch_size)
        with self.watch() as watch:
            self.step.evaluate(batch, self.step.objectives[-1], watch.phase)
            kept = self.kept_logits(watch)
        return self.halves(watch, ["evaluation"], kept)

    def halves(self, watch: Allocations, phases: Iterable[str], kept: Mapping[int, str]) -> dict[Half, Sizes]:
        """The parts at the highest point of the phases that there were, of each half where layers add up."""
        found = {}
        for name in (each for each in phases if each in watch.spans):
            begin, end = watch.spans[name]
            ends = (begin, (begin + end) // 2, end) if name in GROWING else (begin, end)
            found |= {(name, n): self.parts(watch, span, kept) for n, span in enumerate(pairwise(ends))}
        return found

    def watch(self) -> Allocations:
        # on CUDA the loss multiplies its gradient by a scale, on a CPU only if that is not 1
        watch = Allocations(answer=1.0 if self.kind == "cpu" else 2.0, gloo=self.kind == "cpu")
        watch.hold(_tensors(self.step.student) + _tensors(self.step.teacher))
        return watch

    def gradients(self) -> list[Tensor]:
        return [each.grad for each in self.step.student.parameters() if each.grad is not None]

    def kept_logits(self, watch: Allocations) -> dict[int, str]:
        """The workspace's buffers, which are from the step before."""
        blocks = watch.blocks_of(self.workspace.buffers)
        for block in blocks:
            block.born = 0
        return {id(block): "logits" for block in blocks}

    def parts(self, watch: Allocations, span: tuple[int, int], kept: Mapping[int, str]) -> Sizes:
        """{part: bytes} at the highest point of a span."""
        parts: Sizes = Counter()
        for block in watch.held(watch.peak(*span)):
            parts[kept.get(id(block)) or block.what or self.part(block, watch)] += block.bytes
        return parts

    def part(self, block: Block, watch: Allocations) -> str:
        """What a block is: by its shape, the phase in which it was made, and whether it outlived that."""
        head = self.step.student.get_output_embeddings()  # None of a classifier
        rows, known = 0 if head is None else head.weight.shape[0], self.plan.vocabularies
        lasting = block.phase in watch.spans and block.died > watch.spans[block.phase][1]
        sizes = {self.plan.vocabulary, rows} | ({known.teacher_size} if known else set())
        if len(block.shape) > 1 and block.shape[-1] in sizes:
            return "logits"
        if block.phase in ("teacher's router", "teacher's forward"):
            return "teacher's activations"
        if block.phase == "student's forward" and lasting:
            return "cast weights" if self.is_cast(block) else "activations"
        return "head's gradient" if block.phase == "loss" and lasting else "temporaries"

    def is_cast(self, block: Block) -> bool:
        """Whether autocast made it of a weight; kept to the end of the forward pass, by autograd longer."""
        shapes = {tuple(weight.shape) for weight in self.step.student.parameters() if weight.ndim > 1}
        return self.dtype is not torch.float32 and bool({block.shape, block.shape[::-1]} & shapes)

    def trained(self) -> list[Tensor]:
        """The student's parameters that have gradients; of those that ranks share, this rank's part."""
        return [held_here(each) for each in self.student.parameters() if each.requires_grad]

    def optimizer_state(self) -> int:
        name, every = self.args.optim.value, self.trained()
        if name == "adafactor":  # a row and a column per matrix
            counts = (sum(p.shape[-2:]) * p[..., 0, 0].numel() if p.ndim > 1 else p.numel() for p in every)
            return 4 * sum(counts)
        if name not in STATE_BYTES and not name.startswith("adamw"):
            assumed = "8 bytes per parameter, as AdamW's, are assumed"
            self.notes.append(f"training.optim {name}: its state is not known here; {assumed}")
        return STATE_BYTES.get(name, 8) * sum(each.numel() for each in every)

    def optimizer_step(self) -> Sizes:
        """What there is beside the state that the optimizer keeps."""
        sizes = [parameter.nbytes for parameter in self.trained()]
        scratch = sum(sizes) if self.kind == "cuda" else 2 * max(sizes)  # CUDA: all in one go
        scratch *= "fused" not in self.args.optim
        return Counter(gradients=sum(sizes), logits=bytes_of(self.workspace.buffers), temporaries=scratch)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Memory of distinct tensors; of those that ranks share, this rank's part."""
    return sum(held_here(tensor).nbytes for tensor in tensors)


def _tensors(model: torch.nn.Module | None) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()] if model else []
