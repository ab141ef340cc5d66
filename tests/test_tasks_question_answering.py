import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from made_log import read_metrics
from made_questions import multiple_choice, question_tokenizer, tiny_gpt2, written

from kdlib.config.data import DataConfig
from kdlib.config.run import parse
from kdlib.config.task_rules import RULES
from kdlib.data.qa import prepare
from kdlib.diagnostics.doctor import diagnose
from kdlib.diagnostics.parity import parity, shortened
from kdlib.evaluation.compare import Candidate, measured
from kdlib.metrics import multiple_choice as choices
from kdlib.models.loading import BUILT_IN, load_model, load_tokenizer
from kdlib.plots import comparison as plots
from kdlib.plots.classification import answer_tables
from kdlib.runs.files import StudentFolder
from kdlib.tasks import base as tasks, question_answering
from kdlib.tasks.question_answering import ChoiceComparison, scores_of
from kdlib.tasks.token_comparison import COLUMNS, TokenComparison
from kdlib.training import run as training


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {
        "teacher": tiny_gpt2(place / "teacher", layers=2, width=32, seed=1),
        "student": tiny_gpt2(place / "student", layers=1, width=24, seed=2),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(multiple_choice(60), tmp_path_factory.mktemp("data") / "questions.jsonl")


@pytest.fixture(scope="module")
def prepared(source):
    return prepare(
        DataConfig(source=str(source), max_length=128, validation=0.5), question_tokenizer(), seed=0
    )


@pytest.fixture(scope="module")
def voice(folders, prepared):
    return tasks.asked(load_model(str(folders["teacher"])), prepared)


@pytest.fixture
def config(folders, source):
    return parse(
        {
            "task": "question-answering",
            "precision": "float32",
            "teacher": {"model": str(folders["teacher"])},
            "student": {"from": str(folders["student"])},
            "data": {"source": str(source), "max_length": 128, "validation": 0.25},
            "loss": {"temperature": 3.0, "weights": {"kd": 0.5, "ce": 0.5}},
            "training": {
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "per_device_eval_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "no",
                "use_cpu": True,
                "metric_for_best_model": "eval_choice_accuracy",
            },
        }
    )


def test_a_score_is_the_log_probability_of_the_choice_after_the_question(voice, prepared):
    rows = prepared.choices["validation"]
    scores = scores_of(voice, prepared, rows)
    for number in range(0, len(rows), 7):
        ids, given = torch.tensor([rows[number]["input_ids"]]), rows[number]["prompt_tokens"]
        logits = voice.model(input_ids=ids).logits[0, :, : prepared.vocabulary].float().log_softmax(-1)
        expected = sum(logits[place - 1, ids[0, place]].item() for place in range(given, ids.shape[1]))
        assert scores[number] == pytest.approx(expected, rel=1e-5)


def test_normalised_scores_are_divided_by_the_characters_of_the_choice():
    rows = table([["a", "bbbb"], ["cc", "d", "eee"]], answers=[1, 2])
    scores = np.array([-2.0, -4.0, -2.0, -3.0, -3.3])
    assert choices.table_of(rows, scores).tolist() == [
        [-2.0, -1.0, -math.inf],
        [-1.0, -3.0, pytest.approx(-1.1)],
    ]
    assert choices.accuracy(rows, scores) == 0.5  # the long one of the first; of the second the first
    assert choices.accuracy(rows, scores, normalised=False) == 0.0
    assert choices.right_choices(rows).tolist() == [1, 2]


def test_probabilities_are_the_softmax_of_the_normalised_scores_and_0_where_there_is_no_choice():
    rows = table([["a", "bb"], ["a", "b", "c"]], answers=[0, 0])
    found = choices.probabilities(rows, np.array([-1.0, -4.0, -1.0, -1.0, -1.0]))
    assert found[0] == pytest.approx([1 / (1 + math.exp(-1)), 1 - 1 / (1 + math.exp(-1)), 0])
    assert found[1] == pytest.approx([1 / 3] * 3)
    raw = choices.probabilities(rows, np.array([-1.0, -4.0, -1.0, -1.0, -1.0]), normalised=False)
    assert raw[0, 0] == pytest.approx(1 / (1 + math.exp(-3)))


def test_of_equal_scores_the_first_choice_is_taken():
    rows = table([["a", "b"], ["a", "b"]], answers=[0, 1])
    assert choices.accuracy(rows, np.zeros(4)) == 0.5


def test_answers_are_arrays_for_whoever_measures_them(voice, prepared):
    comparison = ChoiceComparison(prepared, question_tokenizer(), resamples=20)
    comparison.add("teacher", voice, prepared)
    answers = comparison.answers()["teacher"]
    probabilities, labels = answers.probabilities, answers.labels
    assert probabilities.shape == (len(prepared.validation), 4)
    assert probabilities.sum(1) == pytest.approx(np.ones(len(labels)))
    rows = prepared.choices["validation"]
    assert (probabilities > 0).sum() == len(rows)
    assert (probabilities.argmax(1) == labels).mean() == choices.accuracy(
        rows, scores_of(voice, prepared, rows)
    )


def test_padding_and_order_change_no_score(voice, prepared, monkeypatch):
    rows = prepared.choices["validation"].select(range(20))
    together = scores_of(voice, prepared, rows)
    monkeypatch.setattr(question_answering, "BATCH", 1)
    assert scores_of(voice, prepared, rows) == pytest.approx(together, abs=1e-4)


def table(texts, answers):
    return Dataset.from_list(
        [
            {"item": item, "choice": number, "is_answer": number == answers[item], "characters": len(text)}
            for item, each in enumerate(texts)
            for number, text in enumerate(each)
        ]
    )


def trained(config, folder):
    tokenizer = load_tokenizer(config.teacher.model)
    prepared = tasks.prepare(config, tokenizer)
    teacher = tasks.load_teacher(config, prepared)
    student = tasks.untrained_student(config, prepared, None)
    training.train(config, folder, student=student, teacher=teacher, tokenizer=tokenizer, prepared=prepared)
    return prepared


def test_every_evaluation_measures_the_choices_and_the_best_model_goes_by_them(config, tmp_path):
    folder = StudentFolder(tmp_path / "run")
    prepared = trained(config, folder)
    logged = [line["eval/choice_accuracy"] for line in read_metrics(folder) if "eval/choice_accuracy" in line]
    assert len(logged) == 3
    best = tasks.asked(load_model(str(folder.best_model)), prepared)
    rows = prepared.choices["validation"]
    assert choices.accuracy(rows, scores_of(best, prepared, rows)) == pytest.approx(max(logged))


def test_training_stops_early_when_the_choices_get_no_better(config, tmp_path):
    folder = StudentFolder(tmp_path / "run")
    stopping = parse(
        {
            **config.as_dict(),
            "early_stopping": {"patience": 1},
            "training": {**config.as_dict()["training"], "learning_rate": 1e-12, "max_steps": 20},
        }
    )
    trained(stopping, folder)
    assert [line["train/step"] for line in read_metrics(folder) if "eval/loss" in line][-1] == 4
    assert folder.final_model.exists()


def test_training_teaches_the_answers(config, tmp_path):
    longer = parse(
        {
            **config.as_dict(),
            "loss": {"temperature": 1.0, "weights": {"ce": 1.0}},
            "training": {**config.as_dict()["training"], "max_steps": 30, "eval_steps": 15},
        }
    )
    folder = StudentFolder(tmp_path / "run")
    trained(longer, folder)
    perplexities = [line["eval/perplexity"] for line in read_metrics(folder) if "eval/perplexity" in line]
    assert perplexities[-1] < 0.5 * prepared_perplexity(longer)


def prepared_perplexity(config) -> float:
    """Of the untrained student."""
    tokenizer = load_tokenizer(config.teacher.model)
    prepared = tasks.prepare(config, tokenizer)
    comparison = TokenComparison(prepared, tokenizer, resamples=100)
    untrained = {"untrained": Candidate(lambda: load_model(config.student.source))}
    found = measured(comparison, prepared, untrained, "untrained")
    return found["models"]["untrained"]["perplexity"]["value"]


def compared(folders, prepared, models):
    comparison = ChoiceComparison(prepared, question_tokenizer(), resamples=200)
    candidates = {
        name: Candidate(lambda folder=folder: load_model(str(folders[folder])))
        for name, folder in models.items()
    }
    return measured(comparison, prepared, candidates, "distilled")


def test_a_comparison_has_the_choices_with_paired_intervals(folders, prepared):
    results = compared(folders, prepared, {"teacher": "teacher", "twin": "teacher", "distilled": "student"})
    assert results["questions"] == len(prepared.validation)
    teacher, twin, student = (results["models"][name] for name in ("teacher", "twin", "distilled"))
    assert twin["choice_agreement"]["value"] == 1 > twin["choice_agreement"]["low"]  # on these few questions
    assert teacher["choice_agreement"]["low"] == 1
    assert twin["choice_retention"]["low"] < twin["choice_retention"]["value"] == 100  # likewise
    assert teacher["choice_retention"] == pytest.approx({"value": 100, "low": 100, "high": 100})
    assert student["choice_retention"]["value"] == pytest.approx(
        100 * student["choice_accuracy"]["value"] / teacher["choice_accuracy"]["value"]
    )
    rows = prepared.choices["validation"]
    scores = scores_of(tasks.asked(load_model(str(folders["student"])), prepared), prepared, rows)
    assert student["choice_accuracy"]["value"] == pytest.approx(choices.accuracy(rows, scores))
    assert student["choice_accuracy_raw"]["value"] == pytest.approx(
        choices.accuracy(rows, scores, normalised=False)
    )
    for entry in results["differences"]:
        assert entry["low"] - 1e-9 <= entry["value"] <= entry["high"] + 1e-9
        if (entry["model"], entry["against"]) == ("twin", "teacher"):
            assert entry["value"] == pytest.approx(0, abs=1e-5)
    assert {entry["metric"] for entry in results["differences"]} >= set(RULES["question-answering"].measures)
    json.dumps(results, allow_nan=False)
    assert {
        test["p_value"]
        for test in results["mcnemar"]
        if {test["model"], test["against"]} == {"teacher", "twin"}
    } == {1.0}
    assert student["on_teachers_mistakes"]["rows"] == round(
        (1 - teacher["choice_accuracy"]["value"]) * results["questions"]
    )
    for each in results["worst"]:
        assert each["label"] in {row["text"] for row in rows if row["question"] == each["text"]}
        assert sum(share for _, share in each["said"]["distilled"]) <= 1 + 1e-9


def test_the_picture_and_the_tables_of_a_comparison_begin_with_the_choices(folders, prepared):
    models = {"teacher": "teacher", "untrained": "student", "distilled": "student"}
    results = {"task": "question-answering", **compared(folders, prepared, models)}
    assert list(plots.quality_table(results).columns)[:2] == [
        "right choices (primary)",
        "retention, %",
    ]
    assert "the distilled student shows: no clear difference in right choices" in plots.comparison_message(
        results
    )
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in plots.comparison_bars(results).axes]
    assert list(answer_tables(results)) == ["mcnemar", "on_teachers_mistakes", "worst"]
    assert titles == ["right choices (primary)", "retention, %", "the teacher's choices", "KL to teacher"]


def test_bits_per_byte_counts_the_answers_alone(folders, prepared):
    comparison = TokenComparison(prepared, question_tokenizer(), resamples=100)
    rights = prepared.choices["validation"].filter(lambda row: row["is_answer"])
    comparison.beside_teacher("teacher", tasks.asked(tiny_model(prepared.vocabulary), prepared))
    found = comparison.sums["teacher"][:, COLUMNS.index("bytes")]
    assert found.tolist() == [1 + len(text.encode()) for text in rights["text"]]


def test_the_self_test_passes_on_questions(config):
    tokenizer = load_tokenizer(config.teacher.model)
    prepared = tasks.prepare(config, tokenizer)
    found = parity(
        config,
        student=tasks.untrained_student(config, prepared, None),
        teacher=tasks.load_teacher(config, prepared),
        tokenizer=tokenizer,
        prepared=prepared,
    )
    assert set(found["result"]) == {"pass"}, found.to_string()


def test_the_rows_of_the_self_test_keep_a_prompt_and_differ_in_what_is_learned(prepared):
    rows = shortened(prepared.train)
    learned = [len(row["input_ids"]) - row["prompt_tokens"] for row in rows]
    answers = [len(row["input_ids"]) - row["prompt_tokens"] for row in prepared.train.select(range(3))]
    assert [many - few for many, few in zip(learned, answers, strict=True)] == [1, 2, 3]
    assert all(row["prompt_tokens"] >= 1 for row in rows)


def test_the_doctor_speaks_of_questions(config):
    found = {each.where: each.what for each in diagnose(config)}
    assert found["data.validation"] == "15 questions are held out"
    assert "data.text" not in found
    assert "data.source" not in found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # another package's
@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed; the test extra brings it")
@pytest.mark.parametrize("name", ["tiny", "smollm2-135m-instruct"])
def test_scores_and_accuracies_are_those_of_lm_eval(name, folders, tmp_path):
    """Its own model, task and evaluation, from the same file of questions: every score, acc and acc_norm."""
    tokenizer, model = (
        load(name if name in BUILT_IN else str(folders["teacher"])) for load in (load_tokenizer, load_model)
    )
    count = 4 if name in BUILT_IN else 30
    prepared = prepare(
        DataConfig(
            source=str(written(multiple_choice(2 * count), tmp_path / "q.jsonl")),
            max_length=128,
            validation=0.5,
        ),
        tokenizer,
        seed=0,
    )
    rows = prepared.choices["validation"]
    scores = scores_of(tasks.asked(model, prepared), prepared, rows)
    theirs, figures = scored_by_lm_eval(model, tokenizer, rows, tmp_path)
    assert len(theirs) == len(scores)
    assert scores == pytest.approx(np.array(theirs), abs=1e-4)
    assert choices.accuracy(rows, scores, normalised=False) == figures["acc,none"]
    assert choices.accuracy(rows, scores) == figures["acc_norm,none"]


def scored_by_lm_eval(model, tokenizer, rows, folder):
    """([rows] log-likelihoods, the task's results) of these questions."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    found = {}
    for row in rows:
        item = found.setdefault(row["item"], {"question": row["question"], "choices": []})
        item["choices"].append(row["text"])
        item |= {"answer": row["choice"]} if row["is_answer"] else {}
    file = str(written(found.values(), folder / "held_out.jsonl"))
    task = ConfigurableTask(
        config={
            "task": "ours",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": file}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )
    results = evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4),
        {"ours": task},
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"]["ours"], key=lambda sample: sample["doc_id"])
    return [score for sample in samples for score, _ in sample["filtered_resps"]], results["results"]["ours"]
