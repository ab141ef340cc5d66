"""Another project's settings as a config of ours, every key of theirs translated or listed.

Read are the JSON of the student-aware project (its weights, its two curricula, its top k), and the JSON, YAML
or flags of projects with one `alpha`.  What a key meant there is kept, not its name: `alpha` stands for the
weight of the teacher's term in some projects and of the cross-entropy in others, so it is asked which.
"""

from pathlib import Path
from typing import Any

from kdlib.config.import_table import AS_IT_IS, BY_MEANING, DTYPES, LEFT_OUT, by_name, read_settings
from kdlib.config.migration import TO_FILL_IN, Migration
from kdlib.config.run import parse
from kdlib.config.training_arguments import RESERVED, problem_with, scheduler_names, training_fields

OURS, REASONS, MEANT = by_name(AS_IT_IS), by_name(LEFT_OUT), by_name(BY_MEANING)
INSIDE = {  # term, and whether it comes in with the second phase of the student-aware curriculum or the third
    "alpha_feature": ("hidden", True),
    "alpha_attention": ("attention", True),
    "alpha_layerwise": ("hidden", False),  # two compare hidden states, which is one term here: they are added
    "alpha_contrastive": ("contrastive", False),
}


def migrated(
    path: str | Path,
    *,
    alpha_on: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    data: str | None = None,
) -> Migration:
    """Another project's settings as a config of ours that loads, with TO_FILL_IN where a name is missing.

    Args:
        path: JSON, YAML, or a text with command-line flags.
        alpha_on: `kd` or `ce`: the term that `alpha` weights there; the other gets 1 - alpha.
        teacher, student, data: what the file does not name, or names otherwise.

    Raises:
        ConfigError: unreadable; or values that contradict each other, that kdlib refuses, or that could mean
            two things.
    """
    made = Migration(str(path), read_settings(path))
    options = {"teacher.model": teacher, "student.from": student, "data.source": data}
    for key in made.theirs:
        if key not in MEANT:
            _plain(key, made, given={ours for ours, option in options.items() if option})
    for ours, option in options.items():
        origin = "given to kd import" if option else "the name"
        made.put(ours, option or made.values.get(ours, TO_FILL_IN), origin)
    _task(made)
    _weights(made, alpha_on)
    _inside(made)
    _temperature(made)
    _precision(made)
    if "task" not in made.values:
        made.put("data.packing", False, "a row holds one text there")
    if "training.eval_steps" in made.values and "training.eval_strategy" not in made.values:
        made.put("training.eval_strategy", "steps", "eval_steps")
    _stops(made)
    if "training.report_to" not in made.values:
        made.put("training.report_to", "none", "no tracker is named there")
    parse(made.nested(), name=made.name)
    return made


def _plain(key: str, made: Migration, given: set[str]) -> None:
    """One of their settings that is one of ours under another name, or none of ours."""
    value, ours = made.theirs[key], OURS.get(key)
    if not ours and key in training_fields() and key not in RESERVED:
        ours = f"training.{key}"
    if ours and key == "kd_top_k" and value == 0:
        made.put(ours, None, "kd_top_k: 0, the whole vocabulary")
    elif value is None:
        made.leave_out(key, "nothing is set")
    elif ours in given:
        made.leave_out(key, f"{ours} was given to kd import")
    elif ours == "training.lr_scheduler_type" and problem_with("lr_scheduler_type", value):
        made.leave_out(key, f"no schedule of that name; {ours} is one of {', '.join(scheduler_names())}")
    elif ours:
        made.put(ours, value, key)
    elif key.startswith(("comment", "_comment")):
        made.leave_out(key, "a remark")
    else:
        made.leave_out(key, REASONS.get(key) or RESERVED.get(key) or "kdlib has no such setting")


def _task(made: Migration) -> None:
    """A classification, where classes are counted or named; how many there are, the data says."""
    for key in made.named("task"):
        if made.theirs[key] is None:
            made.leave_out(key, "nothing is set")
        elif (count := made.number(key)) < 2 or count % 1:
            raise made.fault(key, f"found {made.theirs[key]!r}, needs the number of classes, 2 or more")
        else:
            made.put("task", "sequence-classification", f"{key}: {count:g} classes, which the data names")
    for path in sorted({"data.label", "data.labels"} & set(made.values)):
        made.put("task", "sequence-classification", path)


def _weights(made: Migration, alpha_on: str | None) -> None:
    """kd and ce: a weight and what it leaves of 1."""
    if alpha_on not in (None, "kd", "ce"):
        raise made.fault("--alpha-on", f"found {alpha_on!r}; it is kd or ce, the term that alpha weights")
    if alpha_on and "alpha" not in made.theirs:
        raise made.fault("--alpha-on", "is for a setting `alpha`, and there is none; leave it out")
    for key, on in (("alpha", alpha_on), ("alpha_kd", "kd")):
        if key not in made.theirs:
            continue
        share = made.number(key, most=1.0)
        rest = round(1 - share, 12)
        if on is None and share != rest:
            raise made.fault(
                key,
                f"found {share:g}, which can mean two things; say which: --alpha-on kd reads "
                f"{{kd: {share:g}, ce: {rest:g}}}, as soft-classification and question-answering projects "
                f"do, --alpha-on ce reads {{kd: {rest:g}, ce: {share:g}}}, as code and FSDP projects do; the "
                "project's own line `loss = alpha * ...` tells",
            )
        weights = {"kd": rest, "ce": share} if on == "ce" else {"kd": share, "ce": rest}
        made.put("loss.weights", weights, f"{key} on {on}, the rest on the other" if on else key)
    if "loss.weights" not in made.values:
        made.put("loss.weights", {"kd": 0.7, "ce": 0.3}, "not given there: kdlib's usual")


def _inside(made: Migration) -> None:
    """The terms on what goes on inside, their layers, and the student-aware project's three phases."""
    weights: dict[str, float] = {}
    early: dict[str, float] = {}
    for key in (key for key in INSIDE if key in made.theirs):
        (term, is_early), weight = INSIDE[key], made.number(key)
        if "task" in made.values:
            made.leave_out(key, "it compares the models token by token, and here rows are classified")
            continue
        weights[term] = round(weights.get(term, 0.0) + weight, 12)
        early[term] = early.get(term, 0.0) + is_early * weight
        made.replace("loss.weights", {**made.values["loss.weights"], **weights}, f"{term} from {key}")
    if "use_curriculum" in made.theirs:
        phases = [
            {"until": 0.3, "weights": dict.fromkeys(weights, 0.0)},
            {"until": 0.6, "ramp": 0.3, "weights": early},
            {"until": 1.0, "ramp": 0.4, "weights": weights},
        ]
        if made.is_on("use_curriculum") and any(weights.values()):
            made.put("loss.curriculum", phases, "use_curriculum: its three phases")
        else:
            made.put("loss.curriculum", None, "use_curriculum: no term comes in later")
    if layers := made.theirs.get("attention_layers"):
        origin = "attention_layers, here of every term on what goes on inside"
        made.put("loss.features", {"layers": {"last": layers}}, origin)
    elif "attention_layers" in made.theirs:
        made.leave_out("attention_layers", "no limit; loss.features.layers: even takes all")


def _temperature(made: Migration) -> None:
    """The temperature that falls in the student-aware project, and that of its contrastive term."""
    theirs, start = made.theirs, made.values.get("loss.temperature")
    switch = "use_temperature_curriculum"
    told = [key for key in (switch, "min_temperature") if key in theirs]
    falls = made.is_on(switch) if switch in theirs else bool(told)
    if falls and start is not None:
        end = theirs.get("min_temperature", 2.0)  # 2 where that project's file is silent
        made.replace("loss.temperature", {"linear": [start, end]}, ", ".join(told))
    else:
        for key in told:
            made.leave_out(key, "the temperature stands still")
    if "contrastive_temp" in theirs and "contrastive" in made.values["loss.weights"]:
        both = {"kd": made.values.get("loss.temperature", 2.0), "contrastive": theirs["contrastive_temp"]}
        made.replace("loss.temperature", both, "contrastive from contrastive_temp")
    elif "contrastive_temp" in theirs:
        made.leave_out("contrastive_temp", "there is no contrastive term")


def _precision(made: Migration) -> None:
    """The dtype of matrix products, which projects switch on by many names; and where figures are sent."""
    theirs, dtypes = made.theirs, by_name(DTYPES)

    def dtype_of(value: Any) -> Any:
        return dtypes.get(str(value).removeprefix("torch."), value)

    is_off = "use_amp" in theirs and not made.is_on("use_amp")
    for key in made.named("precision"):
        value = theirs[key]
        if key == "use_amp" and is_off:
            made.put("precision", "float32", "use_amp: false")
        elif key == "use_amp":
            origin = "use_amp" if "amp_dtype" in theirs else "use_amp: torch's usual mixed precision"
            made.put("precision", dtype_of(theirs.get("amp_dtype", "half")), origin)
        elif key in ("fp16", "bf16") and not made.is_on(key):
            made.leave_out(key, "it is off")
        elif is_off and key not in ("fp16", "bf16"):
            made.leave_out(key, "use_amp is off")
        else:
            made.put("precision", dtype_of(key if value is True else value), key)
    if "use_wandb" in theirs:
        made.put("training.report_to", "wandb" if made.is_on("use_wandb") else "none", "use_wandb")


def _stops(made: Migration) -> None:
    """Early stopping, where a patience is given and nothing switches it off."""
    theirs = made.theirs
    switches = [made.is_on(key) for key in made.named("early_stopping") if theirs[key] is not None]
    patient = any(theirs[key] is not None for key in made.named("early_stopping.patience"))
    why = "" if patient and all(switches) else "it is off" if patient else "no patience is given"
    if made.values.get("training.eval_strategy") in ("no", False):
        why = "nothing is evaluated there"
    for path in ("early_stopping.patience", "early_stopping.min_delta", "early_stopping"):
        for key in made.named(path):
            if why or theirs[key] is None:
                made.leave_out(key, why or "nothing is set")
            elif path == "early_stopping":
                made.put("early_stopping.patience", made.values["early_stopping.patience"], key)
            else:
                made.put(path, theirs[key], key)
    if "early_stopping.patience" in made.values and "training.eval_strategy" not in made.values:
        made.put("training.eval_strategy", "epoch", "early stopping needs evaluations")
