"""A student for other tokens than its teacher's: whose tokenizer is whose, and what it begins with."""

import pytest
import torch
from conftest import sentences, tiny_model
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, GPT2Config, GPT2LMHeadModel

from kdlib.config.run import parse
from kdlib.errors import ConfigError, ModelError
from kdlib.models.loading import load_tokenizer
from kdlib.students.student import (
    check_pair,
    outline,
    reembedded,
    spoken,
    teacher_tokenizer_of,
    tokenizer_of,
)
from kdlib.tasks import base as tasks
from kdlib.tokens.vocabulary import trained_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer(sentences(60), 280)


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def other_tokens(raw_config, folder):
    """The tiny experiment, whose student has other tokens and learns from text alone."""
    student = {**raw_config["student"], "tokenizer": folder}
    return {**raw_config, "student": student, "loss": {"weights": {"ce": 1.0}}}


def untied():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False)).eval()


@pytest.mark.parametrize("made", [tiny_model, untied], ids=["tied", "untied"])
def test_the_same_tokens_in_another_order_are_said_the_same(made, tokenizer):
    model, order = made().eval(), torch.randperm(300)[:280]
    student = reembedded(model, order[:, None].tolist(), tokenizer)
    ids = torch.randint(280, (2, 9))
    torch.testing.assert_close(student(ids).logits, model(order[ids]).logits[..., order])
    head, embedding = student.get_output_embeddings().weight, student.get_input_embeddings().weight
    assert (head is embedding) == (model.lm_head.weight is model.get_input_embeddings().weight)


def test_a_token_begins_as_the_mean_of_its_pieces_and_without_any_as_the_mean_of_all(tokenizer):
    model = tiny_model()
    rows = model.get_input_embeddings().weight
    cut = [[7], [3, 5, 5], []] + [[0]] * 277
    made = reembedded(model, cut, tokenizer).get_input_embeddings().weight
    torch.testing.assert_close(made[:3], torch.stack([rows[7], (rows[3] + 2 * rows[5]) / 3, rows.mean(0)]))


def test_it_speaks_by_the_tokenizers_special_tokens_and_is_the_same_when_it_is_loaded_again(
    tokenizer, tmp_path
):
    model = tiny_model()
    made = reembedded(model, [[number] for number in range(280)], tokenizer)
    made.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.arange(20)[None]
    for each in (made, loaded):
        assert each.config.vocab_size == 280
        for stated in (each.config, each.generation_config):
            assert (stated.bos_token_id, stated.eos_token_id, stated.pad_token_id) == (None, 0, 1)
    assert torch.equal(made(ids).logits, loaded(ids).logits)
    assert model.config.vocab_size == 300


def test_a_model_with_other_tables_of_tokens_is_refused(tokenizer):
    with pytest.raises(ModelError, match="gemma3n_text knows its tokens by vocab_size_per_layer_input"):
        spoken(Gemma3nTextConfig(), tokenizer)


def test_the_student_is_made_for_its_own_tokenizer(other_tokens, tokenizer):
    config = parse(other_tokens)
    student = tasks.untrained_student(config, None, [0, 3])
    teacher = AutoModelForCausalLM.from_pretrained(config.teacher.model)
    theirs = load_tokenizer(config.teacher.model)
    rows, kept = student.get_input_embeddings().weight, teacher.get_input_embeddings().weight
    assert (student.config.num_hidden_layers, len(rows)) == (2, 280)
    torch.testing.assert_close(rows[tokenizer.eos_token_id], kept[theirs.eos_token_id])
    ours, whole = tokenizer.get_vocab(), theirs.get_vocab()
    shared = [token for token in ours if token in whole]
    assert len(shared) > 256
    torch.testing.assert_close(rows[[ours[t] for t in shared]], kept[[whole[t] for t in shared]])
    assert outline(config, tasks.task_of(config)).student.vocab_size == 280


def test_each_reads_its_own_tokens_where_they_differ_and_the_teachers_where_not(
    other_tokens, raw_config, tokenizer
):
    apart, same = parse(other_tokens), parse(raw_config)
    named = parse(raw_config, {"student.tokenizer": raw_config["teacher"]["model"]})
    teachers = load_tokenizer(raw_config["teacher"]["model"]).get_vocab()
    assert tokenizer_of(apart).get_vocab() == tokenizer.get_vocab()
    assert teacher_tokenizer_of(apart).get_vocab() == teachers
    for config in (same, named):
        assert tokenizer_of(config).get_vocab() == teachers
        assert teacher_tokenizer_of(config) is None
    assert len(tasks.untrained_student(named, None, [0]).get_input_embeddings().weight) == 320


@pytest.mark.parametrize(
    "weights", [{"kd": 1.0}, {"ce": 1.0, "reverse_kl": 0.1}, {"ce": 1.0, "attention": 1}]
)
@pytest.mark.parametrize("section", ["loss", "baseline"])
def test_a_term_of_one_vocabulary_is_refused_with_the_four_of_two(other_tokens, section, weights):
    config = parse({**other_tokens, section: {"weights": weights}})
    (term,) = set(weights) - {"ce"}
    words = f"loss has {term}, which needs one vocabulary: weight one of span_kl, projected_kl, alm, uld"
    with pytest.raises(ModelError, match=words):
        check_pair(config, tokenizer_of(config))


def test_terms_that_read_no_vocabulary_go_with_two(other_tokens):
    config = parse(other_tokens, {"loss.weights.hidden": 0.1})
    check_pair(config, tokenizer_of(config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"student": {"from": "gpt2", "tokenizer": "x"}}, "`tokenizer` goes with .* a model has its own"),
        ({"task": "sequence-classification"}, "student.tokenizer: .* a classifier of the teacher's layers"),
    ],
)
def test_a_tokenizer_that_would_not_be_used_is_refused(other_tokens, changes, words):
    with pytest.raises(ConfigError, match=words):
        parse({**other_tokens, **changes})


def test_rows_have_both_sides_tokens_and_the_teachers_vocabulary(other_tokens, tokenizer):
    config = parse(other_tokens)
    prepared = tasks.prepare(config, tokenizer_of(config))
    theirs = load_tokenizer(config.teacher.model)
    assert (prepared.vocabulary, prepared.teacher_vocabulary) == (280, 300)
    for row in prepared.train.select(range(5)):
        assert tokenizer.decode(row["input_ids"]).replace("<|endoftext|>", "<eos>") == theirs.decode(
            row["teacher_input_ids"]
        )
    assert tasks.layers_for_student(config, tasks.load_teacher(config, prepared).model, prepared)


def test_the_teachers_rows_end_where_its_positions_do(other_tokens):
    assert teacher_tokenizer_of(parse(other_tokens)).model_max_length == 64
