import re
from inspect import signature

import pytest
import torch

from kdlib.config.terms import DIVERGENCES, GATED, ROUTER, TEMPERATURES, TERM_NAMES
from kdlib.losses.divergences import KNOWN, chosen
from kdlib.losses.features import FEATURE_TERMS
from kdlib.losses.ledger import SUM_TOLERANCE, Entry, Ledger, LedgerWindow, breach
from kdlib.losses.objective import EVAL_TERMS, Objective, ledger
from kdlib.losses.signals import DenseSignal
from kdlib.losses.terms import ON_LOGITS
from kdlib.schedulers import constant, linear


def entry(total: float, count: int, weight: float) -> Entry:
    return Entry(torch.tensor(total), count, weight)


def test_the_total_is_the_sum_of_weight_times_sum_over_count():
    book = Ledger({"kd": entry(8.0, 4, 0.7), "ce": entry(12.0, 4, 0.3)})
    assert book.total.item() == pytest.approx(0.7 * 2 + 0.3 * 3)


def test_an_empty_step_costs_zero_not_nan():
    assert Ledger({"ce": entry(0.0, 0, 1.0)}).total.item() == 0


def test_a_window_of_micro_batches_adds_up_to_the_steps_loss():
    window, loss = LedgerWindow(), 0.0
    # two steps of two micro-batches; 4 tokens a step
    for step, total in ((0, 1.0), (0, 2.0), (1, 5.0), (1, 3.0)):
        book = Ledger({"kd": entry(total, 4, 0.5), "ce": entry(2 * total, 4, 0.25)})
        loss += book.total.item() / 2
        window.add(book, step)
    figures = window.figures()
    assert figures["kd"] == pytest.approx((11 / 8, 0.5))
    assert sum(value * weight for value, weight in figures.values()) == pytest.approx(loss)


def test_logged_terms_add_up_to_the_loss_even_while_a_weight_moves():
    window = LedgerWindow()
    for step, (value, weight) in enumerate(((4.0, 1.0), (2.0, 0.5))):
        window.add(Ledger({"kd": entry(value, 1, weight)}), step)
    value, weight = window.figures()["kd"]
    assert (value, value * weight) == pytest.approx((3.0, 2.5))


def test_a_term_that_starts_inside_a_window_is_shown_at_its_full_value():
    window = LedgerWindow()
    window.add(Ledger({"ce": entry(1.0, 1, 1.0)}), 0)
    window.add(Ledger({"ce": entry(1.0, 1, 1.0), "kd": entry(6.0, 1, 0.5)}), 1)
    assert window.figures() == {"ce": (1.0, 1.0), "kd": (6.0, 0.25)}  # a share of 3 in one step of two: 1.5


@pytest.mark.parametrize("widest", [torch.Tensor.double, torch.Tensor.float], ids=["float64", "MPS"])
def test_a_long_window_adds_up_and_is_as_strict_as_a_short_one(widest, monkeypatch):
    """Sums of float32 drift apart; where a device has no other, the tolerance grows with the window."""
    monkeypatch.setattr("kdlib.losses.ledger.widest", widest)
    window, book = LedgerWindow(), Ledger({"kd": entry(3.1, 8, 0.7), "ce": entry(4.3, 8, 0.3)})
    total = book.total
    with torch.no_grad():
        for number in range(2000):
            window.add(book, number // 8)
            window.went_back(total)
    assert breach(window.figures(), window.loss(), window.tolerance) is None
    if widest is torch.Tensor.double:
        assert window.tolerance == SUM_TOLERANCE
        assert window.loss() == pytest.approx(8 * total.item(), rel=1e-12)
        assert breach(window.figures(), window.loss() * (1 + 5e-5), window.tolerance)


FIGURES = {"kd": (4.0, 0.7), "ce": (3.0, 0.3), "hidden": (0.5, 0.1)}
RIGHT = 4.0 * 0.7 + 3.0 * 0.3 + 0.5 * 0.1


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (RIGHT - 0.9, "-0.9: as if ce was left out"),
        (RIGHT + 2.8, r"\+2.8: as if kd was counted twice"),
        (RIGHT + 0.45, r"\+0.45: as if hidden was taken without its weight 0.1"),
        (RIGHT - 0.63, "-0.63: as if ce was weighted by 0.3 twice"),
        (RIGHT * 1.01, "no usual mistake with one term explains it: the loss is 1.01 x the sum"),
        (float("nan"), "no usual mistake"),
    ],
)
def test_a_breach_names_the_term_that_explains_it_and_gives_all_figures(loss, words):
    found = breach(FIGURES, loss)
    assert re.search(words, found)
    assert "hidden: 0.5 x 0.1 = 0.05" in found


def test_terms_that_sum_to_the_loss_are_no_breach():
    assert breach(FIGURES, RIGHT * (1 + 5e-6)) is None
    assert breach(FIGURES, RIGHT * (1 + 5e-5)) is not None


def test_a_term_of_weight_zero_is_not_computed():
    objective = Objective({"kd": constant(0.0), "ce": constant(1.0)}, constant(2.0))
    at = objective.at(0.5)
    assert list(at.weights) == ["ce"]
    assert not at.needs_teacher
    signal = DenseSignal(torch.randn(3, 5))
    book = ledger(signal, None, torch.tensor([0, 1, 2]), at=at, count=3)  # no teacher is asked
    assert list(book.entries) == ["ce"]


def test_weights_and_temperature_follow_their_schedules():
    objective = Objective({"kd": linear(0.0, 1.0), "ce": constant(0.3)}, linear(4.0, 2.0))
    assert list(objective.at(0.0).weights) == ["ce"]
    assert objective.at(0.5).weights == pytest.approx({"kd": 0.5, "ce": 0.3})
    assert objective.at(0.5).temperatures == {"kd": 3}


def test_the_formula_reads_as_it_is_computed():
    at = Objective({"kd": constant(0.7), "ce": constant(0.3)}, constant(2.0)).at(0)
    assert at.formula == "loss = 0.7·T²·KL(teacher ‖ student; T=2) + 0.3·CE"


def test_a_moment_without_any_weight_is_refused():
    at = Objective({"ce": constant(0.0)}, constant(1.0)).at(0)
    with pytest.raises(ValueError, match="every weight is 0"):
        ledger(DenseSignal(torch.zeros(1, 2)), None, torch.tensor([0]), at=at, count=1)


def test_the_config_knows_the_objectives_terms():
    assert set(TERM_NAMES) == {"kd", "ce", *KNOWN, *ON_LOGITS, "alm", *FEATURE_TERMS, *GATED, ROUTER} - {
        *EVAL_TERMS
    } | {"ce"}
    assert set(TEMPERATURES) < set(TERM_NAMES)
    # made once for both
    assert EVAL_TERMS["ce"].function is Objective({"ce": constant(1.0)}).at(0).logit_terms["ce"].function


def test_the_config_knows_the_divergences_and_their_options():
    known = {name: tuple(signature(each.function).parameters)[2:] for name, each in KNOWN.items()}
    assert known == DIVERGENCES


@pytest.mark.parametrize(("renormalise", "tail"), [(False, "+ tail"), (True, "renormalised")])
def test_the_kd_term_takes_the_teachers_top_k(renormalise, tail):
    at = Objective({"kd": constant(0.7)}, constant(2.0), "forward_kl", 3, renormalise).at(0)
    assert at.formula == f"loss = 0.7·T²·KL(teacher ‖ student; T=2, top-3 {tail})"
    student, teacher = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    book = ledger(
        DenseSignal(student), DenseSignal(teacher), torch.zeros(4, dtype=torch.long), at=at, count=4
    )
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    p3, order = p.topk(3)
    q3 = q.gather(-1, order)
    if renormalise:
        p3, q3 = p3 / p3.sum(-1, True), q3 / q3.sum(-1, True)
    else:
        p3, q3 = (torch.cat([x, 1 - x.sum(-1, True)], -1) for x in (p3, q3))
    torch.testing.assert_close(book.total, 0.7 * 4 * (p3 * (p3 / q3).log()).sum(-1).mean())


@pytest.mark.parametrize(
    ("spec", "formula"),
    [
        ("reverse_kl", "loss = 1·T²·KL(student ‖ teacher; T=3)"),
        ({"generalized_jsd": {"beta": 0.3}}, "loss = 1·T²·JSD(teacher, student; beta=0.3, T=3)"),
        ("total_variation", "loss = 1·T·TV(teacher, student; T=3)"),
    ],
)
def test_the_kd_term_takes_the_divergence_chosen(spec, formula):
    at = Objective({"kd": constant(1.0)}, constant(3.0), spec).at(0)
    assert at.formula == formula
    student, teacher = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    book = ledger(
        DenseSignal(student), DenseSignal(teacher), torch.zeros(4, dtype=torch.long), at=at, count=4
    )
    known = chosen(spec)
    by_hand = 3**known.power * known.function((student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1))
    torch.testing.assert_close(book.total, by_hand.mean())
