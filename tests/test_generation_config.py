"""What `kd generate` is asked for, and the files of prompts that it reads.

Run: pytest tests/test_generation_config.py
"""

import json

import pytest

from kdlib.config.run import load, parse
from kdlib.errors import ConfigError, DataError
from kdlib.filters.sift import sifted
from kdlib.generation.answers import Answer, Usage, key_of
from kdlib.generation.config import GenerationConfig
from kdlib.generation.run import answered_row
from kdlib.prompts.config import CATEGORIES, known_category
from kdlib.prompts.prompt import Prompt, are_alone, read_prompts
from kdlib.sweeps.config import SweepConfig

RAW = {"teacher": {"endpoint": {"model": "gpt-4o-mini"}}, "prompts": {"from": "prompts.jsonl"}}


def config(*overrides, **sections):
    return parse({**RAW, **sections}, overrides, kind=GenerationConfig)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.endpoint.modle=x", "teacher.endpoint.modle: unknown key; did you mean 'model'?"),
        ("budget.usd=0", "found 0: nothing can be asked for it; give dollars, or budget: null"),
        ("budget.usd=-1", "nothing can be asked for it"),
        ("teacher.local.model=smollm2-135m-instruct", "found endpoint and local of endpoint and local"),
        ("teacher.endpoint.provider=openia", "teacher.endpoint.provider: found 'openia'"),
        ("teacher.endpoint.base_url=localhost:8000", "an address is like http://localhost:8000/v1"),
        ("teacher.endpoint.key_variable=MY_PLACE", "the name of an environment variable that holds the key"),
        ("teacher.endpoint.key_variable=sk-abc.def", "the name of an environment variable"),
        ("limits.tokens_per_minute=100", "limits.tokens_per_minute: found 100; it needs more than"),
        ("prices.input=1", "give input and output (dollars per million tokens), or hour, and not both"),
        ("prices.hour=1", "prices: an endpoint is paid by the token"),
        ("sampling.temperature=3", "less than or equal to 2"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(override, expected):
    with pytest.raises(ConfigError) as caught:
        config(override)
    assert expected in str(caught.value)


def test_an_unknown_category_is_told_its_nearest():
    assert known_category(CATEGORIES[0]) == CATEGORIES[0]
    with pytest.raises(ValueError, match="unknown category bugfix; did you mean 'bug_fix'"):
        known_category("bugfix")


def test_a_key_in_the_config_is_refused():
    with pytest.raises(ConfigError, match="what looks like a key"):
        config("sampling.extra.x=sk-proj-abcdefghijklmnopqrstuvwxyz0123456789")


def test_the_providers_key_goes_to_the_provider_alone():
    own = "teacher.endpoint.base_url=http://localhost:8000/v1/"
    assert config().teacher.endpoint.key_name == "OPENAI_API_KEY"
    assert config(own).teacher.endpoint.key_name is None
    assert config(own, "teacher.endpoint.key_variable=LAB_KEY").teacher.endpoint.key_name == "LAB_KEY"
    assert config(own).teacher.endpoint.base_url == "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("raw", "kind", "expected"),
    [
        (
            {"teacher": {}, "student": {}, "data": {}},
            GenerationConfig,
            "a training (`student:`); give it to kd run",
        ),
        ({"base": "x.yaml", "grid": {}}, GenerationConfig, "a sweep (`base:`); give it to kd sweep"),
        (RAW, SweepConfig, "rows to be made by a teacher (`prompts:`); give it to kd generate"),
    ],
)
def test_a_config_for_another_command_is_told_which(tmp_path, raw, kind, expected):
    path = tmp_path / "some.yaml"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"this describes") as caught:
        load(path, kind=kind)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_is_told_of_a_config_for_generation(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(json.dumps(RAW))
    with pytest.raises(ConfigError, match="give it to kd generate"):
        load(path)


def test_prompts_are_read_in_both_forms(tmp_path):
    talk = [{"role": "system", "content": "be short"}, {"role": "user", "content": "a\u2028b"}]
    rows = [
        {"prompt": "write f", "category": "function", "seed": "s1"},
        {"messages": talk, "category": "mine"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    one, two = read_prompts(path)
    assert one == Prompt((("user", "write f"),), "function", seed="s1")
    assert two.as_sent() == talk
    assert read_prompts(path, 1) == [one]
    assert are_alone([one])
    assert not are_alone([one, two])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x"}', "line 1: no category"),
        ('{"prompt": " ", "category": "a"}', "a message is empty"),
        ('{"prompt": "x", "category": "a", "promt": 1}', "unknown column 'promt'; did you mean 'prompt'?"),
        ('{"prompt": "x", "messages": [], "category": "a"}', "either prompt or messages"),
        ('{"messages": [{"role": "bot", "content": "x"}], "category": "a"}', "found the role 'bot'"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "category": "a"}', "it needs the user's"),
        ('{"prompt": "x", "category": 3}', "category = 3; a text is needed"),
        ("[1]", "found list, not an object"),
        ("{", "line 1:"),
        ("", "no rows"),
    ],
)
def test_a_broken_prompt_is_named_by_its_line(tmp_path, line, expected):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert expected in str(caught.value)


def test_a_key_depends_on_what_is_sent_and_to_whom_alone():
    prompt, who, how = Prompt((("user", "x"),), "function"), {"model": "m"}, {"max_tokens": 3}
    key = key_of(prompt, who, how)
    assert key == key_of(Prompt((("user", "x"),), "bug_fix", seed="s"), {"model": "m"}, {"max_tokens": 3})
    others = [(Prompt((("system", "x"),), "a"), who, how), (prompt, {"model": "n"}, how), (prompt, who, {})]
    assert len({key, *(key_of(*each) for each in others)}) == 4


def test_what_is_empty_cut_off_refused_or_out_of_bounds_is_not_kept():
    prompt = Prompt((("user", "x"),), "function")
    said = [("fine", "stop"), (" \n", "stop"), ("def f(", "length"), ("no", "refusal"), ("a" * 9, "stop")]
    answered = [(prompt, Answer(text, finish, None, 0.0)) for text, finish in said]
    filters = config("filters.longest=8").filters
    assert sifted(filters, answered) == [None, "empty", "cut off", "refusal", "too long"]


def test_rows_with_roles_end_with_the_assistant():
    prompt = Prompt((("system", "s"), ("user", "u")), "function")
    row = answered_row(prompt, Answer("a", "stop", Usage(3, 4), 0.1), "m", alone=False)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert "prompt" not in row
    assert row["usage"] == {"input": 3, "output": 4, "cached": 0, "written": 0}
