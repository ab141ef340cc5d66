"""What the student-aware project alone has: terms on what goes on inside, two curricula, a router, a gate.

Its teacher and student read other tokens, so its terms become those for two vocabularies, which with one are
what they are there.
"""

from typing import Any

from kdlib.migration.table import Migration

INSIDE = {  # term, and whether it comes in with the second phase of the student-aware curriculum or the third
    "alpha_feature": ("hidden", True),
    "alpha_attention": ("attention", True),
    "alpha_layerwise": ("hidden", False),  # two compare hidden states, which is one term here: they are added
    "alpha_contrastive": ("contrastive", False),
}
AWARE = {"router_lr": "learning_rate", "load_balance_weight": "balance"}  # of teacher.experts.student_aware
ACROSS = {"kd": "projected_kl", "attention": "relational"}  # in the place of terms that need one vocabulary


def inside(made: Migration) -> None:
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


def temperature(made: Migration) -> None:
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


def experts(made: Migration) -> None:
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
