"""What the runs of a sweep take, as forecast and as measured: the time that is left.  Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cost:
    """Of one run, forecast."""

    # of training, with the baseline's; without set-up and comparison; None where it is not known
    seconds: float | None
    peak: float  # bytes of memory
    models: float  # bytes on disk
    checkpoints: float  # bytes on disk besides, until the run is done


@dataclass
class Clock:
    """The runs' forecasts, and what the finished runs say of them."""

    costs: dict[str, Cost] = field(default_factory=dict)  # by the run's name
    errors: dict[str, str] = field(default_factory=dict)  # runs that cannot be forecast, and why
    free: float = 0.0  # bytes of memory
    others: float = 0.0  # cores that other processes kept busy while the forecast was made
    # seconds of whole runs: forecast, measured
    measured: list[tuple[float, float]] = field(default_factory=list)

    def learn(self, run: str, seconds: float) -> None:
        """A whole run took so long."""
        self.measured.append((self._ahead(run), seconds))

    def left(self, runs: Sequence[str], jobs: int) -> float | None:
        """Seconds that these runs will take: the forecast, times what the finished runs took over theirs.

        Before any is finished the forecast as if one ran after another, since side by side they share a
        machine; None without one.
        """
        ahead = sum(map(self._ahead, runs))
        if not self.measured:
            return ahead if self._times() else None
        return (
            ahead / jobs * sum(took for _, took in self.measured) / sum(before for before, _ in self.measured)
        )

    def _times(self) -> list[float]:
        return [cost.seconds for cost in self.costs.values() if cost.seconds]

    def _ahead(self, run: str) -> float:
        """A run's forecast; the mean of the others where it has none; where nobody has one all count
        alike.
        """
        times, own = self._times(), self.costs.get(run)
        return own.seconds if own and own.seconds else sum(times) / len(times) if times else 1.0


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h"""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
