import copy
import subprocess
import sys

import pytest
import yaml

from kdlib.benchmarks.settings import BenchmarkConfig
from kdlib.config import Config, differences, load, parse
from kdlib.errors import ConfigError


def faults(raw, overrides=(), **options) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(raw, overrides, **options)
    return str(caught.value)


def test_all_faults_come_at_once_each_with_its_path_and_the_nearest_name(raw_config):
    raw = copy.deepcopy(raw_config)
    raw["loss"] = {"temprature": 3, "weights": {"kdd": 1, "ce": -1}}
    raw["training"] |= {"learnin_rate": 1, "max_steps": "many", "seed": 1, "bf16": True}
    raw["traning"] = {}
    message = faults(raw)
    for expected in (
        "8 faults", "loss.temprature: unknown key; did you mean 'temperature'?", "no term 'kdd'; did you mean 'kd'?",
        "loss.weights: ce: found -1; weights are 0 or more", "training.learnin_rate", "did you mean 'learning_rate'?",
        "training.max_steps: found 'many', needs int", "training.seed: not set here", "training.bf16", "traning: unknown key",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.temperature=0", "loss.temperature: the temperature must stay above 0"),
        ("loss.temperature=hot", "loss.temperature: found 'hot'"),
        ("loss.weights={kd: 0, ce: 0}", "loss.weights: all weights are 0"),
        ("loss.weights.kd=-0.1", "weights are 0 or more"),
        ("loss.weights=[1]", "loss.weights: found [1]"),
        ("data.max_length=1", "data.max_length: found 1"),
        ("data.max_length=true", "data.max_length: a number is needed"),
        ("data.validation=1.5", "data.validation: found 1.5"),
        ("student.keep=[0, 1]", None),
        ("training.metric_for_best_model=loss", "training.metric_for_best_model: found 'loss'; it is one of perplexity"),
        ("training.metric_for_best_model=null", "training.metric_for_best_model: found None"),
        ("training.metric_for_best_model=agreemnt", "did you mean 'agreement'?"),
        ("training.greater_is_better=true", "it follows from metric_for_best_model"),
        ("training.save_total_limit=1", "training.save_total_limit: found 1, needs 2 or more"),
        ("training.save_strategy=best", "best_model/ is kept anyway"),
        ("training.max_steps=" + "9" * 400, "needs int"),
        ("loss.temperature=" + "9" * 400, "a schedule is a number"),
        ("loss.temperature={linear: [.inf, 1]}", "every value must be finite"),
        ("loss.weights={kd: {linear: [.nan, 1]}}", "every value must be finite"),
        ("loss.weights={kd: {linear: [0, 1]}}", "all weights are 0 at 0 % of training"),
        ("loss.weights={kd: {steps: {0: 1, 0.5: 0}}}", "all weights are 0 at 50 % of training"),
        ("seed=5000000000", "seed: found 5000000000"),
        ("loss.divergence=reverse_kl", None),
        ("loss.divergence={generalized_jsd: {beta: 3e-1}}", None),
        ("loss.divergence=forward_lk", "loss.divergence: found 'forward_lk'; did you mean 'forward_kl'?"),
        ("loss.divergence={generalized_jsd: {alpha: 0.3}}", "generalized_jsd takes beta"),
        ("loss.divergence={generalized_jsd: {beta: 1.3}}", "lies from 0 to 1"),
        ("loss.divergence={reverse_kl: 3}", "reverse_kl takes no options"),
        ("loss.top_k=256", None),
        ("loss.top_k=0", "loss.top_k: found 0"),
        ("loss.top_k_tail=drop", "loss.top_k_tail: found 'drop'"),
        ("loss.divergence=[1]", "it is one of forward_kl"),
        ("student.keep=often", "student.keep: found 'often'; it is influence, even, first, or a list"),
        ("student.keep=[a]", "student.keep: found ['a']"),
        ("loss=null", "loss: found None"),
        ("training=[]", "training: found []"),
        ("1=2", "1: unknown key"),
        ("student.keep=[0, 1, 2]", "`layers` is 2, but `keep` lists 3"),
        ("student={from: elsewhere, layers: 2}", "go with `from: teacher` only"),
        ("student={}", "needs `layers: <how many>`"),
        ("training.learning_rate=abc", "training.learning_rate: found 'abc', needs float"),
        ("training.gradient_accumulation_steps=1.5", "needs int"),
        ("training.use_cpu=1", "needs bool"),
        ("data.source.x=3", "it has no `x`"),
        ("teacher=", "teacher: found None"),
        ("temperature", "write it as key=value"),
        ("loss.temperature={", "not valid YAML"),
    ],
)
def test_one_fault_is_named_where_it_is(raw_config, override, expected):
    if expected is None:
        parse(raw_config, [override])
    else:
        assert expected in faults(raw_config, [override])


def test_numbers_that_yaml_reads_as_strings_become_numbers(raw_config):
    config = parse(raw_config, ["training.learning_rate=6e-4", "loss.weights.kd=5e-1", "training.max_steps=1e1"])
    assert config.training["learning_rate"] == 6e-4
    assert config.training["max_steps"] == 10
    assert config.loss.weights["kd"] == 0.5


def test_overrides_come_as_a_list_or_a_mapping_and_win_over_smoke(raw_config):
    listed = parse(raw_config, ["loss.temperature=3", "training.max_steps=7"], smoke=True)
    assert listed == parse(raw_config, {"loss.temperature": 3, "training.max_steps": 7}, smoke=True)
    assert listed.loss.temperature == 3
    assert listed.training["max_steps"] == 7
    assert listed.data.max_length == 32


def test_the_resolved_config_reads_back_as_itself(raw_config):
    config = parse(raw_config)
    assert parse(yaml.safe_load(config.as_yaml())) == config
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3


def test_differences_name_the_values_that_differ(raw_config):
    one, other = parse(raw_config), parse(raw_config, ["loss.temperature=3"])
    assert differences(one.as_dict(), other.as_dict()) == ["loss.temperature: 2.0 -> 3.0"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tinny.yaml", None, "no such file; did you mean 'tiny.yaml'?"),
        ("broken.yaml", b"a: [1", "not valid YAML"),
        ("empty.yaml", b"", "a mapping of sections is needed"),
        ("list.yaml", b"- 1", "a mapping of sections is needed"),
        ("binary.yaml", b"\xff\xfe\x00", "cannot be read as a text file"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(config_file, name, content, expected):
    path = config_file.parent / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert expected in str(caught.value)


def test_every_config_that_we_ship_loads_and_is_short():
    from kdlib.runs import project_root

    for path in sorted((project_root() / "configs").glob("*.yaml")):
        kind = BenchmarkConfig if path.stem == "benchmark" else Config
        assert isinstance(load(path, kind=kind), kind)
        assert isinstance(load(path, smoke=True, kind=kind), kind)
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_reading_a_config_loads_no_torch():
    code = "import sys, kdlib.config, kdlib.runs, kdlib.plots, kdlib.reports, kdlib.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
