"""One benchmark as typed, frozen, checked objects: what is measured, at which sizes.  Imports no torch."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from kdlib.config.sections import Count, Number, Section
from kdlib.config.terms import COOLEST, HOTTEST
from kdlib.errors import nearest

CASES = {
    "floor": "matrix products alone (the floor)",
    "naive": "naive: full logits, autograd",
    "ours": "ours",
    "ours_eager": "ours, eager rows",
    "ours_top_k": "ours, top-k and tail",
    "ours_reverse_kl": "ours, reverse KL",
    "ours_generalized_jsd": "ours, JSD(0.5)",
    "ours_skewed_forward_kl": "ours, skewed forward KL",
    "ours_skewed_reverse_kl": "ours, skewed reverse KL",
    "ours_adaptive_kl": "ours, adaptive KL",
    "ours_total_variation": "ours, total variation",
    "ours_half_masked": "ours, part masked",
    "ours_span_kl": "ours, other tokens, KL on shared",
    "ours_projected_kl": "ours, other tokens, projected KL",
    "ours_alm": "ours, other tokens, ALM",
    "ours_uld": "ours, other tokens, ULD",
    "trl_forward_kl": "TRL, forward KL without CE",
    "trl_jsd": "TRL, JSD(0.5) without CE",
    "trl_half_masked": "TRL, forward KL without CE, part masked",
    "trl_chunked_forward_kl": "TRL tiled, forward KL without CE",
    "trl_chunked_jsd": "TRL tiled, JSD(0.5) without CE",
    "liger_forward_kl": "Liger chunked, forward KL",
    "liger_jsd": "Liger chunked, JSD(0.5)",
    "torchtune_forward_kl": "torchtune chunked, forward KL",
}
"""The ways to a loss and its gradients, by name, with how tables call them.  KD + CE unless said."""

CONTENDERS = {
    "ours_kd": "ours, KD + CE",
    "ours_lora": "ours, KD + CE, an adapter alone (LoRA, r 16)",
    "ours_hidden": "ours, KD + CE + hidden, layers even",
    "ours_routed": "ours, KD + CE + hidden, routed, top-4",
    "ours_from_hidden": "ours, KD + CE, the teacher's hidden states from a disk",
    "ours_from_top_k": "ours, KD + CE, its top 32 and tail from a disk",
    "ours_from_samples": "ours, KD + CE, 12 of its samples from a disk",
    "ours_sft": "ours, CE alone",
    "teacher": "teacher's forward pass alone",
    "trainer_sft": "transformers Trainer, SFT",
    "trl_sft": "TRL SFTTrainer",
    "trl_gkd": "TRL GKDTrainer, forward KL without CE",
    "trl_gkd_jsd": "TRL GKDTrainer, JSD(0.5) without CE",
}
"""The ways to a whole training step."""


def _chosen(value: Any, known: dict[str, str]) -> list[str]:
    names = list(known) if value == "all" else value
    if not isinstance(names, list):
        raise ValueError(f"found {value!r}; it is `all` or a list of names")
    if faults := [name for name in names if name not in known]:
        raise ValueError(
            f"there is no {faults[0]!r}{nearest(str(faults[0]), known)}; known are {', '.join(known)}"
        )
    return names


Positive = Annotated[Count, Field(ge=1)]
Cases = Annotated[Any, AfterValidator(lambda value: _chosen(value, CASES)), Field(validate_default=True)]
Contenders = Annotated[
    Any, AfterValidator(lambda value: _chosen(value, CONTENDERS)), Field(validate_default=True)
]


class Measurement(Section):
    """What is measured in one dtype."""

    tokens: Positive
    rounds: Positive = 5
    cases: Cases = "all"


class HeadsConfig(Section):
    """The loss alone: from hidden states and heads to their gradients."""

    hidden: Positive = 576
    vocabulary: Annotated[Count, Field(ge=2)] = 49152
    chunk: Positive = 512
    top_k: Positive = 64
    masked: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    memory: Cases = "all"
    more_tokens: Annotated[Count, Field(ge=2)] = 8
    float32: Measurement | None = None
    bfloat16: Measurement | None = None


class StepsConfig(Section):
    """Whole training steps of a teacher and a student made from its layers."""

    teacher: str
    student_layers: Positive
    batch: Positive = 4
    length: Annotated[Count, Field(ge=2)] = 128
    temperature: Annotated[Number, Field(ge=COOLEST, le=HOTTEST)] = 2.0
    chunk: Positive = 512
    precision: list[Literal["float32", "bfloat16"]] = ["float32", "bfloat16"]
    rounds: Positive = 5
    warmup: Positive = 4
    steps: Positive = 4
    contenders: Contenders = "all"


class BenchmarkConfig(Section):
    """One complete benchmark."""

    smoke: ClassVar = {
        "heads": {
            "hidden": 32,
            "vocabulary": 500,
            "chunk": 16,
            "top_k": 8,
            "memory": ["naive", "ours"],
            "float32": {"tokens": 40, "rounds": 2},
            "bfloat16": {"tokens": 40, "rounds": 2},
        },
        "steps": {
            "batch": 2,
            "length": 16,
            "precision": ["float32"],
            "rounds": 1,
            "warmup": 1,
            "steps": 1,
            "contenders": ["ours_kd", "teacher", "trainer_sft", "trl_gkd"],
        },
    }
    seed: Annotated[Count, Field(ge=0, lt=2**32)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    heads: HeadsConfig | None = None
    steps: StepsConfig | None = None
