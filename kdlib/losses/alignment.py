"""A teacher with another tokenizer: which of its tokens stand for the same text as the student's.

Axes: V vocabulary, student's and teacher's.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Vocabularies:
    """What the tokens of student and teacher have in common."""

    student_size: int  # one more than its tokenizer's largest id
    teacher_size: int
    shared: Tensor  # [student's V] the teacher's token of the same bytes, or the same role; -1 where none
    pieces: (
        Tensor  # [larger V] of each token, the first of the smaller vocabulary's that make it; -1 where none
    )

    @property
    def onto_student(self) -> bool:
        """Whether `pieces` are of the teacher's tokens: the larger vocabulary is cut into the smaller."""
        return self.teacher_size >= self.student_size
