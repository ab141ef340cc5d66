"""Another project's settings as a config of ours, every key of theirs translated or listed.  Imports no
torch.

Read are the JSON of the student-aware project (its weights, its two curricula, its top k), and the JSON, YAML
or flags of projects with one `alpha`.  What a key meant there is kept, not its name: `alpha` stands for the
weight of the teacher's term in some projects and of the cross-entropy in others, so it is asked which.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kdlib.config.import_table import COUNTS, HALVES, OURS, REASONS, STOP_SWITCHES, STOPS, read_settings
from kdlib.config.run import parse, with_override
from kdlib.config.sections import number
from kdlib.config.training_arguments import RESERVED, problem_with, scheduler_names, training_fields
from kdlib.errors import ConfigError, printable

TO_FILL_IN = "TO-BE-FILLED-IN"
SECTIONS = ("task", "seed", "precision", "teacher", "student", "data", "loss", "training", "early_stopping")
INSIDE = {
    "alpha_feature": "hidden",
    "alpha_attention": "attention",
    "alpha_layerwise": "hidden",
    "alpha_contrastive": "contrastive",
}
"""The terms on what goes on inside.  Both of the first and third compare hidden states, which is one term
here: they are added.
"""
# come in with the second phase of their curriculum, the others with the third
EARLY = ("alpha_feature", "alpha_attention")
SPECIAL = {
    "alpha",
    "alpha_kd",
    *INSIDE,
    "use_curriculum",
    "attention_layers",
    "min_temperature",
    "use_temperature_curriculum",
    *COUNTS,
    *STOPS,
    *STOP_SWITCHES,
    "contrastive_temp",
    "fp16",
    "bf16",
    "precision",
    "mixed_precision",
    "dtype",
    "amp_dtype",
    "use_amp",
    "use_wandb",
}


@dataclass
class Migration:
    """A config of ours in the making: each value with where it came from, and what became of everything
    else.
    """

    name: str  # the file it came from
    values: dict[str, Any] = field(default_factory=dict)  # by path: section.key
    origins: dict[str, str] = field(default_factory=dict)  # likewise
    left_out: list[str] = field(default_factory=list)  # `key = value: why`

    @property
    def missing(self) -> list[str]:
        """The settings that only a person can name."""
        return [path for path, value in self.values.items() if value == TO_FILL_IN]

    def put(self, path: str, value: Any, origin: str) -> None:
        """Set one of our values; a second origin must agree with the first."""
        origin = _one_line(origin)
        if path in self.values and self.values[path] != value:
            raise self.fault(
                path,
                f"found {self.values[path]!r} ({self.origins[path]}) and {value!r} ({origin}); leave one out",
            )
        self.origins[path] = f"{self.origins[path]}, {origin}" if path in self.values else origin
        self.values[path] = value

    def replace(self, path: str, value: Any, origin: str) -> None:
        """Put a value in the place of one that it was made from."""
        self.values[path], self.origins[path] = (
            value,
            ", ".join([*filter(None, [self.origins.get(path)]), origin]),
        )

    def leave_out(self, key: str, value: Any, why: str) -> None:
        self.left_out.append(f"{_one_line(key)} = {_one_line(value)}: {why}")

    def fault(self, key: str, what: str) -> ConfigError:
        return ConfigError(f"{self.name}: {_one_line(key)}: {what}")

    def nested(self) -> dict[str, Any]:
        """The config as plain data."""
        raw: dict[str, Any] = {}
        for path, value in self.values.items():
            raw = with_override(raw, path, value, self.name)
        return raw

    def as_yaml(self) -> str:
        """The config, each line with its origin, and before it what must be filled in and what was left
        out.
        """
        lines = [
            (
                f"# Made by `kd import` from {_one_line(self.name)}; each comment says which of its settings "
                "a "
                "value comes from."
            )
        ]
        lines += [f"# To be filled in: {', '.join(self.missing)}"] * bool(self.missing)
        lines += [
            "# Without a counterpart here, so left out:",
            *(f"#   {line}" for line in self.left_out),
        ] * bool(self.left_out)
        section = None
        for path in sorted(self.values, key=lambda path: SECTIONS.index(path.partition(".")[0])):
            head, _, key = path.partition(".")
            lines += ([""] if head != section else []) + ([f"{head}:"] if key and head != section else [])
            lines.append(f"{f'  {key}' if key else head}: {_flow(self.values[path])}  # {self.origins[path]}")
            section = head
        return "\n".join(lines) + "\n"

    def write(self, output: Path) -> None:
        """`as_yaml` into a new file.

        Raises:
            ConfigError: it is there already, or cannot be written.
        """
        try:
            with output.open("x", encoding="utf-8") as file:
                file.write(self.as_yaml())
        except FileExistsError:
            raise ConfigError(f"{output}: is there already; name a new file") from None
        except OSError as error:
            raise ConfigError(f"{output}: cannot be written: {error}") from None


def migrated(
    path: str | Path,
    *,
    alpha_on: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    data: str | None = None,
) -> Migration:
    """Another project's settings, translated; a config of ours that loads, with TO_FILL_IN where a name is
    missing.

    Args:
        path: JSON, YAML, or a text with command-line flags.
        alpha_on: `kd` or `ce`: the term that `alpha` weights there; the other gets 1 - alpha.
        teacher, student, data: what the file does not name, or names otherwise.

    Raises:
        ConfigError: unreadable; or values that contradict each other, that kdlib refuses, or that could mean
            two things.
    """
    theirs, made = read_settings(path), Migration(str(path))
    options = {"teacher.model": teacher, "student.from": student, "data.source": data}
    for key, value in theirs.items():
        if key not in SPECIAL:
            _plain(key, value, made, given={ours for ours, option in options.items() if option})
    for ours, option in options.items():
        made.put(
            ours, option or made.values.get(ours, TO_FILL_IN), "given to kd import" if option else "the name"
        )
    special = {key: value for key, value in theirs.items() if key in SPECIAL}
    _task(special, made)
    _weights(special, made, alpha_on)
    _inside(special, made)
    _temperature(special, made)
    _precision(special, made)
    if "task" not in made.values:
        made.put("data.packing", False, "a row holds one text there")
    if "training.eval_steps" in made.values and "training.eval_strategy" not in made.values:
        made.put("training.eval_strategy", "steps", "eval_steps")
    _stops(special, made)
    if "training.report_to" not in made.values:
        made.put("training.report_to", "none", "no tracker is named there")
    parse(made.nested(), name=made.name)
    return made


def _plain(key: str, value: Any, made: Migration, given: set[str]) -> None:
    """One of their settings that is one of ours under another name, or none of ours."""
    ours = OURS.get(key) or (f"training.{key}" if key in training_fields() and key not in RESERVED else None)
    if key == "kd_top_k" and value == 0:
        made.put(ours, None, "kd_top_k: 0, the whole vocabulary")
    elif value is None:
        made.leave_out(key, value, "nothing is set")
    elif ours in given:
        made.leave_out(key, value, f"{ours} was given to kd import")
    elif ours == "training.lr_scheduler_type" and problem_with("lr_scheduler_type", value):
        made.leave_out(
            key,
            value,
            f"no schedule of that name; training.lr_scheduler_type is one of {', '.join(scheduler_names())}",
        )
    elif ours:
        made.put(ours, value, key)
    elif key.startswith(("comment", "_comment")):
        made.leave_out(key, value, "a remark")
    else:
        made.leave_out(key, value, REASONS.get(key) or RESERVED.get(key) or "kdlib has no such setting")


def _task(theirs: Mapping[str, Any], made: Migration) -> None:
    """A classification, where classes are counted or named; how many there are, the data says."""
    for key in (key for key in COUNTS if key in theirs):
        if theirs[key] is None:
            made.leave_out(key, None, "nothing is set")
        elif (count := _number(theirs, key, made)) < 2 or count % 1:
            raise made.fault(key, f"found {theirs[key]!r}, needs the number of classes, 2 or more")
        else:
            made.put("task", "sequence-classification", f"{key}: {count:g} classes, which the data names")
    for path in sorted({"data.label", "data.labels"} & set(made.values)):
        made.put("task", "sequence-classification", path)


def _weights(theirs: Mapping[str, Any], made: Migration, alpha_on: str | None) -> None:
    """kd and ce: a weight and what it leaves of 1."""
    if alpha_on not in (None, "kd", "ce"):
        raise made.fault("--alpha-on", f"found {alpha_on!r}; it is kd or ce, the term that alpha weights")
    if alpha_on and "alpha" not in theirs:
        raise made.fault("--alpha-on", "is for a setting `alpha`, and there is none; leave it out")
    for key, on in (("alpha", alpha_on), ("alpha_kd", "kd")):
        if key not in theirs:
            continue
        share = _number(theirs, key, made, most=1.0)
        rest = round(1 - share, 12)
        if on is None and share != rest:
            raise made.fault(
                key,
                (
                    f"found {share:g}, which can mean two things; say which: --alpha-on kd reads {{kd: "
                    f"{share:g}, ce: {rest:g}}}, as "
                    f"soft-classification and question-answering projects do, --alpha-on ce reads {{kd: "
                    f"{rest:g}, ce: {share:g}}}, as code "
                    "and FSDP projects do; the project's own line `loss = alpha * ...` tells"
                ),
            )
        weights = {"kd": rest, "ce": share} if on == "ce" else {"kd": share, "ce": rest}
        made.put("loss.weights", weights, f"{key} on {on}, the rest on the other" if on else key)
    if "loss.weights" not in made.values:
        made.put("loss.weights", {"kd": 0.7, "ce": 0.3}, "not given there: kdlib's usual")


def _inside(theirs: Mapping[str, Any], made: Migration) -> None:
    """The terms on what goes on inside, their layers, and the student-aware project's three phases."""
    found = {key: _number(theirs, key, made) for key in INSIDE if key in theirs}
    for key in [key for key in found if "task" in made.values]:
        made.leave_out(
            key, found.pop(key), "it compares the models token by token, and here rows are classified"
        )
    weights, early = {}, {}
    for key, weight in found.items():
        term = INSIDE[key]
        weights[term] = round(weights.get(term, 0.0) + weight, 12)
        early[term] = weight if key in EARLY else early.get(term, 0.0)
    if found:
        told = [f"{INSIDE[key]} from {key}" for key in found]
        made.replace("loss.weights", {**made.values["loss.weights"], **weights}, ", ".join(told))
    if "use_curriculum" in theirs:
        if _switch(theirs, "use_curriculum", made) and any(weights.values()):
            phases = [
                {"until": 0.3, "weights": dict.fromkeys(weights, 0.0)},
                {"until": 0.6, "ramp": 0.3, "weights": early},
                {"until": 1.0, "ramp": 0.4, "weights": weights},
            ]
            made.put("loss.curriculum", phases, "use_curriculum: its three phases")
        else:
            made.put("loss.curriculum", None, "use_curriculum: no term comes in later")
    if layers := theirs.get("attention_layers"):
        made.put(
            "loss.features",
            {"layers": {"last": layers}},
            "attention_layers, here of every term on what goes on inside",
        )
    elif "attention_layers" in theirs:
        made.leave_out("attention_layers", layers, "no limit; loss.features.layers: even takes all")


def _temperature(theirs: Mapping[str, Any], made: Migration) -> None:
    """The temperature's course in the student-aware project, and that of its contrastive term."""
    start = made.values.get("loss.temperature")
    falls = (
        _switch(theirs, "use_temperature_curriculum", made)
        if "use_temperature_curriculum" in theirs
        else "min_temperature" in theirs
    )
    for key in ("use_temperature_curriculum", "min_temperature"):
        if key in theirs and not (falls and start is not None):
            made.leave_out(key, theirs[key], "the temperature stands still")
    if falls and start is not None:
        end = theirs.get("min_temperature", 2.0)  # 2 where that project's file is silent
        told = [key for key in ("use_temperature_curriculum", "min_temperature") if key in theirs]
        made.replace("loss.temperature", {"linear": [start, end]}, ", ".join(told))
    if "contrastive_temp" in theirs and "contrastive" in made.values["loss.weights"]:
        usual = made.values.get("loss.temperature", 2.0)
        made.replace(
            "loss.temperature",
            {"kd": usual, "contrastive": theirs["contrastive_temp"]},
            "contrastive from contrastive_temp",
        )
    elif "contrastive_temp" in theirs:
        made.leave_out("contrastive_temp", theirs["contrastive_temp"], "there is no contrastive term")


def _precision(theirs: Mapping[str, Any], made: Migration) -> None:
    """The dtype of matrix products, which projects switch on by many names; and where figures are sent."""
    mixed = "use_amp" not in theirs or _switch(theirs, "use_amp", made)
    if not mixed:
        made.put("precision", "float32", "use_amp: false")
    elif "use_amp" in theirs and "amp_dtype" not in theirs:
        made.put("precision", "float16", "use_amp: torch's usual mixed precision")
    elif "use_amp" in theirs:
        made.put(
            "precision",
            HALVES.get(str(theirs["amp_dtype"]).removeprefix("torch."), theirs["amp_dtype"]),
            "use_amp",
        )
    for key in ("precision", "mixed_precision", "dtype", "amp_dtype"):
        if key in theirs and mixed:
            made.put("precision", HALVES.get(str(theirs[key]).removeprefix("torch."), theirs[key]), key)
        elif key in theirs:
            made.leave_out(key, theirs[key], "use_amp is off")
    for key in ("fp16", "bf16"):
        if key in theirs and _switch(theirs, key, made):
            made.put("precision", HALVES[key], key)
        elif key in theirs:
            made.leave_out(key, theirs[key], "it is off")
    if "use_wandb" in theirs:
        made.put("training.report_to", "wandb" if _switch(theirs, "use_wandb", made) else "none", "use_wandb")


def _stops(theirs: Mapping[str, Any], made: Migration) -> None:
    """Early stopping, where a patience is given and nothing switches it off."""
    switches = [_switch(theirs, key, made) for key in STOP_SWITCHES if theirs.get(key) is not None]
    patient = any(theirs.get(key) is not None for key, ours in STOPS.items() if ours == "patience")
    why = "" if patient and all(switches) else "it is off" if patient else "no patience is given"
    if made.values.get("training.eval_strategy") in ("no", False):
        why = "nothing is evaluated there"
    for key in (key for key in (*STOPS, *STOP_SWITCHES) if key in theirs):
        if why or theirs[key] is None:
            made.leave_out(key, theirs[key], why or "nothing is set")
        else:
            ours = f"early_stopping.{STOPS.get(key, 'patience')}"
            made.put(ours, theirs[key] if key in STOPS else made.values[ours], key)
    if "early_stopping.patience" in made.values and "training.eval_strategy" not in made.values:
        made.put("training.eval_strategy", "epoch", "early stopping needs evaluations")


def _number(theirs: Mapping[str, Any], key: str, made: Migration, most: float = float("inf")) -> float:
    try:
        found = number(theirs[key])
    except ValueError:  # true or false
        found = None
    if not isinstance(found, (int, float)) or not 0 <= found <= most or found == float("inf"):
        raise made.fault(
            key, f"found {theirs[key]!r}, needs a number {'from 0 to 1' if most == 1 else 'of 0 or more'}"
        )
    return float(found)


def _switch(theirs: Mapping[str, Any], key: str, made: Migration) -> bool:
    if not isinstance(theirs[key], bool):
        raise made.fault(key, f"found {theirs[key]!r}, needs true or false")
    return theirs[key]


def _one_line(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value))


def _flow(value: Any) -> str:
    """A value as one line of YAML."""
    style = {"default_flow_style": True, "sort_keys": False, "width": float("inf")}
    text = yaml.safe_dump([value], allow_unicode=True, **style).strip()
    return (text if text.isprintable() else yaml.safe_dump([value], default_style='"', **style).strip())[1:-1]
