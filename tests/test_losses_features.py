"""Feature terms: values by hand, what they ignore, and that nothing is asked of the models while their
weight is 0.
"""

import math

import pytest
import torch
from conftest import tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from kdlib.errors import ModelError
from kdlib.losses.features import (
    FEATURE_TERMS,
    attention_divergence,
    contrastive_loss,
    hidden_distance,
    layer_pairs,
    projections,
    relational_distance,
)
from kdlib.losses.objective import Objective, ledger
from kdlib.losses.signals import DenseSignal, Features
from kdlib.models.hooks import attend_eagerly, captured_layers
from kdlib.schedulers import constant


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(n: int, heads: int, length: int, seed: int = 0) -> torch.Tensor:
    """Causal-looking attention rows: a later position has an exact 0."""
    scores = 2 * states(n, heads, length, seed=seed)
    scores[..., -1] = -torch.inf
    return scores.softmax(-1)


def test_hidden_distance_by_hand():
    student, teacher = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 5.0], [2.0, 2.0]])
    # at right angles; the same way
    assert hidden_distance(student, teacher).tolist() == pytest.approx([2.0, 0.0], abs=1e-6)
    assert hidden_distance(student, teacher, normalise=False).tolist() == [(9 + 25) / 2, 1.0]


def test_attention_divergence_by_hand():
    student, teacher = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.5, 0.5]]])
    by_hand = 0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(0.5 / 0.05)
    assert attention_divergence(student, teacher).item() == pytest.approx(by_hand, rel=1e-6)


def test_fewer_heads_are_held_against_the_mean_of_the_teachers_at_their_place():
    teacher = maps(3, 6, 5)
    pooled = teacher.view(3, 2, 3, 5).mean(2)
    assert attention_divergence(pooled, teacher).abs().max() < 1e-12
    assert attention_divergence(maps(3, 4, 5), teacher).shape == (3,)


def test_relational_distance_by_hand():
    rows = torch.tensor([0, 0, 1])
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0], [3.0], [2.0]])
    # cosines 0 and 1; alone
    assert relational_distance(student, teacher, rows).tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)


def test_contrastive_loss_by_hand():
    rows, eye = torch.tensor([0, 0, 4]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    expected = math.log(1 + math.exp(-2))  # cosines 1 and 0 at T = 0.5
    assert contrastive_loss(eye, eye, rows, temperature=0.5).tolist() == pytest.approx(
        [expected, expected, 0.0], abs=1e-6
    )


PER_PAIR = {
    "hidden": lambda s, t, rows: hidden_distance(s, t),
    "hidden, not normalised": lambda s, t, rows: hidden_distance(s, t, normalise=False),
    "relational": relational_distance,
    "contrastive": contrastive_loss,
    "attention": lambda s, t, rows: attention_divergence(s, t),
}
each = pytest.mark.parametrize("name", PER_PAIR)
ROWS = torch.tensor([0, 0, 0, 2, 2])


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        (maps(5, 2, 6), maps(5, 2, 6, seed=1))
        if name == "attention"
        else (states(5, 4), states(5, 4, seed=1))
    )


@each
def test_zero_at_equality_and_positive_elsewhere(name):
    student, teacher = inputs(name)
    assert name == "contrastive" or PER_PAIR[name](teacher, teacher, ROWS).abs().max() < 1e-12
    assert (PER_PAIR[name](student, teacher, ROWS) > 0).all()


@each
def test_a_row_does_not_see_the_other_rows(name):
    """So any cut into micro-batches gives the same sums."""
    student, teacher = inputs(name)
    whole = PER_PAIR[name](student, teacher, ROWS)
    parts = torch.cat(
        [PER_PAIR[name](student[rows], teacher[rows], ROWS[rows]) for rows in (slice(0, 3), slice(3, 5))]
    )
    torch.testing.assert_close(whole, parts, rtol=1e-14, atol=0)
    assert PER_PAIR[name](student[:0], teacher[:0], ROWS[:0]).shape == (0,)


@each
def test_gradcheck(name):
    student, teacher = inputs(name)
    if name == "attention":
        assert torch.autograd.gradcheck(
            lambda x: attention_divergence(torch.cat([x.softmax(-1), 0 * x[..., :1]], -1), teacher),
            states(5, 2, 5).requires_grad_(),
        )
    else:
        assert torch.autograd.gradcheck(lambda x: PER_PAIR[name](x, teacher, ROWS), student.requires_grad_())


@each
def test_half_precision_is_summed_in_float32(name):
    student, teacher = inputs(name)
    low = PER_PAIR[name](student.bfloat16(), teacher.bfloat16(), ROWS)
    assert low.dtype is torch.float32
    torch.testing.assert_close(low.double(), PER_PAIR[name](student, teacher, ROWS), rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("spec", "pairs"),
    [("even", [(0, 2), (1, 5)]), ({"last": 1}, [(1, 5)]), ([[0, 0], [1, 4]], [(0, 0), (1, 4)])],
    ids=["even", "last", "given"],
)
def test_layer_maps(spec, pairs):
    assert layer_pairs(spec, 2, 6) == pairs


@pytest.mark.parametrize("ours", range(1, 13))
@pytest.mark.parametrize("theirs", range(1, 13))
def test_even_pairs_exist_rise_end_at_the_last_and_lie_at_the_same_depth(ours, theirs):
    pairs = layer_pairs("even", ours, theirs)
    assert [student for student, _ in pairs] == list(range(ours))
    layers = [teacher for _, teacher in pairs]
    assert layers[0] >= 0
    assert layers == sorted(layers)
    assert layers[-1] == theirs - 1
    for student, teacher in pairs:  # half a layer of the teacher apart at most, but for its first
        apart = (teacher + 1) / theirs - (student + 1) / ours
        assert abs(apart) <= 0.5 / theirs + 1e-9 or teacher == 0


@pytest.mark.parametrize("spec", [{"last": 3}, [[0, 6]], [[2, 0]]])
def test_a_layer_that_is_not_there_is_refused(spec):
    with pytest.raises(ValueError, match="the student has layers 0 to 1, the teacher 0 to 5"):
        layer_pairs(spec, 2, 6)


def test_a_projection_is_made_only_where_sizes_differ():
    assert projections([(0, 1)], 4, 4) is None
    assert [tuple(matrix.weight.shape) for matrix in projections([(0, 1), (1, 3)], 4, 6)] == [(6, 4)] * 2


def test_a_feature_term_is_normalised_and_written_as_every_term_is():
    at = Objective(
        {"hidden": constant(0.5), "contrastive": constant(0.1), "ce": constant(1.0)}, constant(2.0)
    ).at(0)
    assert at.formula == "loss = 0.5·hidden(even, normalised) + 0.1·contrastive(even; T=0.1) + 1·CE"
    assert (at.needs_hidden, at.needs_attention) == (True, False)
    student, teacher = ([states(5, 4, seed=i) for i in range(k, k + 2)] for k in (0, 2))
    ours, theirs = Features(ROWS, student, projected=student), Features(ROWS, teacher)
    logits = states(5, 7)
    book = ledger(
        DenseSignal(logits, ours),
        DenseSignal(logits, theirs),
        torch.zeros(5, dtype=torch.long),
        at=at,
        count=10,
    )
    hidden = sum(hidden_distance(s, t).sum() for s, t in zip(student, teacher, strict=True)) / 2
    assert book.entries["hidden"].share.item() == pytest.approx(0.5 * hidden.item() / 10)
    assert list(book.entries) == ["hidden", "contrastive", "ce"]


def test_what_is_not_weighted_is_not_asked_for():
    at = Objective({name: constant(0.0) for name in FEATURE_TERMS} | {"ce": constant(1.0)}).at(0)
    assert (at.needs_hidden, at.needs_attention, at.needs_teacher) == (False, False, False)
    logits = DenseSignal(states(5, 7))
    assert list(ledger(logits, None, torch.zeros(5, dtype=torch.long), at=at, count=5).entries) == ["ce"]


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_positions=16, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2], ids=["llama", "gpt2"])
def test_hooks_give_what_the_model_itself_would_show(make):
    model, ids = make().eval(), torch.arange(7)[None]
    with captured_layers(model, [0, 2], hidden=True, attention=False) as captured, torch.no_grad():
        model(input_ids=ids)
    attend_eagerly(model, True)
    with captured_layers(model, [1], hidden=False, attention=True) as maps_only, torch.no_grad():
        model(input_ids=ids)
    assert not any(module._forward_hooks for module in model.modules())
    shown = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(captured.hidden[0], shown.hidden_states[1], rtol=1e-5, atol=1e-5)
    assert list(captured.hidden) == [0, 2]
    assert captured.attention == maps_only.hidden == {}
    assert torch.equal(maps_only.attention[1], shown.attentions[1])
    attend_eagerly(model, False)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_a_list_of_layers_can_be_heard_where_nothing_inside_is_asked_for():
    with captured_layers(torch.nn.Linear(2, 2), [0], hidden=False, attention=False) as captured:
        pass
    assert captured.hidden == captured.attention == {}


def test_a_model_that_shows_no_maps_is_refused():
    model = tiny_model()
    with (
        pytest.raises(ModelError, match=r"sdpa attention shows no attention maps in layers \[0\]"),
        captured_layers(model, [0], hidden=False, attention=True),
        torch.no_grad(),
    ):
        model(input_ids=torch.arange(4)[None])
