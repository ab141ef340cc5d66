"""What the doctor asks of machine and models: do they fit each other, the text and the terms?

`BATCH_CHECKS` load the models and measure the first batch: is there something to learn, do all terms count?
"""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch

from kdlib.config.sections import flow
from kdlib.config.terms import ROUTE_WEIGHTS
from kdlib.data.batches import vocabulary_of
from kdlib.diagnostics.context import Context, Finding, Findings, Unavailable, critical, note, warning
from kdlib.diagnostics.forecast import GIB, Forecast, remedies, verdict
from kdlib.errors import ModelError
from kdlib.hardware import emulates_bf16
from kdlib.losses.features import FEATURE_TERMS
from kdlib.losses.terms import log_probs
from kdlib.models.loading import device_of, load_tokenizer, positions_of
from kdlib.schedulers import SHAPES, at_most, breakpoints, from_spec
from kdlib.students.student import check_pair, teacher_tokenizer_of

AUTO = {"precision": "auto"}
UNIFORM = 0.9  # of log V: the entropy above which a teacher says next to nothing
FLAT = 0.999  # likewise: what is left of the teacher is a few thousandths of a nat
TELLING = 0.6  # of log V: that of a temperature which is proposed
PROPOSED = (4.0, 3.0, 2.0, 1.5, 1.0)
UNLIKE = 100.0  # times, between weighted terms
EQUAL = 1e-6  # nats: student and teacher say the same


def device_has_the_dtype(context: Context) -> Findings:
    """The machine computes in the config's dtype, and gains by it."""
    precision, device = context.config.precision, device_of(context.config.wanted_device).type
    cuda = torch.cuda.get_device_name() if device == "cuda" else ""
    is_recent = bool(cuda) and torch.cuda.get_device_capability()[0] >= 8
    found_as, ends = warning, "float16 ends at 65,504, which logits pass"
    if precision == "float16" and device == "cpu":
        found_as, where = critical, "a CPU"
        why = f"most CPUs emulate its products, 60 times slower than float32's; and {ends}"
    elif precision == "float16" and is_recent:
        where, why = f"{cuda}, which has bfloat16", f"{ends}; bfloat16 is as fast"
    elif precision == "bfloat16" and device == "cpu" and emulates_bf16():
        where, why = "a CPU without avx512_bf16 or amx_bf16", "emulated, 4 to 100 times slower than float32"
    elif precision == "bfloat16" and cuda and not is_recent:
        where, why = f"{cuda}, which has no instructions for it", "emulated, slower than float32"
    else:
        return
    yield found_as("precision", f"{precision} on {where}", why, "write auto", AUTO)


def rows_fit_the_positions(context: Context) -> Findings:
    """No row is longer than a model has positions."""
    where, length = "data.max_length", context.config.data.max_length
    stated = {name: positions_of(each) for name, each in context.configs.items()}
    name = min(stated, key=lambda name: stated[name] or math.inf)
    if (least := stated[name] or math.inf) < length:
        found, why = (
            f"{length}; the {name} has {least} positions",
            "beyond them nothing is learned, or it fails",
        )
        yield critical(where, found, why, f"write {least}", {where: least})


def models_are_a_pair(context: Context) -> Findings:
    """The student has layers of the teacher's, or ids that mean the same; each model a row for every id."""
    config = context.config
    try:
        data = config.data.model_copy(update={"max_length": 2})  # positions have a check of their own
        check_pair(config.model_copy(update={"data": data}), context.tokenizer)
    except ModelError as error:
        raise Unavailable("student", error) from error
    is_one = context.rules.one_vocabulary
    teachers = teacher_tokenizer_of(config) if is_one else load_tokenizer(config.teacher.model)
    for name, each in context.configs.items():
        where = "teacher.model" if name == "teacher" else "student.from"
        tokens = vocabulary_of(teachers if teachers and name == "teacher" else context.tokenizer)
        rows = each.get_text_config().vocab_size
        if rows < tokens:
            matrix, whose = "head" if is_one else "embedding", "its" if teachers else "the"
            found = f"the {name}'s {matrix} has {rows} rows, but {whose} tokenizer's ids end at {tokens - 1}"
            do = "nothing, if they are none of the data's; else take the tokenizer that belongs to the model"
            yield note(where, found, "tokens beyond have no row, and rows that hold one are refused", do)
        elif rows > tokens and is_one:
            found = f"the {name}'s head is padded from {tokens} tokens to {rows} rows"
            yield note(where, found, "rows beyond mean nothing", "nothing: they are left out on both sides")


def tokenizers_agree(context: Context) -> Findings:
    """A student of its own is trained and saved with the teacher's tokenizer; what that changes is named."""
    config = context.config
    if config.student.source == "teacher" or config.teacher is None or not context.rules.one_vocabulary:
        return
    ours, theirs = context.student_tokenizer, context.tokenizer
    for name in ("bos_token", "eos_token", "chat_template", "padding_side", "pad_token"):
        own, teachers = getattr(ours, name), getattr(theirs, name)
        if own == teachers:
            continue
        found = f"its {name} is {own!r}, the teacher's {teachers!r}"
        if name == "chat_template":
            found = "its chat_template differs from the teacher's"
        if name in ("bos_token", "eos_token"):
            why = "the text is made with the teacher's, new to the student in this place"
            do = "train long enough for it to learn, or take a student of the teacher's family"
            yield warning("student.from", found, why, do)
        else:
            why = "the trained student is saved with the teacher's tokenizer and template"
            yield note("student.from", found, why, "use the saved tokenizer with the trained student")


def terms_have_a_source(context: Context) -> Findings:
    """What feature terms need is there, or made, and what that costs."""
    if "teacher" not in (stated := context.configs):
        return
    configs = (stated.get("student", stated["teacher"]), stated["teacher"])
    ours, theirs = (each.get_text_config().hidden_size for each in configs)
    for name in context.active:
        term, where = FEATURE_TERMS.get(name), f"loss.weights.{name}"
        if term and term.projected and ours != theirs:
            found = f"the student's states have {ours} dimensions, the teacher's {theirs}"
            why = "they are compared through a projection, which is trained too and not saved"
            yield note(where, found, why, "nothing")
        if term and term.attention:
            found = "both models switch to eager attention while this term has a weight"
            why = "it is slower and keeps [B, A, T, T] for each layer, but other attention makes no maps"
            yield note(where, found, why, "nothing, or compare hidden states instead")


def memory_suffices(context: Context, forecast: Callable[..., Forecast]) -> Findings:
    """The peak that kdlib.diagnostics.memory.forecast gives lies within what the device has."""
    prepared = context.prepared
    forecast = partial(forecast, rows=len(prepared.train), vocabulary=prepared.vocabulary)
    found = forecast(context.config)
    judged = verdict(found.peak, found.total)
    if judged == "fits":
        return
    changes = [
        f"{each.overrides} ({each.what}): {each.peak / GIB:.1f} GiB"
        for each in remedies(context.config, found, found.total, forecast)
        if each.peak <= found.total
    ]
    needs = f"{found.peak / GIB:.1f} GiB are forecast, {found.moment}, and the device has "
    why = "a training that runs out of memory ends without a word, on a CPU even with the whole machine"
    do = "; or ".join(changes) or "see `kd forecast`; take smaller models, shorter rows, or more memory"
    found_as, where = (
        critical if judged == "does not fit" else warning,
        "training.per_device_train_batch_size",
    )
    yield found_as(where, f"{needs}{found.total / GIB:.1f}", why, do)


def temperature_leaves_something_to_teach(context: Context) -> Findings:
    """At the highest temperature of each term the teacher is not near uniform on this text."""
    loss, done, flatness = context.config.loss, set(), cache(lambda at: _flatness(context, at))
    by_term = isinstance(loss.temperature, Mapping) and not any(key in SHAPES for key in loss.temperature)
    for term, spec in loss.temperatures(context.active).items():
        values = [from_spec(spec)(fraction) for fraction in breakpoints(spec)]
        lowest, highest = min(values), max(values)
        if term in FEATURE_TERMS or highest in done:
            continue
        done.add(highest)
        if not flatness(highest) > UNIFORM:  # nan is another check's
            continue
        where = f"loss.temperature.{term}" if by_term else "loss.temperature"
        found = f"at T = {highest:g} the teacher's entropy on the first batch is "
        found += f"{flatness(highest):.0%} of a uniform guess's"
        one = "token" if context.rules.unit == "token" else "class"
        why = f"a teacher that finds every {one} equally likely teaches noise"
        cooler = [T for T in PROPOSED if highest > T]
        better = next((T for T in cooler if flatness(T) <= TELLING), None)
        if isinstance(spec, Mapping) and (better or 0.0) <= lowest:  # a schedule is to stay one
            better = next((T for T in cooler if lowest < T and flatness(T) <= UNIFORM), better)
        if better is not None:
            found += f"; at T = {better:g} it is {flatness(better):.0%}"
            found_as = critical if flatness(lowest) > FLAT else warning
            mended = at_most(spec, better)
            yield found_as(where, found, why, f"write {flow(mended)}", {where: mended})
        else:
            do = "see whether this teacher knows such text: no temperature tried is better"
            yield warning(where, found, why, do)


def terms_are_of_a_size(context: Context) -> Findings:
    """No term's weighted share of the loss is a hundredth of another's where its own weight is largest.

    What is held against is the largest share among the terms made from logits, in nats, else the largest of
    all; the weight proposed gives the term that share.  A gate's own terms are small and are not judged.
    """
    means = cache(lambda fraction: context.batch.means(context.objective.at(fraction, sampled=False)))
    for term, spec in ((name, each) for name, each in context.active.items() if name not in ROUTE_WEIGHTS):
        fraction = max(breakpoints(*context.active.values()), key=from_spec(spec))
        weights = context.objective.at(fraction).weights
        shares = {name: weights[name] * mean for name, mean in means(fraction).items()}
        inside = (*FEATURE_TERMS, *ROUTE_WEIGHTS)
        plain = {name: share for name, share in shares.items() if name not in inside} or shares
        main = max(plain, key=plain.get)
        if term == main or shares[main] == 0 or not all(math.isfinite(share) for share in shares.values()):
            continue
        if (mean := means(fraction)[term]) < EQUAL:
            found = f"its value on the first batch is {mean:.1e}: student and teacher say the same there"
            why = "at first this term teaches nothing"
            yield note(f"loss.weights.{term}", found, why, "nothing, if that is meant")
        elif max(ratio := shares[main] / shares[term], 1 / ratio) > UNLIKE:
            yield _unlike(context, term, main, shares, weights[term])


def _unlike(context: Context, term: str, main: str, shares: Mapping[str, float], weight: float) -> Finding:
    loss, ratio, where = context.config.loss, shares[main] / shares[term], f"loss.weights.{term}"
    proposed = float(f"{weight * ratio:.2g}")
    by_phase = any(term in phase.weights for phase in loss.curriculum or [])
    moves = by_phase or isinstance(loss.weights.get(term, {}), Mapping)
    small, large, times = (term, main, ratio) if ratio > 1 else (main, term, 1 / ratio)
    found = ", ".join(f"{name} {share:.2g}" for name, share in shares.items())
    found = (
        f"weight x value on the first batch: {found}; {large} counts {times:,.0f} times as much as {small}"
    )
    sums = "a row's tokens" if context.rules.unit == "token" else "a batch's rows"
    why = f"the smaller term has no say; weights for sums over {sums} look like this, "
    do = f"with the weight {proposed:g} {term} counts as much as {main}"
    return warning(where, found, f"{why}here terms are means", do, None if moves else {where: proposed})


def teacher_is_finite(context: Context) -> Findings:
    """The teacher's logits are numbers, and such that the config's dtype has."""
    largest = max(float(logits.abs().amax()) for logits in context.batch.teacher_logits())  # nan wins
    reach = f"the teacher's logits on the first batch reach {largest:.3g}"
    if not math.isfinite(largest):
        do = "take another file of this model: its weights are damaged"
        yield critical("teacher.model", f"{reach}, in float32", "nothing can be learned from them", do)
    elif context.config.precision == "float16" and largest > torch.finfo(torch.float16).max:
        found, why = f"{reach}, and float16 ends at 65,504", "beyond it the loss is nan"
        yield critical("precision", found, why, "write auto", AUTO)


def _flatness(context: Context, temperature: float) -> float:
    """The teacher's mean entropy over that of a uniform guess, 0 to 1."""
    probs = [log_probs(logits, temperature).exp() for logits in context.batch.teacher_logits()]
    total, count = sum(float(torch.special.entr(each).sum()) for each in probs), sum(map(len, probs))
    return total / max(count, 1) / math.log(probs[0].shape[1] if probs else 2)


MODEL_CHECKS = (
    device_has_the_dtype,
    rows_fit_the_positions,
    models_are_a_pair,
    tokenizers_agree,
    terms_have_a_source,
)
BATCH_CHECKS = (temperature_leaves_something_to_teach, terms_are_of_a_size, teacher_is_finite)
