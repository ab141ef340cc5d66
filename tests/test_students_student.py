import shutil

import pytest
import torch
from conftest import sentences, tiny_model, tiny_tokenizer
from transformers import (
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    XLNetConfig,
)

from kdlib.config.run import parse
from kdlib.data.batches import calibration_rows
from kdlib.diagnostics.context import Context
from kdlib.errors import ModelError
from kdlib.models.loading import load_tokenizer, positions_of
from kdlib.students.depth import layer_influence
from kdlib.students.student import check_pair, chosen_layers, outline, own_config, tokenizer_of
from kdlib.tasks import base as tasks


def config(raw, **student):
    return parse({**raw, "student": {"from": "teacher", **student}})


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"layers": 2, "keep": "first"}, [0, 1]),
        ({"layers": 2, "keep": "even"}, [0, 3]),
        ({"layers": 3, "keep": "even"}, [0, 2, 3]),
        ({"keep": [1, 3]}, [1, 3]),
    ],
)
def test_layers_are_chosen_as_the_config_says(raw_config, student, expected):
    assert chosen_layers(config(raw_config, **student), tiny_model(), torch.arange(8)[None]) == expected


def test_influence_keeps_the_layers_that_turn_the_stream():
    model = tiny_model()
    for layer in (1, 2):  # a layer that adds nothing to the stream has no influence
        for weights in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
            torch.nn.init.zeros_(weights.weight)
    influence = layer_influence(model, torch.arange(16)[None])
    assert influence.shape == (4,)
    assert influence[[1, 2]].abs().max() < 1e-6 < influence[[0, 3]].min()


def test_a_last_layer_that_does_nothing_has_no_influence_whatever_the_final_norm():
    model = tiny_model()
    for weights in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
        torch.nn.init.zeros_(weights.weight)
    torch.nn.init.normal_(model.model.norm.weight)
    assert layer_influence(model, torch.arange(16)[None])[3] < 1e-6


@pytest.mark.parametrize("keep", [[0, 9], [2, 1], [1, 1], [-1, 0]])
def test_layers_that_the_teacher_lacks_are_refused(raw_config, keep):
    with pytest.raises(ModelError, match="rising layer numbers"):
        chosen_layers(config(raw_config, keep=keep), tiny_model(), torch.arange(8)[None])


def test_rows_longer_than_a_models_positions_are_refused(raw_config, teacher_folder):
    with pytest.raises(ModelError, match="data.max_length is 128, but .* has 64 positions"):
        check_pair(parse(raw_config, ["data.max_length=128"]), load_tokenizer(str(teacher_folder)))


def test_different_tokenizers_are_refused_with_the_way_out(raw_config, teacher_folder, tmp_path):
    other = tmp_path / "other"
    tiny_tokenizer(sentences(50, seed=9), size=290).save_pretrained(other)
    tiny_model().save_pretrained(other)
    pair = parse({**raw_config, "student": {"from": str(other)}})
    words = r"different vocabularies: \d+ tokens differ.*kd, which needs one vocabulary: .* span_kl"
    with pytest.raises(ModelError, match=words):
        check_pair(pair, tokenizer_of(pair))


def test_a_folder_that_is_called_teacher_is_a_model_like_any_other(
    raw_config, teacher_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_folder, "teacher")
    named = parse({**raw_config, "teacher": {"model": "teacher"}})
    check_pair(named, load_tokenizer("teacher"))
    with pytest.raises(ModelError, match="but the teacher has 4"):
        check_pair(parse({**raw_config, "teacher": {"model": "teacher"}}, ["student.layers=9"]), None)


@pytest.mark.parametrize("keep", ["even", "first", "influence", [0, 3]], ids=str)
def test_a_student_may_be_some_layers_of_another_model(raw_config, teacher_folder, tmp_path, keep):
    folder = str(tmp_path / "other")
    model = tiny_model(seed=7)
    model.save_pretrained(folder)
    load_tokenizer(str(teacher_folder)).save_pretrained(folder)
    shape = {} if isinstance(keep, list) else {"layers": 2}
    named = parse({**raw_config, "student": {"from": folder, "keep": keep, **shape}})
    assert parse(named.as_dict()) == named
    check_pair(named, tokenizer_of(named))
    prepared = tasks.prepare(named, tokenizer_of(named))
    layers = tasks.layers_for_student(named, None, prepared)
    student = tasks.untrained_student(named, prepared, layers)
    asked = calibration_rows(prepared.train, reads="")
    wanted = sorted(layer_influence(model, asked).topk(2).indices.tolist())
    assert layers == {"even": [0, 3], "first": [0, 1], "influence": wanted}.get(str(keep), keep)
    for new, old in enumerate(layers):
        kept, was = student.model.layers[new].state_dict(), model.model.layers[old].state_dict()
        assert all(torch.equal(kept[name], was[name]) for name in was)
    plan = outline(named, tasks.task_of(named))
    assert (plan.layers, own_config(named).num_hidden_layers) == ((2, 4), 2)
    assert any("seen on text" in note for note in plan.notes) == (keep == "influence")
    made = Context(named).student
    assert all(map(torch.equal, made.cpu().parameters(), student.parameters()))


def test_layers_that_a_named_model_lacks_are_refused_by_its_name(raw_config, teacher_folder):
    named = parse({**raw_config, "student": {"from": str(teacher_folder), "layers": 9}})
    with pytest.raises(ModelError, match=f"student.layers is 9, but {teacher_folder} has 4; choose 1 to 4"):
        check_pair(named, tokenizer_of(named))


POSITIONS = [
    (LlamaConfig(max_position_embeddings=64), 64),
    (GPT2Config(n_positions=32), 32),
    (MptConfig(max_seq_len=48), 48),
    (XLNetConfig(), None),
    (BloomConfig(), None),
    (OPTConfig(max_position_embeddings=40), 40),
    (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
    (Gemma3Config(text_config={"max_position_embeddings": 128}), 128),
]


@pytest.mark.parametrize(("stated", "expected"), POSITIONS, ids=lambda each: type(each).__name__)
def test_a_models_longest_row_is_found_by_whatever_name_it_has(stated, expected):
    assert positions_of(stated) == expected
