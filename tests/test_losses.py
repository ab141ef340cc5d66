"""Loss terms and their two evaluations, against values by hand and references written here."""

import pytest
import torch
from torch import Tensor

from kdlib.losses.divergences import generalized_jsd, reverse_kl
from kdlib.losses.linear import term_sums, token_values
from kdlib.losses.subset import on_top_k
from kdlib.objective import agreement, cross_entropy, soft_target_loss
from kdlib.signals import DenseSignal, LinearSignal

V = 11


def random_log_probs(n: int, *, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, V, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_the_soft_target_loss_is_T_squared_times_the_kl_of_the_softened_distributions():
    student, teacher = random_log_probs(5, seed=0), random_log_probs(5, seed=1)
    expected = 9 * (lambda s, t: (t.exp() * (t - s)).sum(-1))((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1))
    torch.testing.assert_close(soft_target_loss(3.0)(student, teacher, None), expected, rtol=1e-12, atol=0)


def test_the_gradient_keeps_its_size_when_the_temperature_moves():
    """Hinton's reason for T squared: at high T the gradient tends to a limit instead of vanishing as 1 / T^2."""
    sizes = []
    for temperature in (20.0, 40.0):
        student = random_log_probs(5, seed=0).requires_grad_()
        soft_target_loss(temperature)(student, random_log_probs(5, seed=1), None).sum().backward()
        sizes.append(student.grad.norm())
    assert sizes[1] / sizes[0] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("function", [soft_target_loss(2.0), cross_entropy], ids=["kd", "ce"])
def test_a_constant_added_to_the_logits_changes_nothing(function):
    student, teacher, targets = random_log_probs(5, seed=0), random_log_probs(5, seed=1), torch.arange(5)
    torch.testing.assert_close(function(student + 7.5, teacher - 3, targets), function(student, teacher, targets))


def test_half_precision_logits_are_summed_in_float32():
    student, teacher = random_log_probs(8, seed=0), random_log_probs(8, seed=1)
    low = soft_target_loss(2.0)(student.bfloat16(), teacher.bfloat16(), None)
    assert low.dtype is torch.float32
    torch.testing.assert_close(low, soft_target_loss(2.0)(student, teacher, None).float(), rtol=1e-2, atol=1e-2)


def linear_case(n: int = 10, h: int = 5, dtype=torch.float64, bias: bool = False):
    torch.manual_seed(0)
    parts = [torch.randn(n, h, dtype=dtype), torch.randn(V, h, dtype=dtype)] + ([torch.randn(V, dtype=dtype)] if bias else [])
    teacher = LinearSignal(torch.randn(n, 3, dtype=dtype), torch.randn(V, 3, dtype=dtype))
    return [part.requires_grad_() for part in parts], teacher, torch.randint(V, (n,))


FUNCTIONS, WEIGHTS = [soft_target_loss(2.0), cross_entropy], [0.7, 0.3]


@pytest.mark.parametrize("divergence", [reverse_kl, generalized_jsd, on_top_k(reverse_kl, 4)], ids=["reverse_kl", "jsd", "top-4"])
def test_any_divergence_is_chunked_as_the_forward_kl_is(divergence):
    (hidden, weight), teacher, targets = linear_case()
    functions = [soft_target_loss(2.0, divergence), cross_entropy]
    dense = term_sums(DenseSignal(hidden @ weight.T), teacher, targets, functions=functions, weights=WEIGHTS)
    chunked = term_sums(LinearSignal(hidden, weight), teacher, targets, functions=functions, weights=WEIGHTS, chunk=3)
    combine = torch.tensor(WEIGHTS, dtype=torch.float64)
    grads = [torch.autograd.grad(sums @ combine, (hidden, weight)) for sums in (chunked, dense)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_chunked_equals_dense_in_value_and_gradient(chunk, bias, dtype, tolerance):
    parts, teacher, targets = linear_case(dtype=dtype, bias=bias)
    student = LinearSignal(*parts)
    dense = term_sums(DenseSignal(student.logits()), teacher, targets, functions=FUNCTIONS, weights=WEIGHTS)
    chunked = term_sums(student, teacher, targets, functions=FUNCTIONS, weights=WEIGHTS, chunk=chunk)
    torch.testing.assert_close(chunked, dense, rtol=tolerance, atol=tolerance)
    combine = torch.tensor(WEIGHTS, dtype=dtype) / 7
    expected = torch.autograd.grad(dense @ combine, parts)
    for ours, theirs in zip(torch.autograd.grad(chunked @ combine, parts), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_chunked_against_a_reference_written_out():
    (hidden, weight), teacher, targets = linear_case()
    s = (hidden @ weight.T).detach()
    t = teacher.hidden @ teacher.weight.T
    p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
    kd = 4 * (p * (p / q).log()).sum()
    ce = -s.softmax(-1)[range(10), targets].log().sum()
    sums = term_sums(LinearSignal(hidden, weight), teacher, targets, functions=FUNCTIONS, weights=WEIGHTS, chunk=4)
    torch.testing.assert_close(sums, torch.stack([kd, ce]), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(sums @ torch.tensor(WEIGHTS, dtype=torch.float64), hidden)
    one_hot = torch.nn.functional.one_hot(targets, V)
    by_hand = (0.7 * 2 * (q - p) + 0.3 * (s.softmax(-1) - one_hot)) @ weight  # T^2 / T = 2
    torch.testing.assert_close(grad, by_hand.detach(), rtol=1e-12, atol=1e-14)


def test_gradcheck_of_the_chunked_form():
    parts, teacher, targets = linear_case(n=4, h=3)

    def total(*inputs):
        sums = term_sums(LinearSignal(*inputs), teacher, targets, functions=FUNCTIONS, weights=WEIGHTS, chunk=3)
        return sums @ torch.tensor(WEIGHTS, dtype=torch.float64)

    assert torch.autograd.gradcheck(total, parts)


def test_sums_combined_with_other_weights_are_refused_on_backward():
    parts, teacher, targets = linear_case()
    sums = term_sums(LinearSignal(*parts), teacher, targets, functions=FUNCTIONS, weights=WEIGHTS)
    with pytest.raises(RuntimeError, match="back-propagate Ledger.total"):
        sums[0].backward()


def test_under_autocast_the_chunks_are_multiplied_in_bfloat16_and_summed_in_float32():
    parts, teacher, targets = linear_case(n=40, h=16, dtype=torch.float32)
    exact = term_sums(LinearSignal(*parts), teacher, targets, functions=FUNCTIONS, weights=WEIGHTS, chunk=8)
    exact_grads = torch.autograd.grad(exact @ torch.tensor(WEIGHTS), parts)
    with torch.autocast("cpu", torch.bfloat16):
        low = term_sums(LinearSignal(*parts), teacher, targets, functions=FUNCTIONS, weights=WEIGHTS, chunk=8)
    assert low.dtype is torch.float32
    torch.testing.assert_close(low, exact, rtol=1e-2, atol=0)
    for ours, theirs in zip(torch.autograd.grad(low @ torch.tensor(WEIGHTS), parts), exact_grads, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs():
    (hidden, weight), teacher, targets = linear_case()
    sums = term_sums(LinearSignal(hidden, weight.detach()), teacher, targets, functions=FUNCTIONS, weights=WEIGHTS, chunk=4)
    (sums @ torch.tensor(WEIGHTS, dtype=torch.float64)).backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("linear", [True, False], ids=["chunked", "dense"])
def test_nothing_kept_costs_nothing_and_gives_zero_gradient(linear):
    parts, _, _ = linear_case(n=0)
    student = LinearSignal(*parts) if linear else DenseSignal(LinearSignal(*parts).logits())
    teacher = LinearSignal(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(V, 3, dtype=torch.float64))
    sums = term_sums(student, teacher, torch.zeros(0, dtype=torch.long), functions=FUNCTIONS, weights=WEIGHTS)
    sums.sum().backward() if not linear else (sums @ torch.tensor(WEIGHTS, dtype=torch.float64)).backward()
    assert sums.tolist() == [0, 0]
    assert parts[1].grad.abs().sum() == 0


def test_agreement_and_values_come_token_by_token():
    logits = torch.eye(3)
    student, teacher = DenseSignal(logits), DenseSignal(logits.roll(1, 0))
    values = token_values(student, teacher, torch.tensor([0, 1, 0]), functions=[agreement, cross_entropy])
    assert values.shape == (2, 3)
    assert values[0].tolist() == [0, 0, 0]
    assert values[1, 0] == values[1, 1] < values[1, 2]
