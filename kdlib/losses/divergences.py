"""Divergences: how far the student's next-token distribution is from the teacher's, token by token.

Pure functions of log-probabilities; they know no mask, weight, temperature, log or step.
"""

from torch import Tensor


def forward_kl(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """KL(teacher || student) per token: the student must cover everything that the teacher might say.

    Args:
        student_log_probs: [N, V] natural log; each row a distribution.
        teacher_log_probs: [N, V] likewise, same vocabulary order; -inf means "never".

    Returns:
        [N] nats, >= 0 up to rounding, and 0 where the two agree; +inf where the student excludes what the teacher says.

    Raises:
        ValueError: the vocabularies differ in size.

    Reference: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531
    """
    if student_log_probs.shape != teacher_log_probs.shape:
        raise ValueError(
            f"student has log-probs {tuple(student_log_probs.shape)}, teacher {tuple(teacher_log_probs.shape)}; a KL needs "
            "one vocabulary and the same tokens: slice both heads to the tokenizer's size, or use a tokenizer-free term"
        )
    impossible = teacher_log_probs.isneginf()  # 0 * (-inf - x) is 0 here, not nan
    difference = (teacher_log_probs - student_log_probs).masked_fill(impossible, 0.0)
    return (teacher_log_probs.exp() * difference).sum(-1)
