import math

import pytest
import torch
from test_losses_divergences import FAMILY, V, each, random_log_probs

from kdlib.losses.divergences import adaptive_kl, forward_kl
from kdlib.losses.subset import OnTopK, top_k_pair

STUDENT, TEACHER = random_log_probs(40, seed=0), random_log_probs(40, seed=1)


def test_the_pair_by_hand():
    teacher, student = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log(), torch.tensor([[0.4, 0.2, 0.3, 0.1]]).log()
    s, t = top_k_pair(student, teacher, 2)
    torch.testing.assert_close(t.exp(), torch.tensor([[0.5, 0.3, 0.2]]))
    torch.testing.assert_close(s.exp(), torch.tensor([[0.2, 0.1, 0.7]]))
    s, t = top_k_pair(student, teacher, 2, renormalise=True)
    torch.testing.assert_close(t.exp(), torch.tensor([[0.625, 0.375]]))
    torch.testing.assert_close(s.exp(), torch.tensor([[2 / 3, 1 / 3]]))


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
def test_gradcheck(renormalise):
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
