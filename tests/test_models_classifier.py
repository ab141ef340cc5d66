"""Classifiers are loaded with their outputs in the order of the data's classes, matched by name; heads
that are not there are named.
"""

import json
from pathlib import Path

import pytest
import torch
from made_classifiers import KINDS, LABELS, classifier, permuted
from transformers import BertModel, LlamaForCausalLM, LlamaForSequenceClassification

from kdlib.errors import ModelError
from kdlib.models.classifier import load_classifier


def logits(model) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_follow_the_order_of_the_datas_classes_by_name(tmp_path, kind):
    folder = classifier(tmp_path / "model", kind)
    usual, other = load_classifier(folder, LABELS), load_classifier(folder, ["Weather", "tools", "animals"])
    torch.testing.assert_close(logits(other), logits(usual)[:, [2, 0, 1]])
    assert other.config.id2label == {0: "Weather", 1: "tools", 2: "animals"}
    assert not usual.training


def test_a_permuted_copy_says_the_same(tmp_path):
    folder = classifier(tmp_path / "model")
    other = permuted(folder, tmp_path / "permuted", [1, 2, 0])
    assert json.loads((Path(other) / "config.json").read_text())["id2label"]["0"] == "animals"
    torch.testing.assert_close(
        logits(load_classifier(other, LABELS)), logits(load_classifier(folder, LABELS))
    )


def test_outputs_without_names_are_taken_as_they_stand(tmp_path):
    folder = classifier(tmp_path / "model", labels=None)
    stored = LlamaForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(logits(load_classifier(folder, LABELS)), logits(stored))


def test_as_many_classes_of_other_names_are_refused(tmp_path):
    folder = classifier(tmp_path / "model", labels=["tools", "plants", "weather"])
    with pytest.raises(
        ModelError, match="its classes are tools, plants, weather; the data's animals is not among them"
    ):
        load_classifier(folder, LABELS)


def test_as_many_classes_of_other_names_are_no_start_for_a_student_whose_head_is_made_anew(tmp_path):
    folder = classifier(tmp_path / "model", labels=["good", "bad", "neither"])
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_classifier(folder, LABELS, untrained=True).score.weight)
    stored = LlamaForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2])
    assert not torch.allclose(heads[0], stored.score.weight)


@pytest.mark.parametrize("labels", [["tools", "animals"], [*LABELS, "plants"]], ids=["fewer", "more"])
def test_a_teacher_with_another_number_of_classes_has_nothing_to_teach_and_a_student_gets_a_new_head(
    tmp_path, labels
):
    folder = classifier(tmp_path / "model", labels=labels)
    with pytest.raises(ModelError, match="no trained head for the 3 classes .*teacher_stage"):
        load_classifier(folder, LABELS)
    assert logits(load_classifier(folder, LABELS, untrained=True)).shape == (2, 3)


def language_model(folder: Path, config) -> str:
    made = LlamaForCausalLM(config)
    made.save_pretrained(folder)
    return str(folder)


def test_a_language_model_is_no_teacher_and_gets_the_same_new_head_from_the_same_seed(tmp_path):
    classifier(tmp_path / "model")
    folder = language_model(
        tmp_path / "model", LlamaForSequenceClassification.from_pretrained(tmp_path / "model").config
    )
    with pytest.raises(ModelError, match="no trained head"):
        load_classifier(folder, LABELS)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(load_classifier(folder, LABELS, untrained=True).score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_an_encoder_without_a_pooler_gets_one_with_its_new_head(tmp_path):
    folder = classifier(tmp_path / "model", "bert", labels=["one", "two"])
    body = BertModel.from_pretrained(folder, add_pooling_layer=False)
    body.save_pretrained(folder)
    made = []
    for _ in range(2):
        torch.manual_seed(4)
        made.append(load_classifier(folder, LABELS, untrained=True))
    torch.testing.assert_close(logits(made[0]), logits(made[1]), rtol=0, atol=0)
    assert all(weight.isfinite().all() for weight in made[0].parameters())
    assert made[0].bert.pooler.dense.weight.std() > 0.01


@pytest.mark.parametrize("pad", [None, 7], ids=["no pad token", "another one"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_decoder_reads_the_last_token_before_the_tokenizers_padding(tmp_path, kind, pad):
    folder = classifier(tmp_path / "model", kind, pad=pad)
    model = load_classifier(folder, LABELS)
    assert model.config.pad_token_id == 0
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        together, alone = (
            model(input_ids=ids, attention_mask=mask).logits[1:],
            model(input_ids=ids[1:, :2]).logits,
        )
    torch.testing.assert_close(together, alone)


def test_loaded_and_saved_the_order_stays(tmp_path):
    folder = classifier(tmp_path / "model", labels=["weather", "tools", "animals"])
    model = load_classifier(folder, LABELS)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        logits(LlamaForSequenceClassification.from_pretrained(tmp_path / "saved")), logits(model)
    )
