"""Malformed and random configs, overrides, files: a config, or a message with a path; never a traceback."""

import copy
import re

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings, strategies as st

from kdlib.config.reading import read_yaml
from kdlib.config.run import Config, load, parse
from kdlib.config.terms import TERM_NAMES
from kdlib.config.training_arguments import training_fields
from kdlib.errors import ConfigError
from kdlib.schedulers import SHAPES

SOUND = {
    "task": "causal-lm",
    "seed": 0,
    "precision": "auto",
    "teacher": {"model": "t"},
    "student": {"from": "teacher", "layers": 2, "keep": "influence"},
    "data": {
        "source": "s",
        "subset": None,
        "text": "text",
        "validation": 0.1,
        "packing": True,
        "max_length": 16,
        "max_eval_rows": 10,
    },
    "loss": {
        "weights": {"kd": 0.7, "ce": 0.3},
        "curriculum": [
            {"until": 0.3, "weights": {"hidden": 0}},
            {"until": 1.0, "weights": {"hidden": 0.5}, "ramp": 0.1},
        ],
        "temperature": {"kd": {"linear": [4, 1]}, "contrastive": 0.1},
        "divergence": {"generalized_jsd": {"beta": 0.5}},
        "top_k": {"piecewise": {0: 8, 1: 4}},
        "samples": None,
        "features": {"layers": [[0, 1]], "normalise": True},
        "chunk": "auto",
        "compile": "auto",
    },
    "baseline": {"weights": {"ce": 1.0}},
    "training": {
        "max_steps": 3,
        "learning_rate": "6e-4",
        "lr_scheduler_type": {"joined": [[0.1, {"linear": [0, 1]}], [1, 1.0]]},
        "metric_for_best_model": "eval_perplexity",
    },
    "compare": {"resamples": 100},
    "diagnostics": {"grad_norms_every": 2},
}
NEVER = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

WORDS = st.sampled_from(
    [
        *TERM_NAMES,
        *SHAPES,
        *sorted(training_fields()),
        "auto",
        "even",
        "last",
        "until",
        "weights",
        "1e-4",
        "nan",
    ]
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | WORDS
    | st.binary(max_size=3)
    | st.dates()
    | st.sampled_from(
        [
            10**400,
            -(10**400),
            "9" * 400,
            "\ud800",
            "a\nb",
            "a\u2028b",
            float("nan"),
            1e308,
            -1e308,
            5e-324,
            0.3,
            1.0,
        ]
    )
)
KEYS = (
    WORDS | st.text(max_size=6) | st.sampled_from(["0", "\ud800", "a\nb", "", ".", "<<", 0, 1.5, None, True])
)
JUNK = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=10
)
SPECS = st.recursive(
    PLAIN,
    lambda inner: st.builds(
        lambda shape, arguments: {shape: arguments},
        st.sampled_from(SHAPES),
        st.lists(inner, max_size=3)
        | st.lists(st.tuples(st.floats(0, 1) | PLAIN, inner).map(list), max_size=3)
        | st.dictionaries(st.floats(0, 1) | KEYS, inner, max_size=3),
    ),
    max_leaves=6,
)


def paths(value, above=()):
    """Every place in a nested config."""
    yield above
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths(inner, (*above, key))


PLACES = [path for path in paths(SOUND) if path]
CHANGES = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(["set", "add", "drop", "wrap"]), KEYS, JUNK | SPECS),
    min_size=1,
    max_size=4,
)


def holds(inner, key) -> bool:
    return (
        key in inner
        if isinstance(inner, dict)
        else isinstance(inner, list) and isinstance(key, int) and key < len(inner)
    )


def changed(changes):
    """SOUND with values set, keys added, keys dropped, and values put into lists."""
    raw = copy.deepcopy(SOUND)
    for (*above, last), what, key, value in changes:
        inner = raw
        for step in above:
            inner = inner[step] if holds(inner, step) else None
        if not holds(inner, last):
            continue  # an earlier change took it away
        if what == "set":
            inner[last] = value
        elif what == "wrap":
            inner[last] = [inner[last]]
        elif what == "drop":
            del inner[last]
        elif isinstance(inner, dict):
            inner[key] = value
    return raw


def check(made, *places: str) -> None:
    """It is a config, which reads back from its own YAML; or a message whose every line begins with a
    path, and which can be printed.
    """
    if isinstance(made, Config):
        assert parse(read_yaml(made.as_yaml(), "its own")) == made
        return
    message = str(made)
    message.encode()
    assert any(place in message for place in places), message
    head, *faults = message.split("\n  ")
    if re.search(r": \d+ faults?$", head):
        assert head.endswith(f": {len(faults)} fault{'s' * (len(faults) > 1)}"), message
        assert all(
            fault.partition(": ")[0].isprintable() and len(fault.split(": ", 1)) == 2 for fault in faults
        ), message


def outcome(function, *arguments, **options):
    try:
        return function(*arguments, **options)
    except ConfigError as error:
        return error


@settings(NEVER, max_examples=400)
@given(changes=CHANGES, smoke=st.booleans())
def test_a_config_changed_at_random_is_a_config_or_a_message_with_a_path(changes, smoke):
    check(outcome(parse, changed(changes), smoke=smoke, name="fuzz.yaml"), "fuzz.yaml")


@settings(NEVER, max_examples=150)
@given(raw=JUNK | st.dictionaries(st.sampled_from(sorted(SOUND)), JUNK | SPECS))
def test_any_plain_data_is_a_config_or_a_message_with_a_path(raw):
    check(outcome(parse, raw, name="fuzz.yaml"), "fuzz.yaml")


TEXT = yaml.safe_dump(SOUND)
BROKEN = st.builds(
    lambda start, end, junk: TEXT[:start] + junk + TEXT[end:],
    st.integers(0, len(TEXT)),
    st.integers(0, len(TEXT)),
    st.text(max_size=4)
    | st.sampled_from(["\t", "[", "{", "&a", "*a", "!!", "---", "? ", ": ", "|", "'", "%", "<<: "]),
)


@settings(NEVER, max_examples=150)
@given(
    content=st.binary()
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    | BROKEN.map(str.encode)
)
@example(content=b"[" * 5000)
@example(content=b"seed: 2026-13-45")
@example(content=b"seed: !!bool maybe")
@example(content=b"seed: !!int ''")
@example(content=b"seed: !!timestamp x")
@example(content=b"seed: " + b"9" * 5000)
@example(content=b"loss: {weights: {kd: &a {joined: [[1, *a]]}}}")
@example(content=b"training: &a {x: *a}")
def test_any_file_is_a_config_or_a_message_with_its_name(tmp_path, content):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(content)
    check(outcome(load, path), "fuzz.yaml")


@settings(NEVER, max_examples=150)
@given(
    overrides=st.lists(
        st.text(max_size=12)
        | st.tuples(
            st.sampled_from([".".join(map(str, path)) for path in PLACES]) | st.text(max_size=6),
            st.text(max_size=6) | JUNK.map(str) | WORDS,
        ).map("=".join),
        max_size=3,
    )
    | st.dictionaries(KEYS, JUNK, max_size=3)
)
@example(overrides=["seed=2026-13-45"])
@example(overrides=["=1"])
@example(overrides=[".=1", "loss.=2", "..a=3"])
def test_any_override_is_a_config_or_a_message_with_its_key(overrides):
    check(outcome(parse, SOUND, overrides, name="fuzz.yaml"), "fuzz.yaml", "override ")


@pytest.mark.parametrize("path", ["no\0file", "x" * 5000, ".", "missing/fuzz.yaml"])
def test_a_name_that_no_file_has_is_a_message_with_it(path):
    check(outcome(load, path), path.replace("\0", r"\x00")[:1000])


def test_the_config_that_is_changed_is_sound():
    assert isinstance(parse(SOUND), Config)
