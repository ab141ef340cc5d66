"""What other packages offer for the same job, called as their own trainers call them, each imported when it
is asked for.

None of them multiplies by T², and each has factors of its own.  They are put right here, so that every value
and gradient can be checked against ours:

    TRL        generalized JSD without the division by beta (1 - beta): its JSD(0.5) is a quarter of ours; no
    CE Liger      the same JSD; CE beside it at T = 1; chunks of 1,024 tokens, its default torchtune  its
    "forward KL" is the cross-entropy with the teacher: the teacher's entropy more, the same gradient; no T
"""

import importlib
import os
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from kdlib.benchmarks.heads import CE, KD, OURS, TEMPERATURE, Case, Problem, Setting, Step

BETA = {"forward_kl": 0.0, "generalized_jsd": 0.5}  # in TRL's and Liger's convention, which is ours
# their value to ours
FACTOR = {"forward_kl": TEMPERATURE**2, "generalized_jsd": TEMPERATURE**2 / (0.5 * (1 - 0.5))}
TORCHTUNE_CHUNKS = 8  # its default
TORCHTUNE = (
    "torchtune 0.6.1 needs torchao below 0.17, at whose import current transformers and torch warn in every "
    "process; so it is "
    'left out of kdlib[bench]. To measure it all the same: pip install torchtune "torchao>=0.14.1,<0.17"'
)


def module(name: str) -> ModuleType:
    """A peer's module.

    Raises:
        ImportError: it is not installed, or does not import here; the message says what to do.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its warning that names may move; they are pinned
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        first = str(error).strip().splitlines()[0]
        do = TORCHTUNE if package == "torchtune" else 'run: pip install "kdlib[bench]"'
        raise ImportError(f"{package} does not import ({first}); {do}") from error


def trl(case: Case, problem: Problem, setting: Setting) -> Step:
    """`GKDTrainer.generalized_jsd_loss` of all logits; masked tokens are dropped after they were computed."""
    loss = module("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    labels = problem.labels if case.masked else problem.targets

    def step() -> Tensor:
        logits = problem.hidden @ problem.head.T
        with torch.no_grad():
            teacher = problem.teacher_hidden @ problem.teacher_head.T
        value = loss(logits, teacher, labels=labels, beta=BETA[case.divergence], temperature=TEMPERATURE)
        return problem.backward(KD * FACTOR[case.divergence] * value)

    return step


def trl_tiled(case: Case, problem: Problem, setting: Setting) -> Step:
    """`ChunkedDivergenceFunction`, which TRL's on-policy DistillationTrainer uses: tiles of 4,096 tokens
    x 32,768 of V.
    """
    divergence = module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def step() -> Tensor:
        per_token, _ = divergence.apply(
            problem.hidden,
            problem.head,
            None,
            problem.teacher_hidden,
            problem.teacher_head,
            None,
            BETA[case.divergence],
            TEMPERATURE,
        )
        return problem.backward(KD * FACTOR[case.divergence] * per_token.mean())

    return step


def liger(case: Case, problem: Problem, setting: Setting) -> Step:
    """`LigerFusedLinearJSDLoss`, compiled on CUDA as by default; on a CPU in plain torch."""
    loss = module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=CE,
        weight_soft_loss=KD * FACTOR[case.divergence],
        beta=BETA[case.divergence],
        temperature=TEMPERATURE,
        compiled=problem.hidden.is_cuda,
    )
    arguments = problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head, problem.targets
    return lambda: problem.backward(loss(*arguments))


def torchtune(case: Case, problem: Problem, setting: Setting) -> Step:
    """`ForwardKLWithChunkedOutputLoss` and `CEWithChunkedOutputLoss` of the same logits, made chunk by
    chunk and all kept.
    """
    losses = module("torchtune.modules.loss")
    kd, ce = (
        losses.ForwardKLWithChunkedOutputLoss(TORCHTUNE_CHUNKS),
        losses.CEWithChunkedOutputLoss(TORCHTUNE_CHUNKS),
    )

    def step() -> Tensor:
        logits = [part @ problem.head.T for part in problem.hidden[None].chunk(TORCHTUNE_CHUNKS, dim=1)]
        with torch.no_grad():
            teacher = [
                part @ problem.teacher_head.T / TEMPERATURE
                for part in problem.teacher_hidden[None].chunk(TORCHTUNE_CHUNKS, dim=1)
            ]
        value = kd([part / TEMPERATURE for part in logits], teacher, problem.targets[None])
        return problem.backward(KD * TEMPERATURE**2 * value + CE * ce(logits, problem.targets[None]))

    return step


_trl = partial(Case, trl, ce=False)
_tiled = partial(Case, trl_tiled, ce=False)
PEERS = {
    "trl_forward_kl": _trl(),
    "trl_jsd": _trl(divergence="generalized_jsd"),
    "trl_half_masked": _trl(masked=True),
    "trl_chunked_forward_kl": _tiled(),
    "trl_chunked_jsd": _tiled(divergence="generalized_jsd"),
    "liger_forward_kl": Case(liger),
    "liger_jsd": Case(liger, divergence="generalized_jsd"),
    "torchtune_forward_kl": Case(torchtune, adds_entropy=True),
}
CASES = OURS | PEERS
