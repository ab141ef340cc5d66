"""What was saved is loaded again before a training is called done, and is what was trained."""

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from tiny_architectures import tiny
from tiny_training import pieces
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from kdlib.config.run import parse
from kdlib.errors import RunError
from kdlib.models.loading import load_model, load_tokenizer
from kdlib.models.saved import settle_generation, special_tokens
from kdlib.runs.files import StudentFolder
from kdlib.students.depth import shallower
from kdlib.training.run import train
from kdlib.training.trainer import DistillationTrainer


@pytest.fixture
def tokenizer(teacher_folder):
    """300 tokens, of which <eos>, 0, is EOS and pad."""
    return load_tokenizer(str(teacher_folder))


@pytest.fixture
def reader_of_pad(tokenizer, tmp_path) -> str:
    """A model whose positions are counted from its pad token, 1, with a tokenizer that pads with 0."""
    folder = tmp_path / "roberta"
    model = tiny("roberta", vocab_size=320, pad_token_id=1)
    model.roberta.embeddings.position_embeddings.weight.data *= 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def trained(raw_config, folder, made=None, **settings):
    config = parse({**raw_config, **settings})
    return train(config, StudentFolder(folder), **{**pieces(config), **(made or {})})


def test_a_student_of_its_teachers_layers_keeps_its_stop_tokens_without_its_sampling_habits():
    teacher = tiny_model()
    teacher.generation_config = GenerationConfig(
        eos_token_id=[0, 5], pad_token_id=7, do_sample=True, temperature=0.6, top_p=0.9
    )
    made = shallower(teacher, [0, 3]).generation_config
    assert (made.eos_token_id, made.pad_token_id, made.bos_token_id) == ([0, 5], 7, 0)
    assert not made.do_sample
    assert made.temperature in (None, 1.0)


@pytest.mark.parametrize(
    ("own", "expected"),
    [(None, 0), (0, 0), ([0, 5], [0, 5]), (7, [0, 7]), ([7, 8], [0, 7, 8])],
)
def test_a_student_stops_at_its_own_tokens_and_at_the_tokenizers(tokenizer, own, expected):
    student = tiny_model()
    student.generation_config.eos_token_id, config = own, student.config.to_dict()
    said = settle_generation(student, tokenizer)
    assert student.generation_config.eos_token_id == expected
    assert said == (["it stops at the tokenizer's <eos> (0) too"] if expected not in (own, 0) else [])
    assert (student.generation_config.pad_token_id, student.config.to_dict()) == (0, config)


def test_a_generation_config_that_cannot_be_written_is_left_out_aloud(tokenizer, tmp_path):
    student = tiny_model()
    student.generation_config = GenerationConfig(eos_token_id=7, temperature=0.6, do_sample=False)
    assert "only the special tokens are kept" in settle_generation(student, tokenizer)[1]
    student.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 7]


def test_a_models_own_pad_token_stays_where_the_tokenizer_pads_with_another(
    raw_config, reader_of_pad, tmp_path
):
    trained(raw_config, tmp_path / "run", teacher={"model": reader_of_pad})
    for name in ("best_model", "final_model"):
        assert load_model(str(tmp_path / "run" / name)).config.pad_token_id == 1


def test_what_moves_it_in_training_is_found_and_nothing_is_lost(raw_config, reader_of_pad, tmp_path):
    class Mover(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **options):
            model.config.pad_token_id = 0

    run, how = StudentFolder(tmp_path / "run"), {"teacher": {"model": reader_of_pad}}
    with pytest.raises(RunError) as caught:
        trained(raw_config, run.path, {"callbacks": [Mover()]}, **how)
    found = str(caught.value)
    assert f"{run.final_model}: the student saved there is not the one that was trained" in found
    assert "its config pad_token_id is 0, and was 1" in found
    assert "its cross-entropy of the first held-out rows is" in found
    assert not run.is_trained
    assert run.best_model.exists()
    with pytest.raises(RunError, match="best_model: the student saved there"):
        trained(raw_config, run.path, **how)  # which a checkpoint has as it is
    shutil.rmtree(run.checkpoints)
    trained(raw_config, run.path, **how)
    assert run.is_trained


def test_a_pad_token_without_a_row_leaves_a_student_that_can_be_loaded(raw_config, tokenizer, tmp_path):
    folder = tmp_path / "teacher"
    tiny_model(vocabulary=300).save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == 300
    trained(raw_config, tmp_path / "run", teacher={"model": str(folder)})
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "best_model")
    assert saved.generation_config.pad_token_id in (None, 0)


def doubled(state):
    return {name: 2 * value if "down_proj" in name else value for name, value in state.items()}


def without_a_norm(state):
    return {name: value for name, value in state.items() if name != "model.norm.weight"}


@pytest.mark.parametrize(
    ("change", "found"), [(doubled, "its cross-entropy"), (without_a_norm, "1 of its weights: missing")]
)
@pytest.mark.parametrize("place", ["best_model", "final_model"])
def test_weights_that_are_not_the_trained_ones_are_an_error_that_names_the_folder(
    raw_config, tmp_path, monkeypatch, change, found, place
):
    right = DistillationTrainer.save_student

    def save(self, folder):
        if folder.name != place:
            return right(self, folder)
        usual = self.accelerator.get_state_dict
        with monkeypatch.context() as patch:
            patch.setattr(self.accelerator, "get_state_dict", lambda model: change(usual(model)))
            return right(self, folder)

    monkeypatch.setattr(DistillationTrainer, "save_student", save)
    with pytest.raises(RunError, match=rf"{place}: the student saved there .*\n  {found}"):
        trained(raw_config, tmp_path / "run")


def test_the_best_student_is_held_against_its_own_evaluation(raw_config, tmp_path):
    """An earlier one is the best here: ce pulls the student away from its teacher."""
    settings = {"learning_rate": 0.3, "eval_on_start": True, "metric_for_best_model": "kl_to_teacher"}
    run = trained(
        {**raw_config, "loss": {"weights": {"ce": 1.0}}},
        tmp_path / "run",
        training={**raw_config["training"], **settings},
    )
    lines = [line for line in run.state.log_history if "eval_loss" in line]
    best = min(lines, key=lambda line: line["eval_kl_to_teacher"])
    assert abs(best["first_rows_ce"] - lines[-1]["first_rows_ce"]) > 0.1


def test_special_tokens_are_read_from_both_configs(tokenizer):
    assert special_tokens(tiny_model())["generation config eos_token_id"] == 0
    assert len(special_tokens(tiny("llama"))) == 6
    json.dumps(special_tokens(tiny_model().to(torch.float16)))
