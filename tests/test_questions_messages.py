"""Conversations as people keep them, each read as it is; what stands in a message is used or refused."""

import json

import pytest
from datasets import Dataset
from made_questions import CHATML, question_tokenizer, written

from kdlib.config.data import DataConfig
from kdlib.data.qa import prepare
from kdlib.errors import DataError, ModelError
from kdlib.losses.signals import IGNORED

TOOLS = (
    "{% for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | upper }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
SYSTEM, ASKED, SAID = "Answer briefly.", "What is it?", "one half"
CALL = {"id": "c1", "type": "function", "function": {"name": "spin", "arguments": '{"of": "a gate"}'}}
TOOL = {"name": "spin", "description": "What a thing's spin is."}


def openai(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns):
    return [{"from": role, "value": content} for role, content in turns]


WHOLE = openai(("system", SYSTEM), ("user", ASKED), ("assistant", SAID))
FORMS = {
    "OpenAI": {"messages": WHOLE},
    "JSON in a cell": {"messages": json.dumps(WHOLE)},
    "other roles": {"messages": openai(("developer", SYSTEM), ("user", ASKED), ("assistant", SAID))},
    "parts": {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in WHOLE]},
    "LMSYS": {"conversation_id": "a", "conversation": WHOLE, "language": "English"},
    "ShareGPT": {"id": "a", "conversations": sharegpt(("system", SYSTEM), ("human", ASKED), ("gpt", SAID))},
    "LLaMA-Factory": {"conversations": sharegpt(("human", ASKED), ("gpt", SAID)), "system": SYSTEM},
    "Alpaca": {"instruction": ASKED, "input": "", "output": SAID, "system": SYSTEM, "history": []},
    "OpenOrca": {"id": "a", "system_prompt": SYSTEM, "question": ASKED, "response": SAID},
    "TRL, prompt and completion": {"prompt": WHOLE[:2], "completion": WHOLE[2:]},
    "TRL, preference": {"prompt": WHOLE[:2], "chosen": WHOLE[2:], "rejected": openai(("assistant", "no"))},
    "TRL, preference with the prompt in it": {"chosen": WHOLE, "rejected": WHOLE},
    "UltraFeedback": {"system": SYSTEM, "prompt": ASKED, "chosen": WHOLE[1:], "rejected": WHOLE[1:]},
    "LLaMA-Factory, preference": {
        **{"conversations": sharegpt(("human", ASKED)), "system": SYSTEM},
        **{side: {"from": "gpt", "value": word} for side, word in (("chosen", SAID), ("rejected", "no"))},
    },
    "a turn of the user's at the end": {"messages": [*WHOLE, *openai(("user", "Thank you."))]},
}  # fmt: skip


@pytest.fixture(scope="module")
def chatty():
    return question_tokenizer(CHATML)


@pytest.fixture(scope="module")
def calling():
    return question_tokenizer(TOOLS)


@pytest.fixture(scope="module")
def marking():
    return question_tokenizer(MARKED)


def read(row, tmp_path, tokenizer, **changes):
    """What the training row shows, what of it is learned, and how both rows were prepared."""
    rows = [row, json.loads(json.dumps(row).replace(ASKED, "What is that?"))]
    source = DataConfig(source=str(written(rows, tmp_path / "rows.jsonl")), validation=0.5, **changes)
    made = prepare(source, tokenizer, seed=0)
    labels = made.collate([made.train[0]])["labels"][0]
    text = tokenizer.decode(made.train[0]["input_ids"]).replace("What is that?", ASKED)
    return text, tokenizer.decode(labels[labels != IGNORED]), made


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS.keys())
def test_each_form_is_the_same_conversation(tmp_path, chatty, row):
    text, learned, _ = read(row, tmp_path, chatty)
    shown = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in WHOLE)
    assert text.removesuffix("<|im_start|>user\nThank you.<|im_end|>\n") == shown
    assert learned == f"{SAID}<|im_end|>"


def test_earlier_turns_in_a_column_of_their_own_come_first(tmp_path, chatty):
    row = {"instruction": ASKED, "input": "A gate.", "output": SAID, "history": [[f"How? {ASKED}", "So."]]}
    text, learned, made = read(row, tmp_path, chatty)
    assert text.index("How?") < text.index("So.") < text.index(f"{ASKED}\nA gate.")
    assert learned == f"So.<|im_end|>{SAID}<|im_end|>"
    assert "(prompt: instruction + input; response: output; history: history)" in made.notes["columns"]


def test_tools_calls_and_reasoning_go_to_the_template_and_are_learned_where_the_assistant_says_them(
    tmp_path, calling
):
    row = {
        "messages": [
            *openai(("user", ASKED)),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1/2", "tool_call_id": "c1", "name": "spin"},
            {"role": "assistant", "content": SAID, "reasoning_content": "It is a gate."},
        ],
        "tools": json.dumps([TOOL]),
    }
    text, learned, _ = read(row, tmp_path, calling, max_length=2000)
    call = '<call>{"name": "spin", "arguments": {"of": "a gate"}}</call>'
    assert text.startswith(f'<tool>{{"type": "function", "function": {json.dumps(TOOL)}}}</tool>')
    assert learned == f"{call}<|im_end|><think>It is a gate.</think>{SAID}<|im_end|>"
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    turns = [
        ("human", ASKED),
        ("function_call", json.dumps(CALL["function"])),
        ("observation", "1/2"),
        ("gpt", SAID),
    ]
    for messages in (
        [*openai(("user", ASKED)), old, *openai(("function", "1/2"), ("assistant", SAID))],
        sharegpt(*turns),
    ):
        _, learned, _ = read({"conversations": messages, "tools": [TOOL]}, tmp_path, calling, max_length=2000)
        assert learned == f"{call}<|im_end|>{SAID}<|im_end|>"


def test_a_table_that_fills_every_message_with_all_keys_says_the_same(tmp_path, calling):
    rows = [
        [
            *openai(("user", f"{ASKED} {n}")),
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": w},
        ]
        for n, w in enumerate((1, None))
    ]
    spoken = [{"messages": [*row, *openai(("tool", "1/2"), ("assistant", SAID))]} for row in rows]
    written(spoken, tmp_path / "rows.jsonl")
    Dataset.from_list(spoken).to_parquet(tmp_path / "rows.parquet")
    made = [
        prepare(DataConfig(source=str(tmp_path / f"rows.{kind}"), validation=0.5), calling, seed=0)
        for kind in ("jsonl", "parquet")
    ]
    assert len({each.notes["fingerprint"] for each in made}) == 1


@pytest.mark.parametrize("says", [{"weight": 0}, {"train": False}])
def test_a_turn_that_says_so_is_read_and_not_learned(tmp_path, chatty, says):
    first = {"role": "assistant", "content": "So.", **says}
    row = {"messages": [*openai(("user", ASKED)), first, *openai(("user", "How?"), ("assistant", SAID))]}
    text, learned, made = read(row, tmp_path, chatty)
    assert "So." in text
    assert learned == f"{SAID}<|im_end|>"
    assert made.notes["train_turns_read_only"] == 0


def test_what_a_template_marks_is_learned(tmp_path, marking):
    """As capitals, which no answer has: the marks tell, not what is given."""
    row = {
        "messages": [*WHOLE, *openai(("user", "How?")), {"role": "assistant", "content": "So.", "weight": 0}]
    }
    text, learned, _ = read(row, tmp_path, marking)
    assert "SO." in text
    assert learned == f"{SAID.upper()}<|im_end|>"


def test_of_several_templates_the_one_that_is_named_is_taken(tmp_path):
    several = question_tokenizer(CHATML)
    several.chat_template = {
        "short": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        "long": CHATML,
    }
    with pytest.raises(
        ModelError, match="chat templates long, short, and none is the one to take.*data.chat_template"
    ):
        read({"messages": WHOLE}, tmp_path, several)
    text, _, _ = read({"messages": WHOLE}, tmp_path, several, chat_template="short")
    assert text == f"{SYSTEM}<|im_end|>{ASKED}<|im_end|>{SAID}<|im_end|>"
    with pytest.raises(ModelError, match="without a name; leave it out"):
        read({"messages": WHOLE}, tmp_path, question_tokenizer(CHATML), chat_template="short")


def test_a_call_is_as_the_template_takes_it(tmp_path):
    """DeepSeek's template adds arguments to a text; others take them as a mapping."""
    texts = question_tokenizer(
        TOOLS.replace("{{ c.function | tojson }}", "{{ 'f: ' + c.function.arguments }}")
    )
    row = {
        "messages": [*openai(("user", ASKED)), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    }
    _, learned, _ = read(row, tmp_path, texts)
    assert learned == '<call>f: {"of": "a gate"}</call><|im_end|>'


def test_the_end_of_a_text_that_a_template_writes_once_hides_no_answer(tmp_path):
    """As Phi's templates do."""
    ending = question_tokenizer(
        CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n' }}{% else %}<eos>")
    )
    row = {"messages": [*WHOLE, *openai(("user", "How?"), ("assistant", "So."))]}
    text, learned, made = read(row, tmp_path, ending)
    assert text.endswith("So.<|im_end|>\n<eos>")
    assert learned == f"{SAID}<|im_end|>So.<|im_end|>\n<eos>"
    assert made.notes["train_turns_read_only"] == 0


def test_a_token_that_begins_before_an_answer_is_learned_with_it(tmp_path):
    """As the space before a first word, where the template has it."""
    joined = question_tokenizer(
        "{% for m in messages %}[{{ m.role }}]: {{ m.content }}<|im_end|>{% endfor %}"
    )
    joined.add_tokens([": one"])
    _, learned, _ = read({"messages": WHOLE}, tmp_path, joined)
    assert learned == f": {SAID}<|im_end|>"


SPOKEN = openai(("user", ASKED), ("assistant", SAID))


def answered(**more):
    return {"messages": [SPOKEN[0], {**SPOKEN[1], **more}]}


PICTURE = [{"type": "image_url", "image_url": "x"}]
REFUSED = {
    "a picture": (
        {"messages": [{**SPOKEN[0], "content": PICTURE}, SPOKEN[1]]},
        "a part of the type image_url",
    ),
    "calls": (
        answered(tool_calls=[CALL]),
        "message 1 has 'tool_calls', which the chat template does not read",
    ),
    "tools": ({"messages": SPOKEN, "tools": [TOOL]}, "a column has 'tools', which the chat"),
    "reasoning": (
        answered(reasoning_content="It is."),
        r"does not read; .* data.ignore: \[reasoning_content\]",
    ),
    "what nobody knows": (answered(mood="good"), "message 1 has 'mood', which the chat"),
    "half a weight": (answered(weight=0.5), "weight of message 1 is 0.5; needed is 0 or 1"),
    "a weight of the user's": (
        {"messages": [{**SPOKEN[0], "train": True}, SPOKEN[1]]},
        "train of message 0, the user's, is True; the assistant's alone",
    ),
    "nothing to learn": (answered(weight=0), "an answer of the assistant's that is to be learned"),
    "nobody's role": (
        {"messages": openai(("boss", ASKED), ("assistant", SAID))},
        "with a role of system, dev",
    ),
    "two systems": (
        {"messages": WHOLE, "system": "Be long."},
        "is 'Be long.' in a column, and another in the",
    ),
    "no JSON": ({"messages": "Hello"}, "messages is the text 'Hello', and no JSON"),
    "no call": (answered(tool_calls=[{"x": 1}]), "message 1 calls {'x': 1}; needed is"),
    "no content": (answered(content=None), "the content of message 1 is empty"),
    "history": ({"prompt": ASKED, "response": SAID, "history": 3}, "history has 3; needed are pairs"),
    "a number that is lost": ({"prompt": ASKED, "response": 2.0}, "response is 2.0; needed is a text"),
    "no number": ({"prompt": ASKED, "response": float("nan")}, "response is (nan|empty); needed is a text"),
    "another prompt": (
        {"prompt": "Who?", "chosen": SPOKEN, "rejected": SPOKEN},
        "begins with the user's word",
    ),
}


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_refused_by_its_name(tmp_path, chatty, row, words):
    with pytest.raises(DataError, match=words):
        read(row, tmp_path, chatty)


def test_columns_of_other_names_are_named(tmp_path, chatty):
    _, learned, made = read({"ask": ASKED, "reply": SAID}, tmp_path, chatty, prompt="ask", response="reply")
    assert (learned, made.notes["form"]) == (f"{SAID}<|im_end|>", "prompt and response")
    _, learned, made = read({"talk": SPOKEN, "prompt": "x"}, tmp_path, chatty, messages="talk")
    assert (learned, made.notes["columns_not_read"]) == (f"{SAID}<|im_end|>", ["prompt"])
    with pytest.raises(
        DataError, match="no column 'tlak'; it has talk: name the one with the messages in data.m"
    ):
        read({"talk": SPOKEN}, tmp_path, chatty, messages="tlak")


def test_what_is_ignored_is_not_looked_at(tmp_path, chatty):
    row = {"messages": [{**SPOKEN[0], "mood": "good"}, {**SPOKEN[1], "weight": 0.5}], "label": 3}
    _, learned, made = read(row, tmp_path, chatty, ignore=["mood", "weight", "label"])
    assert learned == f"{SAID}<|im_end|>"
    assert made.notes["columns_not_read"] == []


def test_a_turn_that_a_template_passes_over_is_refused(tmp_path):
    deaf = question_tokenizer(
        CHATML.replace(
            "{% for message in messages %}", "{% for message in messages if message['role'] != 'tool' %}"
        )
    )
    row = {"messages": [SPOKEN[0], *openai(("tool", "1/2")), SPOKEN[1]]}
    with pytest.raises(DataError, match="message 1, the tool's, is not in what the chat template makes"):
        read(row, tmp_path, deaf)


def test_without_a_chat_template_plain_rows_are_read_and_others_are_refused(tmp_path):
    plain = question_tokenizer()
    row = {"instruction": ASKED, "input": "A gate.", "output": SAID, "system": None, "history": None}
    text, learned, _ = read(row, tmp_path, plain)
    assert (text, learned) == (f"{ASKED}\nA gate. {SAID}<eos>", f" {SAID}<eos>")
    with pytest.raises(DataError, match="messages need a chat template, and the tokenizer has none"):
        read({**row, "system": SYSTEM}, tmp_path, plain)
