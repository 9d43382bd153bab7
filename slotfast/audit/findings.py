"""What an audit may spend, and what it has found out about a loop."""

import math
import time
from dataclasses import dataclass, field

import numpy as np

from .checks import COARSE, STREAM_NOISE, Bets, Moved, Noise
from .log import Record
from .streams import Probe

PHASES = ("probes", "fresh", "sums")
_FRESH_SHARE = 0.15


@dataclass
class Budget:
    """How much a round of an audit may run, and what each of its phases has used.

    Args:
        reruns: runs of the whole stream; shorter ones count for less.
        seconds: that quick loops may use beyond that; all that may be used, where `reruns` is 0.
        limit: seconds after which slow loops are run no further, whatever is left of `reruns`.
    """

    reruns: float
    seconds: float
    limit: float = math.inf
    shares: dict[str, float] = field(default_factory=dict)
    spent: dict[str, list[float]] = field(default_factory=lambda: {name: [0.0, 0.0] for name in PHASES})

    def share(self, sums: float) -> None:
        """Divide it: the totals over the vocabulary get the given share."""
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
        """Seconds; where the caller set no time, a busy machine's other work counts for little."""
        wall, used = time.perf_counter() - begin[0], time.process_time() - begin[1]
        return max(used, wall / 4) if self.reruns else wall


@dataclass(frozen=True)
class Leak:
    """A score that depends on what it must not.

    Args:
        relation: `future` (a token that comes later), or `own` (the charged token itself).
        token: position of the token that was changed.
        moved: what moved.
        place, change: where and how the stream was altered when it was first seen.
        alone: whether changing that token alone suffices.
        same_event: whether one event charged both; None where the loop reports no events.
        events_apart: events from the moved score's to the changed token's; below 0 where the token was charged first.
        stream: which stream it was.
        one_event: whether the loop reported all its charges in one event.
        whole: whether the stream's last token moves its first scores.
        block: events that move one another's scores, where that is not the whole stream; 0 where it was not looked for.
        became_bos: whether the change made the token a document's first, or no longer one.
        moves_without_bos: where it became one, whether another change of it moves a score too; else None.
    """

    relation: str
    token: int
    moved: Moved
    place: str
    change: str
    alone: bool
    same_event: bool | None
    events_apart: int
    stream: str
    one_event: bool = False
    whole: bool = False
    block: int = 0
    became_bos: bool = False
    moves_without_bos: bool | None = None


@dataclass
class Findings:
    """What was found out about one loop."""

    name: str
    reference: Record
    bets: Bets
    noise: Noise = field(default_factory=Noise)
    remembers: float = 0.0  # nats between the first run of the stream and the last
    leak: Leak | None = None
    own: Leak | None = None
    own_positions: set[tuple[str, int]] = field(default_factory=set)
    by_length: float = 0.0
    lengths: int = 0
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    bases: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    sums: list[tuple[int, int, float]] = field(default_factory=list)  # position, tokens substituted, total
    worst_sum: tuple[int, float] | None = None
    late_reruns: int = 0  # runs of a round that have room for a late total
    once_cause: str = ""  # what charges that are no charges, or not the only ones, look like
    rounded_sums: float = 0.0  # how far totals are off that charges in half precision explain
    rows: int = 0
    row_precision: float = 0.0  # of the coarsest distributions
    charges: int = 0
    worst_total: tuple[int, float] | None = None
    worst_mismatch: tuple[int, float] | None = None
    problems: dict[str, str] = field(default_factory=dict)
    bytes_checked: int = 0

    def differs(self, noise: Noise) -> None:
        """Take down how far two runs of one stream differed."""
        self.noise = Noise(max(self.noise.nll, noise.nll), max(self.noise.rows, noise.rows))

    @property
    def late(self) -> int:
        """First position behind three quarters of the stream and two events: totals from there on can clear a loop."""
        starts = self.reference.starts
        behind = int(starts[2]) if len(starts) > 2 else 0
        return min(max(3 * len(self.reference.tokens) // 4, behind), len(self.reference.tokens) - 1)

    @property
    def unsteady(self) -> float:
        """Nats between reruns of one stream, where that is too much."""
        return self.noise.nll if self.noise.nll > STREAM_NOISE else 0.0

    @property
    def blurred(self) -> str:
        """Why the distributions, if there are any, cannot clear the loop; they may still convict it."""
        if self.row_precision > COARSE:
            return "half precision, in which a small gain does not show"
        if self.noise.rows > STREAM_NOISE:
            return f"distributions differ by {self.noise.rows:.2g} nats between reruns of one stream"
        return ""

    @property
    def gives_rows(self) -> bool:
        """Whether every charged token of the reference came with a distribution that can clear the loop."""
        given = self.reference.rows is not None and self.reference.charges > 0
        return bool(np.any(given)) and not np.isnan(self.reference.total[given]).any() and not self.blurred
