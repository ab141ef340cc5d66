"""Who speaks among a teacher's experts, from experts.json, as tables: no torch."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd


def expert_tables(found: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Every table that there is something to write in, by the name of its figure; {} of a dense teacher's."""
    if not found:
        return {}
    tables = {"experts_by_token": token_table(found), "experts_by_layer": layer_table(found)}
    if found["kinds"]:
        tables["experts_by_kind"] = kind_table(found)
    if len(found["routings"]) > 1:
        tables["experts_moved"] = moved_table(found)
    return tables


def layer_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each routing and layer: router, entropy, the load of each expert."""
    return pd.DataFrame(
        {"routing": name, "layer": layer, "router": router, "entropy": entropy, **_numbered(load)}
        for name, routing in found["routings"].items()
        for layer, (router, entropy, load) in enumerate(
            zip(found["layers"], routing["entropy"], routing["load"], strict=True)
        )
    )


def token_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each routing and token of the text: the weight of each expert."""
    text = found["text"]
    return pd.DataFrame(
        {"routing": name, "layer": text["layer"], "token": token, "kind": kind, **_numbered(shares)}
        for name, weights in text["weights"].items()
        for token, kind, shares in zip(text["tokens"], text["kinds"], weights, strict=True)
    )


def kind_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each kind and expert of the layer in which kinds differ most, with its interval."""
    kinds = found["kinds"]
    every = zip(kinds["names"], kinds["tokens"], kinds["intervals"], strict=True)
    return pd.DataFrame(
        {"kind": kind, "tokens": tokens, "layer": kinds["layer"], "expert": number, **each}
        for kind, tokens, loads in every
        for number, each in enumerate(loads)
    )


def moved_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each layer: how much of the load moved between each two routings that follow each other."""
    pairs = pairwise(found["routings"])
    shares = {f"{a} → {b}": np.abs(changes(found, a, b)).sum(1) / 2 for a, b in pairs}
    return pd.DataFrame({"layer": range(len(found["layers"])), **shares})


def routing_table(found: Mapping[str, Any]) -> pd.DataFrame:
    """For reading: each routing in a line."""
    rows = {
        name: {
            "entropy, nats": f"{np.mean(routing['entropy']):.3f}",
            "busiest expert, 1 is even": f"{routing['max_load']:.2f}",
            "experts that speak": f"{routing['coverage']:.1%}",
            "KL from its own, nats": f"{routing.get('moved_by', 0.0):.3f}",
        }
        for name, routing in found.get("routings", {}).items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def changes(found: Mapping[str, Any], first: str, last: str) -> np.ndarray:
    """[L, E] by how much each load grew."""
    before, after = (np.array(found["routings"][name]["load"]) for name in (first, last))
    return after - before


def _numbered(shares: Sequence[float]) -> dict[str, float]:
    return {f"expert_{number}": share for number, share in enumerate(shares)}
