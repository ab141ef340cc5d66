"""What the doctor asks of machine and models: do they fit each other, the text and the terms?

`BATCH_CHECKS` load the models and measure the first batch: is there something to learn, do all terms count?
"""

import math
from collections.abc import Mapping
from functools import cache, partial

import torch

from kdlib.diagnostics.context import Context, Finding, Findings, Unavailable, critical, note, warning
from kdlib.diagnostics.forecast import GIB, remedies, verdict
from kdlib.errors import ModelError
from kdlib.hardware import emulates_bf16
from kdlib.losses.features import FEATURE_TERMS
from kdlib.losses.objective import log_probs
from kdlib.models.loading import device_of, load_tokenizer
from kdlib.models.student import check_pair
from kdlib.schedulers import SHAPES, breakpoints, from_spec

AUTO = {"precision": "auto"}
NO_LENGTH = {
    "max_length": 2
}  # with it `check_pair` looks at all but positions, which have a check of their own
UNIFORM = 0.9  # of log V: the entropy above which a teacher says next to nothing
TELLING = 0.6  # of log V: that of a temperature which is proposed
PROPOSED = (4.0, 3.0, 2.0, 1.0)
UNLIKE = 100.0  # times, between weighted terms
EQUAL = 1e-6  # nats: student and teacher say the same


def device_has_the_dtype(context: Context) -> Findings:
    """The machine computes in the config's dtype, and gains by it."""
    precision, device = context.config.precision, device_of(context.config.wanted_device).type
    cuda = torch.cuda.get_device_name() if device == "cuda" else ""
    is_recent = bool(cuda) and torch.cuda.get_device_capability()[0] >= 8
    emulated = "its products are then emulated"
    if precision == "float16" and device == "cpu":
        found, why = "float16 on a CPU", "most CPUs emulate its products, 60 times slower than float32's"
        why += "; and it ends at 65,504, which logits pass"
    elif precision == "float16" and is_recent:
        found = f"float16 on {cuda}, which has bfloat16"
        why = "float16 ends at 65,504, which logits and gradients pass"
        why += "; bfloat16 has float32's range at the same speed"
    elif precision == "bfloat16" and device == "cpu" and emulates_bf16():
        found = "bfloat16 on a CPU without avx512_bf16 or amx_bf16"
        why = f"{emulated}, 4 to 100 times slower than float32's"
    elif precision == "bfloat16" and cuda and not is_recent:
        found = f"bfloat16 on {cuda}, which has no instructions for it"
        why = f"{emulated}, slower than float32's"
    else:
        return
    severity = "critical" if precision == "float16" and device == "cpu" else "warning"
    yield Finding(severity, "precision", found, why, "write auto", AUTO)


def rows_fit_the_positions(context: Context) -> Findings:
    """No row is longer than a model has positions."""
    stated = {name: getattr(each, "max_position_embeddings", None) for name, each in context.configs.items()}
    limits, length = {name: limit for name, limit in stated.items() if limit}, context.config.data.max_length
    if limits and (least := min(limits.values())) < length:
        yield critical(
            "data.max_length",
            f"{length}; the {min(limits, key=limits.get)} has {least} positions",
            "beyond them a model fails, or says nothing that it has learned",
            f"write {least}",
            {"data.max_length": least},
        )


def models_are_a_pair(context: Context) -> Findings:
    """The student has layers of the teacher's, or ids that mean the same; each model a row for every id."""
    config = context.config
    try:
        data = config.data.model_copy(update=NO_LENGTH)
        check_pair(config.model_copy(update={"data": data}), context.tokenizer)
    except ModelError as error:
        raise Unavailable("student", error) from error
    is_one = context.rules.one_vocabulary
    for name, each in context.configs.items():
        where = "teacher.model" if name == "teacher" else "student.from"
        source = config.teacher.model if name == "teacher" else config.student.source
        rows, tokens = (
            each.get_text_config().vocab_size,
            len(context.tokenizer if is_one else load_tokenizer(source)),
        )
        if rows < tokens:
            matrix, whose = ("head", "the") if is_one else ("embedding", "its")
            found = f"the {name}'s {matrix} has {rows} rows, but {whose} tokenizer {tokens} tokens"
            why = "the tokens beyond have no row to be looked up in"
            yield critical(where, found, why, "take the tokenizer that belongs to the model")
        elif rows > tokens and is_one:
            found = f"the {name}'s head is padded from {tokens} tokens to {rows} rows"
            do = "nothing: they are left out on both sides"
            yield note(where, found, "rows beyond the tokenizer mean nothing", do)


def tokenizers_agree(context: Context) -> Findings:
    """A student of its own is trained and saved with the teacher's tokenizer; what that changes is named."""
    if context.config.student.source == "teacher" or not context.rules.one_vocabulary:
        return
    ours, theirs = context.student_tokenizer, context.tokenizer
    for name in ("bos_token", "eos_token", "chat_template", "padding_side", "pad_token"):
        own, teachers = getattr(ours, name), getattr(theirs, name)
        if own == teachers:
            continue
        if name in ("bos_token", "eos_token"):
            yield warning(
                "student.from",
                f"its {name} is {own!r}, the teacher's {teachers!r}",
                "the text is made with the teacher's, which the student has not met in this place",
                "train long enough for it to learn, or take a student of the teacher's family",
            )
        else:
            shown = "" if name == "chat_template" else f": {own!r}, the teacher's {teachers!r}"
            yield note(
                "student.from",
                f"its {name} differs from the teacher's{shown}",
                "the trained student is saved with the teacher's tokenizer, whose template is the one that "
                "is used; padding is masked",
                "use the saved tokenizer with the trained student",
            )


def terms_have_a_source(context: Context) -> Findings:
    """What feature terms need is there, or made, and what that costs."""
    stated = context.configs
    configs = (stated.get("student", stated["teacher"]), stated["teacher"])
    ours, theirs = (each.get_text_config().hidden_size for each in configs)
    for name in context.active:
        term = FEATURE_TERMS.get(name)
        if term and term.projected and ours != theirs:
            yield note(
                f"loss.weights.{name}",
                f"the student's states have {ours} dimensions, the teacher's {theirs}",
                "they are compared through a projection, trained with the student and not saved in it",
                "nothing",
            )
        if term and term.attention:
            yield note(
                f"loss.weights.{name}",
                "both models switch to eager attention while this term has a weight",
                "SDPA and flash attention make no maps; eager attention is slower and keeps [B, A, T, T] for "
                "each layer",
                "nothing, or compare hidden states instead",
            )


def memory_suffices(context: Context) -> Findings:
    """The forecast of the training's peak lies within what the device has: `kd forecast`, part by part."""
    prepared = context.prepared
    forecast = partial(context.forecast, rows=len(prepared.train), vocabulary=prepared.vocabulary)
    found = forecast(context.config)
    judged = verdict(found.peak, found.total)
    if judged == "fits":
        return
    tried = remedies(context.config, found, found.total, forecast)
    changes = [
        f"{each.overrides} ({each.what}): {each.peak / GIB:.1f} GiB"
        for each in tried
        if each.peak <= found.total
    ]
    yield Finding(
        "critical" if judged == "does not fit" else "warning",
        "training.per_device_train_batch_size",
        f"the training is forecast to take {found.peak / GIB:.1f} GiB, {found.moment}, and the device has "
        f"{found.total / GIB:.1f}",
        "a training that runs out of memory ends without a word, on a CPU even with the whole machine",
        "; or ".join(changes) or "see `kd forecast`; take smaller models, shorter rows, or more memory",
    )


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
        better = next((T for T in PROPOSED if highest > T and flatness(T) <= TELLING), None)
        where = f"loss.temperature.{term}" if by_term else "loss.temperature"
        yield Finding(
            "critical" if better and (lowest == highest or flatness(lowest) > UNIFORM) else "warning",
            where,
            f"at T = {highest:g} the teacher's entropy on the first batch is {flatness(highest):.0%} of that "
            "of a uniform guess" + (f"; at T = {better:g} it is {flatness(better):.0%}" if better else ""),
            "a teacher that finds every token equally likely teaches nothing: what is left is its noise on "
            "tokens that never come",
            f"write {better:g}"
            if better
            else "see whether this teacher knows such text: it is near uniform at every temperature tried",
            {where: better} if better and not isinstance(spec, Mapping) else None,
        )


def terms_are_of_a_size(context: Context) -> Findings:
    """No term's weighted share of the loss is a hundredth of another's where its own weight is largest.

    What is held against is the largest share among the terms made from logits, in nats, else the largest of
    all; the weight proposed gives the term that share.
    """
    means = cache(lambda fraction: context.batch.means(context.objective.at(fraction, sampled=False)))
    for term, spec in context.active.items():
        fraction = max(breakpoints(*context.active.values()), key=from_spec(spec))
        weights = context.objective.at(fraction).weights
        shares = {name: weights[name] * mean for name, mean in means(fraction).items()}
        plain = {name: share for name, share in shares.items() if name not in FEATURE_TERMS} or shares
        main = max(plain, key=plain.get)
        if term == main or shares[main] == 0 or not all(math.isfinite(share) for share in shares.values()):
            continue
        if (mean := means(fraction)[term]) < EQUAL:
            yield note(
                f"loss.weights.{term}",
                f"its value on the first batch is {mean:.1e}",
                "student and teacher say the same there, so at first this term teaches nothing",
                "nothing, if that is meant",
            )
        elif max(ratio := shares[main] / shares[term], 1 / ratio) > UNLIKE:
            yield _unlike(context, term, main, shares, weights[term])


def _unlike(context: Context, term: str, main: str, shares: Mapping[str, float], weight: float) -> Finding:
    loss, ratio = context.config.loss, shares[main] / shares[term]
    proposed = float(f"{weight * ratio:.2g}")
    moves = isinstance(loss.weights.get(term, {}), Mapping) or any(
        term in phase.weights for phase in loss.curriculum or []
    )
    small, large, times = (term, main, ratio) if ratio > 1 else (main, term, 1 / ratio)
    listed = ", ".join(f"{name} {share:.2g}" for name, share in shares.items())
    return warning(
        f"loss.weights.{term}",
        f"weight x value on the first batch: {listed}, so {large} counts {times:,.0f} times as much as "
        f"{small}",
        "the smaller term has no say. Weights taken from a project that sums KD over a row's tokens "
        "(`batchmean`) look like this: here every term is a mean over tokens",
        f"with the weight {proposed:g} {term} counts as much as {main}",
        None if moves else {f"loss.weights.{term}": proposed},
    )


def teacher_is_finite(context: Context) -> Findings:
    """The teacher's logits are numbers, and such that the config's dtype has."""
    largest = max(float(logits.abs().amax()) for logits in context.batch.teacher_logits())  # nan wins
    if not math.isfinite(largest):
        yield critical(
            "teacher.model",
            f"the teacher's logits on the first batch reach {largest}, in float32",
            "nothing can be learned from them",
            "take another file of this model: its weights are damaged",
        )
    elif context.config.precision == "float16" and largest > torch.finfo(torch.float16).max:
        found = f"the teacher's logits on the first batch reach {largest:.3g}, and float16 ends at 65,504"
        yield critical(
            "precision", found, "beyond it they are infinite, and the loss is nan", "write auto", AUTO
        )


def _flatness(context: Context, temperature: float) -> float:
    """The teacher's mean entropy over that of a uniform guess, 0 to 1."""
    entropies = [
        torch.special.entr(log_probs(logits, temperature).exp()) for logits in context.batch.teacher_logits()
    ]
    total, count = sum(float(each.sum()) for each in entropies), sum(map(len, entropies))
    return total / max(count, 1) / math.log(entropies[0].shape[1] if entropies else 2)


MODEL_CHECKS = (
    device_has_the_dtype,
    rows_fit_the_positions,
    models_are_a_pair,
    tokenizers_agree,
    terms_have_a_source,
)
BATCH_CHECKS = (temperature_leaves_something_to_teach, terms_are_of_a_size, teacher_is_finite)
