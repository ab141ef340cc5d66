"""What the doctor asks of a training's settings: length, learning rate, intervals, batch, curriculum."""

import math
from collections.abc import Mapping

from kdlib.config.loss import LossConfig
from kdlib.config.terms import DIVERGENCES
from kdlib.diagnostics.context import Context, Findings, critical, note, warning
from kdlib.errors import ConfigError
from kdlib.losses.features import FEATURE_TERMS, feature_terms
from kdlib.schedulers import from_spec
from kdlib.training.plan import try_out

REACHED = 0.5  # of training.learning_rate that the schedule must get to
FLAT = 0.05  # of it, below which nothing is learned
WITHOUT_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
SAMPLES = 2000  # steps at which a schedule is looked at, at most
LONG_WARM_UP = 0.5  # of the steps
IN_BATCHES = (10, 3)  # max_steps equal to the batches of 1 to 3 passes, of 10 or more each, is no accident
SHARE = 0.1  # of the steps: the warm-up that is proposed
REFERENCE_RATE = (6e-4, 125e6, -0.37)  # AdamW's for N parameters: 6e-4 x (N / 125 M)^-0.37
RATE_RANGE = (1 / 300, 5.0)  # of it
LION = 1 / 5  # of AdamW's
FAR_OUT = 10.0  # times beyond a limit: no training survives it
SGD_RANGE = (1e-4, 1.0)
STILL = "no weight moves at a learning rate of 0, and below it the loss rises"
FEW_ROWS = 8  # of a classification, in an optimizer step
FEW_TOKENS, MANY_TOKENS = 256, 4e6  # of an optimizer step


def checkpointing_lets_gradients_through(context: Context) -> Findings:
    """Feature terms look inside layers, where re-entrant checkpointing keeps no gradient."""
    training = context.config.training
    # gradient_…: its deprecated name
    kind = "activation" if training.get("activation_checkpointing") is not None else "gradient"
    options = training.get(f"{kind}_checkpointing_kwargs")
    reentrant = isinstance(options, dict) and options.get("use_reentrant")
    if training.get(f"{kind}_checkpointing") and reentrant and feature_terms(context.active):
        where, found = f"training.{kind}_checkpointing_kwargs.use_reentrant", "true beside a feature term"
        yield critical(where, found, "such a term would teach nothing", "write false", {where: False})


def settings_are_used(context: Context) -> Findings:
    """What shapes the kd term stands beside a kd weight."""
    loss = context.config.loss
    own = next((name for name in context.active if name in DIVERGENCES), None)
    for name in ("divergence", "top_k", "samples") if "kd" not in context.active else ():
        if (value := getattr(loss, name)) != LossConfig.model_fields[name].default:
            found, why = f"{value}, but no weight for kd", f"{', '.join(context.active)} do not read it"
            do = f"give kd a weight, or leave {name} out"
            if own and name != "divergence":
                do = f"write kd in place of {own} among the weights, and divergence: {own}; kd alone reads "
                do += f"{name}; or leave {name} out"
            elif own:
                do = f"leave it out: {own} is a term by itself; or write kd in place of {own}"
            yield warning(f"loss.{name}", found, why, do)


def training_can_be_made(context: Context) -> Findings:
    """Optimizer, loader, compiler and what else `training:` configures are to be had here."""
    try:
        try_out(context.args)
    except ConfigError as error:
        where, _, found = str(error).partition(": ")
        if not where.startswith("training.lr_scheduler"):  # which the next check tells
            why = "the training would end before its first step"
            yield critical(where, found, why, "mend it, or leave it out")


def schedule_can_be_made(context: Context) -> Findings:
    """The Trainer's schedule accepts its arguments, among which may be no `num_training_steps`."""
    where, given = "training.lr_scheduler_kwargs", context.config.training.get("lr_scheduler_kwargs")
    if isinstance(given, Mapping) and "num_training_steps" in given:
        kept = dict(given)
        found = f"num_training_steps: {kept.pop('num_training_steps')} in a training of {context.steps} steps"
        why, do = "the Trainer counts the steps itself", "leave num_training_steps out"
        yield critical(where, found, why, do, {where: kept or None})
    else:
        _ = context.learning_rate  # its failure is the finding


def warm_up_fits(context: Context) -> Findings:
    """The warm-up ends within the training, and leaves most of it."""
    args, steps, where = context.args, context.steps, "training.warmup_steps"
    warm_up, rate = args.get_warmup_steps(steps), args.learning_rate
    if context.has_own_schedule or context.config.training.get("lr_scheduler_type") in WITHOUT_WARM_UP:
        return
    if warm_up <= LONG_WARM_UP * steps or steps < 2:
        return
    peak, found = min((steps - 1) / warm_up, 1.0), f"a warm-up of {warm_up} optimizer steps in a training of"
    found += f" {steps}: the learning rate gets to {rate * peak:.1e} of {rate:.1e}"
    if (accumulation := args.gradient_accumulation_steps) > 1:
        found += f"; if {warm_up} are batches, it would be {warm_up / accumulation:g} steps"
    do = f"count optimizer steps, or give a share of them: warmup_steps: {SHARE:g}"
    found_as = critical if peak < FLAT else warning
    yield found_as(where, found, "the learning rate is low until then", do, {where: SHARE})


def learning_rate_reaches_its_peak(context: Context) -> Findings:
    """The schedule gets to the learning rate that was chosen, and is not near zero for most of it."""
    args, steps, named = context.args, context.steps, not context.has_own_schedule
    rate, warm_up = args.learning_rate, args.get_warmup_steps(steps)
    if context.learning_rate is None or steps < 2 or (named and warm_up > LONG_WARM_UP * steps):
        return
    values = _rates(context)
    peak = max(values)
    still = sum(value < FLAT * peak for value in values) / len(values)
    if named and peak < REACHED:
        found = f"the learning rate gets to {rate * peak:.1e} of {rate:.1e} in {steps} steps"
        why, do = "it never reaches what was chosen", "leave these out, or make the schedule fit the steps"
        yield (critical if peak < FLAT else warning)("training.lr_scheduler_kwargs", found, why, do)
    elif still > LONG_WARM_UP:
        found = f"in {still:.0%} of the {steps} steps the learning rate is below {FLAT:.0%} of its peak"
        why, do = "they take time and change nothing", "stretch the schedule, or train for fewer steps"
        yield warning("training.lr_scheduler_type", found, why, do)


def learning_rate_in_range(context: Context) -> Findings:
    """The peak is one with which models of this size train.

    For AdamW the reference is GPT-3's table, 6e-4 for 125 M parameters to 1e-4 for 13 B (Brown et al. 2020,
    table 2.1), a power law of the size.  Lion takes a fifth (Chen et al. 2023: a third to a tenth).  Of SGD
    only the order of magnitude is judged, of other optimizers nothing but that it is not 0.
    """
    rate, where = context.args.learning_rate, "training.learning_rate"
    optimizer = context.args.optim.value
    if context.has_own_schedule:
        rate *= max(_rates(context))
    if optimizer == "sgd":
        proposed, (low, high), rule = 0.05, SGD_RANGE, "SGD"
    elif "adamw" in optimizer or "lion" in optimizer or optimizer == "adafactor":
        base, at, power = REFERENCE_RATE
        proposed = base * (context.size / at) ** power * (LION if "lion" in optimizer else 1)
        low, high = (proposed * factor for factor in RATE_RANGE)
        rule = f"{optimizer} and {context.size / 1e6:.3g} M parameters"
    else:
        if rate <= 0:
            yield critical(where, f"{rate:g}", STILL, "give one above 0")
        return
    if rate <= 0:
        own = context.has_own_schedule
        proposed = float(f"{proposed:.1g}")
        yield critical(where, f"{rate:g}", STILL, f"try {proposed:g}", None if own else {where: proposed})
    elif not low <= rate <= high:
        far, rounded = not low / FAR_OUT <= rate <= high * FAR_OUT, float(f"{proposed:.1g}")
        found = f"a peak of {rate:.1e}; with {rule} trainings go well from {low:.0e} to {high:.0e}"
        why = "above it a training diverges, below it the weights hardly move"
        change = {where: rounded} if far and not context.has_own_schedule else None
        yield (critical if far else warning)(where, found, why, f"try {rounded:g}", change)


def steps_are_not_batches(context: Context) -> Findings:
    """`max_steps` is not the number of batches, which accumulation makes fewer steps of."""
    (fewest, most), steps, where = IN_BATCHES, context.args.max_steps, "training.max_steps"
    accumulation = context.args.gradient_accumulation_steps
    if steps <= 0 or accumulation == 1 or (batches := context.extent.batches) < fewest:
        return
    passes, odd = divmod(steps, batches)
    if not odd and passes <= most:
        meant = passes * -(-batches // accumulation)
        found = f"{steps}, the number of batches in {passes} pass{'es' * (passes > 1)}; with {accumulation} "
        found += f"to an optimizer step the training passes {context.extent.passes:.1f} times over the text"
        why = "counted in batches, training and schedules are too long by the accumulation"
        yield warning(where, found, why, f"write {meant}", {where: meant})


def intervals_fit(context: Context) -> Findings:
    """The training is long enough to be logged and evaluated."""
    steps, args = context.steps, context.args
    logging = args.logging_steps if args.logging_strategy == "steps" else 0
    evaluating = (args.eval_steps or args.logging_steps) if args.eval_strategy == "steps" else 0
    for name, interval, times, lost in (
        ("logging", logging, 20, "no figure of the training would be kept"),
        ("eval", evaluating, 4, "no held-out figure would be made while it trains"),
    ):
        if interval > steps:
            where, shorter = f"training.{name}_steps", max(steps // times, 1)
            found = f"{interval:g} in a training of {steps} steps"
            yield warning(where, found, lost, f"write {shorter}", {where: shorter})
    if args.save_strategy == "steps" and args.save_steps > steps > 1:
        found = f"{args.save_steps:g} in a training of {steps} steps"
        why = "stopped by force, it starts again from the beginning"
        yield note("training.save_steps", found, why, "save more often, if it takes long")


def batch_is_sensible(context: Context) -> Findings:
    """An optimizer step sees enough for its gradient to mean something, and not the whole text."""
    args, notes, are_rows = context.args, context.prepared.notes, context.rules.unit == "row"
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = rows * notes.get("train_learned_tokens", notes["train_tokens"]) / max(notes["train_rows"], 1)
    seen = f"{rows} rows, {tokens:,.0f} {'' if are_rows else 'learned '}tokens, make an optimizer step"
    do, few = "lower batch size or accumulation", rows < FEW_ROWS if are_rows else tokens < FEW_TOKENS
    if rows > context.extent.rows:
        seen += f"; there are {context.extent.rows} training rows"
        why = "every step then sees the same rows, and fewer than was meant"
    elif few:
        limit = f"{FEW_ROWS} rows" if are_rows else f"{FEW_TOKENS} tokens"
        why, do = f"below some {limit} the gradient is mostly chance", "raise batch size or accumulation"
        times = math.ceil(FEW_ROWS / rows if are_rows else FEW_TOKENS / max(tokens, 1))
        do = f"{do} by {times} times" if rows * times <= context.extent.rows else "give more rows to train on"
    elif tokens > MANY_TOKENS:
        why = "so large a step learns little more than a smaller one would, and there are fewer"
    else:
        return
    yield warning("training.gradient_accumulation_steps", seen, why, do)


def phases_start(context: Context) -> Findings:
    """Every phase of the curriculum has an optimizer step."""
    start, steps = 0.0, context.steps
    for number, phase in enumerate(context.config.loss.curriculum or []):
        near = range(int(start * steps), min(int(phase.until * steps) + 1, steps))
        if not any(start <= step / steps < phase.until for step in near):
            found = f"phase {number + 1}, from {start:.4g} to {phase.until:.4g} of {steps} steps, has no step"
            do = f"make it longer than {1 / steps:.2g} of the training, or leave it out"
            yield warning(f"loss.curriculum.{number}.until", found, "its weights never hold", do)
        start = phase.until


def feature_terms_start_when_meant(context: Context) -> Findings:
    """A feature term that a later phase brings in is off before it, where its usual weight else holds."""
    weights, phases = context.config.loss.weights, context.config.loss.curriculum or []
    for term in [name for name in weights if name in FEATURE_TERMS]:
        first = next((number for number, phase in enumerate(phases) if term in phase.weights), 0)
        if first == 0 or from_spec(weights[term])(0.0) == 0:
            continue
        usual, later = weights[term], from_spec(phases[first].weights[term])(1.0)
        if later < usual:  # fading out, which is a use of the usual weight
            continue
        has_others = all(set(weights) - {term} | set(phase.weights) for phase in phases[:first])
        change = {f"loss.curriculum.{number}.weights.{term}": 0 for number in range(first)}
        found = f"{term} comes in with phase {first + 1}, at {later:g}, but phase 1 leaves it at {usual:g}"
        why = "where a phase does not name it a term has its usual weight"
        do = f"write {term}: 0 in the weights of phase 1{f' to {first}' * (first > 1)}"
        yield warning(next(iter(change)), found, why, do, change if has_others else None)


def _rates(context: Context) -> list[float]:
    """The schedule at some of the steps, as multiples of the peak that was asked for."""
    return [context.learning_rate(step) for step in range(0, context.steps, -(-context.steps // SAMPLES))]


CONFIG_CHECKS = (
    checkpointing_lets_gradients_through,
    settings_are_used,
    training_can_be_made,
    schedule_can_be_made,
    warm_up_fits,
    learning_rate_reaches_its_peak,
    learning_rate_in_range,
    steps_are_not_batches,
    intervals_fit,
    batch_is_sensible,
    phases_start,
    feature_terms_start_when_meant,
)
