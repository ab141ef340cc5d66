import math
import tracemalloc

import numpy as np
import pytest
from sklearn import metrics

from kdlib.metrics.bootstrap import Bootstrap, interval, mcnemar, permutation
from kdlib.metrics.calibration import bin_of, calibration_gaps, reliability
from kdlib.metrics.classification import Answers, item_figures, measures
from kdlib.metrics.names import MEASURES, SHARE
from kdlib.metrics.paired import results_of, worst_rows

NAMES = ("sport", "politics", "science", "music")


def made(seed: int, count: int = 300, skill: float = 2.0, labels=None) -> Answers:
    """Answers of a model that leans to the right class."""
    generator = np.random.default_rng(seed)
    labels = (
        np.random.default_rng(0).choice(4, size=count, p=[0.4, 0.3, 0.25, 0.05]) if labels is None else labels
    )
    logits = generator.normal(size=(count, 4)) + skill * np.eye(4)[labels]
    probabilities = np.exp(logits)
    return Answers(probabilities / probabilities.sum(axis=1, keepdims=True), labels)


@pytest.fixture(scope="module")
def models():
    return {"teacher": made(1, skill=2.5), "baseline": made(2, skill=1.5), "distilled": made(3, skill=2.0)}


@pytest.fixture(scope="module")
def results(models):
    return results_of(models, NAMES, resamples=300)


def test_the_measures_are_those_of_scikit_learn(models, results):
    for name, answers in models.items():
        true, said, found = answers.labels, answers.probabilities.argmax(1), results["models"][name]
        assert found["accuracy"]["value"] == metrics.accuracy_score(true, said)
        assert found["macro_f1"]["value"] == metrics.f1_score(true, said, average="macro")
        assert found["log_loss"]["value"] == pytest.approx(metrics.log_loss(true, answers.probabilities))
        assert found["log_loss"]["value"] == pytest.approx(answers.nats.mean())
        assert found["agreement"]["value"] == np.mean(said == models["teacher"].probabilities.argmax(1))
        assert found["confusion"] == metrics.confusion_matrix(true, said).tolist()
        report = metrics.classification_report(true, said, target_names=NAMES, output_dict=True)
        for entry in found["per_class"]:
            expected = report[entry["class"]]
            assert (entry["precision"], entry["recall"], entry["f1"]["value"], entry["support"]) == (
                expected["precision"],
                expected["recall"],
                expected["f1-score"],
                expected["support"],
            )


def calibration_error(confidence, right):
    return np.abs(calibration_gaps(confidence, right).sum(axis=0)).sum() / len(confidence)


def by_scikit_learn(answers, teacher):
    true, said = answers.labels, answers.said
    accuracy = metrics.accuracy_score(true, said)
    return {
        "accuracy": accuracy,
        "macro_f1": metrics.f1_score(true, said, average="macro", zero_division=0.0),
        "log_loss": metrics.log_loss(
            true, answers.probabilities, labels=range(answers.probabilities.shape[1])
        ),
        "ece": calibration_error(answers.confidence, answers.right),
        "kl_to_teacher": answers.kl_from(teacher).mean(),
        "agreement": metrics.accuracy_score(teacher.said, said),
        **({"retention": 100 * accuracy / teacher.right.mean()} if teacher.right.any() else {}),
    }


def test_the_resampled_measures_are_those_of_scikit_learn_on_the_items_drawn(models):
    teacher, answers = models["teacher"], models["distilled"]
    few = slice(0, 25)  # few enough that some draws lack a class
    teacher, answers = (Answers(each.probabilities[few], each.labels[few]) for each in (teacher, answers))
    figures, bootstrap = item_figures(answers, teacher, classes=True), Bootstrap(25, 50, seed=4)
    resampled = measures({name: bootstrap.sums(values) for name, values in figures.items()})
    draws = np.concatenate(list(bootstrap.draws())).astype(int)
    for number, times in enumerate(draws):
        items = np.repeat(np.arange(25), times)
        drawn, beside = (
            Answers(each.probabilities[items], each.labels[items]) for each in (answers, teacher)
        )
        for name, value in by_scikit_learn(drawn, beside).items():
            assert resampled[name][number] == pytest.approx(value), name


def test_kl_to_the_teacher_is_zero_where_both_say_the_same_and_right_by_hand():
    teacher = Answers([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [0, 0])
    student = Answers([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]], [0, 0])
    assert teacher.kl_from(teacher).tolist() == [0, 0]
    assert student.kl_from(teacher) == pytest.approx([0.5 * math.log(2), 0])


def test_what_is_no_distribution_or_has_no_such_label_is_refused():
    with pytest.raises(ValueError, match="1 rows are no distribution, first 1"):
        Answers([[0.5, 0.5], [np.nan, 0.5]], [0, 1])
    with pytest.raises(ValueError, match="row 0 has the label 2; it must be 0 to 1"):
        Answers([[0.5, 0.5]], [2])
    with pytest.raises(ValueError, match="needed"):
        Answers(np.zeros((0, 2)), [])
    with pytest.raises(ValueError, match="was asked other questions"):
        results_of({"teacher": Answers([[0.5, 0.5]], [0]), "distilled": Answers([[0.5, 0.5]], [1])})


def test_the_calibration_error_is_right_by_hand():
    confidence, right = np.array([0.9, 0.9, 0.9, 0.9, 0.55, 0.55]), np.array([1, 1, 1, 0, 1, 0], dtype=bool)
    # bins (13/15, 14/15] and (8/15, 9/15]: |0.75 - 0.9| * 4/6 + |0.5 - 0.55| * 2/6
    assert calibration_error(confidence, right) == pytest.approx(0.15 * 4 / 6 + 0.05 * 2 / 6)
    bins = reliability(confidence, right)
    assert [(b["count"], b["confidence"], b["accuracy"]) for b in bins if b["count"]] == [
        (2, pytest.approx(0.55), 0.5),
        (4, pytest.approx(0.9), 0.75),
    ]
    assert bins[0] == {
        "low": 0.0,
        "high": pytest.approx(1 / 15),
        "count": 0,
        "confidence": None,
        "accuracy": None,
    }


def test_a_bin_has_its_upper_edge_and_not_its_lower():
    assert bin_of(np.array([0.0, 0.2, 0.2001, 0.5, 1.0]), bins=5).tolist() == [0, 0, 1, 2, 4]
    assert bin_of(np.array([1 / 15, 1.0, 0.2])).tolist() == [0, 14, 2]


def test_reliability_is_as_scikit_learns_calibration_curve():
    from sklearn.calibration import calibration_curve

    answers = made(5)
    bins = [each for each in reliability(answers.confidence, answers.right) if each["count"]]
    accuracy, confidence = calibration_curve(answers.right, answers.confidence, n_bins=15)
    assert [each["accuracy"] for each in bins] == pytest.approx(accuracy)
    assert [each["confidence"] for each in bins] == pytest.approx(confidence)


def test_mcnemars_test_is_right_by_hand():
    # 1 against 9 of 10: (1 + 10) / 2^10 on each side
    assert mcnemar(1, 9) == {"p_value": pytest.approx(22 / 1024), "test": "exact binomial"}
    assert mcnemar(9, 1)["p_value"] == mcnemar(1, 9)["p_value"]
    assert mcnemar(0, 0)["p_value"] == 1
    assert mcnemar(12, 12)["p_value"] == pytest.approx(1)
    # 10 against 30: (20 - 1)^2 / 40 = 9.025, one degree of freedom: erfc(sqrt(9.025 / 2))
    assert mcnemar(10, 30) == {
        "p_value": pytest.approx(math.erfc(math.sqrt(9.025 / 2))),
        "test": "chi-squared with continuity correction",
    }
    assert mcnemar(20, 20)["p_value"] == 1


def test_mcnemar_counts_the_rows_that_only_one_has_right(models, results):
    entry = next(
        test for test in results["mcnemar"] if (test["model"], test["against"]) == ("distilled", "baseline")
    )
    ours, theirs = models["distilled"].right, models["baseline"].right
    assert entry["only_model_right"] == sum(a and not b for a, b in zip(ours, theirs, strict=True))
    assert entry["only_other_right"] == sum(b and not a for a, b in zip(ours, theirs, strict=True))


def test_the_draws_are_the_same_for_every_model_and_again(models, results):
    assert results_of(models, NAMES, resamples=300) == results
    assert results_of(models, NAMES, resamples=300, seed=1) != results
    twin = results_of({"teacher": models["teacher"], "distilled": models["teacher"]}, NAMES, resamples=100)
    assert all((d["value"], d["low"], d["high"]) == pytest.approx((0, 0, 0)) for d in twin["differences"])


def test_draws_do_not_depend_on_how_many_are_held_at_a_time(monkeypatch):
    column = np.arange(40.0)[:, None]
    whole = Bootstrap(40, 30).sums(column)
    monkeypatch.setattr("kdlib.metrics.bootstrap.AT_ONCE", 90)
    assert np.array_equal(Bootstrap(40, 30).sums(column), whole)
    assert len(whole) == 30


def test_an_interval_holds_its_value(results):
    figures = [
        results["models"][name][m]
        for name in results["models"]
        for m in ("accuracy", "macro_f1", "log_loss", "ece", "retention")
    ]
    for each in [*figures, *results["differences"]]:
        assert each["low"] - 1e-9 <= each["value"] <= each["high"] + 1e-9


def test_groups_are_drawn_whole():
    groups = ["a"] * 10 + ["b"] * 20 + ["c"] * 5
    one_each = np.eye(35)
    draws = Bootstrap(35, 200, seed=3, groups=groups).sums(one_each)  # how often each item is drawn
    assert draws.shape == (200, 35)
    assert all(len(set(draw[:10])) == len(set(draw[10:30])) == len(set(draw[30:])) == 1 for draw in draws)
    assert {draw[0] + draw[10] + draw[30] for draw in draws} == {3.0}
    backwards, forwards = (
        Bootstrap(5, 20, groups=list(names)).sums(np.eye(5)) for names in ("edcba", "abcde")
    )
    assert np.array_equal(backwards[:, ::-1], forwards)


def test_rows_that_say_the_same_make_an_interval_no_narrower():
    """Ten rows of each of thirty pages, all right or all wrong: as sure as thirty rows are, not three
    hundred.
    """
    right = np.repeat(np.random.default_rng(0).random(30) < 0.6, 10).astype(float)
    pages = [f"page {number // 10}" for number in range(300)]
    by_row, by_page = (
        Bootstrap(300, 2000, groups=groups).sums(right[:, None])[:, 0] / 300 for groups in (None, pages)
    )
    share = right.mean()
    assert by_row.std() == pytest.approx((share * (1 - share) / 300) ** 0.5, rel=0.1)
    assert by_page.std() == pytest.approx((share * (1 - share) / 30) ** 0.5, rel=0.1)


def test_what_is_always_or_never_right_on_a_few_rows_is_not_taken_for_certain():
    third = 3 / (3 + 1.959964**2)
    assert interval(1.0, np.ones(9), 3, SHARE) == {"value": 1, "low": pytest.approx(third), "high": 1}
    teacher, student = Answers([[0.9, 0.1], [0.2, 0.8]], [0, 0]), Answers([[0.8, 0.2], [0.7, 0.3]], [0, 0])
    results = results_of({"teacher": teacher, "distilled": student}, ("a", "b"), resamples=100)
    found = results["models"]
    assert found["distilled"]["accuracy"]["low"] == pytest.approx(2 / (2 + 1.959964**2))
    assert found["distilled"]["on_teachers_mistakes"]["mended"]["low"] < 0.3
    for certain in (found["teacher"]["agreement"], found["teacher"]["on_teachers_mistakes"]["repeated"]):
        assert certain["low"] == certain["high"] == 1
    of_one_author = results_of({"teacher": student}, groups=["a", "a"], resamples=100)
    assert of_one_author["models"]["teacher"]["accuracy"] == {"value": 1, "low": 0, "high": 1}
    assert "of which no interval can be told" in of_one_author["interval"]


def test_models_that_never_differ_on_a_few_rows_are_not_equal_for_certain():
    one, other = (Answers([[p, 1 - p]] * 6, [0] * 6) for p in (0.9, 0.8))
    found = results_of({"teacher": one, "distilled": other}, ("a", "b"), resamples=100)["differences"]
    width = 1.959964**2 / (6 + 1.959964**2)
    accuracy, retention = (
        next(each for each in found if each["metric"] == name) for name in ("accuracy", "retention")
    )
    assert (accuracy["value"], accuracy["low"], accuracy["high"]) == (0, *map(pytest.approx, (-width, width)))
    assert (retention["low"], retention["high"]) == pytest.approx((-100 * width, 100 * width))


def test_retention_is_the_share_of_the_teachers_accuracy(models, results):
    found = results["models"]["distilled"]["retention"]
    assert found["value"] == pytest.approx(
        100 * models["distilled"].right.mean() / models["teacher"].right.mean()
    )
    assert results["models"]["teacher"]["retention"] == {"value": 100, "low": 100, "high": 100}


def test_the_teachers_mistakes_are_repeated_or_mended(models, results):
    teacher, student = models["teacher"], models["distilled"]
    found = results["models"]["distilled"]["on_teachers_mistakes"]
    missed = ~teacher.right
    assert found["rows"] == missed.sum()
    assert found["repeated"]["value"] == np.mean(student.said[missed] == teacher.said[missed])
    assert found["mended"]["value"] == np.mean(student.said[missed] == student.labels[missed])
    assert results["models"]["teacher"]["on_teachers_mistakes"]["repeated"]["value"] == 1


def test_a_teacher_without_mistakes_or_without_merit_leaves_out_what_has_no_meaning():
    good, bad = Answers([[0.9, 0.1], [0.2, 0.8]], [0, 1]), Answers([[0.1, 0.9], [0.8, 0.2]], [0, 1])
    assert (
        "on_teachers_mistakes"
        not in results_of({"teacher": good, "distilled": bad}, ("a", "b"), resamples=100)["models"][
            "distilled"
        ]
    )
    assert (
        "retention"
        not in results_of({"teacher": bad, "distilled": good}, ("a", "b"), resamples=100)["models"][
            "distilled"
        ]
    )


def test_choices_of_their_own_for_each_item_have_no_f1():
    teacher = Answers([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]], [0, 2])
    found = results_of({"teacher": teacher}, resamples=100)["models"]["teacher"]
    assert found["accuracy"]["value"] == 1
    assert {"macro_f1", "per_class", "confusion"}.isdisjoint(found)


def test_a_class_without_a_row_has_no_part_in_macro_f1():
    answers = Answers(np.eye(4)[[0, 1, 1]] * 0.97 + 0.0075, [0, 1, 0])
    found = results_of({"teacher": answers}, NAMES, resamples=100)["models"]["teacher"]
    assert found["macro_f1"]["value"] == pytest.approx(2 / 3)
    assert found["per_class"][3] == {
        "class": "music",
        "precision": 0,
        "recall": 0,
        "support": 0,
        "f1": {"value": 0, "low": 0, "high": 0},
    }


def test_the_worst_rows_are_those_most_wrong_and_then_those_furthest_from_the_teacher():
    teacher = Answers([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5]], [0, 0, 0, 1])
    student = Answers([[0.8, 0.2], [0.1, 0.9], [0.99, 0.01], [0.5, 0.5]], [0, 0, 0, 1])
    models, texts = {"teacher": teacher, "distilled": student}, ["x" * 400, "b", "c", "d"]
    found = worst_rows(models, "distilled", texts, [("yes", "no")] * 4, wrong=1, far=2)
    assert [(each["row"], each["why"]) for each in found] == [
        (1, "most wrong"),
        (2, "furthest from the teacher"),
        (0, "furthest from the teacher"),
    ]
    assert found[0]["said"] == {
        "teacher": [["yes", 0.9], ["no", 0.1]],
        "distilled": [["no", 0.9], ["yes", 0.1]],
    }
    assert found[0]["label"] == "yes"
    assert found[2]["text"] == "x" * 300 + " …"


def test_choices_may_differ_from_row_to_row():
    teacher = Answers([[0.9, 0.1, 0.0], [0.2, 0.2, 0.6]], [0, 2])
    found = worst_rows(
        {"teacher": teacher}, "teacher", ["a", "b"], [("yes", "no"), ("red", "green", "blue")], wrong=0, far=0
    )
    assert found == []
    wrong = Answers([[0.1, 0.9, 0.0], [0.2, 0.2, 0.6]], [0, 2])
    found = worst_rows(
        {"teacher": teacher, "distilled": wrong},
        "distilled",
        ["a", "b"],
        [("yes", "no"), ("red", "green", "blue")],
    )
    assert found[0]["said"]["distilled"] == [["no", 0.9], ["yes", 0.1]]


@pytest.mark.parametrize(
    ("pages", "said"), [(3, "3 groups of rows, which are few"), (20, "20 groups of rows")]
)
def test_few_groups_are_said_to_be_few(models, pages, said):
    groups = [f"page {number % pages}" for number in range(len(models["teacher"]))]
    found = results_of(models, NAMES, groups=groups, resamples=50)
    assert found["units"] == pages
    assert said in found["interval"]
    assert ("few" in found["interval"]) == (pages < 20)


def test_every_interval_stays_within_what_its_measure_can_be(models):
    few = Answers(models["distilled"].probabilities[:4], models["distilled"].labels[:4])
    teacher = Answers(models["teacher"].probabilities[:4], models["teacher"].labels[:4])
    found = results_of({"teacher": teacher, "distilled": few}, NAMES, resamples=300)
    for facts in found["models"].values():
        for name, figures in facts.items():
            if name in MEASURES:
                within = MEASURES[name].within
                assert within.low <= figures["low"] <= figures["value"] <= figures["high"] <= within.high
        shares = [each["f1"] for each in facts["per_class"]]
        assert all(0 <= each["low"] <= each["value"] <= each["high"] <= 1 for each in shares)
    for each in found["differences"]:
        within = MEASURES[each["metric"]].within.of_differences
        assert within.low <= each["low"] <= each["value"] <= each["high"] <= within.high


def test_a_test_by_groups_is_exact_and_of_single_rows_it_is_mcnemars():
    advantage = np.array([1] * 9 + [-1] + [0] * 5)
    assert permutation(advantage, [str(n) for n in range(15)])["p_value"] == pytest.approx(22 / 1024)
    # groups that sum to 3, 2, -1: the signs' eight sums are 6, 4, 2, 0 and their opposites; |4| or more: four
    found = permutation(np.array([1, 1, 1, 1, 1, -1, 0]), list("aaabbcd"))
    assert found == {"p_value": 0.5, "test": "exact permutation over 4 groups"}
    assert permutation(np.zeros(4, dtype=int), list("abab"))["p_value"] == 1


def test_equal_models_whose_groups_stand_or_fall_together_differ_in_one_trial_of_twenty():
    generator, groups = np.random.default_rng(0), np.repeat(np.arange(12), 50)
    labels, sure = np.zeros(600, dtype=int), np.array([[0.9, 0.1], [0.1, 0.9]])
    called = 0
    for _ in range(300):
        one, other = (Answers(sure[np.repeat(generator.integers(2, size=12), 50)], labels) for _ in "ab")
        advantage = one.right.astype(int) - other.right
        called += permutation(advantage, groups)["p_value"] < 0.05
    assert called / 300 < 0.08
    found = results_of({"teacher": one, "distilled": other}, groups=groups, resamples=50)["mcnemar"][0]
    assert found["test"] == "exact permutation over 12 groups"


def test_sums_of_many_rows_take_no_more_memory_than_they_need():
    rows = np.random.default_rng(0).random((20_000, 24))
    tracemalloc.start()
    sums = Bootstrap(len(rows), 2000).sums(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sums.shape == (2000, 24)
    assert peak < 30 * 2**20


def test_calibration_error_is_never_below_0():
    labels = np.arange(40) % 2
    even = Answers(np.where(np.eye(2)[labels] > 0, 0.999, 0.001), labels)
    assert results_of({"teacher": even}, ("a", "b"), resamples=200)["models"]["teacher"]["ece"]["low"] >= 0
