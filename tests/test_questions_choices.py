"""Rows as they are published, each read without a converter; what cannot be told is asked."""

from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict
from made_questions import question_tokenizer, written

from kdlib.config.data import DataConfig
from kdlib.data.qa import prepare
from kdlib.errors import DataError

RIGHT = "green"  # of every question there
ASKING = ("question", "Question", "question_stem", "ctx", "goal", "sentence")
PUBLISHED = yaml.safe_load((Path(__file__).parent / "data" / "choices.yaml").read_text())
GPQA, QUANTUM = PUBLISHED["GPQA"][0], PUBLISHED["QuantumBench"]


@pytest.fixture(scope="module")
def tokenizer():
    return question_tokenizer()


def each(*rows):
    """The rows several times, each asking something of its own in the column that asks."""
    asks = next(
        name
        for name in ("question", "Question", "question_stem", "ctx", "goal", "sentence")
        if name in rows[0]
    )
    return [{**row, asks: f"{row[asks]} {number}"} for number in range(4) for row in rows]


def read(rows, tmp_path, tokenizer, **changes):
    source = written(rows, tmp_path / "rows.jsonl")
    return prepare(
        DataConfig(source=str(source), max_length=256, validation=0.5, **changes), tokenizer, seed=0
    )


def right(made):
    """What is right of each held-out question, and the number of choices."""
    rows = made.choices["validation"].to_pandas()
    return set(rows.loc[rows["is_answer"], "text"]), set(rows.groupby("item").size())


@pytest.mark.parametrize("rows", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_rows_as_they_are_published_are_read_without_a_converter(tmp_path, tokenizer, rows):
    made = read(each(*rows), tmp_path, tokenizer)
    answers, sizes = right(made)
    assert answers == {RIGHT}
    assert max(sizes) == 8 if rows == QUANTUM else max(sizes) <= 5
    assert made.notes["columns"].startswith("multiple choice (question: ")


def test_mmlu_without_names_for_its_columns_is_read_by_their_places(tmp_path, tokenizer):
    (tmp_path / "test.csv").write_text("".join(f'"Which, {n}?",red,{RIGHT},blue,black,B\n' for n in range(4)))
    source = DataConfig(source=str(tmp_path / "test.csv"), header=False, max_length=256, validation=0.5)
    assert right(prepare(source, tokenizer, seed=0)) == ({RIGHT}, {4})


def test_a_number_that_stands_for_a_name_is_read_as_the_name(tmp_path, tokenizer):
    rows = [{"question": f"Which, {n}?", "choices": ["red", "green"], "answer": 1} for n in range(8)]
    table = Dataset.from_list(rows).cast_column("answer", ClassLabel(names=["A", "B"]))
    DatasetDict(train=table).save_to_disk(tmp_path / "mmlu")
    made = prepare(
        DataConfig(source=str(tmp_path / "mmlu"), max_length=256, validation=0.5), tokenizer, seed=0
    )
    assert right(made) == ({RIGHT}, {2})
    assert "letter" in made.notes["answers"]


def coloured(*answers, choices=("red", "green", "blue")):
    return [
        {"question": f"Which, {n}?", "choices": choices, "answer": each} for n, each in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("answers", "reading", "expected"),
    [
        ([1, 0, 2, 1], "from_0", "green red blue green"),
        ([1, 3, 2, 1], "from_1", "red blue green red"),
        (["b", "(A)", "C.", "B"], "letter", "green red blue green"),
        (["green", " red ", "blue", "green"], "text", "green red blue green"),
        ([2.0, 0.0, 1.0, 2.0], "from_0", "blue red green blue"),
    ],
)
def test_what_an_answer_means_is_found_for_the_column_and_said(
    tmp_path, tokenizer, answers, reading, expected
):
    made = read(coloured(*answers), tmp_path, tokenizer)
    said = {
        row["text"]: tokenizer.decode(row["input_ids"][row["prompt_tokens"] :])
        for row in (*made.train, *made.validation)
    }
    assert [said[f"Which, {n}?"].strip() for n in range(4)] == expected.split()
    assert f"({reading}), as all 4 answers" in made.notes["answers"]


@pytest.mark.parametrize(
    ("rows", "ways"),
    [
        (coloured(1, 2, 1, 2), ("from_0", "from_1")),
        (coloured("1", "1", "2", "1", choices=("2", "1", "3")), ("from_0", "from_1")),
        (coloured("B", "A", "B", "A", choices=("B", "A")), ("letter", "text")),
    ],
    ids=["0 or 1", "numbers", "letters"],
)
def test_a_column_that_can_be_read_in_two_ways_is_asked_and_data_answer_as_tells(
    tmp_path, tokenizer, rows, ways
):
    with pytest.raises(DataError) as caught:
        read(rows, tmp_path, tokenizer)
    first, second = (f"data.answer_as: {way}" for way in ways)
    assert f"write {first} or {second}" in str(caught.value)
    assert "row 0 of train: " in str(caught.value)
    found = [right(read(rows, tmp_path, tokenizer, answer_as=way))[0] for way in ways]
    assert found[0] != found[1] or len(found[0]) > 1


def test_one_way_to_read_a_column_is_taken_where_it_does_not_fit_every_row(tmp_path, tokenizer):
    """A "2" among texts is no number: the column has texts, and this one is none of them."""
    with pytest.raises(
        DataError, match=r"row 4 of train: the answer '2' is none of the 3 choices .* is the text"
    ):
        read(coloured("red", "green", "blue", "red", "2"), tmp_path, tokenizer)


def test_columns_that_can_be_read_in_two_ways_are_asked_and_data_ignore_tells(tmp_path, tokenizer):
    rows = [{"problem": f"Add {n}.", "solution": "So and so.", "answer": "1"} for n in range(4)]
    with pytest.raises(
        DataError, match=r"as prompt and response \(prompt: problem; response: answer\); or as"
    ):
        read(rows, tmp_path, tokenizer)
    made = read(rows, tmp_path, tokenizer, ignore=["answer"])
    assert tokenizer.decode(made.train[0]["input_ids"]).endswith(" So and so.<eos>")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"prompt": "a", "completion": "b", "label": False}],
            r"'label' beside .* which responses are wanted",
        ),
        ([{"question": "a", "choice": ["b"], "answer": "c"}], r"'choice' beside .* what can be chosen"),
        ([{**GPQA, "Correct Answer": "red"}], "the right answer, 'red', is among wrong ones"),
    ],
)
def test_what_may_change_what_a_row_says_is_asked(tmp_path, tokenizer, rows, words):
    with pytest.raises(DataError, match=words):
        read(rows, tmp_path, tokenizer)


def test_choices_in_columns_of_any_names_are_named(tmp_path, tokenizer):
    rows = [{"stem": f"Which, {n}?", "one": "red", "two": "green", "key": n % 2} for n in range(4)]
    made = read(rows, tmp_path, tokenizer, question="stem", choices=["one", "two"], answer="key")
    assert right(made)[0] <= {"red", "green"}
    with pytest.raises(
        DataError, match="no column 'three'; it has stem, one, two, key: name the one with the choices"
    ):
        read(rows, tmp_path, tokenizer, question="stem", choices=["one", "three"], answer="key")


def test_what_is_said_of_answers_is_refused_where_there_is_nothing_to_understand(tmp_path, tokenizer):
    with pytest.raises(
        DataError, match=r"data.answer_as: found letter, and these rows are multiple choice \(question: Q"
    ):
        read(each(GPQA), tmp_path, tokenizer, answer_as="letter")
