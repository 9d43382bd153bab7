"""What an audit may spend."""

import math
import time
from dataclasses import dataclass, field

PHASES = ("probes", "fresh", "sums")
_FRESH_SHARE = 0.15


@dataclass
class Budget:
    """How much a round of an audit may run, and how much each of its phases has used.

    Args:
        reruns: runs of the whole stream; shorter ones count for less.
        seconds: that quick loops may use beyond that; all that may be used, where `reruns` is 0.
        limit: seconds after which a slow loop is not run again, whatever is left of `reruns`.
    """

    reruns: float
    seconds: float
    limit: float = math.inf
    shares: dict[str, float] = field(default_factory=dict)
    spent: dict[str, list[float]] = field(default_factory=lambda: {name: [0.0, 0.0] for name in PHASES})

    def share(self, sums: float) -> None:
        """Divide the budget: totals over the vocabulary get the given share."""
        self.shares = {"probes": 1 - sums - _FRESH_SHARE, "fresh": _FRESH_SHARE, "sums": sums}

    def left(self, phase: str, rounds: int) -> float:
        """Whether, above 0, a phase may go on in the given number of rounds together: runs or seconds are left."""
        limit = self.limit_left(phase, rounds)
        return max(min(max(self.runs_left(phase, rounds), self.seconds_left(phase, rounds)), limit), 0)

    def runs_left(self, phase: str, rounds: int) -> float:
        return self.shares[phase] * rounds * self.reruns - self.spent[phase][0]

    def seconds_left(self, phase: str, rounds: int) -> float:
        return self.shares[phase] * rounds * self.seconds - self.spent[phase][1]

    def limit_left(self, phase: str, rounds: int) -> float:
        return self.shares[phase] * rounds * self.limit - self.spent[phase][1] if self.shares[phase] else 0.0

    def seconds_since(self, begin: tuple[float, float]) -> float:
        """Seconds; where the caller set no time, other work on a busy machine counts for little."""
        wall, used = time.perf_counter() - begin[0], time.process_time() - begin[1]
        return max(used, wall / 4) if self.reruns else wall
