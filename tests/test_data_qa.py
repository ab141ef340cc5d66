import json

import pytest
from datasets import Dataset, DatasetDict
from made_questions import CHATML, conversations, multiple_choice, pairs, question_tokenizer, written
from tokenizers.processors import TemplateProcessing

from kdlib.config.data import DataConfig
from kdlib.config.run import parse
from kdlib.data.qa import prepare
from kdlib.data.text import units_of_tokens
from kdlib.errors import ConfigError, DataError
from kdlib.losses.signals import IGNORED
from kdlib.tasks import base as tasks
from kdlib.tokens.answers import continued


@pytest.fixture(scope="module")
def tokenizer():
    return question_tokenizer()


@pytest.fixture(scope="module")
def chatty():
    return question_tokenizer(CHATML)


def config(source, **changes) -> DataConfig:
    return DataConfig(**{"source": str(source), "max_length": 128, **changes})


def prepared(rows, tmp_path, tokenizer, **changes):
    return prepare(config(written(rows, tmp_path / "questions.jsonl"), **changes), tokenizer, seed=0)


def learned(batch, row, tokenizer) -> str:
    labels = batch["labels"][row]
    return tokenizer.decode(labels[labels != IGNORED])


def test_of_a_multiple_choice_the_right_choice_is_learned_and_every_choice_can_be_scored(tmp_path, tokenizer):
    rows = multiple_choice(40)
    made = prepared(rows, tmp_path, tokenizer, validation=0.25)
    assert (len(made.train), len(made.validation), made.test) == (30, 10, None)
    by_question = {row["question"]: row for row in rows}
    for number, row in enumerate(made.validation):
        source, batch = by_question[row["text"]], made.collate([row])
        assert (
            tokenizer.decode(row["input_ids"])
            == f"Question: {row['text']}\nAnswer: {source['choices'][source['answer']]}"
        )
        assert learned(batch, 0, tokenizer) == " " + source["choices"][source["answer"]]
        choices = made.choices["validation"].filter(lambda each, number=number: each["item"] == number)
        assert choices["text"][:] == source["choices"]
        assert choices["is_answer"][:].index(True) == source["answer"]
        assert choices["characters"][:] == [len(choice) for choice in source["choices"]]
        assert choices["input_ids"][source["answer"]] == row["input_ids"]
    assert set(made.choices) == {"validation"}
    assert made.notes["validation_choices"] == len(made.choices["validation"])


def test_questions_of_one_passage_are_on_one_side_and_count_as_one(tmp_path, tokenizer):
    rows = [{**row, "passage": n % 8} for n, row in enumerate(multiple_choice(40))]
    made = prepared(rows, tmp_path, tokenizer, validation=0.25, group="passage")
    sides = [set(each["group"]) for each in (made.train, made.validation)]
    assert not sides[0] & sides[1]
    assert (len(sides[1]), len(made.validation)) == (2, 10)
    units, what = units_of_tokens(made)
    assert (len({int(each[0]) for each in units}), what) == (2, "groups of questions")
    with pytest.raises(DataError, match=r"1 row have nothing in 'passage'"):
        prepared([*rows, {**rows[0], "passage": None}], tmp_path, tokenizer, group="passage")


def test_columns_may_have_other_names_and_choices_may_be_numbers(tmp_path, tokenizer):
    rows = [{"q": f"How many, {n}?", "options": [1, 2], "gold": "A"} for n in range(4)]
    made = prepared(rows, tmp_path, tokenizer, question="q", choices="options", answer="gold")
    assert made.choices["validation"]["text"][:] == ["1", "2"]


def test_a_free_answer_ends_with_eos_and_its_prompt_is_given(tmp_path, tokenizer):
    made = prepared(pairs(20), tmp_path, tokenizer)
    batch = made.collate(list(made.validation))
    responses = {row["prompt"]: row["response"] for row in pairs(20)}
    assert [learned(batch, n, tokenizer) for n in range(2)] == [
        f" {responses[row['text']]}<eos>" for row in made.validation
    ]
    assert made.choices == {}


def test_a_free_answer_stands_in_the_chat_template_where_there_is_one(tmp_path, chatty):
    made = prepared(pairs(20), tmp_path, chatty)
    responses, row = {row["prompt"]: row["response"] for row in pairs(20)}, made.train[0]
    assert chatty.decode(row["input_ids"]) == (
        f"<|im_start|>user\n{row['text']}<|im_end|>\n<|im_start|>assistant\n{responses[row['text']]}<|im_end|>\n"
    )
    assert learned(made.collate([row]), 0, chatty) == f"{responses[row['text']]}<|im_end|>"


def test_of_a_conversation_every_answer_of_the_assistant_is_learned_and_nothing_else(tmp_path, chatty):
    rows = conversations(10)
    made = prepared(rows, tmp_path, chatty, max_length=256)
    answers = {
        row["messages"][1]["content"]: [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        for row in rows
    }
    batch = made.collate([made.train[0], made.train[1]])
    for number in range(2):
        question = made.train[number]["text"].removeprefix("Answer briefly.\n")
        assert learned(batch, number, chatty) == "".join(
            f"{answer}<|im_end|>" for answer in answers[question]
        )
    assert made.notes["train_turns_read_only"] == 0
    assert made.notes["train_learned_tokens"] == sum(
        int((made.collate([row])["labels"] != IGNORED).sum()) for row in made.train
    )


def test_a_turn_that_the_template_strips_later_is_read_only_and_counted(tmp_path, chatty):
    earlier = "message['role'] == 'assistant' and not loop.last"
    stripping = question_tokenizer(
        CHATML.replace("message['content']", f"(message['content'][:2] if {earlier} else message['content'])")
    )
    made = prepared(conversations(10), tmp_path, stripping, max_length=256)
    assert made.notes["train_turns_read_only"] == len(made.train)
    assert learned(made.collate([made.train[0]]), 0, stripping).count("<|im_end|>") == 1


def test_the_boundary_is_where_the_prompts_own_tokens_end(tokenizer):
    (row,) = continued([("What is it? ", "one half")], tokenizer)
    assert tokenizer.decode(row.input_ids[: row.prompt_tokens]) == "What is it?"
    assert tokenizer.decode(row.input_ids[row.prompt_tokens :]) == " one half"


def test_a_row_begins_with_bos_where_the_tokenizers_own_call_does(tmp_path):
    llama = question_tokenizer()
    llama.add_special_tokens({"bos_token": "<bos>"})
    llama._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", llama.bos_token_id)]
    )
    made = prepared(multiple_choice(20), tmp_path, llama)
    for row in [*made.train, *made.choices["validation"]]:
        assert row["input_ids"][0] == llama.bos_token_id != row["input_ids"][1]
    assert learned(made.collate([made.train[0]]), 0, llama).startswith(" ")


def test_a_question_is_on_one_side_and_a_repeated_row_counts_once(tmp_path, tokenizer):
    rows = multiple_choice(20)
    # the same question, asked otherwise
    other = [{**row, "choices": [*row["choices"], "none of these"]} for row in rows]
    made = prepared(rows + other + rows[:5], tmp_path, tokenizer, validation=0.3, test=0.2)
    sides = [set(part["text"]) for part in (made.train, made.validation, made.test)]
    assert [len(side) for side in sides] == [10, 6, 4]
    assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    assert made.notes["duplicate_documents_left_out"] == 5
    assert len(made.validation) == 12


@pytest.mark.parametrize("share", [False, True], ids=["own", "validation is a share"])
def test_what_a_sources_own_splits_ask_is_not_trained_on(tmp_path, tokenizer, share):
    rows = multiple_choice(40)
    other = {**rows[35], "choices": [*rows[35]["choices"], "none of these"]}
    splits = {"train": [*rows, rows[0], other], "validation": rows[28:36], "test": rows[34:]}
    splits = {n: Dataset.from_list(each) for n, each in splits.items() if not (share and n == "validation")}
    DatasetDict(splits).save_to_disk(tmp_path / "leaky")
    made = prepare(config(tmp_path / "leaky", validation=0.2), tokenizer, seed=0)
    questions = [set(part["text"]) for part in (made.train, made.validation, made.test)]
    assert sum(map(len, questions)) == len(set.union(*questions)) == 40
    assert questions[2] == {row["question"] for row in rows[34:]}
    assert made.notes["duplicate_documents_left_out"] == (8 if share else 16)


def test_the_split_follows_its_seed_and_any_change_is_in_the_fingerprint(tmp_path, tokenizer):
    rows = multiple_choice(20)
    first = prepared(rows, tmp_path, tokenizer).notes["fingerprint"]
    assert prepared(rows, tmp_path, tokenizer).notes["fingerprint"] == first
    assert prepared(rows, tmp_path, tokenizer, split_seed=7).notes["fingerprint"] != first
    changed = [{**row, "choices": [*row["choices"][:-1], "something else"]} for row in rows]
    assert prepared(changed, tmp_path, tokenizer).notes["fingerprint"] != first


def test_a_sources_own_splits_are_taken_as_they_are(tmp_path, tokenizer):
    splits = {
        name: Dataset.from_list(multiple_choice(n, seed=n))
        for name, n in (("train", 12), ("dev", 5), ("test", 4))
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    made = prepare(config(tmp_path / "saved", validation="dev"), tokenizer, seed=0)
    assert (len(made.train), len(made.validation), len(made.test)) == (12, 5, 4)
    assert made.notes["split"] == "the source's own"
    assert set(made.choices) == {"validation", "test"}
    with pytest.raises(DataError, match="no split 'def'; did you mean 'dev'"):
        prepare(config(tmp_path / "saved", validation="def"), tokenizer, seed=0)


def test_a_test_split_without_answers_is_not_used_and_said(tmp_path, tokenizer):
    blind = [{**row, "answer": -1} for row in multiple_choice(4, seed=4)]
    DatasetDict(train=Dataset.from_list(multiple_choice(12)), test=Dataset.from_list(blind)).save_to_disk(
        tmp_path / "saved"
    )
    made = prepare(config(tmp_path / "saved"), tokenizer, seed=0)
    assert made.test is None
    assert "no answers" in made.notes["test"]


def test_limits_take_a_sample_of_the_questions_with_all_their_choices(tmp_path, tokenizer):
    made = prepared(
        multiple_choice(60), tmp_path, tokenizer, validation=0.5, max_train_rows=7, max_eval_rows=5
    )
    assert (len(made.train), len(made.validation)) == (7, 5)
    assert list(dict.fromkeys(made.choices["validation"]["question"])) == made.validation["text"][:]


GOOD = multiple_choice(6)
BAD = {
    "a choice list of one": ({"choices": ["one"]}, "row 3 of train: 1 choice; needed are two or more"),
    "an answer outside the choices": ({"answer": 9}, "row 3 of train: the answer '9' is none of the"),
    "an answer below them": ({"answer": -1}, "row 3 of train: the answer '-1' is none of the"),
    "no answer": ({"answer": None}, "row 3 of train: no answer: answer = None"),
    "an empty question": ({"question": "  "}, "row 3 of train: question is empty; needed is a text"),
    "an empty choice": ({"choices": ["a", ""]}, "row 3 of train: choice 1 is empty"),
    "no choices": ({"choices": None}, "row 3 of train: choices = None; needed is a list"),
}


@pytest.mark.parametrize(("change", "expected"), BAD.values(), ids=BAD.keys())
def test_a_row_that_cannot_be_asked_is_named_and_nothing_is_dropped(tmp_path, tokenizer, change, expected):
    rows = [*GOOD[:3], {**GOOD[3], **change}, *GOOD[4:]]
    with pytest.raises(DataError) as caught:
        prepared(rows, tmp_path, tokenizer)
    assert expected in str(caught.value)
    assert "1 row of train with nothing to ask or to answer; mend them, or take them out" in str(caught.value)


def test_rows_that_cannot_be_asked_are_left_out_where_that_is_asked_and_counted(tmp_path, tokenizer):
    rows = [{**row, "passage": f"p{n}"} for n, row in enumerate(multiple_choice(14))]
    bad = [{**rows[3], "answer": None}, {**rows[4], "choices": ["one"]}, {**rows[5], "question": " "}]
    made = prepared([*bad, *rows, {**rows[6], "answer": 9}], tmp_path, tokenizer, skip_unusable=True)
    assert made.notes["unusable_rows_left_out"] == 4
    assert made.notes["first_unusable_rows"][0].startswith("row 0 of train: ")
    same = prepared(rows, tmp_path, tokenizer)
    assert made.notes["fingerprint"] == same.notes["fingerprint"]
    grouped = prepared([*bad, *rows], tmp_path, tokenizer, skip_unusable=True, group="passage")
    assert {*grouped.train["group"], *grouped.validation["group"]} == {row["passage"] for row in rows}
    with pytest.raises(DataError, match="no row of train with nothing"):
        prepared(bad, tmp_path, tokenizer, skip_unusable=True)


def test_the_first_ten_are_named_and_all_are_counted(tmp_path, tokenizer):
    with pytest.raises(DataError) as caught:
        prepared([{**row, "answer": "Z"} for row in multiple_choice(14)], tmp_path, tokenizer)
    assert "14 rows of train" in str(caught.value)
    assert str(caught.value).count("the answer 'Z' is none of") == 10
    assert "… and 4 more" in str(caught.value)


def test_an_answer_that_would_be_cut_is_refused_with_the_length_it_needs(tmp_path, tokenizer):
    rows = [
        *multiple_choice(10),
        {"question": "How long is this? " * 20, "choices": ["short", "long"], "answer": 1},
    ]
    with pytest.raises(DataError) as caught:
        prepared(rows, tmp_path, tokenizer, max_length=64)
    message = str(caught.value)
    assert "row 10 of train" in message
    needed = int(message.split("raise data.max_length to ")[1].split(",")[0])
    assert prepared(rows, tmp_path, tokenizer, max_length=needed).notes["fingerprint"]
    with pytest.raises(DataError):
        prepared(rows, tmp_path, tokenizer, max_length=needed - 1)


def test_two_answers_to_one_question_are_refused(tmp_path, tokenizer):
    rows = [*GOOD, {**GOOD[2], "answer": (GOOD[2]["answer"] + 1) % len(GOOD[2]["choices"])}]
    with pytest.raises(DataError, match="row 6 of train: asks what row 2 of train asks"):
        prepared(rows, tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "a"}, {"text": "b"}], "found the columns text; needed are question, choices, answer"),
        (
            [{"question": "a", "choice": ["b"], "answer": 0}],
            "found 'choice' beside prompt and response",
        ),
        (
            [{"prompt": "a", "response": " "}, {"prompt": "b", "response": "c"}],
            "row 0 of train: response is empty",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}]}] * 2,
            "an answer of the assistant's that is to be learned",
        ),
        (
            [{"messages": [{"role": "boss", "content": "a"}]}] * 2,
            "with a role of system, developer, user",
        ),
        (conversations(4), "messages need a chat template, and the tokenizer has none"),
        ([{**multiple_choice(1)[0], "answer": 0}], "1 question in train, of which 1 would be held out"),
    ],
)
def test_other_forms_that_cannot_be_used_are_refused_with_a_reason(tmp_path, tokenizer, rows, expected):
    with pytest.raises(DataError) as caught:
        prepared(rows, tmp_path, tokenizer)
    assert expected in str(caught.value)


def test_messages_that_a_template_refuses_are_named(tmp_path):
    strict = question_tokenizer("{{ raise_exception('no system here') }}")
    with pytest.raises(
        DataError, match="row 0 of train: the chat template refuses these messages: no system here"
    ):
        prepared(conversations(4), tmp_path, strict)


def test_the_best_model_is_not_chosen_by_choices_where_there_are_none(raw_config, tmp_path, tokenizer):
    raw = {**raw_config, "task": "question-answering"}
    raw["data"] = {"source": str(written(pairs(20), tmp_path / "pairs.jsonl"))}
    raw["training"] = {**raw["training"], "metric_for_best_model": "eval_choice_accuracy"}
    with pytest.raises(ConfigError, match="has no choices"):
        tasks.prepare(parse(raw), tokenizer)


def test_a_smoke_run_cuts_no_answer(raw_config, tmp_path):
    raw = {**raw_config, "task": "question-answering", "data": {"source": "x.jsonl", "max_length": 100}}
    assert parse(raw, smoke=True).data.max_length == 100
    assert parse(raw_config, smoke=True).data.max_length == 32


def test_rows_come_from_a_table_too(tmp_path, tokenizer):
    rows = [{**row, "choices": json.dumps(row["choices"])} for row in multiple_choice(20)]
    Dataset.from_list(rows).to_csv(str(tmp_path / "questions.csv"))
    made = prepare(config(tmp_path / "questions.csv"), tokenizer, seed=0)
    same = prepared(multiple_choice(20), tmp_path, tokenizer)
    assert made.notes["fingerprint"] == same.notes["fingerprint"]
