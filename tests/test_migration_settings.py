"""Other projects' settings as configs of ours: the right weights, and every key either translated or
listed.
"""

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings, strategies as st

from kdlib.config.reading import overridden
from kdlib.config.run import load
from kdlib.errors import ConfigError
from kdlib.migration.settings import OURS, TO_FILL_IN, migrated
from kdlib.migration.table import read_settings
from kdlib.workbench import cli_checks

STUDENT_AWARE = {
    "_comment_models": "Models",
    "teacher_model": "huihui-ai/Huihui-MoE-1B-A0.6B",
    "student_model": "HuggingFaceTB/SmolLM-135M",
    "num_experts": 8,
    "top_k": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 8,
    "learning_rate": 3e-5,
    "router_lr": 1e-4,
    "num_epochs": 3,
    "warmup_steps": 1000,
    "eval_steps": 1000,
    "save_steps": 500,
    "logging_steps": 50,
    "save_epochs": 1,
    "max_length": 384,
    "alpha_kd": 0.7,
    "alpha_feature": 0.1,
    "alpha_attention": 0.1,
    "alpha_layerwise": 0.05,
    "alpha_contrastive": 0.05,
    "temperature": 3.0,
    "min_temperature": 2.0,
    "use_temperature_curriculum": True,
    "contrastive_temp": 0.07,
    "label_smoothing": 0.1,
    "use_curriculum": True,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "scheduler_type": "cosine",
    "use_amp": True,
    "amp_dtype": "bfloat16",
    "loss_chunk_size": 128,
    "attention_layers": 4,
    "kd_top_k": 256,
    "use_gradient_checkpointing": True,
    "dataset_subset_size": 50000,
    "num_workers": 1,
    "use_dynamic_batching": True,
    "checkpoint_dir": "./checkpoints",
    "log_dir": "./logs",
    "use_early_stopping": True,
    "early_stopping_patience": 10,
    "use_ema": True,
    "ema_decay": 0.9999,
    "use_wandb": False,
    "seed": 42,
}
SOFT = {
    "teacher_model_name": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "student_model_name": "Qwen/Qwen2.5-0.5B",
    "alpha": 0.7,
    "temperature": 3,
    "max_length": 128,
    "train_batch_size": 8,
    "lr": 2e-5,
    "num_epochs": 3,
    "num_labels": 14,
    "fp16": False,
}
QA = """#!/bin/bash
# the usual run: --alpha is on the teacher
python distill_qa.py --teacher_model gpt2-large --student_model gpt2 \\
    --alpha 0.5 --temperature 3 --lr=2e-5 --warmup_ratio 0.1 \\
    --train_data "quantum bench.jsonl" --epochs 3 --patience 2
"""
FSDP = (
    "torchrun train.py --teacher-model a/b --student-model c/d --alpha 0.3 --temperature 2.0 --bf16 "
    "--batch-size 4 "
    "--max-steps 1000 --fsdp full_shard --use-gradient-checkpointing --warmup-steps 1e2 --output-dir out"
)


def file(folder, content, name="theirs.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def loaded(made, folder):
    """The config that the written file loads as."""
    made.write(folder / "ours.yaml")
    return load(folder / "ours.yaml")


def test_the_student_aware_projects_json_comes_along(tmp_path):
    made = migrated(file(tmp_path, STUDENT_AWARE), data="text.jsonl")
    config = loaded(made, tmp_path)
    assert config.loss.weights == {
        "projected_kl": 0.7,
        "ce": 0.3,
        "hidden": 0.15,
        "relational": 0.1,
        "contrastive": 0.05,
    }
    assert config.loss.temperature == {"projected_kl": {"linear": [3.0, 2.0]}, "contrastive": 0.07}
    assert (config.loss.top_k, config.loss.chunk, config.loss.features.route.top_k) == (256, 128, 2)
    assert config.teacher.experts == {
        "student_aware": {"learning_rate": 1e-4, "balance": 0.01, "anchor": 0.1}
    }
    assert (config.teacher.model, config.student.source) == (
        "huihui-ai/Huihui-MoE-1B-A0.6B",
        "HuggingFaceTB/SmolLM-135M",
    )
    assert (config.precision, config.seed, config.data.max_length, config.data.max_train_rows) == (
        "bfloat16",
        42,
        384,
        50000,
    )
    expected = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
        "warmup_steps": 1000,
        "num_train_epochs": 3,
        "eval_strategy": "steps",
        "eval_steps": 1000,
        "save_steps": 500,
        "logging_steps": 50,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "activation_checkpointing": True,
        "dataloader_num_workers": 1,
        "weight_decay": 0.01,
    }
    assert expected.items() <= config.training.items()
    left = {line.split(" = ")[0] for line in made.left_out}
    assert (config.early_stopping.patience, config.early_stopping.min_delta) == (10, 0)
    assert left >= {
        "num_experts",
        "attention_layers",
        "label_smoothing",
        "ema_decay",
        "_comment_models",
        "checkpoint_dir",
    }
    assert made.missing == []


ROUTER = {"initial_top_k": 1, "final_top_k": 4, "load_balance_weight": 0.02, "noise_std": 0.1}


def test_its_router_becomes_one_that_learns_and_a_gate_for_hidden_states(tmp_path):
    made = migrated(file(tmp_path, {**STUDENT_AWARE, **ROUTER}), data="text.jsonl")
    config = loaded(made, tmp_path)
    aware = {"learning_rate": 1e-4, "balance": 0.02, "anchor": 0.1}
    assert config.teacher.experts == {"student_aware": aware}
    assert (config.loss.features.route.top_k, config.loss.features.route.noise) == (
        {"linear": [1.0, 4.0]},
        0.1,
    )
    text = made.as_yaml()
    assert "# alpha_kd" in text
    assert (
        "projected_kl in the place of kd, relational in the place of attention: for two vocabularies" in text
    )
    assert any(line.startswith("top_k = 2: the gate's grows") for line in made.left_out)


def test_without_hidden_states_its_gate_is_left_out_and_its_router_stays(tmp_path):
    made = migrated(file(tmp_path, {"alpha_kd": 0.5, "router_lr": 1e-3, **ROUTER}))
    config = loaded(made, tmp_path)
    assert config.loss.weights == {"projected_kl": 0.5, "ce": 0.5}
    assert config.teacher.experts["student_aware"]["learning_rate"] == 1e-3
    left = {line.split(" = ")[0] for line in made.left_out}
    assert left == {"initial_top_k", "final_top_k", "noise_std"}


def test_a_top_k_alone_is_of_no_router(tmp_path):
    made = migrated(file(tmp_path, {"alpha_kd": 0.5, "top_k": 50, "alpha_feature": 0.1}))
    config = loaded(made, tmp_path)
    assert (config.loss.features.route, config.loss.weights) == (None, {"kd": 0.5, "ce": 0.5, "hidden": 0.1})
    assert made.left_out == [
        "top_k = 50: it is of a router that learns from the student, and none is asked for"
    ]


def test_its_curriculum_brings_terms_in_as_it_does_there(tmp_path):
    from kdlib.schedulers import from_spec

    specs = loaded(migrated(file(tmp_path, STUDENT_AWARE)), tmp_path).loss.schedules
    at = {
        fraction: {name: round(from_spec(spec)(fraction), 6) for name, spec in specs.items()}
        for fraction in (0.2, 0.45, 0.8, 1.0)
    }
    assert at[0.2] == {"projected_kl": 0.7, "ce": 0.3, "hidden": 0, "relational": 0, "contrastive": 0}
    assert at[0.45] == {"projected_kl": 0.7, "ce": 0.3, "hidden": 0.05, "relational": 0.05, "contrastive": 0}
    assert at[0.8] == {
        "projected_kl": 0.7,
        "ce": 0.3,
        "hidden": 0.125,
        "relational": 0.1,
        "contrastive": 0.025,
    }
    assert at[1.0] == {"projected_kl": 0.7, "ce": 0.3, "hidden": 0.15, "relational": 0.1, "contrastive": 0.05}


@pytest.mark.parametrize(("on", "weights"), [("kd", {"kd": 0.7, "ce": 0.3}), ("ce", {"kd": 0.3, "ce": 0.7})])
def test_alpha_is_read_as_told(tmp_path, on, weights):
    config = loaded(migrated(file(tmp_path, yaml.safe_dump(SOFT), "soft.yaml"), alpha_on=on), tmp_path)
    assert config.loss.weights == weights
    assert (config.training["learning_rate"], config.data.max_length, config.data.source) == (
        2e-5,
        128,
        TO_FILL_IN,
    )


def test_an_alpha_that_can_mean_two_things_is_asked_about_with_both_readings(tmp_path):
    with pytest.raises(ConfigError) as caught:
        migrated(file(tmp_path, SOFT))
    for expected in (
        "theirs.json: alpha: found 0.7",
        "--alpha-on kd reads {kd: 0.7, ce: 0.3}",
        "--alpha-on ce reads {kd: 0.3, ce: 0.7}",
    ):
        assert expected in str(caught.value)


def test_flags_of_a_script_come_along_and_one_half_needs_no_telling(tmp_path):
    made = migrated(file(tmp_path, QA, "run.sh"))
    config = loaded(made, tmp_path)
    assert config.loss.weights == {"kd": 0.5, "ce": 0.5}
    assert (config.teacher.model, config.student.source, config.data.source) == (
        "gpt2-large",
        "gpt2",
        "quantum bench.jsonl",
    )
    assert (
        config.training["warmup_steps"],
        config.training["num_train_epochs"],
        config.loss.temperature,
    ) == (0.1, 3, 3.0)
    assert (config.early_stopping.patience, config.training["eval_strategy"], made.left_out) == (
        2,
        "epoch",
        [],
    )


def test_a_classification_comes_along_with_its_limits_and_its_patience(tmp_path):
    theirs = {
        **SOFT,
        "max_train_samples": 10000,
        "max_eval_samples": 2000,
        "validation_split": 0.1,
        "early_stopping_patience": 2,
        "early_stopping_min_delta": 0.001,
        "label_column": "topic",
        "alpha_feature": 0.1,
    }
    made = migrated(file(tmp_path, theirs), alpha_on="kd", data="rows.parquet")
    config = loaded(made, tmp_path)
    assert (config.task, config.data.label, config.data.validation) == (
        "sequence-classification",
        "topic",
        0.1,
    )
    assert (config.data.max_train_rows, config.data.max_eval_rows) == (10000, 2000)
    assert (config.loss.weights, config.loss.temperature) == ({"kd": 0.7, "ce": 0.3}, 3)
    assert (config.early_stopping.patience, config.early_stopping.min_delta) == (2, 0.001)
    assert config.training["eval_strategy"] == "epoch"
    assert "num_labels: 14 classes, which the data names" in made.as_yaml()
    assert [line.split(":")[0] for line in made.left_out] == ["alpha_feature = 0.1", "fp16 = False"]


@pytest.mark.parametrize("off", [{"use_early_stopping": False}, {"eval_strategy": "no"}, {"patience": None}])
def test_early_stopping_that_is_off_there_is_off_here(tmp_path, off):
    made = migrated(file(tmp_path, {"alpha": 0.5, "patience": 3, "early_stopping_min_delta": 0.1, **off}))
    assert loaded(made, tmp_path).early_stopping is None
    assert {"patience", "early_stopping_min_delta"} <= {line.split(" = ")[0] for line in made.left_out}


def test_flags_of_an_fsdp_project_with_alpha_on_ce(tmp_path):
    config = loaded(migrated(file(tmp_path, FSDP, "flags.txt"), alpha_on="ce", data="text.jsonl"), tmp_path)
    assert config.loss.weights == {"kd": 0.7, "ce": 0.3}
    assert (config.precision, config.training["fsdp"], config.training["max_steps"]) == (
        "bfloat16",
        "full_shard",
        1000,
    )
    assert (config.training["warmup_steps"], config.training["activation_checkpointing"]) == (100.0, True)


def test_the_yaml_says_where_each_value_came_from_and_what_is_missing(tmp_path):
    text = migrated(
        file(tmp_path, {"alpha": 0.5, "temp\u2028e": 1, "num_epochs": 3, "kd_top_k": 0})
    ).as_yaml()
    assert "  num_train_epochs: 3  # num_epochs" in text
    assert "  top_k: null  # kd_top_k: 0, the whole vocabulary" in text
    assert "# To be filled in: teacher.model, student.from, data.source" in text
    assert "#   'temp\\u2028e' = 1: kdlib has no such setting" in text
    assert len(text.splitlines()) == text.count("\n")


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ({"alpha": 1.5}, {}, "alpha: found 1.5, needs a number from 0 to 1"),
        ({"alpha": "much"}, {}, "alpha: found 'much', needs a number"),
        ({"alpha_kd": True}, {}, "alpha_kd: found True"),
        ({"alpha_kd": 0.5}, {"alpha_on": "kd"}, "--alpha-on: is for a setting `alpha`"),
        ({"alpha": 0.5}, {"alpha_on": "kl"}, "--alpha-on: found 'kl'"),
        ({"alpha": 0.2, "alpha_kd": 0.5}, {"alpha_on": "kd"}, "loss.weights: found"),
        ({"alpha_feature": -1}, {}, "alpha_feature: found -1, needs a number of 0 or more"),
        (
            {"num_epochs": 3, "epochs": 5},
            {},
            "training.num_train_epochs: found 3 (num_epochs) and 5 (epochs); leave one out",
        ),
        ({"num_labels": 1}, {}, "num_labels: found 1, needs the number of classes, 2 or more"),
        (
            {"patience": 2, "early_stopping_patience": 3},
            {},
            "early_stopping.patience: found 3 (early_stopping_patience) and 2",
        ),
        ({"use_curriculum": "maybe"}, {}, "use_curriculum: found 'maybe', needs true or false"),
        ({"learning_rate": "fast"}, {}, "training.learning_rate: found 'fast', needs float"),
        ({"fp16": True, "bf16": True}, {}, "precision: found 'float16' (fp16) and 'bfloat16' (bf16)"),
        ({"amp_dtype": "int8"}, {}, "precision: found 'int8'"),
        ("[1, 2]", {}, "settings are needed"),
        ('{"alpha": 0.5, "alpha": 0.6}', {}, "'alpha' stands 2 times"),
        ("{", {}, "cannot be read as settings"),
        ("--alpha 0.5 --alpha 0.6", {}, "--alpha stands twice"),
        ("--alpha 'open", {}, "No closing quotation"),
        ("--alpha {", {}, "--alpha: not valid YAML"),
        ('{"a-b": 1, "a_b": 2}', {}, "'a_b' stands 2 times"),
        ("a: &a {b: *a}", {}, "within itself"),
        ('{"a":' * 5000 + "1" + "}" * 5000, {}, "nested too deeply"),
    ],
)
def test_what_cannot_be_translated_is_refused_with_its_place(tmp_path, content, options, expected):
    path = file(tmp_path, content, "theirs.txt")
    with pytest.raises(ConfigError) as caught:
        migrated(path, **options)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_nested_settings_go_by_their_innermost_names_where_these_are_unlike(tmp_path):
    settings = {"train": {"lr": 1e-4, "name": "a"}, "model": {"name": "b"}, "loss": {"alpha": 0.5}}
    path = file(tmp_path, settings)
    assert read_settings(path) == {"lr": 1e-4, "train.name": "a", "model.name": "b", "alpha": 0.5}


KEYS = {
    **STUDENT_AWARE,
    **SOFT,
    **ROUTER,
    **dict.fromkeys(("kl_weight", "bf16", "eval_file", "tf32"), True),
    "alpha": 0.5,
    "amp_dtype": "bf16",
    "warmup_ratio": 0.1,
    "mixed_precision": "bf16",
    "datasets": ["a", "b"],
    "patience": 10,
    "early_stopping": True,
    "label_names": ["a", "b"],
    "scheduler": "sometimes",
    "max_train_samples": None,
}


def outcome(path):
    """The migration and no fault, or none and what the error says."""
    try:
        return migrated(path), ""
    except ConfigError as error:
        return None, str(error)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(keys=st.lists(st.sampled_from(sorted(KEYS)), unique=True))
def test_every_key_of_theirs_is_translated_or_listed(tmp_path, keys):
    """Some subsets contradict themselves, which is refused; of all others every key is in the YAML, in an
    origin or a line.
    """
    path = file(tmp_path, {key: KEYS[key] for key in keys})
    made, fault = outcome(path)
    assert (made is None) == ("leave one out" in fault)
    if made is None:
        return
    said = [line.split(" = ")[0] for line in made.left_out]
    for key in keys:
        told = key in said or any(
            key in origin.replace(":", ",").replace(" ", ",").split(",") for origin in made.origins.values()
        )
        assert told, f"{key} is lost: {made.as_yaml()}"
    assert yaml.safe_load(made.as_yaml()) == overridden({}, made.values, made.name)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KNOWN = st.sampled_from(sorted({*KEYS, *OURS}))


@example(content=f'{{"alpha_attention": 1{"0" * 400}}}')
@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.dictionaries(KNOWN | st.text(max_size=8), JUNK, max_size=5).map(json.dumps)
    | st.text()
    | st.binary()
    | st.lists(KNOWN.map("--{}".format) | st.text(max_size=6), max_size=8).map(" ".join)
)
def test_any_file_gives_a_config_that_loads_or_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "theirs.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    made, fault = outcome(path)
    assert (made is None) == (str(path) in fault)
    fault.encode()  # can be printed
    if made:
        (tmp_path / "ours.yaml").unlink(missing_ok=True)
        loaded(made, tmp_path)


def test_kd_import_writes_a_new_file_and_lists_what_was_left_out(tmp_path, capsys):
    theirs, ours = file(tmp_path, STUDENT_AWARE), tmp_path / "ours.yaml"
    cli_checks.migrate(str(theirs), output=ours, data="text.jsonl")
    said = capsys.readouterr()
    assert "ours.yaml" in said.out
    assert "left out: ema_decay = 0.9999: " in said.err
    assert load(ours).loss.weights["projected_kl"] == 0.7
    with pytest.raises(ConfigError, match="is there already"):
        cli_checks.migrate(str(theirs), output=ours)
    cli_checks.migrate(str(theirs))
    said = capsys.readouterr()
    assert yaml.safe_load(said.out)["data"]["source"] == TO_FILL_IN
    assert "to be filled in: data.source" in said.err


def test_translating_loads_no_torch():
    code = "import sys, kdlib.migration.settings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


S1 = (
    "python train_soft.py --teacher_model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --student_model "
    "Qwen/Qwen2.5-0.5B --dataset dbpedia --kd_alpha 0.7 --temperature 3 --max_val_samples 2000 --dry-run"
)


def test_the_command_of_a_soft_classification_yields_one(tmp_path):
    made = migrated(file(tmp_path, S1, "run.sh"))
    config = loaded(made, tmp_path)
    assert (config.task, config.data.source) == ("sequence-classification", "fancyzhx/dbpedia_14")
    assert (config.data.text, config.data.max_eval_rows) == (["title", "content"], 2000)
    assert config.loss.weights == {"kd": 0.7, "ce": 0.3}
    assert made.left_out == ["dry_run = True: give the command another name: kd run CONFIG --smoke, or "
                             "notebooks/01_dry_run"]  # fmt: skip


def test_the_command_of_a_question_answering_yields_one_by_the_columns_of_its_file(tmp_path):
    rows = tmp_path / "quantum bench.jsonl"
    rows.write_text('\ufeff{"question": "?", "choices": ["a", "b"], "answer": 0}\n', encoding="utf-8")
    made = migrated(file(tmp_path, QA.replace("quantum bench.jsonl", str(rows)), "run.sh"))
    assert loaded(made, tmp_path).task == "question-answering"


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text('\ufeff{"alpha": 0.5}', encoding="utf-8")
    assert migrated(path).values["loss.weights"] == {"kd": 0.5, "ce": 0.5}


@pytest.mark.parametrize(
    ("kind", "weights", "teacher"),
    [("output", {"ce": 1}, None), ("logits", {"kd": 1}, "a/b"), ("hybrid", {"kd": 0.25, "ce": 0.75}, "a/b")],
)
def test_output_logit_and_hybrid_distillation_are_what_they_say(tmp_path, kind, weights, teacher):
    theirs = f"train.py --distillation-type {kind} --teacher a/b --alpha 0.25 --data rows.jsonl"
    config = loaded(migrated(file(tmp_path, theirs, "run.sh"), alpha_on="kd"), tmp_path)
    assert config.loss.weights == weights
    assert (config.teacher and config.teacher.model) == teacher


def test_other_trainers_names_have_a_counterpart(tmp_path):
    theirs = {
        "base_model": "a/b",
        "bf16": "auto",
        "cutoff_len": 512,
        "num_training_steps": 30,
        "beta": 0.5,
        "wandb_project": "p",
        "wandb_entity": "e",
        "run_name": "r",
    }
    made = migrated(file(tmp_path, theirs))
    config = loaded(made, tmp_path)
    assert (config.student.source, config.precision, config.data.max_length) == ("a/b", "auto", 512)
    assert config.loss.divergence == {"generalized_jsd": {"beta": 0.5}}
    assert config.training.items() >= {"max_steps": 30, "project": "p", "run_name": "r"}.items()
    assert (config.trackers.entity, made.left_out) == ("e", [])
    assert "whose loss is this times 0.25" in made.as_yaml()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.py", "alpha: float = 0.5\n", "a Python program"),
        (
            "config.txt",
            "from dataclasses import dataclass\n@dataclass\nclass C:\n    alpha: float = 0.5\n",
            "a Python",
        ),
        (
            "run.sh",
            "python generate_data.py --teacher a/b --alpha 0.5",
            "makes data, and trains nothing; kd generate",
        ),
        ("run.sh", "train.py --distillation-type all", "found 'all'; it is one of output, logit, hybrid"),
    ],
)
def test_what_is_no_training_is_told(tmp_path, name, content, expected):
    with pytest.raises(ConfigError, match=expected):
        migrated(file(tmp_path, content, name))
