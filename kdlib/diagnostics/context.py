"""What the doctor looks at, loaded when a check first asks, and what it says.

Checks are generators: `Context` → `Finding`s, none for what is well.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import DatasetDict
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.optimization import get_scheduler

from kdlib.config.run import Config
from kdlib.config.task_rules import TaskRules, rules_of
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError, KdlibError
from kdlib.hardware import precision_of
from kdlib.losses.alignment import SPANS, TeacherSignal, said_of, unit_of
from kdlib.losses.features import LayerPairs
from kdlib.losses.objective import EVAL_TERMS, Objective, ObjectiveAt, row_sums
from kdlib.losses.signals import Kept, Signal, kept, moved
from kdlib.models.heads import head_form
from kdlib.models.loading import device_of, load_config, parameters
from kdlib.models.sharing import ranks_of
from kdlib.models.teacher import LiveTeacher, insides, signal_of
from kdlib.routing.gates import compared_layers
from kdlib.schedulers import Schedule, Spec, from_spec, sampled
from kdlib.sources.documents import read_documents, split_documents
from kdlib.students.student import outline, own_config, own_tokenizer, tokenizer_of
from kdlib.tasks import base as tasks
from kdlib.training.plan import Extent, extent, objective_of, training_arguments

TOKENS, CHUNK = 2048, 128  # of the first batch, at most; whose logits exist at a time
LONGEST = 300  # characters of an error that nobody foresaw
SEVERITIES = ("critical", "warning", "note")  # it will fail or teach nothing; it may go wrong; good to know


@dataclass(frozen=True)
class Finding:
    """One thing that a config does, or that follows from it."""

    severity: Literal["critical", "warning", "note"]
    where: str  # dotted path in the config: loss.curriculum.0.weights.hidden
    what: str  # was found, with figures
    why: str  # it matters
    fix: str  # what to do
    change: Mapping[str, Any] | None = None  # {path: new value}, where anybody would choose the same

    def __str__(self) -> str:
        change = "".join(f"\n  --fix  {path}: {value}" for path, value in (self.change or {}).items())
        head = f"{self.severity.upper()}  {self.where}"
        return f"{head}\n  found  {self.what}\n  why    {self.why}\n  do     {self.fix}{change}"


Findings = Iterator[Finding]  # of a check: Context → Findings
critical, warning, note = (partial(Finding, severity) for severity in SEVERITIES)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Each once, the gravest first, else as they came."""
    unique = {(each.severity, each.where, each.what): each for each in findings}
    return sorted(unique.values(), key=lambda each: SEVERITIES.index(each.severity))


def as_text(findings: Sequence[Finding]) -> str:
    """How many there are, and a paragraph for each."""
    counts = {name: sum(each.severity == name for each in findings) for name in SEVERITIES}
    said = [f"{n} {name}{'s' * (n > 1 and name != 'critical')}" for name, n in counts.items() if n]
    return "\n\n".join([", ".join(said) or "no findings", *map(str, findings)])


class Unavailable(KdlibError):
    """A part of what the config names cannot be had (`where`), or it names none, and nothing is wrong."""

    def __init__(self, where: str, error: Exception | str, *, is_unforeseen=False, is_absent=False) -> None:
        super().__init__(str(error))
        self.where, self.is_unforeseen, self.is_absent = where, is_unforeseen, is_absent


@contextmanager
def answered(where: str, name: str) -> Iterator[None]:
    """Whatever fails inside is `Unavailable`, at this setting: a doctor must not die of what it looks at.

    Here any error is right to catch, as none is hushed up: it becomes a finding that says what failed.
    """
    try:
        yield
    except Unavailable:
        raise
    except (KdlibError, torch.OutOfMemoryError) as error:
        raise Unavailable(where, error) from error
    except Exception as error:
        text = " ".join(str(error).split()) or "without a message"
        short = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
        found = f"this check failed: {name.replace('_', ' ')}: {type(error).__name__}: {short}"
        raise Unavailable(where, found, is_unforeseen=True) from error


def part(where: str) -> Callable[[Callable[["Context"], Any]], property]:
    """A property that is made once; where that fails, the failure is kept too, and names this setting."""

    def decorate(make):
        name = make.__name__

        @wraps(make)
        def get(self):
            if name not in self.made:
                try:
                    with answered(where, name):
                        self.made[name] = make(self)
                except Unavailable as error:
                    self.made[name] = error
            if isinstance(found := self.made[name], Unavailable):
                raise found
            return found

        return property(get)

    return decorate


@dataclass(frozen=True)
class FirstBatch:
    """What both models say about the first rows of the training text."""

    tokens: Kept
    student: Signal
    teacher: TeacherSignal
    rows: int

    def means(self, at: ObjectiveAt) -> dict[str, float]:
        """{term of the objective: unweighted nats per token, or per span}."""
        of, ce = (self.student, self.teacher, self.tokens.targets, self.tokens.rows), EVAL_TERMS["ce"]
        sums = row_sums(*of, row_count=self.rows, at=at, terms={"ce": ce}, chunk=CHUNK)
        found, spans = {name: float(each.sum()) for name, each in sums.items()}, SPANS in sums
        return {name: found[name] / max(found[unit_of(name, spans=spans)], 1.0) for name in at.weights}

    def teacher_logits(self) -> Iterator[Tensor]:
        """[n, V] of each chunk, in float32."""
        for start in range(0, len(said := said_of(self.teacher)), CHUNK):
            with torch.no_grad():
                yield said.logits(slice(start, start + CHUNK)).float()


class Context:
    """A config and what it names; a part that cannot be had raises `Unavailable` to each check that asks."""

    # what is loaded, and the sections of a config on which it depends
    loaded = ("tokenizer", "student_tokenizer", "configs", "size", "split", "prepared", "teacher", "student")
    sections = ("task", "teacher", "student", "data", "seed", "teacher_stage")

    def __init__(self, config: Config, made: Mapping[str, Any] | None = None) -> None:
        """`made` are parts that are there already, by the names of the properties below."""
        self.config, self.made = config, {n: part for n, part in (made or {}).items() if part is not None}

    def mended(self, config: Config) -> "Context":
        """Another config, with what is loaded, where it names the same."""
        same = all(getattr(config, section) == getattr(self.config, section) for section in self.sections)
        return Context(config, {name: self.made[name] for name in self.loaded if same and name in self.made})

    @property
    def rules(self) -> TaskRules:
        return rules_of(self.config)

    @property
    def is_taught_briefly(self) -> bool:
        """Whether the teacher had no more than a smoke run's few steps."""
        return self.made.get("is_taught_briefly", False)

    @property
    def objective(self) -> Objective:
        return objective_of(self.config)

    @property
    def active(self) -> dict[str, Spec]:
        """The weights over training of the terms that have one at some time."""
        return {name: spec for name, spec in self.config.loss.schedules.items() if max(sampled(spec)) > 0}

    @part("training")
    def args(self) -> TrainingArguments:
        """In float32: whether the device has the config's dtype is a check of its own."""
        return training_arguments(self.config.model_copy(update={"precision": "float32"}), Path("unused"))

    @part("training")
    def extent(self) -> Extent:
        ranks = ranks_of(self.config.launch.processes, self.config.wanted_device)
        return extent(self.args, len(self.prepared.train), ranks)

    @part("training")
    def steps(self) -> int:
        """Optimizer steps of the whole training; does not read the data where the config says `max_steps`."""
        steps = self.args.max_steps if self.args.max_steps >= 0 else self.extent.steps
        if steps < 1:
            raise ConfigError("the training has no optimizer step; raise max_steps or num_train_epochs")
        return steps

    @property
    def has_own_schedule(self) -> bool:
        """Whether the learning rate follows a schedule that the config spells out."""
        return isinstance(self.config.training.get("lr_scheduler_type"), Mapping)

    @part("training.lr_scheduler_kwargs")
    def learning_rate(self) -> Schedule | None:
        """Optimizer step, from 0 → multiple of `training.learning_rate`; None where it follows the losses."""
        args, steps = self.args, self.steps
        if self.has_own_schedule:
            schedule = from_spec(self.config.training["lr_scheduler_type"])
            return lambda step: schedule(step / steps)
        kind, warm_up = args.lr_scheduler_type, args.get_warmup_steps(steps)
        try:
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
            scheduler = get_scheduler(kind, optimizer, warm_up, steps, args.lr_scheduler_kwargs)
            if not isinstance(scheduler, LambdaLR):
                return None
            scheduler.lr_lambdas[0](steps - 1)  # some arguments are first read after the warm-up
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ConfigError(f"transformers makes no {kind.value} schedule of these: {error}") from error
        return scheduler.lr_lambdas[0]

    @part("teacher.model")
    def tokenizer(self) -> PreTrainedTokenizerBase:
        _ = self.config.student.own_tokens and self.student_tokenizer  # the first names a lack
        return tokenizer_of(self.config)

    @part("student.from")
    def student_tokenizer(self) -> PreTrainedTokenizerBase:  # the one that it was trained with
        return own_tokenizer(self.config)

    @part("student.from")
    def student_config(self) -> Any:
        return own_config(self.config)

    @part("teacher.model")
    def configs(self) -> dict[str, Any]:
        """{"teacher": …, "student": …} the models' own; no student's where that is made from the teacher."""
        found = {"teacher": load_config(self.config.teacher.model)} if self.config.teacher else {}
        return found if self.config.student.source == "teacher" else found | {"student": self.student_config}

    @part("student.from")
    def size(self) -> int:
        """The student's parameters, counted on a model without weights."""
        _, plan = self.configs, outline(self.config, tasks.task_of(self.config))  # the first names a lack
        with torch.device("meta"):
            return parameters(plan.blank_student())

    @part("data.source")
    def split(self) -> DatasetDict:
        """The documents, before they are tokens."""
        data = self.config.data
        return split_documents(read_documents(data), data, seed=self.config.seed)

    @part("data.source")
    def prepared(self) -> Prepared:
        _ = self.configs  # as of size
        return tasks.prepare(self.config, self.tokenizer)

    @part("teacher.model")
    def teacher(self) -> LiveTeacher:
        """In a dtype that the machine is good at and that has float32's range: what float16 lacks is seen."""
        if self.config.teacher is None:
            raise Unavailable("teacher", "there is none", is_absent=True)
        device, config = device_of(self.config.wanted_device), self.config
        found = tasks.load_teacher(config, self.prepared, precision_of("auto", device)[0])
        found.to(device)
        return found

    @part("student.from")
    def student(self) -> PreTrainedModel:
        """Untrained, as a run would start with it."""
        config, prepared = self.config, self.prepared
        model = self.teacher.model if config.student.source == "teacher" else None
        layers = tasks.layers_for_student(config, model, prepared)
        made = model and not config.teacher.quantization and tasks.student_of(config, model, layers, prepared)
        return (made or tasks.untrained_student(config, prepared, layers)).to(device_of(config.wanted_device))

    @part("loss.features.layers")
    def pairs(self) -> LayerPairs:
        """The layers that feature terms compare; the student gets the projections that they need."""
        return compared_layers(self.config, self.student, self.teacher.model, self.objective)

    @part("loss.weights")
    def batch(self) -> FirstBatch:
        """The first rows, no more than `TOKENS` tokens, through both models."""
        prepared, student = self.prepared, self.student
        rows = prepared.train.select(range(min(self.args.train_batch_size, len(prepared.train)))).to_list()
        rows = rows[: max(sum(n <= TOKENS for n in accumulate(len(row["input_ids"]) for row in rows)), 1)]
        batch = moved(prepared.collate(rows), student.device)
        tokens, (ours, theirs) = kept(batch["labels"]), insides(self.objective.in_full, self.pairs, student)
        with torch.no_grad():
            of = {"vocabulary": prepared.vocabulary, "form": head_form(student), "inside": ours}
            said = signal_of(student, batch, tokens, **of)
        return FirstBatch(tokens, said, self.teacher(batch, tokens, theirs), len(rows))
