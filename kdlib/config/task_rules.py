"""What is known of a task without its models: its measures, the settings it reads, what does not go with it.

A task that is added brings its rules along in its own file (kdlib.tasks.base.register).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kdlib.config.terms import FEATURE_TERMS
from kdlib.metrics.names import MEASURES, TO_TEACHER, rivals_of


@dataclass(frozen=True)
class TaskRules:
    """What config and readers know of one task; measures by their names in kdlib.metrics.names."""

    name: str  # `task:` in a config
    unit: str  # what is predicted, one by one: "token", or "row"
    best_by: tuple[str, ...]  # of an evaluation, the usual first: what may choose the best model
    measures: tuple[str, ...]  # of a comparison, first in its table and in this order; four are drawn
    told_first: tuple[str, ...]  # in a report's first sentence; the first is the primary: see `primary_in`
    reads: tuple[str, ...] = ()  # of `data:`, beside what every task reads
    not_shown: tuple[str, ...] = ("accuracy",)  # what a comparison has and its table leaves out
    rows: str = "rows"  # what a comparison is made over, in words
    one_vocabulary: bool = True  # compared by tokens: each its own where these differ; else always its own
    smoke: Mapping[str, Any] | None = None  # of `data:`, for a run of seconds; a value None: as it is
    misfits: Callable[[Any], Iterable[str]] = lambda config: ()  # what does not go together, a line each

    @property
    def held(self) -> tuple[str, ...]:
        """The measures that a comparison has, if also not all of them are shown."""
        return tuple(dict.fromkeys([*self.measures, *self.not_shown]))


def _of_language(config: Any) -> Iterator[str]:
    if isinstance(config.data.text, list):
        yield f"data.text: found {config.data.text}; {config.task} reads one column: name it"
    if config.data.streaming and config.training.get("max_steps", -1) < 1:
        what = "a stream's end is not known, so the training says how much of it is read"
        yield f"data.streaming: needs training.max_steps: {what}; set it, or leave streaming out"


def _of_classes(config: Any) -> Iterator[str]:
    if config.student.source == "teacher" and config.student.tokenizer is not None:
        found = f"found {config.student.tokenizer}; a classifier of the teacher's layers reads as it does"
        yield f"student.tokenizer: {found}: leave it out, or take a model of its own"
    for where, section in (("loss", config.loss), ("baseline", config.baseline)):
        for name in section.feature_terms if section else ():
            yield (
                f"{where}.weights.{name}: it compares the models token by token, and rows are classified "
                "here, which the two may read with different tokenizers; leave it out"
            )


LANGUAGE = TaskRules(
    "causal-lm",
    "token",
    best_by=("perplexity", "kl_to_teacher", "agreement", "accuracy"),
    measures=("kl_to_teacher", "agreement", "perplexity", "bits_per_byte"),
    told_first=("kl_to_teacher", "agreement", "perplexity"),
    reads=("packing", "text", "group", "mix", "streaming"),
    rows="blocks",
    misfits=_of_language,
)
CLASSES = TaskRules(
    "sequence-classification",
    "row",
    best_by=("accuracy", "macro_f1", "log_loss", "kl_to_teacher", "agreement"),
    measures=("accuracy", "macro_f1", "log_loss", "ece", "kl_to_teacher", "agreement", "retention"),
    told_first=("accuracy", "macro_f1", "log_loss", "ece"),
    not_shown=(),
    reads=("label", "labels", "merge_labels", "group", "test", "text"),
    one_vocabulary=False,
    smoke={"max_train_rows": 256, "max_eval_rows": 64},  # some rows of each class
    misfits=_of_classes,
)
QUESTIONS = TaskRules(
    "question-answering",
    "token",
    best_by=("perplexity", "kl_to_teacher", "agreement", "accuracy", "choice_accuracy"),
    measures=(
        *("choice_accuracy", "choice_retention", "choice_agreement", "kl_to_teacher"),
        *("choice_accuracy_raw", "agreement", "perplexity", "bits_per_byte"),
    ),
    told_first=("choice_accuracy", "choice_agreement", "kl_to_teacher", "perplexity"),
    reads=(
        *("question", "choices", "answer", "answer_as", "prompt", "response", "messages", "ignore"),
        *("chat_template", "test", "group"),
    ),
    rows="questions",
    smoke={"max_length": None},  # a shorter row would lose its answer
)
RULES = {rules.name: rules for rules in (LANGUAGE, CLASSES, QUESTIONS)}


def register(rules: TaskRules) -> TaskRules:
    """Makes a task known to configs and readers."""
    RULES[rules.name] = rules
    return rules


def rules_named(name: str) -> TaskRules:
    """The rules of the task of this name; a ValueError where there is none."""
    if name not in RULES:
        import_module("kdlib.tasks")  # every file there registers its task
    if name not in RULES:
        raise ValueError(f"found {name!r}; it is one of {', '.join(RULES)}")
    return RULES[name]


def rules_of(config: Any) -> TaskRules:
    """The rules of a config's task."""
    return RULES[config.task]


def rules_in(results: Mapping[str, Any]) -> TaskRules:
    """The rules of the task that was compared; what is older than tasks is of language models.

    Of a task that is not known here whatever is measured is shown.
    """
    name = results.get("task") or ("question-answering" if "questions" in results else "causal-lm")
    return RULES.get(name) or TaskRules(name, "row", (), (), told_first=tuple(MEASURES), not_shown=())


def shown_in(results: Mapping[str, Any], *, first: bool = False) -> list[str]:
    """The measures that all models of a comparison have, in the order of its table, or those told first."""
    rules, models = rules_in(results), results["models"].values()
    every = [name for name in dict.fromkeys([*rules.measures, *MEASURES]) if name not in rules.not_shown]
    names = rules.told_first if first else every
    return [name for name in names if all(name in facts for facts in models)]


def differing(results: Mapping[str, Any], rival: str, *, first: bool = False) -> list[str]:
    """The measures held against this rival: not those of nearness to the teacher against the teacher."""
    return [name for name in shown_in(results, first=first) if rival != "teacher" or name not in TO_TEACHER]


def primary_in(results: Mapping[str, Any]) -> str:
    """The one measure that a comparison is decided by, against the hardest rival; chosen before it is made.

    All others, and all other rivals, are beside it, each with an interval of its own: of many such some
    exclude zero by chance (Hochberg and Tamhane 1987, Multiple Comparison Procedures, chapter 1).
    """
    first, every = (differing(results, rivals_of(results)[0], first=only) for only in (True, False))
    return next(iter([*first, *every]))


def misfits(config: Any) -> list[str]:
    """What does not go together in a config whose sections are sound one by one, a line each."""
    found = [*_unread(config), *rules_of(config).misfits(config), *_of_stops(config)]
    return [
        *found,
        *_of_adapter(config),
        *_of_cache(config),
        *(_of_shards(config) if config.teacher else _without_teacher(config)),
    ]


def _unread(config: Any) -> Iterator[str]:
    """Settings that this task would pass over in silence."""
    for name, field in type(config.data).model_fields.items():
        readers = [rules.name for rules in RULES.values() if name in rules.reads]
        value = getattr(config.data, name)
        if readers and config.task not in readers and value != field.default:
            yield (
                f"data.{name}: found {value!r}, which {config.task} does not read; leave it out, or set "
                f"task: {' or '.join(readers)}"
            )
    if config.code and rules_of(config).unit == "row":
        yield "code: a classifier writes no programs; leave it out, or set task: causal-lm"


def _without_teacher(config: Any) -> Iterator[str]:
    """What `teacher: null` leaves without an answer."""
    if rules_of(config).unit == "row":
        yield f"teacher: found null, but {config.task} compares classes with a teacher's; name one"
    if config.student.source == "teacher":
        yield "student.from: found teacher, and there is none (teacher: null); name a model, or config"
    if config.student.source == "config" and config.student.tokenizer is None:
        yield "student.tokenizer: missing; it is the teacher's else, and there is none (teacher: null)"
    for term in sorted({*config.loss.schedules} - {"ce", "router_aux"}):
        yield f"loss.weights.{term}: needs a teacher, and there is none (teacher: null); leave ce alone"
    if config.teacher_stage is not None:
        yield "teacher_stage: trains the teacher first, and there is none (teacher: null); leave it out"
    if config.baseline is not None:
        yield "baseline: it is a student without a teacher, and so is this one (teacher: null); leave it out"
    if config.training.get("fsdp"):
        yield "training.fsdp: is for a teacher and a student together; without a teacher leave it out (DDP)"


def _of_shards(config: Any) -> Iterator[str]:
    fsdp, teacher, every = config.training.get("fsdp"), config.teacher, config.diagnostics.grad_norms_every
    if fsdp and rules_of(config).unit == "row":
        yield f"training.fsdp: found {fsdp!r}, but a classifier lies whole on each rank (DDP); leave it out"
    if fsdp and teacher.device:
        yield f"teacher.device: found {teacher.device}, but with training.fsdp it is spread over all ranks"
    if fsdp and every:
        found = f"found {every}, but with training.fsdp no rank has the whole student"
        yield f"diagnostics.grad_norms_every: {found}; set it to null"
    if fsdp and isinstance(teacher.experts, dict) and "student_aware" in teacher.experts:
        yield "teacher.experts: a student-aware router lies whole on each rank; leave training.fsdp out (DDP)"
    if fsdp and (route := config.loss.features.route) and route.experts:
        yield "loss.features.layers.route.experts: asks them one by one, and training.fsdp spreads them"
    if teacher.quantization and (fsdp or config.teacher_stage or rules_of(config).unit == "row"):
        found = "goes with a language model that lies whole on each device, and is not trained"
        yield f"teacher.quantization: {found}; leave it out, or training.fsdp and teacher_stage"
    if teacher.offload and not fsdp:
        yield "teacher.offload: goes with training.fsdp, which gathers it layer by layer; leave it out"


def _of_cache(config: Any) -> Iterator[str]:
    """What a teacher's answers on a disk cannot do."""
    if not (config.teacher and config.teacher.cache):
        return
    teacher, loss, form = config.teacher, config.loss, config.teacher.cache.form_for(config.loss)
    if teacher.source:
        yield "teacher.cache: this teacher is the student's own model (from: student); leave it out"
    if teacher.experts not in ("topk", "all"):
        yield f"teacher.experts: {teacher.experts} asks anew in each step; leave teacher.cache out"
    if loss.features.route or "attention" in config.terms:
        what = "a gate over layers" if loss.features.route else "loss.weights.attention"
        yield f"teacher.cache: what {what} looks at is not kept; leave one of them out"
    if form == "hidden":
        return
    setting = getattr(loss, form)
    if not setting:
        yield f"teacher.cache.form: {form} keeps what loss.{form} looks at, which is null; set it, as to 32"
    if others := sorted(config.terms - {"kd", "ce", "router_aux", *FEATURE_TERMS}):
        what = f"loss.weights.{others[0]} looks at all tokens"
        yield f"teacher.cache.form: found {form}, but {what}; take `cache: hidden`, or kd alone"
    if form == "samples" and loss.divergence != "forward_kl":
        found = f"samples serve forward_kl alone, found loss.divergence: {loss.divergence}"
        yield f"teacher.cache.form: {found}; take `cache: hidden`"
    if rules_of(config).unit == "row":
        yield f"teacher.cache.form: found {form}, but classes are few; take `cache: hidden`"


def _of_adapter(config: Any) -> Iterator[str]:
    student, teacher = config.student, config.teacher
    if student.adapter and config.training.get("fsdp"):
        yield "training.fsdp: a student with an adapter lies whole on each rank (DDP); leave it out"
    has_base = student.is_own and not student.is_cut and rules_of(config).unit == "token"
    if student.adapter and not (has_base or student.adapter.merge):
        what = "made here" if rules_of(config).unit == "token" else "a classifier with classes of its own"
        yield f"student.adapter.merge: its base is {what}, and loaded by no name; set it to true"
    if not (teacher and teacher.source):
        return
    if not (student.adapter and student.is_own and not student.is_cut):
        needed = "needed are `student.from: <a model>` with all its layers, and `student.adapter`"
        yield f"teacher.from: found student, its own model with the adapter off; {needed}"
    others = {name: getattr(teacher, name) for name in ("quantization", "device", "offload")}
    others["experts"] = teacher.experts != "topk"
    for name in (name for name, value in others.items() if value):
        yield f"teacher.{name}: this teacher is the student's own model (from: student); leave it out"
    if config.teacher_stage:
        yield "teacher_stage: this teacher is the student's own model (from: student); leave it out"


def _of_stops(config: Any) -> Iterator[str]:
    stages = {"": config, "teacher_stage.": config.teacher_stage}
    for where, stage in stages.items():
        if stage and stage.early_stopping and stage.training.get("eval_strategy", "no") == "no":
            yield (
                f"{where}early_stopping: needs evaluations to judge by; set {where}training.eval_strategy: "
                "epoch (or steps, with eval_steps)"
            )
