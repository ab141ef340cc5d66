"""The terms of a loss by their names, and which of them has what; forms of settings that stand alone."""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any


def statements(package: str, file: str) -> list[ast.stmt]:
    """A module of a package, read and not imported, so that torch stays unloaded."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(package)
    return ast.parse(Path(spec.origin).with_name(file).read_text(encoding="utf-8")).body


DIVERGENCES = {
    node.name: tuple(option.arg for option in node.args.kwonlyargs)
    for node in statements("kdlib.losses", "divergences.py")
    if isinstance(node, ast.FunctionDef)
    and any(ast.unparse(mark).startswith("divergence(") for mark in node.decorator_list)
}
"""{name: options} of those that kdlib.losses.divergences marks as such; importing it would load torch."""
FEATURE_TERMS = ("hidden", "attention", "relational", "contrastive")
"""The terms on what goes on inside, token by token: those of kdlib.losses.features."""
ROUTE_WEIGHTS = {"route_balance": 0.01, "route_entropy": 0.001}
"""The terms of a gate's own, with the weights that they have where hidden states are routed, unless told."""
GATED = ("hidden", *ROUTE_WEIGHTS)
"""The terms that a gate gives."""
SPAN_TERMS = ("span_kl", "projected_kl", "alm", "uld")
"""The terms of a teacher with another tokenizer: those of kdlib.losses.alignment."""
ROUTER = "router_aux"
"""The term of a student with experts: the auxiliary loss by which its router uses them evenly."""
TERM_NAMES = ("kd", "ce", *DIVERGENCES, *SPAN_TERMS, *FEATURE_TERMS, *ROUTE_WEIGHTS, ROUTER)
FOR_ITSELF = {"contrastive": 0.1, "alm": 100.0}
"""Terms whose temperature is none of soft targets: what is given for all is not meant for them."""
TEMPERATURES = {**dict.fromkeys(("kd", *DIVERGENCES, *SPAN_TERMS), 2.0), **FOR_ITSELF}
"""The terms that have a temperature, with the one they take unless told otherwise."""

COOLEST, HOTTEST = 0.01, 100.0
"""The temperatures that float32 can carry: at 1000 a KL is smaller than the rounding of a probability."""


def check_temperature(*temperatures: float) -> None:
    """
    Raises:
        ValueError: one of them is none that float32 can carry.
    """
    for found in temperatures:
        if not COOLEST <= found <= HOTTEST:
            between = f"from {COOLEST:g} to {HOTTEST:g}"
            raise ValueError(f"the temperature must stay {between}, found {found:g}; usual values are 1 to 4")


def compiled(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"found {value!r}; it is auto, true or false")
    return value


def layers_or(*words: str) -> Callable[[Any], Any]:
    """Takes one of the words, or a list of different layer numbers."""

    def checked(value: Any) -> Any:
        is_list = isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value)
        if not (value in words or (is_list and len(set(value)) == len(value))):
            form = f"{', '.join(words)}, or a list of different layer numbers, counted from 0"
            raise ValueError(f"found {value!r}; it is {form}")
        return value

    return checked


def map_of_layers(value: Any) -> Any:
    """Takes `even`, `{last: 3}`, or pairs [student's layer, teacher's layer]."""
    if isinstance(value, dict):
        fits = list(value) == ["last"] and type(value["last"]) is int and value["last"] >= 1
    elif isinstance(value, list) and value:
        pairs = [pair if isinstance(pair, list) and len(pair) == 2 else [None] for pair in value]
        fits = all(type(layer) is int and layer >= 0 for pair in pairs for layer in pair)
    else:
        fits = value == "even"
    if not fits:
        form = "even, {last: how many}, or pairs of layer numbers, [[student's, teacher's], …], or {route: …}"
        raise ValueError(f"found {value!r}; it is {form}")
    return value
