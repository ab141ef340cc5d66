import json

import pytest
from conftest import other_tokens, sentences
from made_questions import multiple_choice, tiny_gpt2, written
from tiny_classifiers import LABELS, bert, llama, rows
from typer.testing import CliRunner

from kdlib.errors import ConfigError, DataError, RunError
from kdlib.evaluation import compare
from kdlib.plots import comparison as plots
from kdlib.reports.run import render_comparison
from kdlib.workbench.cli import app

COLUMNS = ["data.text=content", "data.label=topic"]
FEW = ["compare.resamples=100", "device=cpu", "precision=float32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A decoder that knows the classes in another order, two encoders with tokenizers of their own, rows
    with columns of other names.
    """
    place = tmp_path_factory.mktemp("given")
    llama(place / "teacher", labels=LABELS[::-1])
    bert(place / "small")
    bert(place / "other", seed=2, size=260)
    lines = [json.dumps({"content": row["text"], "topic": row["label"]}) for row in rows()]
    (place / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return place


def options(words):
    return [word for text in words for word in ("-o", text)]


def test_classifiers_are_compared_from_the_command_line_and_written(place, tmp_path):
    words = [
        "compare",
        "--teacher",
        place / "teacher",
        "--student",
        place / "small",
        "--student",
        f"wide={place / 'other'}",
        "--data",
        place / "rows.jsonl",
        *options([*COLUMNS, *FEW, "data.test=0.5"]),
        "--output",
        tmp_path / "out",
    ]
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0
    found = json.loads((tmp_path / "out" / "comparison_results.json").read_text())
    assert list(found["models"]) == ["teacher", "wide", "small"]
    assert (found["student"], found["split"], found["rows"]) == ("small", "test", 80)
    assert found["models"]["teacher"]["kl_to_teacher"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["models"]["small"]["kl_to_teacher"]["value"] > 0
    assert "on 80 test rows of" in done.output
    assert "small against" in done.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "small compared" in page
    assert "McNemar" in page
    assert "on 80 test rows of" in page
    assert str(place / "other") in page
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        "teacher_student_comparison",
        "confusion",
        "reliability",
        "f1_per_class",
    }


def test_the_teacher_as_its_own_student_differs_in_nothing(place):
    found = compare.compare(
        str(place / "teacher"),
        {"same": str(place / "teacher")},
        str(place / "rows.jsonl"),
        overrides=[*COLUMNS, *FEW, "data.validation=0.25"],
    )
    assert found["split"] == "validation"
    assert {
        d["value"] for d in found["differences"] if d["metric"] in ("accuracy", "agreement", "log_loss")
    } == {0.0}


def test_a_comparison_on_four_rows_warns_and_stays_within_what_can_be(place, tmp_path, capsys):
    found = compare.compare(
        str(place / "teacher"),
        {"small": str(place / "small")},
        str(place / "rows.jsonl"),
        overrides=[*COLUMNS, *FEW, "data.max_eval_rows=4"],
    )
    warned = "95 %, paired bootstrap over 4 rows, which are few: below 20 it is rough"
    assert found["interval"] == warned
    assert f"intervals: {warned}" in capsys.readouterr().out
    assert (
        0
        <= found["models"]["small"]["agreement"]["low"]
        <= found["models"]["small"]["agreement"]["high"]
        <= 1
    )
    render_comparison(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert warned in page
    assert "Few units were measured" in page


def test_nearly_a_whole_file_can_be_measured(place):
    found = compare.compare(
        str(place / "teacher"),
        {"small": str(place / "small")},
        str(place / "rows.jsonl"),
        overrides=[*COLUMNS, *FEW, "data.test=0.99"],
    )
    assert found["rows"] == 160 - 2 * len(LABELS)


def test_a_file_that_nothing_divides_is_measured_whole(place):
    models = str(place / "teacher"), {"small": str(place / "small")}
    found = compare.compare(*models, str(place / "rows.jsonl"), overrides=[*COLUMNS, *FEW])
    assert (found["rows"], found["split"]) == (160, "test")
    assert "all there are, each text once" in found["rule"]
    assert (
        compare.compare(
            *models, str(place / "rows.jsonl"), overrides=[*COLUMNS, *FEW, "data.max_eval_rows=40"]
        )["rows"]
        == 40
    )


def test_against_the_teacher_nothing_is_said_of_how_near_it_is_to_itself(place):
    models = str(place / "teacher"), {"small": str(place / "small")}
    found = compare.compare(*models, str(place / "rows.jsonl"), overrides=[*COLUMNS, *FEW])
    said = plots.comparison_message(found)
    assert "accuracy" in said
    assert "KL to the teacher" not in said
    assert "KL to teacher" not in plots.difference_table(found)["metric"].tolist()


def test_a_missing_column_is_named_with_its_setting(place):
    with pytest.raises(
        DataError, match=r"no column 'body'.*it has content, topic: name the one with the text in data\.text"
    ):
        compare.compare(
            str(place / "teacher"),
            {"small": str(place / "small")},
            str(place / "rows.jsonl"),
            overrides=["data.text=body"],
        )


def test_language_models_are_compared_on_held_out_text(teacher_folder, narrow, place, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"content": line}) + "\n" for line in sentences(120, seed=1)))
    settings = ["data.text=content", *FEW, "compare.prompt_tokens=6", "compare.new_tokens=4"]
    found = compare.compare(
        str(teacher_folder), {"narrow": narrow}, str(text), task="causal-lm", overrides=settings
    )
    render_comparison(found, tmp_path)
    assert list(found["models"]) == ["teacher", "narrow"]
    assert found["models"]["teacher"]["kl_to_teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["models"]["narrow"]["kl_to_teacher"]["value"] > 0
    assert "(test: all there are" in found["rule"]


def test_a_model_of_other_tokens_is_compared_on_the_same_bytes(teacher_folder, narrow, tmp_path):
    text, other = tmp_path / "text.jsonl", other_tokens(tmp_path / "other")
    text.write_text("".join(json.dumps({"content": line}) + "\n" for line in sentences(120, seed=1)))
    asked = {"task": "causal-lm", "overrides": ["data.text=content", *FEW, "compare.prompt_tokens=6"]}
    found = compare.compare(str(teacher_folder), {"other": other}, str(text), **asked)
    render_comparison(found, tmp_path)
    assert {"bits_per_byte", "agreement", "kl_to_teacher"} <= set(found["models"]["other"])
    assert "perplexity" not in found["models"]["teacher"]
    with pytest.raises(ConfigError, match="narrow: reads other tokens than other.*with the teacher alone"):
        compare.compare(str(teacher_folder), {"other": other, "narrow": narrow}, str(text), **asked)


def test_models_are_asked_the_same_questions(tmp_path):
    rows = written(multiple_choice(40), tmp_path / "asked.jsonl")
    teacher, student = (
        tiny_gpt2(tmp_path / name, layers=2, width=16, seed=seed)
        for seed, name in enumerate(("teacher", "student"))
    )
    found = compare.compare(
        str(teacher),
        {"student": str(student)},
        str(rows),
        task="question-answering",
        overrides=[*FEW, "data.validation=0.5", "compare.new_tokens=4"],
    )
    render_comparison(found, compare.folder_for(tmp_path / "out"))
    assert found["questions"] == 20
    assert found["models"]["teacher"]["choice_agreement"]["value"] == 1.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "right choices" in page
    assert found["prompts"][0].startswith("Question: What is the")


def test_students_are_named_by_their_folders_or_as_given(tmp_path):
    (tmp_path / "a=b").mkdir()
    found = compare.named_students(["org/small", "mine=org/other", str(tmp_path / "a=b")])
    assert found == {"small": "org/small", "mine": "org/other", "a=b": str(tmp_path / "a=b")}
    with pytest.raises(
        ConfigError, match="the name 'small' is taken; give it one of its own: --student NAME=them/small"
    ):
        compare.named_students(["org/small", "them/small"])


def test_what_does_not_fit_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="--task ranking: compared are models for"):
        compare.compare("a", {"b": "b"}, "c", task="ranking")
    with pytest.raises(ConfigError, match=r"-o student\.from: this has an option of its own"):
        compare.compare("a", {"b": "b"}, "c", overrides=["student.from=d"])
    (tmp_path / "config.yaml").touch()
    with pytest.raises(RunError, match="is the folder of a run"):
        compare.folder_for(tmp_path)
