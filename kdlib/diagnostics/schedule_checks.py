"""What the doctor asks of a training's course: its length, learning rate, intervals, batch, and
curriculum.
"""

from collections.abc import Iterator, Mapping

from kdlib.diagnostics.context import Subject
from kdlib.diagnostics.findings import Finding
from kdlib.losses.features import FEATURE_TERMS
from kdlib.schedulers import from_spec

REACHED = 0.5  # of training.learning_rate that the course must get to
FLAT = 0.05  # of it, below which nothing is learned
WITHOUT_WARM_UP = ("constant", "reduce_lr_on_plateau", "greedy")
SAMPLES = 2000  # steps at which a course is looked at, at most
LONG_WARM_UP = 0.5  # of the steps
# max_steps equal to the batches of 1 to 3 passes, of 10 or more batches each, is no accident
IN_BATCHES = (10, 3)
SHARE = 0.1  # of the steps: the warm-up that is proposed
# AdamW's for N parameters: 6e-4 x (N / 125 M)^-0.37, see `learning_rate_in_range`
REFERENCE_RATE = (6e-4, 125e6, -0.37)
RATE_RANGE = (1 / 300, 5.0)  # of it
LION = 1 / 5  # of AdamW's
FAR_OUT = 10.0  # times beyond a limit: no training survives it
SGD_RANGE = (1e-4, 1.0)
FEW_TOKENS, MANY_TOKENS = 256, 4e6  # of an optimizer step
FEW_ROWS = 8  # of a classification, in an optimizer step


def schedule_can_be_made(subject: Subject) -> Iterator[Finding]:
    """The Trainer's schedule accepts its arguments; one with `num_training_steps` of its own fails when
    training starts.
    """
    given = subject.config.training.get("lr_scheduler_kwargs")
    if isinstance(given, Mapping) and "num_training_steps" in given:
        kept = {name: value for name, value in given.items() if name != "num_training_steps"}
        yield Finding(
            "critical",
            "training.lr_scheduler_kwargs",
            f"num_training_steps: {given['num_training_steps']} in a training of "
            f"{subject.steps} optimizer steps",
            "the Trainer counts the steps itself, and its schedule fails on two counts",
            "leave num_training_steps out",
            {"training.lr_scheduler_kwargs": kept or None},
        )
    else:
        _ = subject.learning_rate  # its failure is the finding


def warm_up_fits(subject: Subject) -> Iterator[Finding]:
    """The warm-up ends within the training, and leaves most of it."""
    steps, warm_up = subject.steps, subject.args.get_warmup_steps(subject.steps)
    course = subject.config.training.get("lr_scheduler_type")
    if (
        isinstance(course, Mapping)
        or course in WITHOUT_WARM_UP
        or warm_up <= LONG_WARM_UP * steps
        or steps < 2
    ):
        return
    accumulation, batches = subject.args.gradient_accumulation_steps, ""
    if accumulation > 1:
        batches = (
            f"; as batches, {accumulation} of which make an optimizer step, it would be "
            f"{warm_up / accumulation:g} steps"
        )
    peak = subject.args.learning_rate * min((steps - 1) / warm_up, 1.0)
    yield Finding(
        "critical" if peak < FLAT * subject.args.learning_rate else "warning",
        "training.warmup_steps",
        f"a warm-up of {warm_up} optimizer steps in a training of {steps}: the learning rate gets to "
        f"{peak:.1e} of "
        f"{subject.args.learning_rate:.1e}{batches}",
        (
            "while it warms up the learning rate is below what was chosen, and a schedule that counts "
            "batches "
            "stays near zero to the end"
        ),
        f"count optimizer steps, or give a share of them: warmup_steps: {SHARE:g}",
        {"training.warmup_steps": SHARE},
    )


def learning_rate_reaches_its_peak(subject: Subject) -> Iterator[Finding]:
    """The course gets to the learning rate that was chosen, and does not lie near zero for most of the
    training.
    """
    named = not isinstance(subject.config.training.get("lr_scheduler_type"), Mapping)
    steps, rate = subject.steps, subject.args.learning_rate
    if subject.learning_rate is None or (
        named and subject.args.get_warmup_steps(steps) > LONG_WARM_UP * steps
    ):
        return
    values = [subject.learning_rate(step) for step in range(0, steps, -(-steps // SAMPLES))]
    still = sum(value < FLAT * max(values) for value in values) / len(values)
    if named and max(values) < REACHED and steps > 1:
        yield Finding(
            "critical" if max(values) < FLAT else "warning",
            "training.lr_scheduler_kwargs",
            f"the learning rate gets to {rate * max(values):.1e} of {rate:.1e} in {steps} steps",
            "it never reaches what was chosen",
            "leave lr_scheduler_kwargs out, or make the schedule fit the steps",
        )
    elif still > LONG_WARM_UP and steps > 1:
        yield Finding(
            "warning",
            "training.lr_scheduler_type",
            f"in {still:.0%} of the {steps} steps the learning rate is below {FLAT:.0%} of its peak",
            "steps at a learning rate near zero take time and change nothing",
            "stretch the course over the training, or train for fewer steps",
        )


def learning_rate_in_range(subject: Subject) -> Iterator[Finding]:
    """The peak is one with which models of this size train.

    For AdamW the reference is GPT-3's table, 6e-4 for 125 M parameters to 1e-4 for 13 B (Brown et al. 2020,
    table 2.1), a power law of the size; 5 times that is too much for most trainings, a 300th hardly moves a
    weight.  Lion takes a fifth (Chen et al. 2023: a third to a tenth).  Of SGD only the order of magnitude is
    judged, of other optimizers nothing but that it is not 0.
    """
    rate = subject.args.learning_rate
    course = subject.config.training.get("lr_scheduler_type")
    if isinstance(course, Mapping) and subject.learning_rate is not None:
        rate *= max(
            subject.learning_rate(step) for step in range(0, subject.steps, -(-subject.steps // SAMPLES))
        )
    if rate <= 0:
        yield Finding(
            "critical",
            "training.learning_rate",
            f"{rate:g}",
            "no weight moves at a learning rate of 0",
            "give one, as 1e-4",
        )
        return
    optimizer = getattr(subject.args.optim, "value", str(subject.args.optim))
    if optimizer == "sgd":
        proposed, (low, high), rule = 0.05, SGD_RANGE, "SGD"
    elif "adamw" in optimizer or "lion" in optimizer or optimizer == "adafactor":
        size = subject.size
        base, at, power = REFERENCE_RATE
        proposed = base * (size / at) ** power * (LION if "lion" in optimizer else 1)
        low, high = (proposed * factor for factor in RATE_RANGE)
        rule = f"{optimizer} and {size / 1e6:.3g} M parameters"
    else:
        return
    if not low <= rate <= high:
        far = rate < low / FAR_OUT or rate > high * FAR_OUT
        rounded = float(f"{proposed:.1g}")
        yield Finding(
            "critical" if far else "warning",
            "training.learning_rate",
            f"a peak of {rate:.1e}; with {rule} trainings go well from {low:.0e} to {high:.0e}",
            "above it a training diverges, below it the weights hardly move before the steps are used up",
            f"try {rounded:g}",
            {"training.learning_rate": rounded} if far and not isinstance(course, Mapping) else None,
        )


def steps_are_not_batches(subject: Subject) -> Iterator[Finding]:
    """`max_steps` is not the number of batches, which accumulation makes fewer steps of."""
    args, (fewest, passes) = subject.args, IN_BATCHES
    if (
        args.max_steps <= 0
        or args.gradient_accumulation_steps == 1
        or (batches := subject.extent.batches) < fewest
    ):
        return
    if args.max_steps % batches == 0 and args.max_steps // batches <= passes:
        meant = args.max_steps // batches * -(-batches // args.gradient_accumulation_steps)
        yield Finding(
            "warning",
            "training.max_steps",
            f"{args.max_steps}, which is the number of batches in {args.max_steps // batches} "
            f"pass{'es' * (args.max_steps > batches)} over {subject.extent.rows} rows; "
            f"{args.gradient_accumulation_steps} batches make one "
            f"optimizer step, so the training would pass {subject.extent.passes:.1f} times over the text",
            (
                "steps are optimizer steps: counted in batches, a training and all its schedules are too "
                "long by "
                "the accumulation"
            ),
            f"write {meant}",
            {"training.max_steps": meant},
        )


def intervals_fit(subject: Subject) -> Iterator[Finding]:
    """The training is long enough to be logged and evaluated."""
    steps, args = subject.steps, subject.args
    every = {
        "logging": args.logging_steps if args.logging_strategy == "steps" else 0,
        "eval": (args.eval_steps or args.logging_steps) if args.eval_strategy == "steps" else 0,
    }
    lost = {
        "logging": "no figure of the training would be kept",
        "eval": "no held-out figure would be made while it trains",
    }
    for name, interval in every.items():
        if interval > steps:
            shorter = max(steps // {"logging": 20, "eval": 4}[name], 1)
            yield Finding(
                "warning",
                f"training.{name}_steps",
                f"{interval:g} in a training of {steps} steps",
                lost[name],
                f"write {shorter}",
                {f"training.{name}_steps": shorter},
            )
    if args.save_strategy == "steps" and args.save_steps > steps > 1:
        yield Finding(
            "note",
            "training.save_steps",
            f"{args.save_steps:g} in a training of {steps} steps",
            "a training that is stopped by force starts again from the beginning",
            "save more often, if it takes long",
        )


def batch_is_sensible(subject: Subject) -> Iterator[Finding]:
    """An optimizer step sees enough tokens for its gradient to mean something, and not the whole text."""
    args, extent, prepared = subject.args, subject.extent, subject.prepared
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    learned = prepared.notes.get("train_learned_tokens", prepared.notes["train_tokens"])
    tokens = rows * learned / max(prepared.notes["train_rows"], 1)
    is_of_rows = subject.config.task == "sequence-classification"
    what = "tokens" if is_of_rows else "learned tokens"
    where, seen = (
        "training.gradient_accumulation_steps",
        f"{rows} rows, {tokens:,.0f} {what}, make an optimizer step",
    )
    if rows > extent.rows:
        yield Finding(
            "warning",
            where,
            f"{seen}; the training text has {extent.rows} rows",
            "every step then sees the same text, and fewer rows than was meant",
            "lower batch size or accumulation",
        )
    elif is_of_rows and rows < FEW_ROWS:
        yield Finding(
            "warning",
            where,
            seen,
            f"below some {FEW_ROWS} rows, with a class each, the gradient is mostly chance",
            "raise batch size or accumulation",
        )
    elif tokens > MANY_TOKENS:
        yield Finding(
            "warning",
            where,
            seen,
            "so large a step learns little more than a smaller one would, and there are fewer",
            "lower batch size or accumulation",
        )
    elif tokens < FEW_TOKENS and not is_of_rows:
        yield Finding(
            "warning",
            where,
            seen,
            f"below some {FEW_TOKENS} tokens the gradient is mostly chance",
            f"raise batch size or accumulation by {-(-FEW_TOKENS // max(tokens, 1)):.0f} times",
        )


def phases_start(subject: Subject) -> Iterator[Finding]:
    """Every phase of the curriculum has an optimizer step."""
    start, steps = 0.0, subject.steps
    for number, phase in enumerate(subject.config.loss.curriculum or []):
        if not any(
            start <= step / steps < phase.until
            for step in range(int(start * steps), min(int(phase.until * steps) + 1, steps))
        ):
            yield Finding(
                "warning",
                f"loss.curriculum.{number}.until",
                (
                    f"phase {number + 1}, from {start:.4g} to {phase.until:.4g} of a training of {steps} "
                    "steps, "
                    "has no step"
                ),
                "its weights never hold",
                f"make it longer than {1 / steps:.2g} of the training, or leave it out",
            )
        start = phase.until


def feature_terms_start_when_meant(subject: Subject) -> Iterator[Finding]:
    """A feature term that a later phase brings in is off before it: a usual weight holds wherever a phase
    is silent.
    """
    loss = subject.config.loss
    for term in [name for name in loss.weights if name in FEATURE_TERMS]:
        named = [number for number, phase in enumerate(loss.curriculum or []) if term in phase.weights]
        if not named or named[0] == 0 or from_spec(loss.weights[term])(0.0) == 0:
            continue
        usual, later = loss.weights[term], from_spec(loss.curriculum[named[0]].weights[term])(1.0)
        if later < usual:  # fading out, which is a use of the usual weight
            continue
        silent = range(named[0])
        others = [set(loss.weights) - {term} | set(loss.curriculum[number].weights) for number in silent]
        change = {f"loss.curriculum.{number}.weights.{term}": 0 for number in silent}
        yield Finding(
            "warning",
            f"loss.curriculum.0.weights.{term}",
            (
                f"{term} comes in with phase {named[0] + 1}, at {later:g}, but phase 1 does not name it and "
                f"leaves it at {usual:g}"
            ),
            (
                "a phase that does not name a term leaves it at its usual weight, so the term acts from the "
                "first step on"
            ),
            f"write {term}: 0 in the weights of phase 1{f' to {named[0]}' * (named[0] > 1)}",
            change if all(others) else None,
        )


SCHEDULE_CHECKS = (
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
