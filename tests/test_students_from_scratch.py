"""Students that have learned nothing yet: their sizes, their tokens, and what is refused."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdlib.config.run import parse
from kdlib.errors import ConfigError, ModelError
from kdlib.models.loading import parameters
from kdlib.students.scratch import llama_of
from kdlib.students.student import own_config
from kdlib.tasks import base as tasks


def sized(count: float, vocabulary: int) -> int:
    sizes = {**llama_of(count, vocabulary), "vocab_size": vocabulary, "tie_word_embeddings": True}
    with torch.device("meta"):
        return parameters(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)))


@pytest.mark.parametrize("vocabulary", [8_000, 32_016, 49_152, 151_936, 262_144])
@pytest.mark.parametrize("count", [100e6, 350e6, 1e9])
def test_a_shape_has_the_parameters_that_are_asked_for(count, vocabulary):
    assert sized(count, vocabulary) == pytest.approx(count, rel=0.05)


def test_a_vocabulary_that_leaves_no_room_for_layers_is_refused():
    with pytest.raises(ModelError, match="found 10m parameters, of which 151,936 tokens leave none"):
        llama_of(10e6, 151_936)


@pytest.fixture
def from_scratch(raw_config):
    def made(**student):
        return parse({**raw_config, "student": {"from": "config", **student}})

    return made


SMALL = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}


def test_a_student_from_scratch_speaks_the_teachers_tokens_and_is_the_same_each_time(from_scratch):
    config = from_scratch(shape={**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2})
    teacher, own = AutoConfig.from_pretrained(config.teacher.model), own_config(config)
    assert (own.hidden_size, own.eos_token_id) == (32, teacher.eos_token_id)
    assert own.vocab_size <= teacher.vocab_size
    one, other = (tasks.untrained_student(config, None, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    another = tasks.untrained_student(config.model_copy(update={"seed": config.seed + 1}), None, None)
    assert not torch.equal(one.get_input_embeddings().weight, another.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (
            {"model_type": "llama", "hidden_sise": 32},
            "student.shape.hidden_sise: a llama has no such setting.*hidden_size",
        ),
        ({"model_type": "lama"}, "transformers makes no such lama"),
        ({"model_type": "llama", "hidden_size": "wide"}, "transformers makes no such llama"),
    ],
)
def test_settings_that_no_model_has_are_refused(from_scratch, shape, words):
    with pytest.raises(ModelError, match=words):
        own_config(from_scratch(shape=shape))


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ({"from": "config"}, "needs `shape: 100m`"),
        ({"from": "config", "shape": "huge"}, "found 'huge'; it is a count of parameters, as 100m"),
        ({"from": "config", "shape": {"hidden_size": 3}}, "it is a count of parameters"),
        ({"from": "teacher", "layers": 1, "shape": "100m"}, "`shape` goes with `from: config` only"),
        ({"from": "config", "shape": "100m", "layers": 2}, "`layers`, `keep` and `width` are a model's"),
    ],
)
def test_a_student_is_one_thing(raw_config, student, words):
    with pytest.raises(ConfigError, match=words):
        parse({**raw_config, "student": student})
