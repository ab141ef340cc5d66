"""The doctor on classifications: one that is well is left alone; a teacher that knows nothing, too few
rows, too few tokens are named.
"""

import json
import shutil
from pathlib import Path

import pytest
from made_classifiers import LABELS, classification, classifier, source, taught
from transformers import LlamaConfig, LlamaForCausalLM

from kdlib.config.run import parse
from kdlib.diagnostics import doctor
from kdlib.diagnostics.context import Context, as_text
from kdlib.diagnostics.data_checks import teacher_knows_the_classes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def knowing(place) -> str:
    return taught(place / "knowing", "llama", labels=["weather", "tools", "animals"])


@pytest.fixture(scope="module")
def well(place, knowing) -> dict:
    """A decoder that knows the classes, an encoder with a tokenizer of its own, enough held out."""
    student = classifier(place / "student", "bert", labels=["one", "two"], tokens=280, seed=1)
    raw = classification(
        knowing, student, max_steps=40, warmup_steps=4, learning_rate=1e-3, eval_steps=10, logging_steps=5
    )
    return {**raw, "data": {"source": source(place, 600), "validation": 0.2, "max_length": 32}}


def found(raw: dict, **made) -> dict[str, tuple[str, str]]:
    """{where: (severity, what)}, without notes."""
    said = doctor.diagnose(parse(raw), made=made)
    return {each.where: (each.severity, each.what) for each in said if each.severity != "note"}


def test_a_classification_that_is_well_is_left_alone(well):
    said = doctor.diagnose(parse(well))
    assert all(each.severity == "note" and "not measured" not in each.what for each in said), as_text(said)


def test_a_teacher_that_knows_nothing_is_named_with_its_accuracy_and_a_toy_is_no_reason_to_stop(
    well, knowing, place
):
    folder = shutil.copytree(knowing, place / "renamed")
    settings = json.loads((folder / "config.json").read_text())
    names = ["tools", "animals", "weather"]
    settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(settings))
    context = Context(parse({**well, "teacher": {"model": str(folder)}}))
    for briefly, severity in ((False, "critical"), (True, "warning")):
        context.made["is_taught_briefly"] = briefly
        (finding,) = teacher_knows_the_classes(context)
        assert (finding.severity, finding.where) == (severity, "teacher.model")
        assert "its accuracy on 128 training rows is" in finding.what


def test_a_teacher_whose_classes_have_no_names_is_taken_in_the_order_of_the_datas_and_said(well, place):
    said = doctor.diagnose(parse({**well, "teacher": {"model": classifier(place / "unnamed", labels=None)}}))
    assert any(
        "have no names (LABEL_0" in each.what and "animals, tools, weather" in each.why for each in said
    ), as_text(said)


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["one", "two"], "a head for 2 classes; the data has 3"), (None, "no head for classes")],
)
def test_a_teacher_without_a_head_is_a_finding_that_names_the_stage(well, place, labels, words):
    folder = place / f"headless {labels}"
    model = classifier(folder, labels=labels or LABELS)
    if labels is None:
        LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    said = doctor.diagnose(parse({**well, "teacher": {"model": model}}))
    finding = next(each for each in said if each.where == "teacher.model")
    assert finding.severity == "critical"
    assert words in finding.what
    assert "teacher_stage: {training:" in finding.fix
    assert any("the first batch was not measured" in each.what for each in said)


def test_with_a_stage_the_teacher_is_not_measured_before_it_is_trained(well, place):
    stage = {"training": {"max_steps": 5, "use_cpu": True}}
    teacher = {"model": classifier(place / "headless", labels=["one", "two"])}
    said = doctor.diagnose(parse({**well, "teacher": teacher, "teacher_stage": stage}))
    assert all(each.severity == "note" for each in said), as_text(said)
    assert any("trained first (teacher_stage)" in each.what for each in said)


@pytest.mark.parametrize(
    ("labels", "where", "words"),
    [
        (["tools", "plants", "weather"], "data.source", "label 'animals', which the teacher does not know"),
        (["red", "green", "blue"], "teacher.model", "its classes are red, green, blue"),
    ],
)
def test_a_teacher_with_other_classes_is_named(well, place, labels, where, words):
    severity, what = found({**well, "teacher": {"model": classifier(place / labels[0], labels=labels)}})[
        where
    ]
    assert severity == "critical"
    assert words in what


def test_few_held_out_rows_and_small_steps_are_named(well):
    raw = {
        **well,
        "data": {**well["data"], "max_eval_rows": 30},
        "training": {**well["training"], "per_device_train_batch_size": 2},
    }
    said = found(raw)
    assert "30 rows are held out" in said["data.max_eval_rows"][1]
    assert "2 rows" in said["training.gradient_accumulation_steps"][1]


def test_small_classes_are_named_with_their_rows(well, place):
    with_one_more = place / "weather_is_rare.jsonl"
    rows = [json.loads(line) for line in Path(source(place, 600)).read_text().splitlines()]
    rare = [number for number, row in enumerate(rows) if row["label"] == "weather"][4:]
    with_one_more.write_text(
        "".join(json.dumps(row) + "\n" for number, row in enumerate(rows) if number not in set(rare))
    )
    raw = {**well, "data": {**well["data"], "source": str(with_one_more)}}
    said = found(raw)
    assert "1 of 3 classes have fewer than 10 of the" in said["data.label"][1]
    assert said["data.label"][1].endswith("weather 3")
    assert said["data.validation"][1].endswith("validation rows: weather 1")


def test_rows_longer_than_either_model_reads_are_named(well, place, knowing):
    severity, what = found({**well, "data": {**well["data"], "max_length": 100}})["data.max_length"]
    assert (severity, what) == ("critical", "100; the teacher has 64 positions")


def test_texts_that_are_cut_are_named_without_a_word_on_packing(well):
    said = doctor.diagnose(parse({**well, "data": {**well["data"], "max_length": 6}}))
    finding = next(each for each in said if each.where == "data.max_length")
    assert "are longer than 6 tokens and cut" in finding.what
    assert "packing" not in finding.fix


def test_the_size_of_a_classifying_student_is_counted_without_its_weights(well):
    assert Context(parse(well)).size > 1000
