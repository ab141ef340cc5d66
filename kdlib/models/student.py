"""Students: made from a teacher's layers, blank, or from scratch; whether a teacher can teach them."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdlib.config.run import Config
from kdlib.config.task_rules import rules_of
from kdlib.errors import ModelError, nearest
from kdlib.models.depth import with_layers
from kdlib.models.hooks import layers_of
from kdlib.models.loading import blank, load_config, load_tokenizer, positions_of

ASPECT, TOLERANCE = 64, 0.04  # hidden size over layers, as in most models; of a count that is asked for


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """The one that makes the rows and is saved with the student: the teacher's, or its own where allowed."""
    is_own = config.teacher is None or not rules_of(config).one_vocabulary
    return own_tokenizer(config) if is_own else load_tokenizer(config.teacher.model)


def own_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The student's: that of its model, or the one that a student from scratch names; else the teacher's."""
    student = config.student
    named = student.source if student.is_own else student.tokenizer
    return load_tokenizer(named or config.teacher.model)


def own_config(config: Config) -> PreTrainedConfig:
    """Of a student that is not made from the teacher: its model's, or as its `shape` says.

    Raises:
        ModelError: there is no such model, or it has no such settings.
    """
    student = config.student
    return load_config(student.source) if student.is_own else _shaped(student.shape, own_tokenizer(config))


def llama_of(count: float, vocabulary: int) -> dict[str, int]:
    """Sizes of a Llama with so many parameters, within 4 %, embedding and head tied and counted once.

    Of these the one whose hidden size is nearest to 64 times its number of layers; heads are 64 wide, an MLP
    8/3 of the hidden size (Touvron et al. 2023, https://arxiv.org/abs/2302.13971).
    """
    fits = []
    for hidden in range(128, 8193, 128):
        inner = math.ceil(hidden * 8 / 3 / 128) * 128
        layer, rest = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden, (vocabulary + 1) * hidden
        layers = max(round((count - rest) / layer), 1)
        if abs((rest + layers * layer) / count - 1) <= TOLERANCE:
            sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
            fits.append((abs(math.log(hidden / layers / ASPECT)), hidden, sizes))
    if not fits:
        found = f"found {count / 1e6:g}m parameters, of which {vocabulary:,} tokens leave none for layers"
        raise ModelError(f"student.shape: {found}; ask for more, or give sizes: {{model_type: llama, …}}")
    sizes = min(fits)[-1]
    heads = sizes["hidden_size"] // 64
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": heads}


def _shaped(shape: str | dict, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of a model from scratch, which speaks by this tokenizer."""
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    asked = {"vocab_size": max(tokenizer.get_vocab().values()) + 1, **tokens}
    if isinstance(shape, str):
        count = float(shape[:-1]) * {"m": 1e6, "b": 1e9}[shape[-1]]
        sizes = {**llama_of(count, asked["vocab_size"]), "tie_word_embeddings": True}
        return AutoConfig.for_model("llama", max_position_embeddings=4096, **asked, **sizes)
    kind, sizes = shape["model_type"], {name: x for name, x in shape.items() if name != "model_type"}
    try:
        known = AutoConfig.for_model(kind)
        if strange := next((name for name in sizes if not hasattr(known, name)), None):
            hint = nearest(strange, known.to_dict())
            raise ModelError(f"student.shape.{strange}: a {kind} has no such setting{hint}")
        return AutoConfig.for_model(kind, **asked | sizes)
    except (ValueError, StrictDataclassError) as error:
        raise ModelError(f"student.shape: transformers makes no such {kind}: {error}") from error


def sources(config: Config) -> list[str]:
    """The models that are loaded by name: the teacher's, and the student's where it has one of its own."""
    teacher = [config.teacher.model] if config.teacher else []
    return list(dict.fromkeys([*teacher, *([config.student.source] if config.student.is_own else [])]))


def check_pair(config: Config, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse a student that the teacher cannot teach: layers it lacks, or token ids that mean other things.

    Raises:
        ModelError: names the layers, or the first tokens that differ.
    """
    students, length = config.student.source, config.data.max_length
    configs = {name: load_config(name) for name in sources(config)}
    if students == "config":
        configs["the student's shape"] = own_config(config)
    for name, each in configs.items():
        positions = positions_of(each)
        if positions and length > positions:
            raise ModelError(f"data.max_length is {length}, but {name} has {positions} positions; lower it")
    if config.teacher is None:
        return
    teachers = config.teacher.model
    if students == "teacher":
        kept_layers(config, configs[teachers].get_text_config().num_hidden_layers)
        return
    if not rules_of(config).one_vocabulary:  # each reads the rows in its own way
        return
    ours, theirs = own_tokenizer(config).get_vocab(), teacher.get_vocab()
    if differing := sorted(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t)):
        shown = [f"{t!r}: {ours.get(t, 'absent')} / {theirs.get(t, 'absent')}" for t in differing[:3]]
        raise ModelError(
            f"student {students} ({len(ours)} tokens) and teacher {teachers} ({len(theirs)}) have different "
            f"vocabularies: {len(differing)} tokens differ, e.g. {', '.join(shown)} (student / teacher id). "
            "The kd term needs one vocabulary: use a student of the teacher's family, or "
            "`student: {from: teacher}`"
        )


def chosen_layers(config: Config, teacher: PreTrainedModel | None, calibration: Tensor) -> list[int] | None:
    """Which of the teacher's layers the student keeps; None for one that is not made from the teacher.

    Args:
        calibration: [B, T] token ids, on which influence is measured.
    """
    if config.student.source != "teacher":
        return None
    kept = kept_layers(config, teacher.config.get_text_config().num_hidden_layers)
    if len(kept) == 1 or config.student.keep != "influence":
        return kept
    return sorted(layer_influence(teacher, calibration).topk(len(kept)).indices.tolist())


def even_layers(count: int, total: int) -> list[int]:
    """`count` of `total` layers, spread evenly from the first to the last."""
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def kept_layers(config: Config, total: int) -> list[int] | None:
    """The student's of the teacher's `total` layers, evenly where influence would choose; None of its own.

    Raises:
        ModelError: the teacher does not have them.
    """
    keep, count = config.student.keep, config.student.layers
    if config.student.source != "teacher":
        return None
    if isinstance(keep, list):
        if not keep or sorted(set(keep)) != keep or keep[0] < 0 or keep[-1] >= total:
            raise ModelError(f"student.keep {keep}: needs rising layer numbers from 0 to {total - 1}")
        return keep
    if count > total:
        raise ModelError(f"student.layers is {count}, but the teacher has {total}; choose 1 to {total}")
    return list(range(count)) if keep == "first" else even_layers(count, total)


@torch.no_grad()
def layer_influence(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """[L] how much each layer turns the residual stream: 1 - mean cosine of input and output, 0 (not) to 2.

    Args:
        input_ids: [B, T] text without padding.

    Reference: Men et al. 2024 (ShortGPT, "block influence"), https://arxiv.org/abs/2403.03853
    """
    influence = []

    def measure(layer, args, kwargs, output):  # `hidden_states` will not do: it ends with the final norm's
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        influence.append(1 - F.cosine_similarity(before.float(), after.float(), dim=-1).mean())

    with ExitStack() as hooks:
        for layer in layers_of(model):
            hooks.enter_context(layer.register_forward_hook(measure, with_kwargs=True))
        model.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    return torch.stack(influence)


@dataclass(frozen=True)
class Outline:
    """The two models of a config, known by their configs alone, as they are when the task trains them."""

    config: Config
    student: PreTrainedConfig
    teacher: PreTrainedConfig | None
    vocabulary: int  # what they choose among: tokens, or classes
    task: Any  # kdlib.tasks.base.Task
    notes: Sequence[str] = ()  # what was taken for granted, in words

    @property
    def layers(self) -> tuple[int, int]:
        """How many: the student's and the teacher's."""
        models = self.student, self.teacher
        return tuple(each.get_text_config().num_hidden_layers if each else 0 for each in models)

    def blank_student(self) -> PreTrainedModel:
        """One with random weights, in float32."""
        return blank(self.task.auto, self.config.student.source, self.student, torch.float32)

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
        student = with_layers(teacher, kept_layers(config, teacher.get_text_config().num_hidden_layers))
        if config.student.keep == "influence":
            notes.append("which layers the student keeps is seen on text; taken evenly here")
    if getattr(teacher, "quantization_config", None):
        notes.append("the teacher's quantised weights are counted in the precision of the training")
    made = task.outlined(config, student, teacher, vocabulary)
    return replace(made, notes=(*notes, *made.notes))
