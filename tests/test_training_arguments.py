"""Every field of TrainingArguments: one trains, or is refused by name before models are loaded."""

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_training import pieces

from kdlib.config.run import parse
from kdlib.config.training_arguments import RESERVED, training_fields
from kdlib.errors import ConfigError, ModelError
from kdlib.models.sharing import check_shards
from kdlib.models.teacher import named_device
from kdlib.runs.files import StudentFolder
from kdlib.runs.log import eval_table, training_table
from kdlib.training import run as training
from kdlib.training.plan import check_processes, training_arguments, try_out
from kdlib.workbench import teacher_stage

TRIED = {
    "an optimizer step": {
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4},
        **{"learning_rate": 1e-3, "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 1},
        **{"lr_scheduler_kwargs": {"min_lr": "1e-5"}, "optim": "adamw_torch", "weight_decay": 0.1},
        **{"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 0.5},
        **{"neftune_noise_alpha": 1.0, "torch_empty_cache_steps": 2, "use_cpu": True},
    },
    "what is logged": {
        **{"logging_strategy": "steps", "logging_steps": 2, "logging_first_step": True},
        **{"include_num_input_tokens_seen": "all", "log_level": "error", "log_level_replica": "error"},
        **{"log_on_each_node": False, "report_to": [], "project": "mine", "run_name": "mine"},
        **{"trackio_space_id": None, "trackio_bucket_id": None},
        **{"metric_for_best_model": "eval_kl_to_teacher", "max_steps": 3},
    },
    "evaluation and checkpoints": {
        **{"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "eval_delay": 1},
        **{"per_device_eval_batch_size": 3, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2},
        **{"save_on_each_node": False, "ignore_data_skip": True, "max_steps": 4},
    },
    "by the epoch": {
        **{"max_steps": -1, "num_train_epochs": 0.1, "logging_strategy": "epoch", "eval_strategy": "epoch"},
        **{"save_strategy": "epoch", "train_sampling_strategy": "group_by_length"},
    },
    "neither evaluated nor saved nor logged": {
        **{"max_steps": 2, "logging_strategy": False, "eval_strategy": False, "save_strategy": False},
    },
    "loaders": {
        **{"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 2},
        **{"dataloader_prefetch_factor": 2, "dataloader_multiprocessing_context": "fork"},
        **{"dataloader_in_order": False, "dataloader_pin_memory": False, "dataloader_drop_last": True},
        **{"train_sampling_strategy": "sequential", "accelerator_config": {"even_batches": True}},
    },
    "sgd on a plateau": {
        **{"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true", "max_steps": 4, "eval_steps": 2},
        **{"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5}},
    },
    "batches of a size": {"train_sampling_strategy": "batch_rebalance", "optim": "adafactor", "max_steps": 2},
    "checkpointed": {
        **{"activation_checkpointing": True, "max_steps": 2},
        "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointed by the old name": {
        **{"gradient_checkpointing": True, "max_steps": 2},
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "compiled": {
        **{"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2},
        "torch_compile_mode": "default",
    },
    "the same again": {"full_determinism": True, "tf32": False, "max_steps": 2},
    "ranks, of which there is one": {
        **{"ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 25, "ddp_broadcast_buffers": False},
        **{"ddp_static_graph": False, "ddp_backend": "gloo", "ddp_timeout": 600, "max_steps": 2},
        **{"fsdp": None, "fsdp_config": None, "optim_target_modules": None},
    },
}


def changed(raw: dict, **changes) -> dict:
    return {**raw, "training": {**raw["training"], **changes}}


def test_every_field_is_tried_or_refused():
    tried = {name for bundle in TRIED.values() for name in bundle}
    assert tried | set(RESERVED) == set(training_fields())
    assert not tried & set(RESERVED)


DYNAMOS_OWN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@DYNAMOS_OWN
@pytest.mark.parametrize("name", TRIED)
def test_what_is_not_refused_trains(raw_config, tmp_path, name, monkeypatch):
    for variable in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG"):  # full_determinism sets them
        monkeypatch.setenv(variable, "")
    config, folder = parse(changed(raw_config, **TRIED[name])), StudentFolder(tmp_path)
    parts = pieces(config)
    before = [weight.clone() for weight in parts["student"].parameters()]
    try:
        trainer = training.train(config, folder, **parts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert folder.is_trained
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.student.parameters(), strict=True))
    assert trainer.state.global_step == trainer.state.max_steps > 0
    assert len(training_table(folder)) == {False: 0, "epoch": 1}.get(
        TRIED[name].get("logging_strategy"), trainer.state.max_steps // 2 + (name == "what is logged") * 2
    )


REFUSED = {
    "max_steps": [(0, "needs 1 or more, or -1")],
    "num_train_epochs": [(0, "needs more than 0"), (-1, "needs more than 0")],
    "lr_scheduler_kwargs": [("{num_cycles: 2}", "needs a mapping"), ({"cycles": 2}, "cannot be made here")],
    "eval_strategy": [("sometimes", "it is one of no, steps, epoch"), (True, "it is one of no, steps")],
    "optim": [
        ("adamw_8bit", "pip install -U bitsandbytes"),
        ("galore_adamw", "galore"),
        ("adamw_torch_8bit", "pip install torchao"),
        ("stable_adamw", "pip install torch-optimi"),
        ("lomo", "is not supported"),
        ("schedule_free_adamw", "is not supported"),
        ("adam", "did you mean"),
    ],
    "optim_args": [("momentum=0.9", "leave it out"), ("momentum", "leave it out")],
    "report_to": [(["mlflow"], "pip install mlflow"), ("wandbb", "did you mean 'wandb'")],
    "dataloader_persistent_workers": [(True, "set dataloader_num_workers to 1")],
    "dataloader_prefetch_factor": [(2, "set dataloader_num_workers to 1")],
    "push_to_hub": [(True, "hf upload")],
    "deepspeed": [("zero2.json", "torchrun")],
    "use_liger_kernel": [(True, "forward pass")],
    "torch_compile_backend": [("inductr", "torch_compile: cannot be made here")],
    "torch_compile_mode": [("fastest", "torch_compile: cannot be made here")],
    "activation_checkpointing_kwargs": [("use_reentrant", "needs a mapping")],
    "accelerator_config": [({"even": True}, "transformers refuses"), ("a.json", "transformers refuses")],
    "lr_scheduler_type": [
        ("polynomial_with", "did you mean"),
        ("warmup_stable_decay", "cannot be made here"),
    ],
    "adam_beta1": [(1.5, "training.optim: adamw_torch_fused")],
    "tf32": [(True, "transformers refuses")],
    "save_steps": [(0, "needs more than 0")],
    "gradient_accumulation_steps": [(0, "needs 1 or more")],
    "train_sampling_strategy": [("length", "it is one of random")],
    "optim_target_modules": [("all-linear", "needs optim galore")],
}


@pytest.mark.parametrize(
    ("name", "value", "said"), [(n, value, said) for n, each in REFUSED.items() for value, said in each]
)
def test_what_cannot_be_made_is_refused_by_name_before_anything_is_loaded(raw_config, name, value, said):
    raw = {**raw_config, "teacher": {"model": "nowhere"}, "data": {"source": "nothing.jsonl"}}
    beside = {"activation_checkpointing": True} if name.startswith("activation") else {}
    with pytest.raises(ConfigError, match=r"(?s)training[.:].*") as refused:
        teacher_stage.preflight(parse(changed(raw, **{name: value}, **beside)))
    assert said in str(refused.value)


def test_what_several_processes_share_is_refused_in_one(raw_config, tmp_path):
    config = parse(changed(raw_config, fsdp="full_shard"))
    teacher_stage.check_arguments(config)  # it may be prepared by one
    with pytest.raises(
        ConfigError, match=r"training.fsdp: found .* with one process; .*torchrun --nproc_per"
    ):
        teacher_stage.preflight(config)
    with pytest.raises(ConfigError, match=r"training.fsdp"):
        check_processes(training_arguments(config, tmp_path))


def test_rows_that_make_no_batch_are_no_training(raw_config, tmp_path):
    raw_config["data"]["max_train_rows"] = 3
    config = parse(changed(raw_config, dataloader_drop_last=True))
    with pytest.raises(ConfigError, match="dataloader_drop_last: 3 rows make no whole batch of 4"):
        teacher_stage.preflight(config)
    with pytest.raises(ConfigError, match="dataloader_drop_last"):
        training.train(config, StudentFolder(tmp_path), **pieces(config))


@DYNAMOS_OWN
def test_compiled_layers_learn_what_others_do(raw_config, tmp_path):
    figures = {}
    for compiled in (False, True):
        backend = {"torch_compile_backend": "aot_eager"} if compiled else {}
        config = parse(changed(raw_config, torch_compile=compiled, max_steps=4, logging_steps=1, **backend))
        parts, folder = pieces(config), StudentFolder(tmp_path / str(compiled))
        training.train(config, folder, **parts)
        is_compiled = [layer._compiled_call_impl is not None for layer in parts["student"].model.layers]
        assert is_compiled == [compiled] * 2
        figures[compiled] = [*training_table(folder)["loss"], *eval_table(folder)["kl_to_teacher"]]
    assert figures[True] == pytest.approx(figures[False], rel=1e-4)


def test_compiled_layers_are_not_looked_into(raw_config):
    raw_config["loss"]["weights"]["hidden"] = 0.1
    with pytest.raises(ConfigError, match="torch_compile: hidden look inside layers"):
        training_arguments(parse(changed(raw_config, torch_compile=True)), "unused")


def test_a_toy_leaves_the_random_numbers_alone(raw_config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try_out(training_arguments(parse(raw_config), "unused"))
    assert torch.equal(torch.rand(3), expected)


SHARED = {
    "training.fsdp_config.version: found 1": {"training": {"fsdp_config": {"version": 1}}},
    "needs a mapping": {"training": {"fsdp_config": "fsdp.json"}},
    "cpu_ram_efficient_loading": {"training": {"fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}}},
    "teacher.device: found cuda:1": {"teacher": {"device": "cuda:1"}},
    "grad_norms_every: found 2": {"diagnostics": {"grad_norms_every": 2}},
    "teacher.offload: goes with training.fsdp": {
        "teacher": {"offload": True},
        "training": {"fsdp": False},
    },
}


@pytest.mark.parametrize("said", SHARED)
def test_what_does_not_go_with_shared_models_is_refused_by_name(raw_config, said):
    given = {"training": {}, **SHARED[said]}
    raw = raw_config | {name: {**raw_config.get(name, {}), **changes} for name, changes in given.items()}
    raw["training"] = {"fsdp": True, **raw["training"]}
    with pytest.raises(ConfigError) as refused:
        parse(raw)
    assert said in str(refused.value)


def test_on_cpu_ranks_sharing_is_refused_and_accelerate_is_not_left_with_a_toys_state(raw_config, tmp_path):
    """accelerate keeps the first state that is asked for: FSDP was off after the toy, on GPUs too."""
    config = parse(changed(raw_config, fsdp=True, fsdp_config={"version": 2, "xla": False}))
    given = config.as_dict()
    args = training_arguments(config, tmp_path)
    assert config.as_dict() == given  # transformers writes its defaults into what it is given
    assert args.fsdp_config["state_dict_type"] == "SHARDED_STATE_DICT"
    with pytest.raises(
        ConfigError, match=r"training.fsdp: found on cpu ranks, where accelerate shards nothing"
    ):
        check_shards(args.device)
    try_out(args)
    assert not AcceleratorState._shared_state


def test_a_teacher_on_a_device_that_is_not_there_is_refused_with_those_that_are(raw_config):
    config = parse({**raw_config, "teacher": {**raw_config["teacher"], "device": "cuda:1"}})
    with pytest.raises(ModelError, match=r"teacher.device: found cuda:1, but this machine has .*cpu"):
        named_device(config.teacher.device)
    assert parse(raw_config).as_dict()["teacher"] == raw_config["teacher"]  # older runs are known again
