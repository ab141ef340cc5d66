import copy
import json
import subprocess
import sys

import pytest
import yaml

from kdlib.benchmarks.settings import BenchmarkConfig
from kdlib.config.reading import differences
from kdlib.config.run import Config, load, parse
from kdlib.config.terms import TERM_NAMES
from kdlib.errors import ConfigError
from kdlib.generation.config import GenerationConfig
from kdlib.schedulers import SHAPES
from kdlib.sweeps.config import SweepConfig


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
        "8 faults",
        "loss.temprature: unknown key; did you mean 'temperature'?",
        "no term 'kdd'; did you mean 'kd'?",
        "loss.weights: ce: found -1; weights are 0 or more",
        "training.learnin_rate",
        "did you mean 'learning_rate'?",
        "training.max_steps: found 'many', needs int",
        "training.seed: not set here",
        "training.bf16",
        "traning: unknown key",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.temperature=0", "loss.temperature: the temperature must stay from 0.01 to 100"),
        ("loss.temperature=hot", "loss.temperature: found 'hot'"),
        ("loss.weights={kd: 0, ce: 0}", "loss.weights: all weights are 0"),
        ("loss.weights.kd=-0.1", "weights are 0 or more"),
        ("loss.weights=[1]", "loss.weights: found [1]"),
        ("data.max_length=1", "data.max_length: found 1"),
        ("data.max_length=true", "data.max_length: a number is needed"),
        ("data.validation=1.5", "data.validation: found 1.5"),
        ("student.keep=[0, 1]", None),
        (
            "training.metric_for_best_model=loss",
            "training.metric_for_best_model: found 'loss'; it is one of perplexity",
        ),
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
        ("loss.top_k={piecewise: {0: 512, 1: 16}}", None),
        ("loss.top_k={linear: [512, 0]}", "every value must be 1 or more"),
        ("loss.top_k=2.5", "loss.top_k: found 2.5; it is a whole number"),
        ("loss.top_k=true", "loss.top_k: found True"),
        ("loss.weights={forward_kl: 0.5, reverse_kl: 0.5, hidden: {linear: [0, 1]}, contrastive: 1}", None),
        ("loss.weights={hiden: 1}", "loss.weights: there is no term 'hiden'; did you mean 'hidden'?"),
        ("loss.temperature={kd: 2, reverse_kl: {exponential: [4, 1]}, contrastive: 0.07}", None),
        (
            "loss.temperature={ce: 2}",
            "loss.temperature: 'ce' has no temperature; the terms with a temperature are kd, forward_kl",
        ),
        ("loss.temperature={reverse_lk: 2}", "did you mean 'reverse_kl'?"),
        ("loss.temperature={liner: [4, 1]}", "did you mean 'linear'?"),
        (
            "loss.temperature={kd: 0}",
            "loss.temperature: kd: the temperature must stay from 0.01 to 100, found 0",
        ),
        (
            "loss.temperature={kd: {linear: [1, -1]}}",
            "loss.temperature: kd: the temperature must stay from 0.01 to 100",
        ),
        ("loss.temperature={linear: [4, 1], kd: 2}", "a schedule is a number or one of linear"),
        ("loss.temperature={}", "loss.temperature: found {}; it is a number, a schedule, or a mapping"),
        ("loss.temperature=1000", "from 0.01 to 100, found 1000"),
        ("loss.temperature={linear: [4, 300]}", "from 0.01 to 100, found"),
        ("loss.temperature={contrastive: 0.001}", "contrastive: the temperature must stay from 0.01 to 100"),
        ("loss.temperature={piecewise: {0: 1, 0.505: 0, 0.506: 1}}", "must stay from 0.01 to 100"),
        ("loss.samples=64", None),
        ("loss.samples=0", "loss.samples: found 0"),
        (
            "loss={weights: {kd: 1}, top_k: 8, samples: 8}",
            "loss.samples: found 8 beside `top_k: 8`; kd takes either",
        ),
        (
            "loss={weights: {kd: 1}, divergence: adaptive_kl, samples: 8}",
            "loss.samples: found 8 with the divergence adaptive_kl",
        ),
        (
            "loss={weights: {kd: 1}, divergence: {adaptive_kl: {head: 0.3}}, samples: 8}",
            "with the divergence adaptive_kl",
        ),
        ("loss.chunk=auto", None),
        ("loss.chunk=1e2", None),
        ("loss.chunk=0", "loss.chunk: found 0; it is auto, or a whole number"),
        ("loss.chunk=all", "loss.chunk: found 'all'"),
        ("loss.compile=false", None),
        ("loss.compile=1", "loss.compile: found 1; it is auto, true or false"),
        ("loss.features={layers: {last: 2}, normalise: false}", None),
        ("loss.features.layers=[[0, 1], [1, 3]]", None),
        ("loss.features.layers=[]", "loss.features.layers: found []; it is even, {last: how many}, or pairs"),
        ("loss.features.layers=[[0, -1]]", "loss.features.layers: found [[0, -1]]"),
        ("loss.features.layers=[[0, true]]", "loss.features.layers: found"),
        ("loss.features.layers={last: 0}", "loss.features.layers: found {'last': 0}"),
        ("loss.features.layers=evn", "loss.features.layers: found 'evn'"),
        (
            "loss.features.layer=even",
            "loss.features.layer: unknown key; did you mean 'layers'?; allowed here: layers, normalise",
        ),
        (
            "loss.curriculum=[{until: 0.3, weights: {hidden: 0}}, {until: 1, weights: {hidden: 0.5}, ramp: "
            "0.1}]",
            None,
        ),
        ("loss.curriculum=[{until: 1, weights: {kd: {cosine: [1, 0]}}}]", None),
        ("loss.curriculum=[]", "loss.curriculum: there is no phase"),
        ("loss.curriculum={until: 1}", "loss.curriculum: found {'until': 1}"),
        ("loss.curriculum=[1]", "loss.curriculum.0: found 1"),
        (
            "loss.curriculum=[{until: 1, wieghts: {kd: 1}}]",
            (
                "loss.curriculum.0.wieghts: unknown key; did you mean 'weights'?; allowed here: until, ramp, "
                "weights"
            ),
        ),
        (
            "loss.curriculum=[{until: 0.5}, {until: 1, weights: {hiden: 1}}]",
            "loss.curriculum.1.weights: there is no term 'hiden'; did you mean 'hidden'?",
        ),
        (
            "loss.curriculum=[{until: 1, weights: {kd: -1}}]",
            "loss.curriculum.0.weights: kd: found -1; weights are 0 or more",
        ),
        ("loss.curriculum=[{until: 1, weights: {1: 1}}]", "loss.curriculum.0.weights.1"),
        ("loss.curriculum=[{weights: {kd: 1}}]", "loss.curriculum.0.until: missing"),
        ("loss.curriculum=[{until: half}]", "loss.curriculum.0.until: found 'half'"),
        ("loss.curriculum=[{until: .nan}]", "loss.curriculum.0.until: found nan"),
        ("loss.curriculum=[{until: true}]", "loss.curriculum.0.until: a number is needed"),
        ("loss.curriculum=[{until: 1, ramp: 0, weights: {hidden: 1}}]", "loss.curriculum.0.ramp: found 0"),
        (
            "loss.curriculum=[{until: 1, ramp: 0.1, weights: {hidden: {linear: [0, 1]}}}]",
            (
                "loss.curriculum.0.weights: hidden: found the schedule {'linear': [0, 1]} beside `ramp`, "
                "needs a "
                "number"
            ),
        ),
        ("loss.curriculum=[{until: 0.5}]", "loss.curriculum: the last phase ends at 0.5, needs to end at 1"),
        (
            "loss.curriculum=[{until: 0.5, weights: {kd: 0, ce: 0}}, {until: 1}]",
            "loss.weights: all weights are 0 at 0 % of training, in phase 1 (kd, ce)",
        ),
        (
            "loss={weights: {kd: {linear: [1, 2]}}, curriculum: [{until: 1, weights: {kd: 1}}]}",
            "loss.weights: kd: found {'linear': [1, 2]}, but the curriculum sets it too (phase 1)",
        ),
        ("loss.curriculum.0=1", "loss.curriculum: found {'0': 1}"),
        ("baseline.weights={ce: 0}", "baseline.weights: all weights are 0 (ce)"),
        ("baseline.weights={forward_kl: 1}", None),
        ("training.lr_scheduler_type={joined: [[0.1, {linear: [0, 1]}], [1.0, {cosine: [1, 0.1]}]]}", None),
        (
            "training.lr_scheduler_type=cosin",
            "training.lr_scheduler_type: found 'cosin'; did you mean 'cosine'?",
        ),
        (
            "training.lr_scheduler_type=0.5",
            "training.lr_scheduler_type: found 0.5; it is one of linear, cosine",
        ),
        ("training.lr_scheduler_type=null", "training.lr_scheduler_type: found None"),
        (
            "training.lr_scheduler_type={liner: [1, 0]}",
            "training.lr_scheduler_type: found {'liner': [1, 0]}; a schedule is",
        ),
        ("training.lr_scheduler_type={linear: [1, -1]}", "needs values of 0 or more, and not 0 throughout"),
        ("training.lr_scheduler_type={linear: [0, 0]}", "needs values of 0 or more, and not 0 throughout"),
        ("training.lr_scheduler_type={linear: [1, .inf]}", "every value must be finite"),
        ("student.keep=often", "student.keep: found 'often'; it is influence, even, first, or a list"),
        ("student.keep=[a]", "student.keep: found ['a']"),
        ("loss=null", "loss.weights: missing"),
        ("training=[]", "training: found []"),
        ("1=2", "1: unknown key"),
        ("student.keep=[0, 1, 2]", "`layers` is 2, but `keep` lists 3"),
        (
            "student={from: config, shape: 100m, layers: 2}",
            "`layers`, `keep` and `width` are a model's; `from: config`",
        ),
        ("trackers.alias={train/kl: kd_loss}", "found 'kd_loss'; a metric is named like train/kd_loss"),
        ("trackers.alias={train/kl: train/kd_loss}", None),
        ("student={}", "needs `layers: <how many>`"),
        ("training.learning_rate=abc", "training.learning_rate: found 'abc', needs float"),
        ("training.gradient_accumulation_steps=1.5", "needs int"),
        ("training.use_cpu=1", "needs bool"),
        ("data.source.x=3", "it has no `x`"),
        ("teacher=", "student.from: found teacher, and there is none"),
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
    config = parse(
        raw_config, ["training.learning_rate=6e-4", "loss.weights.kd=5e-1", "training.max_steps=1e1"]
    )
    assert config.training["learning_rate"] == 6e-4
    assert config.training["max_steps"] == 10
    assert config.loss.weights["kd"] == 0.5


def test_faults_in_nested_sections_and_between_fields_come_all_at_once(raw_config):
    raw = copy.deepcopy(raw_config)
    raw["loss"] = {
        "weights": {"kd": {"linear": [1, 2]}, "kdd": 1},
        "temperature": {"kd": 0, "ce": 1, "hiden": 2},
        "top_k": 8,
        "samples": 8,
        "divergence": "adaptive_kl",
        "features": {"layers": "odd", "normalize": True},
        "chunk": -1,
        "compile": "no",
        "curriculum": [
            {"until": 0.5, "ramp": 0.6, "weights": {"kd": 1}},
            {"until": 0.4, "weights": {"ce": -1}, "til": 1},
        ],
    }
    raw["training"] |= {
        "lr_scheduler_type": {"linear": [0, -1]},
        "warmup_steps": 0.1,
        "lr_scheduler_kwargs": {"min_lr": 1},
    }
    message = faults(raw)
    for expected in (
        "no term 'kdd'",
        "kd: the temperature must stay from 0.01 to 100",
        "'ce' has no temperature",
        "'hiden' has no temperature",
        "beside `top_k: 8`",
        "with the divergence adaptive_kl",
        "loss.features.layers: found 'odd'",
        "loss.features.normalize: unknown key; did you mean 'normalise'?",
        "loss.chunk: found -1",
        "loss.compile: found 'no'",
        "loss.curriculum: phase 1 has a ramp of 0.6",
        "loss.curriculum: phase 2 ends at 0.4",
        "loss.curriculum: the last phase ends at 0.4",
        "loss.curriculum.1.weights: ce: found -1",
        "loss.curriculum.1.til: unknown key",
        "training.lr_scheduler_type: found {'linear': [0, -1]}",
        "training.warmup_steps: found 0.1",
        "training.lr_scheduler_kwargs: found",
        "18 faults",
    ):
        assert expected in message


def test_an_own_course_of_the_learning_rate_refuses_a_warm_up_beside_it(raw_config):
    course = "training.lr_scheduler_type={piecewise: {0: 0, 0.1: 1, 1: 0}}"
    assert (
        "warmup_steps: found 5.0 beside a schedule as lr_scheduler_type; the schedule is all of it; "
        "write the warm-up as its "
        "first part" in faults(raw_config, [course, "training.warmup_steps=5"])
    )
    config = parse(raw_config, [course, "training.warmup_steps=0"])
    assert config.training["lr_scheduler_type"] == {"piecewise": {0.0: 0.0, 0.1: 1.0, 1.0: 0.0}}


def test_smoke_adds_no_warm_up_to_an_own_course_of_the_learning_rate(raw_config):
    assert parse(raw_config, smoke=True).training["warmup_steps"] == 1
    config = parse(raw_config, {"training.lr_scheduler_type": {"cosine": [1, 0]}}, smoke=True)
    assert "warmup_steps" not in config.training
    assert config.training["max_steps"] == 4


def test_the_resolved_weights_follow_the_curriculum(raw_config):
    phases = [
        {"until": 0.3, "weights": {"hidden": 0}},
        {"until": 1, "weights": {"hidden": "5e-1"}, "ramp": 0.1},
    ]
    loss = parse(raw_config, {"loss.curriculum": phases}).loss
    assert loss.weights == {"kd": 0.7, "ce": 0.3}
    assert loss.schedules == {
        **loss.weights,
        "hidden": {"joined": [[0.3, 0.0], [0.4, {"linear": [0.0, 0.5]}], [1.0, 0.5]]},
    }
    assert parse(raw_config).loss.schedules == loss.weights


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (3, {"kd": 3.0, "reverse_kl": 3.0, "contrastive": 0.1}),
        (
            {"linear": [4, 1]},
            {"kd": {"linear": [4.0, 1.0]}, "reverse_kl": {"linear": [4.0, 1.0]}, "contrastive": 0.1},
        ),
        ({"kd": "15e-1"}, {"kd": 1.5, "reverse_kl": 2.0, "contrastive": 0.1}),
        (
            {"reverse_kl": 1, "contrastive": {"linear": [0.2, 0.1]}},
            {"kd": 2.0, "reverse_kl": 1.0, "contrastive": {"linear": [0.2, 0.1]}},
        ),
    ],
)
def test_each_term_that_has_a_temperature_gets_its_own(raw_config, temperature, expected):
    loss = parse(raw_config, {"loss.temperature": temperature}).loss
    assert loss.temperatures(["kd", "ce", "reverse_kl", "hidden", "contrastive"]) == expected
    assert loss.temperatures(["ce"]) == {}


def test_no_schedule_has_the_name_of_a_term():
    assert not set(SHAPES) & set(TERM_NAMES)


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


def test_schedules_read_back_from_the_resolved_config_as_they_were(raw_config):
    config = parse(
        raw_config,
        {
            "loss.temperature": {"kd": {"steps": {0: 2, 0.5: 1}}},
            "loss.top_k": {"piecewise": {0: 64, 1: 8}},
            "loss.curriculum": [
                {"until": 0.5, "weights": {"hidden": {"exponential": [1, 0.5]}}},
                {"until": 1, "ramp": 0.5},
            ],
            "loss.features.layers": [[0, 0], [1, 3]],
            "training.lr_scheduler_type": {"joined": [[0.1, {"linear": [0, 1]}], [1, 1]]},
        },
    )
    assert "0.5: 1.0" in config.as_yaml()  # a fraction stays a number, no quoted text
    assert parse(yaml.safe_load(config.as_yaml())) == config
    assert parse(json.loads(json.dumps(config.as_dict()))) == config


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
        ("no\0name.yaml", None, "cannot be read as a text file: embedded null byte"),
        ("deep.yaml", b"[" * 5000, "not valid YAML: nested too deeply"),
        ("date.yaml", b"seed: !!timestamp 2026-13-45", "not valid YAML: month must be in 1..12"),
        ("bool.yaml", b"seed: !!bool maybe", "not valid YAML: 'maybe'"),
        (
            "itself.yaml",
            b"loss: {weights: {kd: &a {joined: [[1, *a]]}}}",
            "nested too deeply, or within itself",
        ),
        (
            "half.yaml",
            b'loss: {weights: {"\\ud800": -1}, temperature: {"\\ud800": 0}}',
            r"'\ud800': the temperature must stay from 0.01 to 100",
        ),
        (
            "lines.yaml",
            b'training: {"a\\nb": 1}\n"a\\nb": 1',
            "training.'a\\nb': TrainingArguments has no such name",
        ),
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
    from kdlib.runs.folder import project_root

    for path in sorted((project_root() / "configs").glob("*.yaml")):
        kinds = {"benchmark": BenchmarkConfig, "sweep": SweepConfig, "rows": GenerationConfig}
        kind = next((kinds[word] for word in path.stem.split("_") if word in kinds), Config)
        assert isinstance(load(path, kind=kind), kind)
        assert kind in (SweepConfig, GenerationConfig) or isinstance(load(path, smoke=True, kind=kind), kind)
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_reading_a_config_loads_no_torch():
    code = (
        "import sys, kdlib.config.run, kdlib.runs.folder, kdlib.plots.comparison, kdlib.reports.run, "
        "kdlib.workbench.cli; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
