"""What a task is.  `task_of(config)` gives it, and nobody else asks which task a config has.

A task is one file of this package, found because it stands here: a `Task` with its rules, and `register` at
the end.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel as Model, PreTrainedTokenizerBase as Tokenizer

from kdlib.config import task_rules
from kdlib.config.run import Config
from kdlib.config.task_rules import TaskRules
from kdlib.data.batches import Prepared, calibration_rows, reads_of
from kdlib.hardware import precision_of, world_size
from kdlib.losses.signals import DenseSignal, LinearSignal, moved
from kdlib.models.adapters import off
from kdlib.models.heads import head_form
from kdlib.models.loading import blank, device_of, load_tokenizer
from kdlib.models.quantised import check_installed, options_of
from kdlib.models.sharing import check_shards, sharded
from kdlib.models.teacher import LiveTeacher, named_device
from kdlib.routing.student_aware import routing_of
from kdlib.students.adapters import with_adapter
from kdlib.students.depth import shallower
from kdlib.students.student import Outline, chosen_layers, outline, own_config, own_tokenizer, reembedded
from kdlib.students.width import narrower
from kdlib.tokens.answers import roles
from kdlib.tokens.vocabulary import Vocabularies, pieces, token_bytes

Check = Callable[[Any], Iterator[Any]]  # kdlib.diagnostics.context.Context → findings


@dataclass(frozen=True)
class Sample:
    """A few held-out predictions to be looked at one by one: tokens of a text, or rows."""

    batch: Mapping[str, Tensor]
    texts: Sequence[str]  # [N] what came
    before: Sequence[str]  # [N] text since the prediction before, read only; or the row's class
    decode: Callable[[int], str]  # what a number stands for: a token's text, a class's name
    vocabularies: Vocabularies | None = None  # where N are the spans of one token on both sides


class Comparison(ABC):
    """Models asked in turn about the same rows, the teacher first: the others are held against it."""

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str = "cpu",
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.prepared, self.tokenizer, self.device = prepared, tokenizer, torch.device(device)
        self.resamples, self.seed = resamples, seed  # of the bootstrap, the same for every model

    @abstractmethod
    def add(self, name: str, model: LiveTeacher, prepared: Prepared) -> dict[str, Any]:
        """Ask one model about all rows; returns its costs, beside those measured of every model.

        Args:
            prepared: the same rows as this model reads them.
        """

    def beside_teacher(self, name: str, model: LiveTeacher) -> None:  # noqa: B027 — most tasks need it not
        """Ask one model together with the teacher, who is the first, when its memory is measured no more."""

    def show(self, name: str, model: Model) -> None:  # noqa: B027 — most tasks have nothing to show
        """Look at what it makes of a few rows, when nothing is measured any more."""

    @abstractmethod
    def results(self, student: str) -> dict[str, Any]:
        """What comparison_results.json has; `student` is whom it is about.

        Has "models": {name: {measure: {value, low, high}}}, "differences" (kdlib.metrics.paired), "rows".
        """


class Task(ABC):
    """What there is to know of a task beside its rules; one instance each, without state."""

    rules: TaskRules  # what is known of it without torch
    kind: ClassVar[str]  # of its models, in words
    auto: ClassVar[Any]  # transformers' class that makes them from a config
    known: ClassVar[Mapping[type, Any]]  # by the config classes that have such a model
    checks: ClassVar[Sequence[str | Check]] = ()  # of the doctor, by name in kdlib.diagnostics, or its own
    checks_on_batches: ClassVar[Sequence[str | Check]] = ()  # likewise, with the models loaded
    compared_data: ClassVar[Mapping[str, Any]] = {}  # settings of `data:` where nothing is to be trained

    @property
    def unit(self) -> str:
        """What is predicted, one by one: "token", or "row"."""
        return self.rules.unit

    @abstractmethod
    def prepare(self, config: Config, tokenizer: Tokenizer, *, new_head: bool = False) -> Prepared:
        """The rows of a config; `tokenizer` as `kdlib.students.student.tokenizer_of` gives it.

        Args:
            new_head: the teacher is to be trained first: its classes come from the data, not from its model.

        Raises:
            DataError: nothing to read, not the named columns, or rows that the task can do nothing with.
            ConfigError: the best model is to be chosen by a metric that these rows have not.
        """

    @abstractmethod
    def load(
        self,
        source: str,
        prepared: Prepared,
        dtype: torch.dtype = torch.float32,
        *,
        untrained: bool = False,
        **options: Any,
    ) -> Model:
        """A model for these rows; a head that was never trained is refused unless it may be `untrained`.

        Args:
            options: of `from_pretrained`, for a teacher that ranks share.
        """

    @abstractmethod
    def outlined(
        self, config: Config, student: PreTrainedConfig, teacher: PreTrainedConfig, vocabulary: int | None
    ) -> Outline:
        """The two models as the task trains them; `vocabulary`: what they choose among, where it is known."""

    @abstractmethod
    def random_batch(self, plan: Outline, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Rows of random tokens as long as the config allows; unpacked, one is shorter, to need a mask."""

    @abstractmethod
    def facts(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher) -> dict[str, str]:
        """What both models choose among, to be read at the start of a run."""

    @abstractmethod
    def example(self, config: Config, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher) -> Any:
        """The first training row and what is learned of it: shown in a notebook, printed in a terminal."""

    @abstractmethod
    def sample(self, prepared: Prepared, tokenizer: Tokenizer) -> Sample:
        """Held-out predictions for the explorers."""

    @abstractmethod
    def comparison(
        self, config: Config, prepared: Prepared, tokenizer: Tokenizer, **options: Any
    ) -> Comparison:
        """What measures models on these test rows, else validation rows; `options`: see `Comparison`."""


STAGE = "the teacher's own stage before this training is not forecast: give it its own config"
TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Makes a task known, and its rules."""
    TASKS[task_rules.register(task.rules).name] = task
    return task


def task_of(config: Config) -> Task:
    """The task of a config."""
    return TASKS[config.task]


def prepare(config: Config, tokenizer: Tokenizer, **options: Any) -> Prepared:
    """`Task.prepare` of a config's task."""
    return task_of(config).prepare(config, tokenizer, **options)


def load_teacher(config: Config, prepared: Prepared, dtype: torch.dtype | None = None) -> LiveTeacher | None:
    """The teacher, in the precision of the run unless told otherwise; None where the config has none.

    With `training.fsdp` each of several ranks loads its own part of it.
    """
    if config.teacher is None:
        return None
    device, own = device_of(config.wanted_device), config.teacher.device
    chosen, apart = dtype or precision_of(config.precision, device)[0], named_device(own) if own else None
    if config.training.get("fsdp") and (world_size() or 1) > 1:
        check_shards(device)
        with sharded(config.teacher.model, offload=config.teacher.offload) as options:
            model = _teacher_model(config, prepared, chosen, **options)
    else:
        how = options_of(config.teacher.quantization, chosen, apart or device)
        model = _teacher_model(config, prepared, chosen, **how)
    return replace(teacher_of(model, prepared, apart), routing=routing_of(model, config.teacher.experts))


def teacher_of(model: Model, prepared: Prepared, device: torch.device | None = None) -> LiveTeacher:
    """A loaded model as the teacher of these rows, on a device of its own where one is named."""
    reads = "teacher_" if "teacher_input_ids" in prepared.train.column_names else ""
    return LiveTeacher(model, prepared.teacher_vocabulary, reads, device, prepared.vocabularies)


@dataclass
class OwnBase(LiveTeacher):
    """A student's own base as its teacher: the same model, asked with its adapter off."""

    def __post_init__(self) -> None:
        self.heads = {}
        with off(self.model):
            self.form = head_form(self.model)

    def to(self, device: torch.device) -> None:
        """It lies where the student does."""
        self.vocabularies = moved(self.vocabularies, device)

    def _once(self, *asked: Any) -> DenseSignal | LinearSignal:
        with off(self.model):
            return super()._once(*asked)


def student_and_teacher(
    config: Config, student: Model, prepared: Prepared, load: Callable[[], LiveTeacher | None]
) -> dict[str, Any]:
    """Both by name, the teacher as `load` gives it; where it is the student's own base, one model is both."""
    if not (config.teacher and config.teacher.source):
        return {"student": student, "teacher": load()}
    base = OwnBase(student, prepared.teacher_vocabulary, vocabularies=prepared.vocabularies)
    return {"student": student, "teacher": base}


def check_made(config: Config) -> None:
    """Refuse an adapter that the student cannot have, and a quantiser that is not there, before a load."""
    check_installed(config.teacher and config.teacher.quantization)
    if config.student.adapter:
        with torch.device("meta"):
            outline(config, task_of(config)).blank_student()


def asked(model: Model, prepared: Prepared) -> LiveTeacher:
    """A loaded student, to be asked as a teacher is."""
    return LiveTeacher(model, prepared.vocabulary)


def untrained_student(config: Config, prepared: Prepared, keep: Sequence[int] | None) -> Model:
    """The student as its training starts with it: the layers `keep` of the teacher or of a model, or a model.

    The same each time, in float32 whatever the teacher's precision in training.
    With an adapter, which is in float32, the rest is in the precision of the run.
    """
    torch.manual_seed(config.seed)  # for what is made anew: a head, an adapter, or all of it
    if config.student.source == "teacher":
        return student_of(config, _teacher_model(config, prepared, torch.float32), keep, prepared)
    if config.student.source == "config":
        return blank(task_of(config).auto, "config", own_config(config), torch.float32)
    model = task_of(config).load(config.student.source, prepared, untrained=True)
    cut = model if keep is None else _cut(config, model, keep, prepared, "student")
    return with_adapter(config, cut)


def student_of(config: Config, teacher: Model, keep: Sequence[int], prepared: Prepared) -> Model:
    """The student made from the teacher's layers `keep`, for its own tokens where it has others."""
    return with_adapter(config, _of_layers(config, teacher, keep, prepared))


def _of_layers(config: Config, teacher: Model, keep: Sequence[int], prepared: Prepared) -> Model:
    student = _cut(config, teacher, keep, prepared, "teacher")
    if config.student.tokenizer is None:
        return student
    ours, theirs = own_tokenizer(config), load_tokenizer(config.teacher.model)
    if ours.get_vocab() == theirs.get_vocab():
        return student
    rows = len(student.get_input_embeddings().weight)  # a token without one stands for nothing
    known = [each if number < rows else None for number, each in enumerate(token_bytes(theirs))]
    return reembedded(student, pieces(token_bytes(ours), known, theirs, roles(ours, theirs)), ours)


def _cut(config: Config, model: Model, keep: Sequence[int], prepared: Prepared, who: str) -> Model:
    """A model's layers `keep`, as wide as the config says: what matters most in them, without the others."""
    student, width = shallower(model, keep), config.student.width
    return (
        narrower(student, width, calibration_rows(prepared.train, reads=reads_of(who))) if width else student
    )


def layers_for_student(config: Config, teacher: Model | None, prepared: Prepared) -> list[int] | None:
    """Which layers the student keeps, of the teacher or of its own model; None where all stay."""
    if not config.student.is_cut:
        return None
    model, who = teacher, "teacher"
    if config.student.is_own:
        model, who = task_of(config).load(config.student.source, prepared, untrained=True), "student"
    return chosen_layers(config, model, calibration_rows(prepared.train, reads=reads_of(who)))


def _teacher_model(config: Config, prepared: Prepared, dtype: torch.dtype, **options: Any) -> Model:
    before_its_stage = config.teacher_stage is not None  # its head says nothing so far, and may be missing
    return task_of(config).load(config.teacher.model, prepared, dtype, untrained=before_its_stage, **options)
