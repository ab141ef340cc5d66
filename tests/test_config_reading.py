"""What people write is read as they mean it, or refused in a message that ends."""

import pytest
import yaml

from kdlib.config.reading import _loaded, pairs, read_yaml
from kdlib.config.run import Config, parse
from kdlib.config.sections import as_yaml, flow
from kdlib.errors import ConfigError, KdlibError, nearest, nearest_file


def fault(raw, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(raw, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("[yes, no, on, off, y]", ["yes", "no", "on", "off", "y"]),
        ("[true, False, null, ~]", [True, False, None, None]),
        ("[1e3, 1., .5, -.inf]", [1000.0, 1.0, 0.5, float("-inf")]),
        ("'1e3'", "1e3"),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_words_and_numbers_are_what_they_look_like(text, value):
    for found in (read_yaml(text, "it"), _loaded(f"[{text}, {'[],' * 2000}]")[0]):  # libyaml's, PyYAML's
        assert (found, type(found)) == (value, type(value))


TEXTS = [
    "yes",
    "no",
    "010",
    "1:30",
    "1e3",
    "1E-4",
    "1.e2",
    ".5e1",
    "0o7",
    "2024-01-01",
    "null",
    "~",
    "=",
    "<<",
    "é\x07",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_we_write_is_read_as_the_same_text_by_us_and_by_yaml_1_1(text):
    for written in (as_yaml([text]), f"- {flow(text)}"):
        assert read_yaml(written, "it") == [text] == yaml.safe_load(written)


def test_a_key_that_stands_twice_is_refused_with_both_lines():
    with pytest.raises(
        ConfigError, match=r"'seed' stands twice here, first in line 1; keep one(.*\n)*.*line 3"
    ):
        read_yaml("seed: 1\ntask: causal-lm\nseed: 2\n", "it")


def bomb(depth: int, width: int) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize("text", [bomb(9, 9), bomb(60, 2), "a: &a [*a]", "{a: &a {b: {c: *a}}}", "[" * 5000])
def test_aliases_that_multiply_and_nesting_without_end_are_refused_in_a_short_message(text):
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "it")
    assert len(str(caught.value)) < 300


def test_a_long_value_is_shown_by_its_ends(raw_config):
    long = ["layer"] * 20_000
    message = fault(
        {**raw_config, "seed": long, "data": {"source": long, "validation": "x" * 10**6, "text": 3}}
    )
    assert len(message) < 10_000
    assert "seed: found ['layer', 'layer'" in message
    assert "characters left out" in message


def test_no_error_of_ours_is_long_or_moves_the_cursor():
    message = str(KdlibError("a\x1b[2J\x07\u202e" + "b" * 10**7 + "\n" * 10**5 + "end"))
    assert len(message) < 10_000
    assert message.startswith("a\\x07\\u202eb")
    assert message.endswith("end")


def test_an_empty_section_is_its_default(raw_config):
    empty = dict.fromkeys(("compare", "diagnostics", "trackers", "launch"))
    without = {name: value for name, value in raw_config.items() if name not in empty}
    assert parse({**without, **empty}) == parse(without)
    assert "data.source: missing" in fault({**raw_config, "data": None})
    assert parse({**raw_config, "baseline": None, "code": None, "teacher_stage": None}).code is None


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.source=data/a #1.jsonl", "data/a #1.jsonl"),
        ("data.source=#1.jsonl", "#1.jsonl"),
        ("data.source='data/a #1.jsonl'", "data/a #1.jsonl"),
        ("data.source=notes: of a day.txt", "notes: of a day.txt"),
        ("data.source=@folder", "@folder"),
        ("data.source=[draft].txt", "[draft].txt"),
        ("data.source=2024", "2024"),
        ("data.subset=null", None),
        ("data.text=[title, body]", ["title", "body"]),
        ("data.text=true", "true"),
        ("loss.temperature={linear: [4, 1]}", {"linear": [4, 1]}),
        ("training.run_name=a #1", "a #1"),
        ("training.max_steps=5", 5),
        ("student.from=runs/my model", "runs/my model"),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(override, value):
    assert pairs([override], Config) == [(override.partition("=")[0], value)]


def test_a_switch_of_training_may_be_a_word(raw_config):
    config = parse(raw_config, ["training.dataloader_drop_last=off"])
    assert config.training["dataloader_drop_last"] is False


def test_a_text_of_digits_says_that_it_wants_quotes(raw_config):
    assert 'a text of these signs stands in quotes: "3"' in fault({**raw_config, "data": {"source": 3}})


def test_a_suggestion_is_the_setting_that_is_meant_or_none(raw_config):
    assert "temperature: unknown key; did you mean 'loss.temperature'?" in fault(
        {**raw_config, "temperature": 2}
    )
    assert "did you mean 'training.learning_rate'?" in fault({**raw_config, "learning_rate": 1e-4})
    assert "did you mean 'launch'?" in fault({**raw_config, "lanch": {}})
    assert nearest("temperature", ["compare", "teacher"]) == ""


def test_a_file_is_suggested_by_its_name_not_by_its_ending(tmp_path):
    for name in ("quickstart.yaml", "a.yaml"):
        (tmp_path / name).touch()
    assert nearest_file(tmp_path / "quickstrat.yaml", "*.yaml") == "; did you mean 'quickstart.yaml'?"
    assert nearest_file(tmp_path / "b.yaml", "*.yaml") == ""
    assert nearest_file(tmp_path / "nowhere" / "a.yaml") == ""
