"""Every divergence: by hand, its range, its zero, its limits, its gradient, what -inf does; and its top k."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from kdlib.losses.divergences import (
    adaptive_kl,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)
from kdlib.losses.terms import OnTopK, top_k_pair

V = 11
FAMILY = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd 0.5": generalized_jsd,
    "jsd 0.1": partial(generalized_jsd, beta=0.1),
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
}
BOUNDED = {
    name: FAMILY[name]
    for name in ("jsd 0.5", "jsd 0.1", "skewed_forward_kl", "skewed_reverse_kl", "total_variation")
}
each = pytest.mark.parametrize("divergence", FAMILY.values(), ids=FAMILY.keys())
each_bounded = pytest.mark.parametrize("divergence", BOUNDED.values(), ids=BOUNDED.keys())


def random_log_probs(n: int, *, seed: int, scale: float = 3.0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, V, generator=generator, dtype=torch.float64)).log_softmax(-1).to(dtype)


def kl_by_hand(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


T, S = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]
MIX = [0.375, 0.375, 0.25]
BY_HAND = {
    "forward_kl": kl_by_hand(T, S),
    "reverse_kl": kl_by_hand(S, T),
    "jsd 0.5": 2 * kl_by_hand(T, MIX) + 2 * kl_by_hand(S, MIX),
    "jsd 0.1": kl_by_hand(T, [0.275, 0.475, 0.25]) / 0.9 + kl_by_hand(S, [0.275, 0.475, 0.25]) / 0.1,
    "skewed_forward_kl": kl_by_hand(T, [0.275, 0.475, 0.25]),
    "skewed_reverse_kl": kl_by_hand(S, [0.475, 0.275, 0.25]),
    # the head is token 0, with half of the gap
    "adaptive_kl": 0.5 * kl_by_hand(T, S) + 0.5 * kl_by_hand(S, T),
    "total_variation": 0.25,
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_value_by_hand_on_three_tokens(name):
    student, teacher = (
        torch.tensor([S], dtype=torch.float64).log(),
        torch.tensor([T], dtype=torch.float64).log(),
    )
    assert FAMILY[name](student, teacher).item() == pytest.approx(BY_HAND[name], rel=1e-12)


@each
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
def test_zero_where_the_two_agree_and_positive_elsewhere(divergence, dtype, tolerance):
    student, teacher = random_log_probs(50, seed=0, dtype=dtype), random_log_probs(50, seed=1, dtype=dtype)
    assert divergence(teacher, teacher).abs().max() <= tolerance
    assert (divergence(student, teacher) > 0).all()


@each
def test_one_number_for_each_row_whatever_the_other_rows(divergence):
    student, teacher = random_log_probs(6, seed=0), random_log_probs(6, seed=1)
    whole = divergence(student, teacher)
    assert whole.shape == (6,)
    torch.testing.assert_close(
        divergence(student[[4, 2]], teacher[[4, 2]]), whole[[4, 2]], rtol=1e-14, atol=0
    )
    assert divergence(student[:0], teacher[:0]).shape == (0,)


# its share is taken as constant
@pytest.mark.parametrize("divergence", [f for f in FAMILY.values() if f is not adaptive_kl])
def test_gradcheck_against_finite_differences(divergence):
    logits, teacher = random_log_probs(3, seed=0), random_log_probs(3, seed=1)
    assert torch.autograd.gradcheck(lambda x: divergence(x.log_softmax(-1), teacher), logits.requires_grad_())


def test_the_adaptive_share_takes_no_gradient():
    student, teacher = random_log_probs(3, seed=0).requires_grad_(), random_log_probs(3, seed=1)
    (grad,) = torch.autograd.grad(adaptive_kl(student, teacher).sum(), student)
    forward, reverse = (
        torch.autograd.grad(f(student, teacher).sum(), student)[0] for f in (forward_kl, reverse_kl)
    )
    value, kl, rkl = (f(student, teacher) for f in (adaptive_kl, forward_kl, reverse_kl))
    share = ((value - rkl) / (kl - rkl)).detach()[:, None]
    torch.testing.assert_close(grad, share * forward + (1 - share) * reverse, rtol=1e-9, atol=1e-12)
    assert ((share >= 0) & (share <= 1)).all()


@each
def test_a_token_that_neither_says_costs_nothing_and_gives_no_nan(divergence):
    teacher = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    student = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log().requires_grad_()
    loss = divergence(student, teacher)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    without = divergence(student[:, :2].detach(), teacher[:, :2])
    torch.testing.assert_close(loss.detach(), without, rtol=1e-14, atol=0)


@each_bounded
@pytest.mark.parametrize("excluded_by", ["student", "teacher"])
def test_a_bounded_divergence_stays_finite_where_one_side_excludes_what_the_other_says(
    divergence, excluded_by
):
    one, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    student, teacher = (other, one) if excluded_by == "student" else (one, other)
    student = student.clone().requires_grad_()
    loss = divergence(student, teacher)
    loss.sum().backward()
    assert 0 < loss.item() < math.inf
    assert student.grad.isfinite().all()


def test_the_kls_are_infinite_where_what_one_side_says_is_excluded_by_the_other():
    everything, half = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert forward_kl(half, everything).item() == math.inf
    assert reverse_kl(everything, half).item() == math.inf
    assert forward_kl(everything, half).item() == pytest.approx(math.log(2))
    assert reverse_kl(half, everything).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("end", "limit"), [(0.0, forward_kl), (1.0, reverse_kl)])
def test_the_generalized_jsd_is_continuous_at_its_ends(end, limit):
    student, teacher = random_log_probs(20, seed=0), random_log_probs(20, seed=1)
    assert torch.equal(generalized_jsd(student, teacher, beta=end), limit(student, teacher))
    near = generalized_jsd(student, teacher, beta=abs(end - 1e-7))
    torch.testing.assert_close(near, limit(student, teacher), rtol=1e-3, atol=1e-4)


def test_the_generalized_jsd_is_the_papers_divided_by_beta_times_one_minus_beta():
    student, teacher, beta = random_log_probs(20, seed=0), random_log_probs(20, seed=1), 0.3
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    papers = beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta=beta), papers / (beta * (1 - beta)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("skewed", "plain"), [(skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)]
)
def test_a_skew_of_zero_is_the_plain_kl_and_one_of_alpha_is_bounded(skewed, plain):
    student, teacher = random_log_probs(50, seed=0, scale=30), random_log_probs(50, seed=1, scale=30)
    torch.testing.assert_close(skewed(student, teacher, alpha=0.0), plain(student, teacher))
    assert plain(student, teacher).max() > -math.log(0.1) >= skewed(student, teacher, alpha=0.1).max() - 1e-12


def test_total_variation_is_one_where_the_two_share_nothing():
    assert total_variation(torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()).item() == 1


@each
def test_vocabularies_of_different_size_are_refused(divergence):
    with pytest.raises(ValueError, match="one vocabulary"):
        divergence(*(torch.zeros(2, size).log_softmax(-1) for size in (3, 4)))


@each
@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        (lambda x: x + 5, "148.4"),
        (lambda x: x / 2, "sum to"),
        (lambda x: x.exp(), "sum to"),
        (lambda x: torch.full_like(x, -math.inf), "sum to 0"),
    ],
    ids=["raw logits", "divided by T afterwards", "probabilities", "nothing"],
)
def test_what_is_no_distribution_is_refused_by_name(divergence, mistake, found):
    student, teacher = random_log_probs(2, seed=0), random_log_probs(2, seed=1)
    for side, pair in (("student", (mistake(student), teacher)), ("teacher", (student, mistake(teacher)))):
        with pytest.raises(ValueError, match=rf"{side}: .*{found}.*log_softmax"):
            divergence(*pair)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounded_log_probs_and_those_of_a_batch_pass_as_distributions(divergence, dtype):
    student = torch.randn(2, 3, 50_000).log_softmax(-1).to(dtype)
    assert divergence(student, student.roll(1, 0)).shape == (2, 3)
    assert divergence(student[:, :0], student[:, :0]).shape == (2, 0)


STUDENT, TEACHER = random_log_probs(40, seed=0), random_log_probs(40, seed=1)


def test_the_pair_by_hand():
    of = partial(torch.tensor, dtype=torch.float64)
    teacher, student = of([[0.1, 0.5, 0.1, 0.3]]).log(), of([[0.4, 0.2, 0.3, 0.1]]).log()
    s, t = top_k_pair(student, teacher, 2)
    torch.testing.assert_close(t.exp(), of([[0.5, 0.3, 0.2]]))
    torch.testing.assert_close(s.exp(), of([[0.2, 0.1, 0.7]]))
    s, t = top_k_pair(student, teacher, 2, renormalise=True)
    torch.testing.assert_close(t.exp(), of([[0.625, 0.375]]))
    torch.testing.assert_close(s.exp(), of([[2 / 3, 1 / 3]]))


@pytest.mark.parametrize("renormalise", [False, True], ids=["bucket", "renormalised"])
@pytest.mark.parametrize("k", [1, 4, V - 1, V, V + 5])
def test_both_sides_are_distributions_again(k, renormalise):
    for part in top_k_pair(STUDENT, TEACHER, k, renormalise=renormalise):
        torch.testing.assert_close(part.exp().sum(-1), torch.ones(40, dtype=torch.float64))


@each
@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_zero_at_equality_and_never_below(divergence, k):
    assert OnTopK(divergence, k)(TEACHER, TEACHER).abs().max() < 1e-14
    assert (OnTopK(divergence, k)(STUDENT, TEACHER) > -1e-15).all()


@each
@pytest.mark.parametrize("k", [V, V + 1])
def test_all_of_the_vocabulary_is_the_full_divergence(divergence, k):
    torch.testing.assert_close(
        OnTopK(divergence, k)(STUDENT, TEACHER), divergence(STUDENT, TEACHER), rtol=1e-14, atol=0
    )


# no f-divergence
@pytest.mark.parametrize("divergence", [f for f in FAMILY.values() if f is not adaptive_kl])
def test_the_bucket_never_exceeds_the_full_divergence_and_rises_with_k(divergence):
    values = [OnTopK(divergence, k)(STUDENT, TEACHER) for k in range(1, V + 1)]
    for fewer, more in zip(values, values[1:], strict=False):
        assert (fewer <= more + 1e-12).all()


def test_a_student_with_its_mass_outside_pays_in_the_bucket_and_nothing_renormalised():
    teacher = torch.tensor([[0.6, 0.3, 0.05, 0.05]], dtype=torch.float64).log()
    student = torch.tensor([[0.006, 0.003, 0.9, 0.091]], dtype=torch.float64).log()
    assert OnTopK(forward_kl, 2)(student, teacher).item() > 3
    assert OnTopK(forward_kl, 2, renormalise=True)(student, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("renormalise", [False, True], ids=["bucket", "renormalised"])
def test_gradcheck_on_the_top_k(renormalise):
    divergence = OnTopK(forward_kl, 3, renormalise=renormalise)
    logits = random_log_probs(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x.log_softmax(-1), TEACHER[:3]), logits)


def test_a_teacher_with_nothing_outside_its_top_k_gives_no_nan():
    teacher = torch.tensor([[0.7, 0.3, 0.0, 0.0]], dtype=torch.float64).log()
    for rest in (0.0, 0.1):
        student = torch.tensor([[0.5, 0.5 - rest, rest, 0.0]], dtype=torch.float64).log().requires_grad_()
        loss = OnTopK(forward_kl, 2)(student, teacher)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert student.grad.isfinite().all()


def test_no_token_at_all_is_refused():
    with pytest.raises(ValueError, match="needs 1 or more"):
        top_k_pair(STUDENT, TEACHER, 0)


def test_a_tail_of_one_in_a_billion_keeps_its_digits():
    teacher = torch.tensor([[0.0, -1.0, -25.0, -26.0]]).log_softmax(-1)
    tail = top_k_pair(teacher, teacher, 2)[1][0, -1].item()
    exact = (
        torch.tensor([0.0, -1.0, -25.0, -26.0], dtype=torch.float64)
        .log_softmax(-1)[2:]
        .exp()
        .sum()
        .log()
        .item()
    )
    assert tail == pytest.approx(exact, rel=1e-6)
    assert math.isfinite(tail)
