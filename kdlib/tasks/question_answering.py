"""Multiple choice by likelihood: how likely a model finds each choice after the question, as lm-eval scores
it.

A choice's score is the sum of the log-probabilities of its tokens, in float32.  Divided by the choice's
length in characters (without the space before it) it is what lm-eval's `acc_norm` goes by (0.4.13,
`ConfigurableTask.process_results`: `len(choice)`), and undivided `acc`; of equals the first is chosen.  One
difference: rows that pad a head beyond the tokenizer are left out here, and take part there.
"""

from typing import Any

import numpy as np
from datasets import Dataset

from kdlib.data.batches import Prepared
from kdlib.losses.objective import EVAL_TERMS, row_sums
from kdlib.losses.signals import kept
from kdlib.metrics.bootstrap import Bootstrap
from kdlib.metrics.classification import Answers
from kdlib.metrics.paired import results_of, worst_rows
from kdlib.models.teacher import LiveTeacher

BATCH = 16  # rows per forward pass
SCORE = {"ce": EVAL_TERMS["ce"]}
METRICS = ("choice_accuracy", "choice_accuracy_raw", "choice_agreement", "choice_retention")
"""Of a comparison: share of questions right by the normalised scores, by the raw ones, with the teacher's
choice (normalised); and 100 · accuracy / the teacher's.
"""


def choice_rows(prepared: Prepared, split: str = "validation") -> Dataset | None:
    """Every choice of every question of a split, question by question; None where there is no multiple
    choice.

    Columns: item, choice (numbers from 0), is_answer, text, question, characters, input_ids, prompt_tokens.
    """
    return prepared.choices.get(split)


def scores_of(voice: LiveTeacher, prepared: Prepared, rows: Dataset) -> np.ndarray:
    """[rows] nats, <= 0: the log-probability of each choice after its question.

    Args:
        voice: as `kdlib.tasks.base.voice_of` or `teacher_of` gives it.
    """
    # rows of one length: little padding
    order = np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable")
    found = np.zeros(len(rows))
    for start in range(0, len(rows), BATCH):
        numbers = order[start : start + BATCH]
        batch = {
            name: values.to(voice.model.device)
            for name, values in prepared.collate([rows[int(n)] for n in numbers]).items()
        }
        tokens = kept(batch["labels"])
        sums = row_sums(
            voice(batch, tokens), None, tokens.targets, tokens.rows, row_count=len(numbers), terms=SCORE
        )
        found[numbers] = -sums["ce"].double().cpu().numpy()
    return found


def probabilities(rows: Dataset, scores: np.ndarray, *, normalised: bool = True) -> np.ndarray:
    """[N, C] softmax over each question's choices, 0 where a question has fewer than C.

    Of the normalised scores, nats per character, so that the likeliest choice is the one that counts as
    chosen.  Differences per character are small, so these lie nearer to one another than the probabilities of
    the whole texts (`normalised=False`).
    """
    table = table_of(rows, scores, normalised=normalised)
    weights = np.exp(table - table.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def table_of(rows: Dataset, scores: np.ndarray, *, normalised: bool = True) -> np.ndarray:
    """[N, C] scores, per character or raw, −inf where a question has fewer than C choices."""
    items, choices = np.array(rows["item"][:]), np.array(rows["choice"][:])
    table = np.full((items.max() + 1, choices.max() + 1), -np.inf)
    table[items, choices] = scores / np.array(rows["characters"][:]) if normalised else scores
    return table


def right_choices(rows: Dataset) -> np.ndarray:
    """[N] the number of each question's right choice."""
    return np.array(rows["choice"][:])[np.array(rows["is_answer"][:], dtype=bool)]


def accuracy(rows: Dataset, scores: np.ndarray, *, normalised: bool = True) -> float:
    """The share of questions whose right choice scores highest."""
    return float(_is_right(rows, scores, normalised=normalised).mean())


def _is_right(rows: Dataset, scores: np.ndarray, *, normalised: bool) -> np.ndarray:
    return (table_of(rows, scores, normalised=normalised).argmax(1) == right_choices(rows)).astype(float)


class ChoiceTally:
    """Several models' scores of the same questions, the teacher's first, and their figures with paired
    intervals.
    """

    def __init__(self, prepared: Prepared, split: str, *, resamples: int, seed: int) -> None:
        """
        Args:
            resamples: of the bootstrap; each draws questions with replacement, the same for every model.
        """
        self.prepared, self.rows, self.scores, self.resamples, self.seed = (
            prepared,
            prepared.choices[split],
            {},
            resamples,
            seed,
        )
        # [resamples, N] times drawn
        self.draws = Bootstrap(len(right_choices(self.rows)), resamples, seed).times

    def add(self, name: str, voice: LiveTeacher) -> None:
        """Score every choice by one model."""
        self.scores[name] = scores_of(voice, self.prepared, self.rows)

    def figures(self) -> dict[str, dict[str, tuple[float, np.ndarray]]]:
        """{model: {metric: (value, [resamples] values)}}; without retention where the teacher is never
        right.
        """
        per_item = {name: self._per_item(scores) for name, scores in self.scores.items()}
        teacher = next(iter(per_item.values()))["choice_accuracy"]
        found = {
            name: {
                metric: (float(values.mean()), self.draws @ values / len(values))
                for metric, values in metrics.items()
            }
            for name, metrics in per_item.items()
        }
        for name, metrics in found.items() if teacher.any() else ():
            right = per_item[name]["choice_accuracy"]
            drawn = self.draws @ teacher
            # nan: no question that the teacher has right
            resampled = 100 * (self.draws @ right) / np.where(drawn, drawn, np.nan)
            metrics["choice_retention"] = (float(100 * right.sum() / teacher.sum()), resampled)
        return found

    def answers(self) -> dict[str, Answers]:
        """What each model chooses, by the normalised scores, with its probabilities."""
        right = right_choices(self.rows)
        return {
            name: Answers(probabilities(self.rows, scores), right) for name, scores in self.scores.items()
        }

    def findings(self) -> dict[str, Any]:
        """McNemar's tests, what becomes of the teacher's mistakes by model, and the questions on which
        the last model is worst.
        """
        answers = self.answers()
        found = results_of(answers, resamples=self.resamples, seed=self.seed)
        table: dict[int, tuple[str, list[str]]] = {}
        for item, question, choice in zip(
            self.rows["item"][:], self.rows["question"][:], self.rows["text"][:], strict=True
        ):
            table.setdefault(item, (question, []))[1].append(choice)
        questions, choices = zip(*(table[item] for item in range(len(table))), strict=True)
        student = list(answers)[-1]
        shown = {
            name: each
            for name, each in answers.items()
            if name in ("teacher", student) or name != "untrained"
        }
        return {
            "mcnemar": found["mcnemar"],
            "worst": worst_rows(shown, student, questions, choices),
            "on_teachers_mistakes": {
                name: entry["on_teachers_mistakes"]
                for name, entry in found["models"].items()
                if "on_teachers_mistakes" in entry
            },
        }

    def _per_item(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """{metric: [N] 0 or 1}."""
        teacher = table_of(self.rows, next(iter(self.scores.values()))).argmax(1)
        return {
            "choice_accuracy": _is_right(self.rows, scores, normalised=True),
            "choice_accuracy_raw": _is_right(self.rows, scores, normalised=False),
            "choice_agreement": (table_of(self.rows, scores).argmax(1) == teacher).astype(float),
        }
