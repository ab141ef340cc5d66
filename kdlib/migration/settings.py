"""Another project's settings as a config of ours, every key of theirs translated or listed.

What a key meant there is kept, not its name: `alpha` is the weight of the teacher's term in some projects and
of the cross-entropy in others, so it is asked which.
"""

import json
from pathlib import Path

from kdlib.config.data import HUB_IDS
from kdlib.config.run import parse
from kdlib.config.sections import flow
from kdlib.config.task_rules import CLASSES, QUESTIONS
from kdlib.config.training_arguments import RESERVED, problem_with, scheduler_names, training_fields
from kdlib.migration.student_aware import experts, inside, temperature
from kdlib.migration.table import DTYPES, MEANT, OURS, REASONS, TO_FILL_IN, Migration, read_settings


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
    _divergence(made)
    inside(made)
    temperature(made)
    experts(made)
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
    """A classification, where classes are counted or named; how many there are, the data says.

    Else the data tells: a set that is known to have classes, or the columns of a file that is here.
    """
    for key in made.named("task"):
        if (count := made.number(key)) < 2 or count % 1:
            raise made.fault(key, f"found {made.theirs[key]!r}, needs the number of classes, 2 or more")
        made.put("task", CLASSES.name, f"{key}: {count:g} classes, which the data names")
    for path in sorted({"data.label", "data.labels"} & set(made.values)):
        made.put("task", CLASSES.name, path)
    source = str(made.values["data.source"])
    if hub := HUB_IDS.get(source.lower().rpartition("/")[2]):
        if "/" not in source:
            made.replace("data.source", hub, "its name on the hub")
        made.put_usual("task", CLASSES.name, f"{hub} has classes")
        if hub == "fancyzhx/dbpedia_14":
            made.put_usual("data.text", ["title", "content"], "its columns")
    columns = _columns(Path(source).expanduser())
    if {"question", "choices", "options", "messages", "response", "answer", "completion"} & columns:
        made.put_usual("task", QUESTIONS.name, f"the columns of {Path(source).name}")
    elif "label" in columns:
        made.put_usual("task", CLASSES.name, f"the columns of {Path(source).name}")


def _columns(path: Path) -> set[str]:
    """What a JSONL file that is here has in its first row; nothing where there is none."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            row = json.loads(file.readline(2**20)) if path.suffix == ".jsonl" else {}
    except (OSError, ValueError):
        return set()
    return set(row) if isinstance(row, dict) else set()


def _weights(made: Migration, alpha_on: str | None) -> None:
    """kd and ce: a weight and what it leaves of 1; what is learned from the teacher's answers alone is ce."""
    if alpha_on not in (None, "kd", "ce"):
        raise made.fault("--alpha-on", f"found {alpha_on!r}; it is kd or ce, the term that alpha weights")
    if alpha_on and "alpha" not in made.theirs:
        raise made.fault("--alpha-on", "is for a setting `alpha`, and there is none; leave it out")
    if _answers_alone(made):
        return
    for key in sorted({"alpha", "alpha_kd", "kd_alpha"} & set(made.theirs)):
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


def _answers_alone(made: Migration) -> bool:
    """`distillation_type`: output (of rows that a teacher wrote), logit, or hybrid; whether the first."""
    key, kinds = "distillation_type", {"output": {"ce": 1.0}, "logit": {"kd": 1.0}, "hybrid": None}
    if key not in made.theirs:
        return False
    kind = str(found := made.theirs[key]).lower().removesuffix("s")
    if kind not in kinds:
        raise made.fault(key, f"found {found!r}; it is one of {', '.join(kinds)}")
    if weights := kinds[kind]:
        for other in sorted({"alpha", "alpha_kd", "kd_alpha"} & set(made.theirs)):
            made.leave_out(other, f"{key} is {found}: one term alone")
            del made.theirs[other]
        made.put("loss.weights", weights, f"{key}: {found}")
    if kind == "output":
        made.values.pop("teacher.model", None)
        made.put("teacher", None, f"{key}: {found}; the rows have its answers (kd generate makes them)")
    return kind == "output"


def _divergence(made: Migration) -> None:
    """GKD's beta: forward KL at 0, reverse KL at 1."""
    for key in made.named("loss.divergence"):
        beta = made.number(key, most=1.0)
        ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
        there = f"{key} of TRL's GKD, whose loss is this times {beta * (1 - beta):.3g}"
        origin = key if beta in ends else there
        made.put("loss.divergence", ends.get(beta, {"generalized_jsd": {"beta": beta}}), origin)


def _precision(made: Migration) -> None:
    """The dtype of matrix products, which projects switch on by many names; and where figures are sent."""
    theirs = made.theirs
    is_off = "use_amp" in theirs and not made.is_on("use_amp")
    for key in made.named("precision"):
        value, origin = theirs[key], key
        if key in ("fp16", "bf16"):
            if value != "auto" and not made.is_on(key):
                made.leave_out(key, "it is off")
                continue
            value = value if value == "auto" else key
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
