import pytest
from made_questions import CHATML, conversations, multiple_choice, pairs, written
from made_tokenizers import byte_level, sentence_piece, without
from tokenizers.processors import TemplateProcessing

from kdlib.config.data import DataConfig
from kdlib.data.qa import prepare
from kdlib.errors import DataError
from kdlib.losses.signals import IGNORED
from kdlib.tokens.vocabulary import token_bytes

TURNS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]: {{ m['content'] }} <|turn|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]:{% endif %}"
)
LAST_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def student(template=None):
    made = byte_level(400)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def teacher(template=None):
    made = byte_level(700, seed=8, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|turn|>"]})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.chat_template = template
    return made


def prepared(rows, tmp_path, student, teacher, **changes):
    path = written(rows, tmp_path / "questions.jsonl")
    asked = DataConfig(**{"source": str(path), "max_length": 400, "validation": 0.25, **changes})
    return prepare(asked, student, seed=0, teacher=teacher)


def said(tokenizer, ids):
    known = token_bytes(tokenizer)
    return "".join((known[n] or tokenizer.convert_ids_to_tokens([n])[0].encode()).decode() for n in ids)


def learned_spans(made, row, student, teacher):
    """What student and teacher say in the spans of a row that are learned, each joined."""
    batch = made.collate([row])
    ids, teacher_ids = batch["input_ids"][0], batch["teacher_input_ids"][0]
    found = []
    names = ("starts", "sizes", "teacher_starts", "teacher_sizes")
    for start, size, their_start, their_size in zip(
        *(batch["spans"][n].tolist() for n in names), strict=True
    ):
        ours = said(student, ids[start + 1 : start + 1 + size].tolist())
        theirs = said(teacher, teacher_ids[their_start + 1 : their_start + 1 + their_size].tolist())
        found.append((ours, theirs))
    return found


def labelled(made, row, tokenizer):
    labels = made.collate([row])["labels"][0]
    return said(tokenizer, labels[labels != IGNORED].tolist())


def test_a_choice_is_matched_byte_by_byte(tmp_path):
    ours, theirs = student(), teacher()
    made = prepared(multiple_choice(40), tmp_path, ours, theirs)
    alone = prepared(multiple_choice(40), tmp_path, ours, None)
    assert made.train["input_ids"][:] == alone.train["input_ids"][:]
    for row in [*made.train, *made.choices["validation"]]:
        assert row["spans"][-2:] == [len(row["input_ids"]), len(row["teacher_input_ids"])]
        spans = learned_spans(made, row, ours, theirs)
        assert all(one == other for one, other in spans)
        assert "".join(one for one, _ in spans) == labelled(made, row, ours)
        answer = row["teacher_input_ids"][row["teacher_prompt_tokens"] :]
        assert said(theirs, answer) == labelled(made, row, ours)
    for name in ("input_ids", "prompt_tokens", "text", "is_answer"):
        assert made.choices["validation"][name][:] == alone.choices["validation"][name][:]
    assert made.notes["train_documents_not_aligned"] == 0
    assert made.vocabularies.teacher_size == made.teacher_vocabulary > made.vocabulary


@pytest.mark.parametrize(
    ("our_template", "their_template", "end", "their_end", "space"),
    [
        (None, None, "<eos>", "</s>", " "),
        (CHATML, CHATML, "<|im_end|>", "<|im_end|>", ""),
        (CHATML, TURNS, "<|im_end|>", "<|turn|>", None),
        (TURNS.replace("<|turn|>", "<|im_end|>"), CHATML, "<|im_end|>", "<|im_end|>", None),
        (None, CHATML, "<eos>", "<|im_end|>", None),
        (CHATML, None, "<|im_end|>", "</s>", None),
    ],
    ids=["plain", "same template", "other template", "space first", "plain and chat", "chat and plain"],
)
def test_an_answer_is_matched_whatever_stands_around_it(
    tmp_path, our_template, their_template, end, their_end, space
):
    ours, theirs = student(our_template), teacher(their_template)
    made = prepared(pairs(20), tmp_path, ours, theirs)
    alone = prepared(pairs(20), tmp_path, ours, None)
    responses = {row["prompt"]: row["response"] for row in pairs(20)}
    assert made.train["input_ids"][:] == alone.train["input_ids"][:]
    assert made.train["prompt_tokens"][:] == alone.train["prompt_tokens"][:]
    for row in made.train:
        spans, response = learned_spans(made, row, ours, theirs), responses[row["text"]]
        assert spans[-1] == (end, their_end)
        assert all(one == other for one, other in spans[:-1])
        found = "".join(one for one, _ in spans[:-1])
        if space is None:  # the first word may be another token after a space than after a new line
            assert response.endswith(found)
        else:
            assert found == space + response


def test_every_answer_of_a_conversation_is_matched(tmp_path):
    ours, theirs = student(CHATML), teacher(CHATML)
    made = prepared(conversations(12), tmp_path, ours, theirs)
    for row in made.train:
        spans = learned_spans(made, row, ours, theirs)
        assert all(one == other for one, other in spans)
        assert "".join(one for one, _ in spans) == labelled(made, row, ours)
        assert [one for one, _ in spans].count("<|im_end|>") == 2
    assert "read_only" in made.train.column_names


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_answer_that_one_template_leaves_out_is_not_matched(tmp_path, side):
    templates = {"student": CHATML, "teacher": CHATML, side: LAST_ONLY}
    ours, theirs = student(templates["student"]), teacher(templates["teacher"])
    rows = conversations(12)
    made = prepared(rows, tmp_path, ours, theirs)
    answers = {row["messages"][1]["content"]: row["messages"][-1]["content"] for row in rows}
    for row in made.train:
        spans = learned_spans(made, row, ours, theirs)
        (last,) = (each for asked, each in answers.items() if asked in row["text"])
        assert "".join(one for one, _ in spans) == f"{last}<|im_end|>"
        assert row["spans"][-2:] == [len(row["input_ids"]), len(row["teacher_input_ids"])]


def test_a_row_that_one_of_both_does_not_give_back_is_learned_without_spans(tmp_path):
    rows = [*pairs(8), {"prompt": "What is it?", "response": "a \x13 b"}]
    theirs = without(teacher(), "\x13")
    made = prepared(rows, tmp_path, student(), theirs)
    lost = {name: made.notes[f"{name}_documents_not_aligned"] for name in ("train", "validation")}
    assert sum(lost.values()) == 1
    (where,) = (name for name, count in lost.items() if count)
    assert "What is it?" in made.notes[f"{where}_first_not_aligned"][0]
    (row,) = (row for row in getattr(made, where) if row["text"] == "What is it?")
    assert learned_spans(made, row, student(), theirs) == []
    assert row["spans"] == [len(row["input_ids"]), 0, len(row["input_ids"]), len(row["teacher_input_ids"])]


def test_a_row_that_is_too_long_for_the_teacher_is_refused(tmp_path):
    theirs = teacher()
    theirs.model_max_length = 10
    with pytest.raises(DataError, match=r"longer than the 10 tokens that the teacher's tokenizer allows"):
        prepared(pairs(8), tmp_path, student(), theirs)


def test_pieces_with_spaces_are_matched_with_bytes(tmp_path):
    ours, theirs = sentence_piece(), student()
    made = prepared(pairs(20), tmp_path, ours, theirs)
    for row in made.train:
        spans = learned_spans(made, row, ours, theirs)
        assert spans[-1] == ("</s>", "<eos>")
        assert "".join(one for one, _ in spans[:-1]) == labelled(made, row, ours).removesuffix("</s>")
