"""What the peers test of their losses, asked of ours, with float64 for the truth.

TRL (GKD: symmetry and ends of beta, temperature, labels, reduction, accumulation), Liger-Kernel (JSD, KL and
fused linear losses: ignored labels, shapes that fit no block, half precision, strides, large logits),
torchtune (KD losses: chunks, all labels ignored), DistillKit and transformers (masks, shift).  The
mathematics is theirs and ours; no code is.  Where they differ: TRL and Liger leave the JSD undivided by
beta (1 - beta), TRL with a jump to a KL at its ends; two of torchtune's six losses give nan on a batch
without a label, where ours give 0.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from kdlib.losses.buffers import Workspace
from kdlib.losses.divergences import KNOWN, chosen, forward_kl, generalized_jsd, reverse_kl
from kdlib.losses.objective import Objective, ledger
from kdlib.losses.signals import IGNORED, DenseSignal, LinearSignal, kept
from kdlib.losses.terms import log_probs
from kdlib.schedulers import constant

H = 6


def case(rows: int, length: int, vocabulary: int, *, dtype=torch.float64, scale: float = 1.0, seed: int = 0):
    """[B, T, H] states and heads of student and teacher, labels [B, T] with a prompt and padding ignored."""
    torch.manual_seed(seed)
    states = [torch.randn(rows, length, H, dtype=torch.float64).to(dtype) for _ in "st"]
    heads = [(scale * torch.randn(vocabulary, H, dtype=torch.float64)).to(dtype) for _ in "st"]
    labels = torch.randint(vocabulary, (rows, length))
    labels[:, : length // 4] = IGNORED
    labels[0, -1] = IGNORED
    return states, heads, labels


def cost(states, heads, labels, *, chunk=None, count=None, divergence="forward_kl", temperature=2.0):
    """The total and its gradients on the student's states and head."""
    tokens = kept(labels)
    hidden, head = states[0].detach().requires_grad_(), heads[0].detach().requires_grad_()
    student = LinearSignal(tokens.select(hidden), head)
    teacher = LinearSignal(tokens.select(states[1]), heads[1])
    if chunk is None:
        student = DenseSignal(student.logits())
    weights = {"kd": constant(0.7), "ce": constant(0.3)}
    at = Objective(weights, constant(temperature), divergence).at(0)
    count = len(tokens.targets) if count is None else count
    book = ledger(student, teacher, tokens.targets, at=at, count=count, workspace=Workspace(chunk))
    return (book.total.detach(), *torch.autograd.grad(book.total, [hidden, head]))


def by_hand(states, heads, labels, temperature=2.0) -> Tensor:
    """0.7 T^2 KL + 0.3 CE over tokens that are not ignored, shifted by one, in float64, plainly."""
    student, teacher = (
        (state.double() @ head.double().T)[:, :-1] for state, head in zip(states, heads, strict=True)
    )
    right, total, count = labels[:, 1:], 0.0, 0
    for row, place in product(range(len(right)), range(right.shape[1])):
        if right[row, place] == IGNORED:
            continue
        p, q = (logits[row, place].div(temperature).softmax(-1) for logits in (teacher, student))
        total += 0.7 * temperature**2 * (p * (p / q).log()).sum()
        total -= 0.3 * student[row, place].softmax(-1)[right[row, place]].log()
        count += 1
    return total / count


SHAPES = [(1, 3, 3), (3, 5, 7), (2, 9, 31), (4, 7, 127), (2, 17, 1009)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_any_shape_and_any_chunk_give_the_plain_sum_and_its_gradient(shape, chunk):
    """Liger's and torchtune's shapes: primes, one row, more and fewer tokens than a chunk."""
    given = case(*shape)
    dense, chunked = cost(*given), cost(*given, chunk=chunk)
    torch.testing.assert_close(dense[0], by_hand(*given), rtol=1e-12, atol=0)
    for one, other in zip(chunked, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 4])
def test_ignored_labels_cost_nothing_whatever_is_said_there(chunk):
    """TRL, Liger, DistillKit: another state, even a large one, at an ignored label changes nothing."""
    states, heads, labels = case(3, 8, 23)
    before = cost(states, heads, labels, chunk=chunk)
    others = [state.clone() for state in states]
    for state in others:
        state[:, 0] = 1e6  # predicts the second token, which is ignored
        state[0, -2] = -1e6
    labels = labels.clone()
    after = cost(others, heads, labels, chunk=chunk)
    torch.testing.assert_close(after[0], before[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(after[2], before[2], rtol=1e-12, atol=1e-15)
    assert (after[1][:, 0] == 0).all()


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("divergence", KNOWN)
def test_a_batch_without_a_label_costs_zero_and_its_gradient_is_zero(chunk, divergence):
    """Two of torchtune's losses give nan there."""
    states, heads, labels = case(2, 5, 11)
    found = cost(states, heads, torch.full_like(labels, IGNORED), chunk=chunk, count=0, divergence=divergence)
    assert all((each == 0).all() for each in found)


@pytest.mark.parametrize("chunk", [None, 4])
def test_batches_of_any_size_accumulated_are_one_batch(chunk):
    """TRL's and transformers' invariance: rows of unlike length, by the count of the whole step."""
    states, heads, labels = case(4, 9, 31)
    labels[1, 4:], labels[3, 2:] = IGNORED, IGNORED
    count = len(kept(labels).targets)
    whole = cost(states, heads, labels, chunk=chunk)
    for size in (1, 2, 3):
        parts = [slice(start, start + size) for start in range(0, 4, size)]
        each = [cost([s[p] for s in states], heads, labels[p], chunk=chunk, count=count) for p in parts]
        torch.testing.assert_close(sum(part[0] for part in each), whole[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(sum(part[2] for part in each), whole[2], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("factor", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("chunk", [None, 4])
def test_what_comes_after_scales_the_gradient(factor, chunk):
    """Liger's `not the last layer`: the loss is multiplied before it goes back."""
    states, heads, labels = case(2, 6, 13)
    tokens = kept(labels)
    at = Objective({"kd": constant(1.0)}, constant(1.0)).at(0)
    found = []
    for multiple in (1.0, factor):
        hidden = states[0].detach().requires_grad_()
        student = LinearSignal(tokens.select(hidden), heads[0])
        if chunk is None:
            student = DenseSignal(student.logits())
        teacher = LinearSignal(tokens.select(states[1]), heads[1])
        total = ledger(student, teacher, tokens.targets, at=at, count=7, workspace=Workspace(chunk)).total
        found.append(torch.autograd.grad(multiple * total, hidden)[0])
    torch.testing.assert_close(found[1], factor * found[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_half_precision_and_large_logits_keep_to_float64_of_the_same_inputs(scale, dtype, tolerance, chunk):
    """Liger's tolerances, of small and of large weights."""
    given = case(2, 9, 61, dtype=dtype, scale=scale)
    found, exact = cost(*given, chunk=chunk), by_hand(*given)
    assert found[0].item() == pytest.approx(exact.item(), rel=tolerance)
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("chunk", [None, 4])
def test_strides_do_not_matter(chunk):
    """Liger: states and heads that are views of others."""
    states, heads, labels = case(2, 6, 13)
    apart = [state.transpose(0, 1).contiguous().transpose(0, 1) for state in states]
    wide = [torch.cat([head, head], 1)[:, :H] for head in heads]
    assert not apart[0].is_contiguous()
    assert not wide[0].is_contiguous()
    for one, other in zip(
        cost(apart, wide, labels, chunk=chunk), cost(states, heads, labels, chunk=chunk), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5, 0.9])
def test_the_jsd_with_sides_and_beta_exchanged_is_the_same(beta):
    """TRL and Liger: symmetric at one half; otherwise JSD_beta(p, q) = JSD_(1 - beta)(q, p)."""
    one, other = torch.randn(2, 9, 17, dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(
        generalized_jsd(one, other, beta=beta), generalized_jsd(other, one, beta=1 - beta), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.25, 0.5, 0.75, 1 - 1e-6, 1.0])
def test_the_jsd_lies_between_its_ends_bounds_and_is_what_liger_gives_divided(beta):
    one, other = (3 * torch.randn(2, 9, 17, dtype=torch.float64)).log_softmax(-1)
    found = generalized_jsd(one, other, beta=beta)
    if beta in (0.0, 1.0):
        torch.testing.assert_close(found, (reverse_kl if beta else forward_kl)(one, other))
        return
    mixture = beta * other.exp() + (1 - beta) * one.exp()
    theirs = beta * (other.exp() * (other - mixture.log())).sum(-1)
    theirs += (1 - beta) * (one.exp() * (one - mixture.log())).sum(-1)
    torch.testing.assert_close(found * beta * (1 - beta), theirs, rtol=1e-6, atol=1e-9)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert (found * beta * (1 - beta) <= entropy + 1e-9).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("name", KNOWN)
def test_a_temperature_is_a_division_of_both_sides_and_nothing_else(name, temperature):
    """TRL's scaling test: logits already divided, at T = 1, give the same up to the factor."""
    logits, others = torch.randn(2, 7, 13, dtype=torch.float64)
    known, targets = chosen(name), torch.zeros(7, dtype=torch.long)
    at = Objective({name: constant(1.0)}, constant(temperature)).at(0)
    found = ledger(DenseSignal(logits), DenseSignal(others), targets, at=at, count=7).total
    plain = known.function(log_probs(logits / temperature), log_probs(others / temperature)).mean()
    torch.testing.assert_close(found, temperature**known.power * plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", KNOWN)
def test_a_better_student_costs_less_and_one_without_sense_more(name):
    """DistillKit's and torchtune's sanity: on the way to the teacher the loss falls."""
    function = KNOWN[name].function
    teacher, student = 2 * torch.randn(2, 50, 13, dtype=torch.float64)
    costs = [
        function(log_probs(teacher + away * (student - teacher)), log_probs(teacher)).mean().item()
        for away in (0.0, 0.25, 0.5, 1.0)
    ]
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(0, abs=1e-12)
