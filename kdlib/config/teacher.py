"""The teacher of a config: where it comes from, and how its experts are asked."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, model_serializer

from kdlib.config.sections import Section, number, refuse, whole
from kdlib.errors import nearest

AWARE = {"learning_rate": 1e-3, "balance": 0.01, "anchor": 0.1}
"""Of a student-aware router: Adam's step, and the weights of its balance and of its anchor."""
MODES = "topk, all, {augment: 2} or {student_aware: {learning_rate: 1e-3, balance: 0.01, anchor: 0.1}}"


def _experts(value: Any) -> Any:
    """`topk`, `all`, `{augment: draws}`, or `{student_aware: {…}}` with all its settings."""
    if value in ("topk", "all"):
        return value
    name, given = next(iter(value.items())) if isinstance(value, Mapping) and len(value) == 1 else (value, {})
    if name == "augment" and (draws := whole(given)) and draws > 1:
        return {"augment": draws}
    if name == "augment":
        raise ValueError(f"found {value!r}; augment is a number of draws, 2 or more, for each token")
    if name != "student_aware" or not isinstance(given, Mapping | None):
        hint = nearest(str(name), ["topk", "all", "augment", "student_aware"])
        raise ValueError(f"found {value!r}{hint}; it is {MODES}")
    return {"student_aware": _aware(given or {})}


def _aware(given: Mapping[Any, Any]) -> dict[str, float]:
    faults = []
    for key, found in given.items():
        worth = None if isinstance(found, bool) else number(found)
        if key not in AWARE:
            hint = nearest(str(key), AWARE)
            faults.append(f"student_aware has no {key!r}{hint}; it has {', '.join(AWARE)}")
        elif not isinstance(worth, int | float) or not 0 <= worth < float("inf"):
            faults.append(f"student_aware.{key}: found {found!r}; it is a number of 0 or more")
    refuse(faults)
    return {key: float(number(given.get(key, usual))) for key, usual in AWARE.items()}


class TeacherConfig(Section):
    """Where the teacher comes from: a hub id, a local folder, a .gguf file, or a built-in name."""

    model: str
    device: str | None = None  # of its own, as cuda:1; else it lies where the student does
    offload: bool = False  # with training.fsdp: in the CPU's memory, gathered layer by layer
    experts: Annotated[Any, BeforeValidator(_experts)] = "topk"  # while it teaches: kdlib.routing

    @model_serializer(mode="wrap")
    def _stated(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is off, so that older runs and trained teachers are known again."""
        return {name: value for name, value in dump(self).items() if value and value != "topk"}
