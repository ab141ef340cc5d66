"""Terms over spans: what they are where the tokenizers are one, and by hand where they are two."""

import math

import pytest
import torch
from torch import Tensor

from kdlib.losses.alignment import Alignment, Counts, SpanSignal, alm, spans_in
from kdlib.losses.buffers import Workspace
from kdlib.losses.chunked import differentiable_values
from kdlib.losses.objective import Objective, eval_terms, ledger, row_sums, values_of
from kdlib.losses.signals import IGNORED, DenseSignal, Features, Kept, LinearSignal, kept
from kdlib.losses.terms import cross_entropy, projected_kl, span_kl, uld
from kdlib.schedulers import constant
from kdlib.tokens.vocabulary import Vocabularies

V, H = 11, 5
PLAIN = {
    "span_kl": "forward_kl",
    "projected_kl": "forward_kl",
    "hidden": "hidden",
    "relational": "relational",
}
WEIGHTS = ("span_kl", "projected_kl", "uld", "alm", "ce")


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def permuted(seed: int = 0) -> tuple[Tensor, Vocabularies]:
    """A renaming of the vocabulary: the teacher's id of each of the student's tokens."""
    renamed = torch.randperm(V, generator=torch.Generator().manual_seed(seed))
    return renamed, Vocabularies(V, V, renamed, renamed.argsort())


def batch_of(labels: Tensor, spans: list[tuple[int, int, int, int, int]], teacher_ids: Tensor) -> dict:
    """spans: (row, student's first token, how many, teacher's first token, how many)."""
    row, first, sizes, teacher_first, teacher_sizes = (
        torch.tensor(spans).T if spans else torch.zeros(5, 0).long()
    )
    found = {
        "starts": row * labels.shape[1] + first - 1,
        "teacher_starts": row * teacher_ids.shape[1] + teacher_first - 1,
        "sizes": sizes,
        "teacher_sizes": teacher_sizes,
        "rows": row,
    }
    return {"labels": labels, "teacher_input_ids": teacher_ids, "spans": found}


def one_to_one(seed: int = 0) -> tuple[dict, Tensor]:
    """Two rows whose every token is a span, teacher's tokens renamed; the second is padded."""
    renamed, _ = permuted()
    ids = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = labels[1, 5:] = labels[0, 3] = IGNORED
    spans = [(r, t, 1, t, 1) for r in range(2) for t in range(1, 7) if labels[r, t] != IGNORED]
    return batch_of(labels, spans, renamed[ids]), ids


def signals(batch: dict, *, chunked: bool = True) -> tuple[LinearSignal, SpanSignal, DenseSignal, Tensor]:
    """Student; teacher over spans; the same teacher said plainly in the student's ids; what came."""
    renamed, vocabularies = permuted()
    tokens, (lines, theirs) = kept(batch["labels"]), spans_in(batch)
    n = len(tokens.targets)
    inside = [numbers(n, H, seed=7), numbers(n, H, seed=8).requires_grad_()]
    features = [Features(tokens.rows, [each], projected=[each]) for each in inside]
    hidden = numbers(n, H, seed=1).requires_grad_()
    student = LinearSignal(hidden, numbers(V, H, seed=2).requires_grad_(), features=features[1])
    logits = 3 * numbers(n, V, seed=3)
    said = DenseSignal(logits[:, renamed.argsort()], features[0])
    spanned = SpanSignal(said, Kept(**theirs), Alignment(**lines), vocabularies)
    return student, spanned, DenseSignal(logits, features[0]), tokens.targets


def book(student, teacher, targets, weights: dict, count, temperature: float = 2.0, **options):
    at = Objective({name: constant(weight) for name, weight in weights.items()}, constant(temperature)).at(0)
    return ledger(student, teacher, targets, at=at, count=count, **options)


@pytest.mark.parametrize("name", [*PLAIN, "uld", "alm", "contrastive"])
def test_a_renamed_vocabulary_changes_no_term_and_no_gradient(name):
    batch, _ = one_to_one()
    student, spanned, plain, targets = signals(batch)
    counts = spanned.counts
    assert counts == Counts(len(targets), len(targets), len(targets))
    found = book(student, spanned, targets, {name: 0.7, "ce": 0.3}, counts)
    same = book(student, plain, targets, {PLAIN.get(name, name): 0.7, "ce": 0.3}, len(targets))
    leaves = [student.hidden, student.weight, student.features.hidden[0]]
    gradients = [
        torch.autograd.grad(each.total, leaves, allow_unused=True, materialize_grads=True)
        for each in (found, same)
    ]
    assert found.total.item() == pytest.approx(same.total.item(), abs=1e-9)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)
    assert found.entries[name].mean.item() > 1e-3


def test_at_agreement_every_term_is_zero():
    renamed, vocabularies = permuted()
    logits = numbers(4, V, seed=0).log_softmax(-1)
    theirs = logits[:, renamed.argsort()]
    for term in (span_kl, projected_kl, uld):
        assert term(logits, theirs, vocabularies).abs().max() < 1e-9
    assert alm(logits[:, 0], logits[:, 0], 100.0).abs().max() < 1e-9


# the student has "a", "b", "1"; the teacher "a", "b", "12", "13": shared are a and b; 12 and 13 begin with 1
TWO = Vocabularies(3, 4, torch.tensor([0, 1, -1]), torch.tensor([0, 1, 2, 2]))


def test_span_kl_has_one_bucket_for_what_is_not_shared():
    ours, theirs = torch.tensor([[0.5, 0.2, 0.3]]).double(), torch.tensor([[0.4, 0.1, 0.3, 0.2]]).double()
    by_hand = 0.4 * math.log(0.4 / 0.5) + 0.1 * math.log(0.1 / 0.2) + 0.5 * math.log(0.5 / 0.3)
    assert span_kl(ours.log(), theirs.log(), TWO).item() == pytest.approx(by_hand, rel=1e-6)


def test_without_a_bucket_of_the_students_the_teacher_is_taken_given_a_shared_token():
    ours, theirs = torch.tensor([[0.6, 0.4]]).double(), torch.tensor([[0.4, 0.1, 0.5]]).double()
    small = Vocabularies(2, 3, torch.tensor([0, 1]), torch.tensor([0, 1, -1]))
    by_hand = 0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.2 / 0.4)
    assert span_kl(ours.log(), theirs.log(), small).item() == pytest.approx(by_hand, rel=1e-6)


def test_projected_kl_counts_a_number_as_its_first_digit():
    ours, theirs = torch.tensor([[0.5, 0.2, 0.3]]).double(), torch.tensor([[0.4, 0.1, 0.3, 0.2]]).double()
    by_hand = 0.4 * math.log(0.4 / 0.5) + 0.1 * math.log(0.1 / 0.2) + 0.5 * math.log(0.5 / 0.3)
    assert projected_kl(ours.log(), theirs.log(), TWO).item() == pytest.approx(by_hand, rel=1e-6)


def test_projected_kl_cuts_the_student_where_its_vocabulary_is_the_larger():
    theirs, ours = torch.tensor([[0.5, 0.2, 0.3]]).double(), torch.tensor([[0.4, 0.1, 0.3, 0.2]]).double()
    larger = Vocabularies(4, 3, torch.tensor([0, 1, -1, -1]), torch.tensor([0, 1, 2, 2]))
    by_hand = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.1) + 0.3 * math.log(0.3 / 0.5)
    assert projected_kl(ours.log(), theirs.log(), larger).item() == pytest.approx(by_hand, rel=1e-6)


def test_what_cannot_be_cut_is_left_out_on_both_sides():
    # nothing of the teacher's begins with the student's third token, and its own third cannot be cut
    pair = Vocabularies(3, 3, torch.tensor([0, 1, -1]), torch.tensor([0, 1, -1]))
    ours, theirs = torch.tensor([[0.3, 0.3, 0.4]]).double(), torch.tensor([[0.6, 0.2, 0.2]]).double()
    by_hand = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert projected_kl(ours.log(), theirs.log(), pair).item() == pytest.approx(by_hand, rel=1e-6)


def test_the_tail_of_projected_kl_is_paid_for():
    ours, theirs = torch.tensor([[0.1, 0.1, 0.8]]).double(), torch.tensor([[0.6, 0.2, 0.2]]).double()
    one = Vocabularies(3, 3, torch.arange(3), torch.arange(3))
    by_hand = 0.6 * math.log(0.6 / 0.1) + 0.4 * math.log(0.4 / 0.9)
    assert projected_kl(ours.log(), theirs.log(), one, 1).item() == pytest.approx(by_hand, rel=1e-6)


def test_uld_knows_no_token_by_its_name():
    ours, theirs = torch.tensor([[0.7, 0.2, 0.1]]).double(), torch.tensor([[0.1, 0.1, 0.3, 0.5]]).double()
    assert uld(ours.log(), theirs.log(), TWO).item() == pytest.approx(0.2 + 0.1 + 0.0 + 0.1, rel=1e-6)
    assert uld(ours.log(), ours.flip(-1).log(), TWO).item() == pytest.approx(0.0, abs=1e-12)


def test_alm_by_hand_and_at_a_high_temperature_a_kl_of_surprisals():
    ours, theirs = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.2)])
    by_hand = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert alm(ours, theirs, 1.0).item() == pytest.approx(by_hand, rel=1e-6)
    a, b = math.log(2), math.log(5)
    assert alm(ours, theirs, 100.0).item() == pytest.approx(b * math.log(b / a) - b + a, rel=0.02)
    sure = torch.zeros(1, requires_grad=True)
    (gradient,) = torch.autograd.grad(alm(sure, theirs, 100.0).sum(), sure)
    assert gradient.isfinite().all()


# row 0: [bos] a 1 2 b, the teacher's [bos] a 12 b; row 1: [bos] b a a, the teacher's b aa without bos
LABELS = torch.tensor([[IGNORED, 0, 2, 2, 1], [IGNORED, 1, 0, 0, IGNORED]])
SPANS = [
    (0, 1, 1, 1, 1),
    (0, 2, 2, 2, 1),
    (0, 4, 1, 3, 1),
    (1, 2, 2, 1, 1),
]  # nothing predicts the teacher's b
TEACHER_IDS = torch.tensor([[9, 0, 2, 1], [1, 3, 0, 0]])


def two_tokenizers() -> tuple[LinearSignal, SpanSignal, Tensor, Tensor]:
    batch = batch_of(LABELS, SPANS, TEACHER_IDS)
    tokens, (lines, theirs) = kept(LABELS), spans_in(batch)
    student = LinearSignal(numbers(len(tokens.targets), H, seed=1).requires_grad_(), numbers(3, H, seed=2))
    said = DenseSignal(numbers(len(theirs["targets"]), 4, seed=3))
    return student, SpanSignal(said, Kept(**theirs), Alignment(**lines), TWO), tokens.targets, tokens.rows


def test_spans_are_found_among_the_kept_tokens_of_both_sides():
    batch = batch_of(LABELS, SPANS, TEACHER_IDS)
    lines, theirs = spans_in(batch)
    assert lines["first"].tolist() == [0, 1, 3, 5]
    assert lines["teacher_first"].tolist() == [0, 1, 2, 3]
    assert lines["owner"].tolist() == [0, 1, 1, 2, 4, 3, 3]  # the student's b of row 1 is in none
    assert lines["single"].tolist() == [0, 2]
    assert lines["rest"].tolist() == [2, 4, 6]
    assert lines["counts"] == [3, 1]
    assert theirs["targets"].tolist() == [0, 2, 1, 3]
    assert theirs["positions"].tolist() == [0, 1, 2, 4]


def test_each_term_is_of_its_tokens_and_divided_by_their_number():
    student, teacher, targets, _ = two_tokenizers()
    assert teacher.counts == Counts(7, 4, 2)
    found = book(student, teacher, targets, dict.fromkeys(WEIGHTS, 1.0), teacher.counts)
    ours, theirs = student.logits(), teacher.said.logits()
    pairs = [(ours[i] / 2).log_softmax(-1) for i in (0, 3)], [(theirs[i] / 2).log_softmax(-1) for i in (0, 2)]
    by_hand = 4 * span_kl(torch.stack(pairs[0]), torch.stack(pairs[1]), TWO).sum()
    assert found.entries["span_kl"].sum.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert found.entries["span_kl"].count == 2
    begins = [0, 1, 3, 5]
    by_hand = 2 * uld((ours[begins] / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), TWO).sum()
    assert found.entries["uld"].mean.item() == pytest.approx(by_hand.item() / 4, rel=1e-6)
    logs = -cross_entropy(ours, None, targets)
    spans = torch.stack([logs[0], logs[1] + logs[2], logs[3], logs[5] + logs[6]])
    theirs = -cross_entropy(theirs, None, teacher.targets)
    assert found.entries["alm"].sum.item() == pytest.approx(alm(spans, theirs, 100.0).sum().item(), rel=1e-9)
    assert found.entries["ce"].mean.item() == pytest.approx(-logs.mean().item(), rel=1e-9)


@pytest.mark.parametrize(
    "weights", [WEIGHTS, ("span_kl", "ce"), ("alm",), ("projected_kl",), ("alm", "ce"), ("uld",)]
)
def test_a_chunked_gradient_is_that_of_all_at_once(weights):
    student, teacher, targets, _ = two_tokenizers()
    student = LinearSignal(student.hidden, student.weight.requires_grad_())
    dense = DenseSignal(student.logits())
    how = {"weights": {name: 0.3 + i for i, name in enumerate(weights)}, "count": teacher.counts}
    results = [
        book(student, teacher, targets, **how, workspace=Workspace(2)).total,
        book(dense, teacher, targets, **how).total,
    ]
    assert results[0].item() == pytest.approx(results[1].item(), rel=1e-9)
    gradients = [torch.autograd.grad(each, [student.hidden, student.weight]) for each in results]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_differentiable_values_go_into_any_arithmetic():
    student, _, targets, _ = two_tokenizers()

    def curved(hidden: Tensor) -> Tensor:
        student_now = LinearSignal(hidden, student.weight)
        return differentiable_values(student_now, targets, cross_entropy, Workspace(3)).square()

    assert torch.autograd.gradcheck(curved, [student.hidden])


def test_values_stand_at_their_spans_first_tokens_and_rows_know_how_many_there_are():
    student, teacher, targets, rows = two_tokenizers()
    at = Objective({name: constant(1.0) for name in WEIGHTS}, constant(2.0)).at(0)
    with torch.no_grad():
        values = values_of(student, teacher, targets, terms=eval_terms(teacher), at=at, chunk=2)
        sums = row_sums(
            student, teacher, targets, rows, row_count=2, terms=eval_terms(teacher), at=at, chunk=2
        )
    found = book(student, teacher, targets, dict.fromkeys(WEIGHTS, 1.0), teacher.counts)
    for name, entry in found.entries.items():
        assert values[name].sum().item() == pytest.approx(entry.sum.item(), rel=1e-9)
    assert values["span_kl"].nonzero()[:, 0].tolist() == [0, 3]
    assert values["alm"].nonzero()[:, 0].tolist() == [0, 1, 3, 5]
    assert {name: sums[name].tolist() for name in ("tokens", "spans", "single")} == {
        "tokens": [4, 3],
        "spans": [3, 1],
        "single": [2, 0],
    }
    assert sums["kl_to_teacher"][1] == 0
    assert set(values["agreement"].tolist()) <= {0.0, 1.0}


def test_a_batch_without_spans_costs_nothing_and_has_a_gradient():
    labels = torch.full((1, 4), IGNORED)
    labels[0, 2] = 1
    batch = batch_of(labels, [], torch.zeros(1, 2).long())
    tokens, (lines, theirs) = kept(labels), spans_in(batch)
    hidden = numbers(1, H, seed=1).requires_grad_()
    teacher = SpanSignal(DenseSignal(numbers(0, 4, seed=3)), Kept(**theirs), Alignment(**lines), TWO)
    found = book(
        LinearSignal(hidden, numbers(3, H, seed=2)),
        teacher,
        tokens.targets,
        dict.fromkeys(WEIGHTS, 1.0),
        Counts(1, 0, 0),
    )
    assert {name: each.mean.item() for name, each in found.entries.items() if name != "ce"} == dict.fromkeys(
        WEIGHTS[:-1], 0.0
    )
    found.total.backward()
    assert hidden.grad.isfinite().all()
