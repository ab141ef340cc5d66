import math

import numpy as np
import pytest
from made_predictions import softmax

from kdlib.config.run import parse
from kdlib.plots.softening import (
    chosen,
    message as softening_message,
    sizes,
    softened,
    softening,
    softening_figure,
    softening_of,
)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.7])
def test_entropy_and_tail_mass_are_those_of_a_plain_softmax(temperature):
    logits = np.random.default_rng(0).normal(0, 4, (5, 37)).astype(np.float32)
    top, ranked = sizes(37, 10), -np.sort(-logits, axis=-1)
    entropy, outside = softened(ranked, temperature, top)
    probs = softmax(ranked, temperature)
    assert entropy == pytest.approx(-(probs * np.log(probs)).sum(-1), rel=1e-5)
    assert outside == pytest.approx(
        np.stack([probs[:, k:].sum(-1) for k in top], axis=-1), rel=1e-4, abs=1e-12
    )
    assert (outside[:, -1] == 0).all()


def test_tokens_that_are_never_said_have_no_share():
    entropy, outside = softened(np.array([[1.0, 1.0, -np.inf, -np.inf]], dtype=np.float32), 2.0, [1, 2, 4])
    assert entropy == pytest.approx([math.log(2)])
    assert outside[0].tolist() == pytest.approx([0.5, 0, 0])


def test_sizes_are_powers_of_two_the_config_s_own_and_the_whole_vocabulary():
    assert sizes(300, 100) == [1, 2, 4, 8, 16, 32, 64, 100, 128, 256, 300]
    assert sizes(300, 1000)[-1] == 300
    assert sizes(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert sizes(1) == [1]


def test_the_message_states_the_median_and_names_a_top_k_that_holds_enough():
    table = {
        "sizes": [1, 2, 4],
        "rows": [
            {"temperature": 2.0, "entropy": [1, 1, 1], "outside": [[0.4, 0, 0], [0.5, 0.03, 0], [1, 1, 0]]}
        ],
    }
    assert (
        softening_message(table, 2.0)
        == "At T = 2 the top 2 hold 97 % of the teacher's mass, at the median token"
    )
    assert (
        softening_message(table, 2.0, 1)
        == "At T = 2 the top 1 hold 50 % of the teacher's mass, at the median token"
    )
    assert "the top 4 hold 100 %" in softening_message(table, 2.0, 1000)
    with pytest.raises(KeyError, match="T = 3 is not in the table"):
        softening_message(table, 3.0)


def test_a_top_k_beyond_the_vocabulary_is_all_of_it(predictions, raw_config):
    found = softening_of(predictions, parse(raw_config | {"loss": {"weights": {"kd": 1.0}, "top_k": 5000}}))
    assert found["top_k"] == 300
    assert "the top 300 hold 100 %" in softening_message(found["softening"], 2.0, found["top_k"])
    assert softening_figure(found["softening"], 2.0, 300)


def test_the_choice_is_the_config_s_as_training_begins(raw_config):
    def of(**loss):
        return chosen(parse(raw_config | {"loss": loss}))

    assert of(weights={"kd": 1.0}, temperature={"linear": [4, 1]}, top_k={"steps": {0: 64, 0.5: 16}}) == (
        4.0,
        64,
    )
    assert of(weights={"reverse_kl": 1.0, "contrastive": 1.0}, temperature={"reverse_kl": 3}) == (3.0, None)
    assert of(weights={"ce": 1.0}) == (2.0, None)


def test_softening_keeps_quartiles_over_the_tokens(predictions):
    (row,) = softening(predictions.ranked, [2.0], sizes(300))["rows"]
    probs = -np.sort(-softmax(predictions.logits["teacher"], 2.0), axis=-1)
    assert row["entropy"] == pytest.approx(
        np.percentile(-(probs * np.log(probs)).sum(-1), [25, 50, 75]), rel=1e-4
    )
    assert row["outside"][1][3] == pytest.approx(np.median(probs[:, 8:].sum(-1)), rel=1e-4)
