"""A curriculum: which loss weights hold in which phase of training, written short and resolved into
schedules.

    weights: {kd: 0.7, ce: 0.3}
    curriculum:
      - {until: 0.3, weights: {hidden: 0}}              # the first 30 % of training
      - {until: 1.0, weights: {hidden: 0.5}, ramp: 0.1}  # the rest; its first tenth of training goes from 0
        to 0.5

`until` and `ramp` are fractions of the whole training.  A phase's weights stand in for the usual ones
(`loss.weights`, 0 where that is silent) of the terms that it names.  Without a ramp they hold from the
phase's start: a jump, and a weight may be a schedule, stretched over the phase.  With one, every weight that
changes goes in a straight line from where the phase before it ended; in the first phase, the terms that it
names come from 0.  Phases are plain mappings here.
"""

from collections.abc import Mapping, Sequence

from kdlib.schedulers import Spec, from_spec, moments, normal

TINY = 1e-9  # fractions of training that differ by less are the same


def resolved(weights: Mapping[str, Spec], curriculum: Sequence[Mapping]) -> dict[str, Spec]:
    """Every term's weight over the whole training, as the number or the schedule that a config could hold.

    Args:
        weights: the usual ones, by term.
        curriculum: phases in order, without `conflicts` and `disorder`; none leave the weights as they are.
    """
    named = _terms(curriculum)
    return {
        term: _course(term, weights.get(term, 0.0), curriculum) if term in named else weights[term]
        for term in {**weights, **named}
    }


def disorder(curriculum: Sequence[Mapping]) -> list[str]:
    """What is wrong between the phases, a line each: ends that do not rise to 1, ramps longer than their
    phase.
    """
    faults, start = [], 0.0
    for phase_number, phase in enumerate(curriculum, start=1):
        until, ramp = phase["until"], phase.get("ramp") or 0.0
        if until <= start:
            faults.append(
                f"phase {phase_number} ends at {until:g}, needs an end after {start:g}, where it begins"
            )
        elif ramp > until - start + TINY:
            faults.append(
                f"phase {phase_number} has a ramp of {ramp:g}, needs one no longer than itself, "
                f"{until - start:g} of training"
            )
        start = until
    if start != 1:
        faults.append(
            f"the last phase ends at {start:g}, needs to end at 1, the end of training"
            if curriculum
            else "there is no phase; write one, as {until: 1.0, weights: {ce: 1.0}}, or null"
        )
    return faults


def conflicts(weights: Mapping[str, Spec], curriculum: Sequence[Mapping]) -> list[str]:
    """The terms whose usual weight is a schedule although phases set it: two courses for one weight; a
    line each.
    """
    faults = []
    for term in _terms(curriculum):
        phases = [str(i) for i, phase in enumerate(curriculum, start=1) if term in phase.get("weights", {})]
        if isinstance(spec := weights.get(term), Mapping):
            faults.append(
                f"{term}: found {spec}, but the curriculum sets it too (phase {', '.join(phases)}); "
                "write a number here, and the schedule as the weight in a phase"
            )
    return faults


def idle(weights: Mapping[str, Spec], curriculum: Sequence[Mapping]) -> list[str]:
    """One line when there is a moment of training at which every weight is 0, naming moment, phase and
    terms.
    """
    specs = resolved(weights, curriculum)
    schedules, when = [from_spec(spec) for spec in specs.values()], moments(*specs.values())
    still = [moment for moment in when if not any(schedule(moment) for schedule in schedules)]
    if not still:
        return []
    at = "" if len(still) == len(when) else f" at {100 * still[0]:.4g} % of training"
    if at and curriculum:
        at += (
            f", in phase {min(1 + sum(phase['until'] <= still[0] for phase in curriculum), len(curriculum))}"
        )
    terms = ", ".join(specs) or "no term is given"
    return [f"all weights are 0{at} ({terms}), so nothing would be learned; give one term a positive weight"]


def _terms(curriculum: Sequence[Mapping]) -> dict[str, None]:
    return dict.fromkeys(term for phase in curriculum for term in phase.get("weights", {}))


def _course(term: str, usual: Spec, curriculum: Sequence[Mapping]) -> Spec:
    """One term's weight, phase after phase, as one spec."""
    pieces, start = [], 0.0
    before = 0.0 if term in curriculum[0].get("weights", {}) else float(usual)
    for phase in curriculum:
        weight, until, ramp = (
            normal(phase.get("weights", {}).get(term, usual)),
            phase["until"],
            phase.get("ramp"),
        )
        if ramp and weight != before:
            if (full := start + ramp) < until - TINY:
                pieces += [[full, {"linear": [before, weight]}], [until, weight]]
            else:
                pieces.append([until, {"linear": [before, weight]}])
        else:
            pieces.append([until, weight])
        start, before = until, from_spec(weight)(1.0)
    return pieces[0][1] if len(pieces) == 1 else {"joined": pieces}
