"""What the doctor measures on the first batch, with the real models: is there something to learn, and
does each term count?
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache

import torch

from kdlib.diagnostics.config_checks import AUTO
from kdlib.diagnostics.context import Subject
from kdlib.diagnostics.findings import Finding
from kdlib.losses.features import FEATURE_TERMS
from kdlib.losses.objective import log_probs
from kdlib.schedulers import SHAPES, breakpoints, from_spec

UNIFORM = 0.9  # of log V: the entropy above which a teacher says next to nothing
TELLING = 0.6  # of log V: that of a temperature which is proposed
PROPOSED = (4.0, 3.0, 2.0, 1.0)
UNLIKE = 100.0  # times, between weighted terms
EQUAL = 1e-6  # nats: student and teacher say the same


def temperature_leaves_something_to_teach(subject: Subject) -> Iterator[Finding]:
    """At the highest temperature of each term the teacher is not near uniform on this text."""
    loss, done = subject.config.loss, set()
    for term, spec in loss.temperatures(subject.active).items():
        highest = max(from_spec(spec)(moment) for moment in breakpoints(spec))
        if term in FEATURE_TERMS or highest in done:
            continue
        done.add(highest)
        flat = _flatness(subject, highest)
        if not flat > UNIFORM:  # nan is another check's
            continue
        better = next((T for T in PROPOSED if highest > T and _flatness(subject, T) <= TELLING), None)
        by_term = isinstance(loss.temperature, Mapping) and not any(key in SHAPES for key in loss.temperature)
        where = f"loss.temperature.{term}" if by_term else "loss.temperature"
        lowest = min(from_spec(spec)(moment) for moment in breakpoints(spec))
        always = lowest == highest or _flatness(subject, lowest) > UNIFORM
        yield Finding(
            "critical" if always and better else "warning",
            where,
            (
                f"at T = {highest:g} the teacher's entropy on the first batch is {flat:.0%} of that of a "
                "uniform "
                "guess"
            )
            + (f"; at T = {better:g} it is {_flatness(subject, better):.0%}" if better else ""),
            (
                "a teacher that finds every token equally likely teaches nothing: what is left is its noise "
                "on "
                "tokens that never come"
            ),
            f"write {better:g}"
            if better
            else "see whether this teacher knows such text: it is near uniform at every temperature tried",
            {where: better} if better and not isinstance(spec, Mapping) else None,
        )


def terms_are_of_a_size(subject: Subject) -> Iterator[Finding]:
    """No term's weighted share of the loss is a hundredth of another's, each looked at where its own weight
    is largest.

    What is held against is the largest share among the terms made from logits, in nats, else the largest of
    all; the weight proposed gives the term that share.
    """
    means, when = (
        cache(lambda at: subject.batch.means(subject.objective.at(at, sampled=False))),
        breakpoints(*subject.active.values()),
    )
    for term, spec in subject.active.items():
        at = max(when, key=from_spec(spec))
        moment = subject.objective.at(at)
        shares = {name: moment.weights[name] * mean for name, mean in means(at).items()}
        plain = {name: share for name, share in shares.items() if name not in FEATURE_TERMS} or shares
        main = max(plain, key=plain.get)
        if term == main or shares[main] == 0 or not all(math.isfinite(share) for share in shares.values()):
            continue
        mean = shares[term] / moment.weights[term]
        if mean < EQUAL:
            yield Finding(
                "note",
                f"loss.weights.{term}",
                f"its value on the first batch is {mean:.1e}",
                "student and teacher say the same there, so at first this term teaches nothing",
                "nothing, if that is meant",
            )
        elif max(ratio := shares[main] / shares[term], 1 / ratio) > UNLIKE:
            yield _unlike(subject, term, main, shares, moment.weights[term])


def _unlike(subject: Subject, term: str, main: str, shares: Mapping[str, float], weight: float) -> Finding:
    proposed = float(f"{weight * shares[main] / shares[term]:.2g}")
    loss = subject.config.loss
    free = not isinstance(loss.weights.get(term, {}), Mapping) and not any(
        term in phase.weights for phase in loss.curriculum or []
    )
    ratio = shares[main] / shares[term]
    small, large, times = (term, main, ratio) if ratio > 1 else (main, term, 1 / ratio)
    listed = ", ".join(f"{name} {share:.2g}" for name, share in shares.items())
    return Finding(
        "warning",
        f"loss.weights.{term}",
        (
            f"weight x value on the first batch: {listed}, so {large} counts {times:,.0f} times as much as "
            f"{small}"
        ),
        "the smaller term has no say. Weights taken from a project that sums KD over a row's tokens "
        "(`batchmean`) look like this: "
        "here every term is a mean over tokens",
        f"with the weight {proposed:g} {term} counts as much as {main}",
        {f"loss.weights.{term}": proposed} if free else None,
    )


def teacher_is_finite(subject: Subject) -> Iterator[Finding]:
    """The teacher's logits are numbers, and such that the config's dtype has."""
    largest = max(float(logits.abs().amax()) for logits in subject.batch.teacher_logits())  # nan wins
    if not math.isfinite(largest):
        yield Finding(
            "critical",
            "teacher.model",
            f"the teacher's logits on the first batch reach {largest}, in float32",
            "nothing can be learned from them",
            "take another file of this model: its weights are damaged",
        )
    elif subject.config.precision == "float16" and largest > torch.finfo(torch.float16).max:
        yield Finding(
            "critical",
            "precision",
            f"the teacher's logits on the first batch reach {largest:.3g}, and float16 ends at 65,504",
            "beyond it they are infinite, and the loss is nan",
            "write auto",
            AUTO,
        )


def _flatness(subject: Subject, temperature: float) -> float:
    """The teacher's mean entropy over that of a uniform guess, 0 to 1."""
    total, tokens, size = 0.0, 0, 2
    for logits in subject.batch.teacher_logits():
        rows = log_probs(logits, temperature)
        total, tokens, size = (
            total + float(torch.special.entr(rows.exp()).sum()),
            tokens + len(rows),
            rows.shape[1],
        )
    return total / max(tokens, 1) / math.log(size)


BATCH_CHECKS = (temperature_leaves_something_to_teach, terms_are_of_a_size, teacher_is_finite)
