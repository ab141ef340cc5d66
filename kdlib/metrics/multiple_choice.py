"""Multiple choice by likelihood: how likely a model finds each choice, as lm-eval scores it.

A choice's score is the sum of the log-probabilities of its tokens, nats <= 0.  Divided by the choice's length
in characters (without the space before it) it is what lm-eval's `acc_norm` goes by (0.4.13,
`ConfigurableTask.process_results`: `len(choice)`), and undivided `acc`; of equals the first is chosen.

`choices` are the columns item, choice (numbers from 0), characters and is_answer: a row for every choice of
every question, question by question, as kdlib.data.qa makes them.  N questions, C the most choices of one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

Choices = Mapping[str, Any]


def table_of(choices: Choices, scores: np.ndarray, *, normalised: bool = True) -> np.ndarray:
    """[N, C] scores, per character or raw, −inf where a question has fewer than C choices."""
    items, numbers = np.array(choices["item"][:]), np.array(choices["choice"][:])
    table = np.full((items.max() + 1, numbers.max() + 1), -np.inf)
    table[items, numbers] = scores / np.array(choices["characters"][:]) if normalised else scores
    return table


def probabilities(choices: Choices, scores: np.ndarray, *, normalised: bool = True) -> np.ndarray:
    """[N, C] softmax over each question's choices, 0 where a question has fewer than C.

    The likeliest is the one that counts as chosen.  Differences per character are small, so the normalised
    lie nearer to one another than the probabilities of the whole texts (`normalised=False`).
    """
    table = table_of(choices, scores, normalised=normalised)
    weights = np.exp(table - table.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def right_choices(choices: Choices) -> np.ndarray:
    """[N] the number of each question's right choice."""
    return np.array(choices["choice"][:])[np.array(choices["is_answer"][:], dtype=bool)]


def answered_rightly(choices: Choices, scores: np.ndarray) -> dict[str, np.ndarray]:
    """Of each question, [N]: whether its right choice scores highest, a guess's chance of that, and 1."""
    right = table_of(choices, scores).argmax(1) == right_choices(choices)
    chance = 1 / np.bincount(np.array(choices["item"][:]))
    return {"choice_accuracy": right, "chance": chance, "questions": np.ones(len(right))}


def accuracy(choices: Choices, scores: np.ndarray, *, normalised: bool = True) -> float:
    """The share of questions whose right choice scores highest."""
    chosen = table_of(choices, scores, normalised=normalised).argmax(1)
    return float((chosen == right_choices(choices)).mean())
