"""Students: of a teacher's layers, for other tokens, or from scratch; whether a teacher can teach them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights

from kdlib.config.run import Config
from kdlib.config.task_rules import rules_of
from kdlib.config.terms import DIVERGENCES, SPAN_TERMS
from kdlib.errors import ModelError
from kdlib.models.adapters import adapted
from kdlib.models.loading import blank, load_config, load_tokenizer, plain_config, positions_of
from kdlib.students.depth import even_layers, layer_influence, with_layers
from kdlib.students.scratch import of_tokens, shaped
from kdlib.students.width import with_width
from kdlib.tokens.vocabulary import Vocabularies


def tokenizer_of(config: Config) -> Tokenizer:
    """The one that makes the student's rows and is saved with it: the teacher's where both know the same."""
    own = own_tokenizer(config)
    teachers = load_tokenizer(config.teacher.model) if _may_differ(config) else own
    return teachers if own.get_vocab() == teachers.get_vocab() else own


def teacher_tokenizer_of(config: Config) -> Tokenizer | None:
    """The teacher's, where it has rows of its own: it knows other tokens, or a term compares spans.

    Its `model_max_length` is no more than the teacher's positions.
    """
    is_of_spans = config.teacher is not None and bool(config.terms & {*SPAN_TERMS})
    if not (is_of_spans or _may_differ(config)):
        return None
    teachers = load_tokenizer(config.teacher.model)
    if not is_of_spans and own_tokenizer(config).get_vocab() == teachers.get_vocab():
        return None
    ends = teachers.model_max_length, positions_of(load_config(config.teacher.model))
    teachers.model_max_length = min(filter(None, ends))
    return teachers


def own_tokenizer(config: Config) -> Tokenizer:
    """The student's: that of its model, or the one that another student names; else the teacher's."""
    return load_tokenizer(config.student.own_tokens or config.teacher.model)


def _may_differ(config: Config) -> bool:
    """Whether the teacher could have other tokens, where both are asked token by token."""
    return bool(config.teacher and config.student.own_tokens) and rules_of(config).one_vocabulary


def own_config(config: Config) -> PreTrainedConfig:
    """Of a student that is not made from the teacher: its model's, cut to its layers, or as `shape` says.

    Raises:
        ModelError: there is no such model, or it has no such settings, or layers.
    """
    student = config.student
    if not student.is_own:
        return shaped(student.shape, own_tokenizer(config))
    kept, whole = kept_layers(config), load_config(student.source)
    return with_width(with_layers(whole, kept), student.width) if kept else whole


def sources(config: Config) -> list[str]:
    """The models that are loaded by name: the teacher's, and the student's where it has one of its own."""
    teacher = [config.teacher.model] if config.teacher else []
    return list(dict.fromkeys([*teacher, *([config.student.source] if config.student.is_own else [])]))


def check_pair(config: Config, tokenizer: Tokenizer) -> None:
    """Refuse a student that the teacher cannot teach: layers or width it lacks, or a term of shared tokens.

    Args:
        tokenizer: the student's, as `tokenizer_of` gives it.

    Raises:
        ModelError: names the layers, or the term and the first tokens that differ.
    """
    length, configs = config.data.max_length, {name: load_config(name) for name in sources(config)}
    if config.student.source == "config":
        configs["the student's shape"] = own_config(config)
    for name, each in configs.items():
        if (positions := positions_of(each)) and length > positions:
            raise ModelError(f"data.max_length is {length}, but {name} has {positions} positions; lower it")
    if kept_layers(config):
        whole = config.student.source if config.student.is_own else config.teacher.model
        with_width(configs[whole], config.student.width)
    terms = sorted(config.terms & {"kd", *DIVERGENCES, "attention"})
    if terms and _may_differ(config):
        _check_tokens(config, tokenizer, load_tokenizer(config.teacher.model), ", ".join(terms))


def _check_tokens(config: Config, student: Tokenizer, teacher: Tokenizer, terms: str) -> None:
    """Refuse two vocabularies, for terms of one."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if apart := sorted(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t)):
        shown = ", ".join(f"{t!r}: {ours.get(t, 'absent')} / {theirs.get(t, 'absent')}" for t in apart[:3])
        raise ModelError(
            f"student {config.student.own_tokens} ({len(ours)} tokens) and teacher {config.teacher.model} "
            f"({len(theirs)}) have different vocabularies: {len(apart)} tokens differ, e.g. {shown} (student "
            f"/ teacher id). The loss has {terms}, which needs one vocabulary: weight one of "
            f"{', '.join(SPAN_TERMS)}, made for two, or take a student of the teacher's family"
        )


def chosen_layers(config: Config, model: PreTrainedModel, calibration: Tensor) -> list[int] | None:
    """Which layers the student keeps of the model that it is made from; None of one that keeps all.

    Args:
        calibration: [B, T] token ids, on which influence is measured.
    """
    keep, count = config.student.keep, config.student.layers
    if (kept := kept_layers(config)) is None or count in (None, 1) or keep != "influence":
        return kept
    return sorted(layer_influence(model, calibration).topk(len(kept)).indices.tolist())


def kept_layers(config: Config) -> list[int] | None:
    """The student's of the model that it is made from, evenly where influence would choose; None: all.

    Raises:
        ModelError: the model does not have them.
    """
    keep, count = config.student.keep, config.student.layers
    if not config.student.is_cut:
        return None
    own = config.student.source if config.student.is_own else None
    total = load_config(own or config.teacher.model).get_text_config().num_hidden_layers
    if isinstance(keep, list):
        if not keep or sorted(set(keep)) != keep or keep[0] < 0 or keep[-1] >= total:
            raise ModelError(f"student.keep {keep}: needs rising layer numbers from 0 to {total - 1}")
        return keep
    count = count or total
    if count > total:
        raise ModelError(
            f"student.layers is {count}, but {own or 'the teacher'} has {total}; choose 1 to {total}"
        )
    return list(range(count)) if keep == "first" else even_layers(count, total)


@torch.no_grad()
def reembedded(
    model: PreTrainedModel, pieces: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> PreTrainedModel:
    """The same model for another tokenizer's tokens: what it knows of each is the mean of its pieces.

    Embedding and head get a row for each token, a tied head stays tied, layers and norms are as they were.
    A token without pieces begins as the mean of all.

    Args:
        pieces: [V] of each token those of the model's that together stand for it (kdlib.tokens.vocabulary).
        tokenizer: the other one, whose special tokens become the model's.

    Raises:
        ModelError: the model knows its tokens by more than one embedding and one head.

    Reference: Gee et al. 2022, https://arxiv.org/abs/2402.09977
    """
    with no_init_weights():  # every weight is the model's, or made of it
        made = type(model)(spoken(model.config, tokenizer))
    made.tie_weights()
    ends = filter(None, (model.get_input_embeddings(), model.get_output_embeddings()))
    tables = {parameter for end in ends for parameter in end.parameters()}
    named = {name for name, each in model.named_parameters(remove_duplicate=False) if each in tables}
    state = {name: _means(x, pieces) if name in named else x for name, x in model.state_dict().items()}
    made.load_state_dict(state)
    return made.eval()


def spoken(config: PreTrainedConfig, tokenizer: Tokenizer) -> PreTrainedConfig:
    """A copy of a model's config for this tokenizer's tokens; a ModelError where it has other tables too."""
    made = plain_config(config)
    text = made.get_text_config()
    if others := [name for name in text.to_dict() if "vocab_size" in name and name != "vocab_size"]:
        raise ModelError(
            f"student.tokenizer: a {config.model_type} knows its tokens by {others[0]} beside vocab_size, so "
            "it cannot be given other tokens; leave it out, or take another teacher"
        )
    for name, value in of_tokens(tokenizer).items():
        setattr(text, name, value)
    return made


def _means(table: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """[V, …] of each token the mean of its pieces' rows, which are some of the table's; of none, of all."""
    counts, rows = (torch.tensor([*x]).long() for x in (map(len, pieces), chain.from_iterable(pieces)))
    owners, sums = torch.arange(len(pieces)), table.new_zeros(len(pieces), *table.shape[1:])
    sums.index_add_(0, owners.repeat_interleave(counts), table[rows])
    means = sums / counts.clamp(min=1).view(-1, *[1] * (table.dim() - 1))
    means[counts == 0] = table.mean(0)
    return means


@dataclass(frozen=True)
class Outline:
    """The two models of a config, known by their configs alone, as they are when the task trains them."""

    config: Config
    student: PreTrainedConfig
    teacher: PreTrainedConfig | None
    vocabulary: int  # what they choose among: tokens, or classes
    task: Any  # kdlib.tasks.base.Task
    notes: Sequence[str] = ()  # what was taken for granted, in words
    vocabularies: Vocabularies | None = None  # where the teacher reads tokens of its own

    @property
    def layers(self) -> tuple[int, int]:
        """How many: the student's and the teacher's."""
        models = self.student, self.teacher
        return tuple(each.get_text_config().num_hidden_layers if each else 0 for each in models)

    def blank_student(self, base: torch.dtype = torch.float32) -> PreTrainedModel:
        """One with random weights, in float32; with an adapter they are empty, and the others in `base`."""
        adapter, how = self.config.student.adapter, (self.task.auto, self.config.student.source, self.student)
        if adapter is None:
            return blank(*how, torch.float32)
        with unset_fake_temporarily(), torch.device("meta"):  # fake ones cannot be moved, as peft moves them
            made = adapted(blank(*how, base), adapter)
        made.to_empty(device=torch.get_default_device()).tie_weights()
        return made

    def blank_teacher(self, dtype: torch.dtype) -> PreTrainedModel | None:
        """One with random weights; None where none teaches."""
        name = self.config.teacher and self.config.teacher.model
        return blank(self.task.auto, name, self.teacher, dtype) if name else None

    def with_layers(self, student: int, teacher: int) -> "Outline":
        """The same with so many layers of each model, evenly taken."""
        ours, theirs = even_layers(student, self.layers[0]), even_layers(teacher, self.layers[1])
        few = self.teacher and with_layers(self.teacher, theirs)
        return replace(self, student=with_layers(self.student, ours), teacher=few)


def outline(config: Config, task: Any, vocabulary: int | None = None) -> Outline:
    """What is known of a config's models without their weights; `vocabulary`: the number of known classes.

    Raises:
        ModelError: there is no such model, or the teacher lacks the student's layers.
    """
    source, notes = config.student.source, []
    teacher = load_config(config.teacher.model) if config.teacher else None
    student = teacher if source == "teacher" else own_config(config)
    for each, stated in ((config.teacher and config.teacher.model, teacher), (source, student)):
        if stated and type(stated) not in task.known:
            raise ModelError(
                f"{each}: a {stated.model_type} model, which is no {task.kind}; name one that is"
            )
    if source == "teacher":
        student = with_width(with_layers(teacher, kept_layers(config)), config.student.width)
        student = spoken(student, own_tokenizer(config)) if config.student.tokenizer else student
    if config.student.layers is not None and config.student.keep == "influence":
        notes.append("which layers the student keeps is seen on text; taken evenly here")
    if getattr(teacher, "quantization_config", None) or (config.teacher and config.teacher.quantization):
        notes.append("the teacher's quantised weights are counted in the precision of the training")
    made = task.outlined(config, student, teacher, vocabulary)
    return replace(made, notes=(*notes, *made.notes))
