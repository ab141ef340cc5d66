"""A model that reads the token that it is to predict is refused before anything is made of its figures."""

import pytest
import torch
from tiny_architectures import every, tiny
from tiny_training import pieces

from kdlib.config.run import parse
from kdlib.diagnostics import parity
from kdlib.diagnostics.doctor import diagnose
from kdlib.errors import ModelError
from kdlib.models.heads import ahead_by_rounding, check_causal, head_form, look_ahead
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.models.teacher import LiveTeacher, form_error
from kdlib.runs.files import StudentFolder
from kdlib.tasks import base as tasks
from kdlib.training.run import train

IDS = torch.arange(3, 30)[None]
AHEAD = {
    "bert": {"is_decoder": False},
    "roberta": {"is_decoder": False},
    "xlnet": {},
    "xlm": {"causal": False},
    "cpmant": {},
    "gemma3_text": {"use_bidirectional_attention": True},
    "gemma4_text": {"use_bidirectional_attention": "all"},
    "llama": {"is_causal": False},
}
# windows, experts, recurrence, dropout, hashing, chunks; and what looks ahead if it may
CAUSAL = (
    "gpt2",
    "mistral",
    "mixtral",
    "qwen3_next",
    "mamba",
    "recurrent_gemma",
    "reformer",
    "llama4_text",
    "bert",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AHEAD)
def test_a_model_that_looks_ahead_is_refused_by_name_with_what_to_do(name, dtype):
    setting = next(iter(AHEAD[name]), "name a causal language model")
    with pytest.raises(ModelError, match=rf"mine looks ahead: another last token .*{setting}"):
        check_causal("mine", tiny(name, **AHEAD[name]).to(dtype), IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_passes(name, dtype):
    model = tiny(name).to(dtype).train()
    assert check_causal("mine", model, IDS) < ahead_by_rounding(model) / 10
    assert model.training


def test_rows_of_one_token_or_one_word_are_enough():
    for ids in ([[5]], [[5, 5, 5]], [[0, 0]]):
        assert look_ahead(tiny("gpt2"), torch.tensor(ids)) == 0
        assert look_ahead(tiny("bert", is_decoder=False), torch.tensor(ids)) > 1e-4


@pytest.fixture
def encoder(teacher_folder, tmp_path) -> str:
    """A BERT that reads both ways, with the tiny teacher's tokenizer."""
    folder = tmp_path / "encoder"
    tiny("bert", is_decoder=False, vocab_size=320).save_pretrained(folder)
    load_tokenizer(str(teacher_folder)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_nothing_is_trained_tested_or_compared_with_a_model_that_looks_ahead(
    raw_config, encoder, tmp_path, who
):
    settings = {"teacher": {"model": encoder}} if who == "teacher" else {"student": {"from": encoder}}
    config, folder = parse({**raw_config, **settings}), StudentFolder(tmp_path / "run")
    made = pieces(config)
    for ask in (lambda: train(config, folder, **made), lambda: parity.parity(config, **made)):
        with pytest.raises(ModelError, match=rf"the {who} .*encoder looks ahead"):
            ask()
    assert not folder.metrics.exists()
    (found,) = (each for each in diagnose(config) if "another last token" in each.what)
    assert (found.severity, found.where.split(".")[0]) == ("critical", who)
    compared = tasks.task_of(config).comparison(config, made["prepared"], made["tokenizer"])
    asked = LiveTeacher(load_model(encoder), 300)
    with pytest.raises(ModelError, match="mine looks ahead"):
        compared.add("mine", asked, made["prepared"])


@pytest.mark.slow
def test_every_causal_architecture_passes_and_has_its_logits_by_the_chunk():
    """Of transformers' whole list, what can be made tiny: 150 of 189 and more."""
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    batch, tried, dense = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0, []
    for name, model in every():
        if isinstance(model, Exception) or name in ("xlnet", "xlm", "cpmant"):
            continue
        tried += 1
        assert look_ahead(model, ids) < 1e-6, name
        form = head_form(model)
        dense += [name] if form is None else []
        assert form is None or form_error(model, batch, vocabulary=90, form=form) < 0.1, name
    assert tried > 140
    assert dense == ["prophetnet"]
