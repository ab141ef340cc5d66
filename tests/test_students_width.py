import pytest
import torch
from conftest import tiny_model
from made_log import read_metrics
from test_students_depth import IDS, said, trained
from transformers import AutoModelForCausalLM, GPT2Config

from kdlib.config.models import WidthConfig
from kdlib.config.run import parse
from kdlib.errors import ConfigError, ModelError
from kdlib.runs.files import StudentFolder
from kdlib.students.student import check_pair, outline, own_config, tokenizer_of
from kdlib.students.width import importance, narrower, with_width
from kdlib.tasks import base as tasks
from kdlib.training.run import train

SIZES = {"hidden": 32, "intermediate": 48, "heads": 4}  # as they are
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
}


def of_family(name: str):
    """A tiny one, its biases and norms as far from their start as its matrices."""
    model = trained(name, **FAMILIES[name])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    model.config.rms_norm_eps = 0.0
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):  # the only thing that knows how many channels there are
            module.variance_epsilon = 0.0
    return model


def largest_difference(one, other) -> float:
    """Of two models' logits, as a part of the largest."""
    return ((said(one) - said(other)).abs().max() / said(other).abs().max()).item()


@torch.no_grad()
def silence(model, *, channels=(), neurons=(), groups=(), heads=()) -> None:
    """Let these parts give nothing: channels of all that writes to the stream, parts of every layer."""
    size = model.model.layers[0].self_attn.head_dim
    channels = list(channels)
    model.model.embed_tokens.weight[:, channels] = 0
    for layer in model.model.layers:
        for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writes.weight[channels] = 0
            if writes.bias is not None:
                writes.bias[channels] = 0
        for part, numbers in ((layer.mlp.up_proj, neurons), (layer.self_attn.v_proj, _rows(groups, size))):
            part.weight[list(numbers)] = 0
            if part.bias is not None:
                part.bias[list(numbers)] = 0
        layer.self_attn.o_proj.weight[:, _rows(heads, size)] = 0


def _rows(numbers, size) -> list[int]:
    return [number * size + row for number in numbers for row in range(size)]


@pytest.mark.parametrize("name", FAMILIES)
def test_as_wide_as_the_teacher_is_the_teacher(name):
    model = of_family(name)
    same = narrower(model, WidthConfig(**SIZES), IDS)
    torch.testing.assert_close(said(same), said(model), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_gives_nothing_leaves_without_a_trace_and_is_read_again(name, tmp_path):
    model = of_family(name)
    groups = model.config.num_key_value_heads
    silence(model, channels=[0, 5, 6, 31, *range(10, 14)], neurons=[1, 7, 46, 47], groups=range(groups // 2))
    student = narrower(model, WidthConfig(hidden=24, intermediate=44, heads=2), IDS)
    assert largest_difference(student, model) < 1e-5
    assert student.config.num_key_value_heads == groups // 2
    student.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(said(saved), said(student), rtol=0, atol=0)
    is_tied = saved.lm_head.weight is saved.model.embed_tokens.weight
    assert is_tied == model.config.tie_word_embeddings


def test_heads_that_make_no_whole_group_leave_each_alike():
    model = trained(
        "llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=48, head_dim=8
    ).double()
    student, seen = narrower(model, WidthConfig(heads=4), IDS), importance(model, IDS).heads
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (4, 2)
    with torch.no_grad():
        for layer, heads in zip(model.model.layers, seen.view(4, 2, 3), strict=True):
            least = [group * 3 + each for group, each in enumerate(heads.argmin(1).tolist())]
            layer.self_attn.o_proj.weight[:, _rows(least, 8)] = 0
    assert largest_difference(student, model) < 1e-5


def test_importance_is_a_mean_over_positions_and_a_norm_over_rows():
    model, given = tiny_model().eval(), {}
    ids = torch.arange(3, 27).view(2, 12)
    layer, last = model.model.layers[3], model.model.norm
    for name, part in {"neurons": layer.mlp.down_proj, "heads": layer.self_attn.o_proj}.items():
        part.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0].double()}))
    found = importance(model, ids)
    heads = given["heads"].view(2, 12, 4, 8).square().sum(-1).sqrt()
    torch.testing.assert_close(found.heads[3], heads.mean(1).square().sum(0).sqrt())
    torch.testing.assert_close(found.neurons[3], given["neurons"].abs().mean(1).square().sum(0).sqrt())
    with torch.no_grad():
        torch.nn.init.zeros_(last.weight)
        rest = importance(model, ids).hidden
        torch.nn.init.ones_(last.weight)
        states = model.model(input_ids=ids).last_hidden_state.double()
    torch.testing.assert_close(found.hidden - rest, states.abs().mean(1).square().sum(0).sqrt())


def test_a_run_makes_the_student_that_its_outline_tells_of_and_trains_it(raw_config, tmp_path):
    width = {"hidden": 24, "intermediate": 40, "heads": 2}
    raw = {**raw_config, "student": {"from": "teacher", "layers": 2, "width": width}}
    config = parse(raw, ["loss.weights={kd: 1, hidden: 1}"])
    assert parse(config.as_dict()) == config
    tokenizer = tokenizer_of(config)
    check_pair(config, tokenizer)
    prepared = tasks.prepare(config, tokenizer)
    teacher = tasks.load_teacher(config, prepared)
    layers = tasks.layers_for_student(config, teacher.model, prepared)
    one, other = (tasks.untrained_student(config, prepared, layers) for _ in range(2))
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    plan = outline(config, tasks.task_of(config))
    shapes = [
        {name: x.shape for name, x in each.state_dict().items()} for each in (one, plan.blank_student())
    ]
    assert shapes[0] == shapes[1]
    assert (one.config.hidden_size, one.config.head_dim, len(one.model.layers)) == (24, 8, 2)
    folder, beside = StudentFolder(tmp_path), {"tokenizer": tokenizer, "prepared": prepared}
    train(config, folder, student=one, teacher=teacher, **beside, stop_after=1)
    assert one.model.layers[0].mlp.up_proj.weight.ne(other.model.layers[0].mlp.up_proj.weight).any()
    assert read_metrics(folder)[0]["train/hidden_loss"] > 0
    named = parse(
        {**raw, "student": {"from": config.teacher.model, "width": width}}
    )  # of a model, all layers
    assert tasks.layers_for_student(named, None, prepared) == [0, 1, 2, 3]
    assert (
        own_config(named).to_dict() == tasks.untrained_student(named, prepared, [0, 1, 2, 3]).config.to_dict()
    )


@pytest.mark.parametrize(
    ("width", "words"),
    [
        ({"heads": 3}, "heads: found 3; the 4 share 2 key and value heads: choose a multiple of 2"),
        ({"hidden": 30}, "no llama of 30 channels and 4 heads; choose width.hidden a multiple of the heads"),
        ({"intermediate": 49}, "intermediate_size is to be 49, but is 48; choose 1 to 48"),
    ],
    ids=str,
)
def test_a_width_that_cannot_be_is_refused_before_anything_is_loaded(raw_config, width, words):
    config = parse({**raw_config, "student": {"from": "teacher", "width": width}})
    with pytest.raises(ModelError, match=words):
        check_pair(config, None)


def test_other_families_are_refused_by_name():
    with pytest.raises(ModelError, match="a gpt2 cannot be made narrower, only llama, mistral, qwen2, qwen3"):
        with_width(GPT2Config(), WidthConfig(hidden=8))
    assert with_width(config := GPT2Config(), None) is config


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"from": "teacher", "width": {}}, "student.width: found no size; set hidden, intermediate or heads"),
        ({"from": "teacher", "width": {"hiden": 8}}, "width.hiden: unknown key; did you mean 'hidden'"),
        ({"from": "config", "shape": "100m", "width": {"hidden": 8}}, "`width` are a model's"),
    ],
    ids=str,
)
def test_a_width_that_says_nothing_is_refused(raw_config, student, words):
    with pytest.raises(ConfigError, match=words):
        parse({**raw_config, "student": student})
