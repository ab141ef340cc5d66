"""Another project's settings as a config of ours, every key of theirs translated or listed.

What a key meant there is kept, not its name: `alpha` is the weight of the teacher's term in some projects and
of the cross-entropy in others, so it is asked which.  The student-aware project has two curricula and terms
on what goes on inside besides; its teacher and student read other tokens, so its terms become those for two
vocabularies, which with one are what they are there.
"""

from pathlib import Path
from typing import Any

from kdlib.config.run import parse
from kdlib.config.sections import flow
from kdlib.config.training_arguments import RESERVED, problem_with, scheduler_names, training_fields
from kdlib.migration.table import DTYPES, MEANT, OURS, REASONS, TO_FILL_IN, Migration, read_settings

INSIDE = {  # term, and whether it comes in with the second phase of the student-aware curriculum or the third
    "alpha_feature": ("hidden", True),
    "alpha_attention": ("attention", True),
    "alpha_layerwise": ("hidden", False),  # two compare hidden states, which is one term here: they are added
    "alpha_contrastive": ("contrastive", False),
}
AWARE = {"router_lr": "learning_rate", "load_balance_weight": "balance"}  # of teacher.experts.student_aware
ACROSS = {"kd": "projected_kl", "attention": "relational"}  # in the place of terms that need one vocabulary


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
        teacher, student, data: in place of what the file names.

    Raises:
        ConfigError: unreadable; or values that contradict each other, are refused, or could mean two things.
    """
    made = Migration(str(path), read_settings(path))
    options = {"teacher.model": teacher, "student.from": student, "data.source": data}
    given = {ours for ours, option in options.items() if option}
    for key, value in list(made.theirs.items()):
        if value is None:
            made.leave_out(key, "nothing is set")
            del made.theirs[key]
        elif key not in MEANT:
            _plain(key, made, given)
    for ours, option in options.items():
        origin = "given to kd import" if option else "the name"
        made.put(ours, option or made.values.get(ours, TO_FILL_IN), origin)
    _task(made)
    _weights(made, alpha_on)
    _inside(made)
    _temperature(made)
    _experts(made)
    _precision(made)
    _stops(made)
    made.put_usual("data.packing", False, "a row holds one text there", unless="task")
    made.put_usual("training.report_to", "none", "no tracker is named there")
    parse({}, made.values, name=made.name)
    return made


def _plain(key: str, made: Migration, given: set[str]) -> None:
    """One of their settings that is one of ours under another name, or none of ours."""
    value, is_training = made.theirs[key], key in training_fields() and key not in RESERVED
    ours = OURS.get(key) or (f"training.{key}" if is_training else None)
    if ours in given:
        made.leave_out(key, f"{ours} was given to kd import")
    elif ours == "training.lr_scheduler_type" and problem_with("lr_scheduler_type", value):
        made.leave_out(key, f"no schedule of that name; {ours} is one of {', '.join(scheduler_names())}")
    elif key == "kd_top_k" and value == 0:
        made.put("loss.top_k", None, "kd_top_k: 0, the whole vocabulary")
    elif ours:
        made.put(ours, value, key)
    elif key.startswith(("comment", "_comment")):
        made.leave_out(key, "a remark")
    else:
        made.leave_out(key, REASONS.get(key) or RESERVED.get(key) or "kdlib has no such setting")


def _task(made: Migration) -> None:
    """A classification, where classes are counted or named; how many there are, the data says."""
    for key in made.named("task"):
        if (count := made.number(key)) < 2 or count % 1:
            raise made.fault(key, f"found {made.theirs[key]!r}, needs the number of classes, 2 or more")
        made.put("task", "sequence-classification", f"{key}: {count:g} classes, which the data names")
    for path in sorted({"data.label", "data.labels"} & set(made.values)):
        made.put("task", "sequence-classification", path)


def _weights(made: Migration, alpha_on: str | None) -> None:
    """kd and ce: a weight and what it leaves of 1."""
    if alpha_on not in (None, "kd", "ce"):
        raise made.fault("--alpha-on", f"found {alpha_on!r}; it is kd or ce, the term that alpha weights")
    if alpha_on and "alpha" not in made.theirs:
        raise made.fault("--alpha-on", "is for a setting `alpha`, and there is none; leave it out")
    for key in sorted({"alpha", "alpha_kd"} & set(made.theirs)):
        on, share = alpha_on if key == "alpha" else "kd", made.number(key, most=1.0)
        rest = round(1 - share, 12)
        on_kd, on_ce = {"kd": share, "ce": rest}, {"kd": rest, "ce": share}
        if on is None and share != rest:
            raise made.fault(
                key,
                f"found {share:g}, which can mean two things; say which: --alpha-on kd reads {flow(on_kd)}, "
                "as soft-classification and question-answering projects do, --alpha-on ce reads "
                f"{flow(on_ce)}, as code and FSDP projects do; the project's own line `loss = alpha * ...` "
                "tells",
            )
        origin = f"{key} on {on}, the rest on the other" if on else key
        made.put("loss.weights", on_ce if on == "ce" else on_kd, origin)
    made.put_usual("loss.weights", {"kd": 0.7, "ce": 0.3}, "not given there: kdlib's usual")


def _inside(made: Migration) -> None:
    """The terms on what goes on inside, their layers, and the student-aware project's three phases."""
    weights: dict[str, float] = {}
    early: dict[str, float] = {}
    for key in (key for key in INSIDE if key in made.theirs):
        (term, is_early), weight = INSIDE[key], made.number(key)
        if "task" in made.values:
            made.leave_out(key, "it compares the models token by token, and here rows are classified")
        else:
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
    switch, lowest = "use_temperature_curriculum", "min_temperature"
    told, start = [key for key in (switch, lowest) if key in made.theirs], made.values.get("loss.temperature")
    falls = made.is_on(switch) if switch in told else bool(told)
    if falls and start is not None:
        end = made.theirs.get(lowest, 2.0)  # 2 where that project's file is silent
        made.replace("loss.temperature", {"linear": [start, end]}, ", ".join(told))
    else:
        for key in told:
            made.leave_out(key, "the temperature stands still")
    if (key := "contrastive_temp") in made.theirs:
        if "contrastive" in made.values["loss.weights"]:
            both = {"kd": made.values.get("loss.temperature", 2.0), "contrastive": made.theirs[key]}
            made.replace("loss.temperature", both, f"contrastive from {key}")
        else:
            made.leave_out(key, "there is no contrastive term")


def _experts(made: Migration) -> None:
    """The student-aware router: the teacher's learns from the student, and a gate chooses states to match."""
    aware, routed = made.named("teacher.experts"), made.named("loss.features.layers")
    is_its = bool(aware or {"num_experts", "initial_top_k", "final_top_k"} & {*made.theirs})
    if "task" in made.values or not is_its:
        for key in [*aware, *routed]:
            made.leave_out(key, "it is of a router that learns from the student, and none is asked for")
        return
    if aware:
        settings = {AWARE[key]: made.number(key) for key in aware}
        made.put("teacher.experts", {"student_aware": settings}, ", ".join(aware))
    if not made.values["loss.weights"].get("hidden"):
        for key in routed:
            made.leave_out(key, "it is of a gate for hidden states, and no term compares these")
    elif routed:
        if made.values.pop("loss.features", None):
            del made.origins["loss.features"]
            made.leave_out("attention_layers", "a gate looks at all layers for the hidden term")
        made.put("loss.features", {"layers": {"route": _route(made, routed)}}, ", ".join(routed))
    _across(made)


def _route(made: Migration, keys: list[str]) -> dict[str, Any]:
    """A gate's top-k, which may grow, and its noise."""
    given = {key: made.theirs[key] for key in keys}
    ends = [given[key] for key in ("initial_top_k", "final_top_k") if key in given] * 2
    if "top_k" in given and ends:
        made.leave_out("top_k", "the gate's grows, as initial_top_k and final_top_k say")
    ends = ends or [given[key] for key in ("top_k",) if key in given] * 2
    top_k = {"top_k": ends[0] if ends[0] == ends[1] else {"linear": ends[:2]}} if ends else {}
    return {**top_k, **({"noise": given["noise_std"]} if "noise_std" in given else {})}


def _across(made: Migration) -> None:
    """Terms of one vocabulary become those that two have."""

    def renamed(weights: dict[str, Any]) -> dict[str, Any]:
        return {ACROSS.get(name, name): weight for name, weight in weights.items()}

    there = [name for name in ACROSS if name in made.values["loss.weights"]]
    places = ", ".join(f"{ACROSS[name]} in the place of {name}" for name in there)
    made.replace("loss.weights", renamed(made.values["loss.weights"]), f"{places}: for two vocabularies")
    if phases := made.values.get("loss.curriculum"):
        moved = [{**each, "weights": renamed(each["weights"])} for each in phases]
        made.replace("loss.curriculum", moved, "likewise")
    if isinstance(by_term := made.values.get("loss.temperature"), dict) and "kd" in by_term:
        made.replace("loss.temperature", renamed(by_term), "likewise")


def _precision(made: Migration) -> None:
    """The dtype of matrix products, which projects switch on by many names; and where figures are sent."""
    theirs = made.theirs
    is_off = "use_amp" in theirs and not made.is_on("use_amp")
    for key in made.named("precision"):
        value, origin = theirs[key], key
        if key in ("fp16", "bf16"):
            if not made.is_on(key):
                made.leave_out(key, "it is off")
                continue
            value = key
        elif key == "use_amp":
            value = "float32" if is_off else theirs.get("amp_dtype", "float16")
            origin = "use_amp: false" if is_off else "use_amp: mixed precision"
        elif is_off:
            made.leave_out(key, "use_amp is off")
            continue
        made.put("precision", DTYPES.get(str(value).removeprefix("torch."), value), origin)
    if "use_wandb" in theirs:
        made.put("training.report_to", "wandb" if made.is_on("use_wandb") else "none", "use_wandb")


def _stops(made: Migration) -> None:
    """When to evaluate, and early stopping, where a patience is given and nothing switches it off."""
    switches, patience = made.named("early_stopping"), made.named("early_stopping.patience")
    is_off = False in [made.is_on(key) for key in switches]
    why = "no patience is given" if not patience else "it is off" if is_off else ""
    if made.values.get("training.eval_strategy") in ("no", False):
        why = "nothing is evaluated there"
    for key in [*patience, *made.named("early_stopping.min_delta"), *switches]:
        if why:
            made.leave_out(key, why)
        elif key in switches:
            made.put("early_stopping.patience", made.values["early_stopping.patience"], key)
        else:
            made.put(MEANT[key], made.theirs[key], key)
    if "training.eval_steps" in made.values:
        made.put_usual("training.eval_strategy", "steps", "eval_steps")
    if patience and not why:
        made.put_usual("training.eval_strategy", "epoch", "early stopping needs evaluations")
