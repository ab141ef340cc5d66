"""What a model takes to keep and to run, measured here: bytes on disk, time for an answer."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from kdlib.models.loading import folder_of

Batch = Mapping[str, Tensor]
WARM_UP = 3  # answers that are not timed
TIMES, ENOUGH_S = 5, 10.0  # timings at least, unless three took so long


def wait_for(device: torch.device) -> None:
    """Until what was asked of an accelerator is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """How long it takes, to its end."""
    wait_for(device)
    started = perf_counter()
    action()
    wait_for(device)
    return perf_counter() - started


def latency_ms(
    ask: Callable[[Batch], object], batches: Sequence[Batch], device: torch.device
) -> dict[str, float]:
    """Milliseconds for one row by itself, its inputs at hand: median of these rows, and the middle half."""
    for batch in batches[:WARM_UP]:
        ask(batch)
    return middle_half([1e3 * seconds_of(lambda batch=batch: ask(batch), device) for batch in batches])


def middle_half(timings: Sequence[float]) -> dict[str, float]:
    """{value, low, high}: the median of several timings, and the quartiles, which a busy machine moves."""
    low, median, high = statistics.quantiles(timings, n=4) if len(timings) > 1 else [*timings] * 3
    return {"value": median, "low": low, "high": high}


def repeated(action: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds that it takes, five times, or three where it is slow; a first time is not counted."""
    action()
    found: list[float] = []
    while len(found) < TIMES and not (len(found) >= 3 and sum(found) > ENOUGH_S):
        found.append(seconds_of(action, device))
    return found


def stored_bytes(source: str) -> int | None:
    """Bytes of a model's weights in its folder or the hub's cache; None where they are in neither."""
    try:
        folder = folder_of(source)
        path = Path(folder if Path(folder).is_dir() else snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    whole = path / "model.safetensors"
    files = [whole] if whole.exists() else path.glob("model-*-of-*.safetensors")
    return sum(file.stat().st_size for file in files) or None
