"""Questions with answers: read as text whose answer is learned; multiple choice is scored by likelihood.

See kdlib.metrics.multiple_choice for what a score is.  One difference from lm-eval: rows that pad a head
beyond the tokenizer are left out here, and take part there.
"""

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase as Tokenizer

from kdlib.config.run import Config
from kdlib.config.task_rules import RULES
from kdlib.data import qa
from kdlib.data.batches import Prepared
from kdlib.errors import ConfigError, cut
from kdlib.losses.objective import EVAL_TERMS, row_sums
from kdlib.losses.signals import kept
from kdlib.metrics.classification import Answers
from kdlib.metrics.multiple_choice import probabilities, right_choices
from kdlib.metrics.paired import results_of, worst_rows
from kdlib.models.teacher import LiveTeacher
from kdlib.students.student import teacher_tokenizer_of
from kdlib.tasks.base import register
from kdlib.tasks.language_modeling import LanguageModeling
from kdlib.tasks.rows import spread, within_heads
from kdlib.tasks.token_comparison import TokenComparison

BATCH = 16  # rows per forward pass
OF_CHOICES = {
    **{name: f"choice_{name}" for name in ("accuracy", "agreement", "retention")},
    "on_teachers_mistakes": "on_teachers_mistakes",
}
OF_RAW_CHOICES = {"accuracy": "choice_accuracy_raw"}


class QuestionAnswering(LanguageModeling):
    """Causal language models that answer."""

    rules = RULES["question-answering"]
    checks = (
        "documents_are_not_cut",
        "tokens_have_a_term",
        "documents_came_once",
        "held_out_groups_are_new",
        "enough_rows_are_held_out",
    )
    compared_data = {"validation": 0.99}  # nearly all: questions to train on have no choices to be scored

    def prepare(self, config: Config, tokenizer: Tokenizer, *, new_head: bool = False) -> Prepared:
        teacher = teacher_tokenizer_of(config)
        prepared = qa.prepare(config.data, tokenizer, seed=config.seed, teacher=teacher)
        prepared = within_heads(config, prepared, tokenizer, teacher)
        metric = config.training["metric_for_best_model"].removeprefix("eval_")
        if metric == "choice_accuracy" and not prepared.choices:
            raise ConfigError(
                f"training.metric_for_best_model: found eval_choice_accuracy, but {config.data.source} has "
                f"no choices ({prepared.notes['form']}); write eval_perplexity or eval_kl_to_teacher"
            )
        return prepared

    def facts(self, prepared: Prepared, tokenizer: Tokenizer, teacher: LiveTeacher | None) -> dict[str, str]:
        notes = prepared.notes
        found = {"rows are": notes["columns"], "answers": notes.get("answers", "")}
        found["columns not read"] = cut(", ".join(notes["columns_not_read"]), 200)
        return {
            **super().facts(prepared, tokenizer, teacher),
            **{n: each for n, each in found.items() if each},
        }

    def compared_by(self, prepared: Prepared) -> type[TokenComparison]:
        return ChoiceComparison if prepared.measured_on in prepared.choices else TokenComparison

    def prompts(self, config: Config, rows: Dataset) -> list[list[int]]:
        """What is given of a few rows, spread over all: their questions."""
        taken = spread(rows, config.compare.continuations)
        return [list(row["input_ids"][: row["prompt_tokens"]]) for row in taken]


class ChoiceComparison(TokenComparison):
    """Beside the tokens of the answers: which choice each model finds likeliest."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer, **options: Any) -> None:
        super().__init__(prepared, tokenizer, **options)
        self.choices, self.scores = prepared.choices[prepared.measured_on], {}

    def add(self, name: str, model: LiveTeacher, prepared: Prepared) -> dict[str, Any]:
        costs = super().add(name, model, prepared)
        self.scores[name] = scores_of(model, self.prepared, self.choices)
        return costs

    def answers(self, *, normalised: bool = True) -> dict[str, Answers]:
        """What each model chooses, by the scores per character or the raw ones, with its probabilities."""
        right = right_choices(self.choices)
        return {
            name: Answers(probabilities(self.choices, scores, normalised=normalised), right)
            for name, scores in self.scores.items()
        }

    def results(self, student: str) -> dict[str, Any]:
        found, answers = super().results(student), self.answers()
        rows = self.prepared.measured
        groups = rows["group"][:] if "group" in rows.column_names else None
        drawn = {"resamples": self.resamples, "seed": self.seed, "groups": groups}
        chosen = results_of(answers, **drawn)
        raw = results_of(self.answers(normalised=False), **drawn)
        for source, names in ((chosen, OF_CHOICES), (raw, OF_RAW_CHOICES)):
            for name, measures in source["models"].items():
                found["models"][name] |= {names[m]: f for m, f in measures.items() if m in names}
            differing = [each for each in source["differences"] if each["metric"] in names]
            found["differences"] += [{**each, "metric": names[each["metric"]]} for each in differing]
        items = self.choices.to_pandas().groupby("item")
        questions, choices = items["question"].first().tolist(), items["text"].agg(list).tolist()
        shown = {name: each for name, each in answers.items() if name == student or name != "untrained"}
        worst = worst_rows(shown, student, questions, choices)
        return {**found, "questions": len(questions), "mcnemar": chosen["mcnemar"], "worst": worst}


def scores_of(model: LiveTeacher, prepared: Prepared, rows: Dataset) -> np.ndarray:
    """[rows] nats, <= 0: the log-probability of each choice after its question."""
    order = np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable")  # by length: little padding
    found = np.zeros(len(rows))
    for start in range(0, len(rows), BATCH):
        numbers = order[start : start + BATCH]
        batch = prepared.collate([rows[int(n)] for n in numbers])
        batch = {name: values.to(model.model.device) for name, values in batch.items()}
        tokens = kept(batch["labels"])
        signal, terms = model(batch, tokens), {"ce": EVAL_TERMS["ce"]}
        sums = row_sums(signal, None, tokens.targets, tokens.rows, row_count=len(numbers), terms=terms)
        found[numbers] = -sums["ce"].double().cpu().numpy()
    return found


register(QuestionAnswering())
