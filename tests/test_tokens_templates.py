import pytest
from made_questions import CHATML, question_tokenizer

from kdlib.errors import ModelError
from kdlib.tokens import templates
from kdlib.tokens.templates import Asked, Refused, rendered, written

TALK = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "one half", "name": None},
]
HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursion that branches": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a text times a number": "{{ 'a' * 100000000000 }}",
    "a text that doubles": (
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
    ),
    "a number of many digits": "{{ 9 ** (9 ** 9) }}",
    "a wide format": "{{ '%9000000d' % 1 }}",
    "what its messages make long": "{{ messages[0]['content'] * 9000000 }}",
}


@pytest.fixture(scope="module")
def chatty():
    return question_tokenizer(CHATML)


def shown(tokenizer, template, messages=TALK, **more):
    (found,) = rendered(tokenizer, [Asked(template, messages, [(len(messages), False)], **more)])
    return found


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_template_that_does_not_end_or_grows_is_refused_within_seconds(chatty, monkeypatch, template):
    monkeypatch.setattr(templates, "SECONDS", 1)
    with pytest.raises(ModelError, match="its chat template loops, recurses or grows: .*; needed") as caught:
        shown(chatty, template)
    assert len(str(caught.value)) < 1000
    assert shown(chatty, "{{ messages | length }}").texts == ["2"]


RAISING = ("raise_exception('no')", "1 // 0", "messages[7]['role'] + 1", "''.__class__.mro()", "a.b.c", "1 +")


@pytest.mark.parametrize("template", RAISING)
def test_what_a_template_raises_is_said_of_the_messages(chatty, template):
    assert isinstance(shown(chatty, f"{{{{ {template} }}}}"), Refused)


def test_a_conversation_is_as_transformers_writes_it(chatty):
    assert written(chatty, TALK) == chatty.apply_chat_template(TALK, tokenize=False)
    begun = chatty.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert written(chatty, TALK[:1], begins=True) == begun
    values = {"enable_thinking": 7}
    assert shown(chatty, "{{ eos_token }}{{ enable_thinking }}", values=values).texts == ["<eos>7"]
    null = [{**TALK[0], "tool_calls": None}]
    assert shown(chatty, "{{ 'tool_calls' in messages[0] }}", null).texts == ["False"]
    each = ([{"role": "user", "content": str(n)}] for n in range(200))
    many = [Asked("{{ messages[0]['content'] }}", messages, [(1, False)]) for messages in each]
    assert [each.texts for each in rendered(chatty, many)] == [[str(n)] for n in range(200)]


def test_what_a_template_marks_as_the_assistants_is_found(chatty):
    template = "{% for m in messages %}[{% generation %}{{ m['content'] }}{% endgeneration %}]{% endfor %}"
    found = shown(chatty, template, marks=True)
    assert [found.texts[0][start:end] for start, end in found.spans] == ["What is it?", "one half"]
