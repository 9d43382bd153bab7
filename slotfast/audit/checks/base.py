"""What a check is, what it is shown, and how it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from ..leak import Leak
from ..log import Record
from ..moves import STREAM_NOISE, Moved, Noise
from ..streams import Probe, Stream

Verdict = Literal["PASS", "FAIL", "UNTESTED"]
ByteRule = Callable[[np.ndarray], np.ndarray]


def verdict_of(problem: object) -> Verdict:
    """FAIL where there is a problem."""
    return "FAIL" if problem else "PASS"


@dataclass(frozen=True)
class Test:
    """One line of the report.

    Args:
        name: what was asked.
        verdict: PASS, FAIL or UNTESTED.
        conditions: those that it is about, and that fail with it.
        covered: how much was looked at, in words.
        detail: what was seen.
        pairs: of changed token and watched score, or positions, that were looked at.
        looks_like: the pattern that usually fails it, with published cases; advice, not evidence.
    """

    name: str
    verdict: Verdict
    conditions: tuple[str, ...]
    covered: str = ""
    detail: str = ""
    pairs: int = 0
    looks_like: str = ""


@dataclass(frozen=True)
class Pair:
    """A stream and an altered copy of it, both run.

    Args:
        of: which stream: `given`, or `drawn` with its number.
        probe: the copy.
        base, other: the runs of the stream and of the copy.
        moved: scores before the change that differ.
    """

    of: str
    probe: Probe
    base: Record
    other: Record
    moved: Moved | None

    @property
    def same_length(self) -> bool:
        return len(self.probe.tokens) == len(self.base.tokens)


class Check:
    """One question about one loop: it takes note of what it is shown, and answers with tests.

    Args:
        found: what else is known about the loop, and a way to run it again.
    """

    def __init__(self, found: Findings):
        self.found = found

    def see_run(self, record: Record) -> None:
        """Any run of the loop; the first is of the given stream."""

    def see_drawn(self, record: Record, begin: int, log_chance: np.ndarray) -> None:
        """A run whose tokens from position `begin` on were drawn with known chances, float64 [n]."""

    def see_pair(self, pair: Pair) -> None:
        """A run of an altered stream beside that of the original."""

    def see_total(self, stream: Tensor, at: int, tokens: Sequence[int], nll: np.ndarray, precision: float) -> None:
        """What tokens were charged, float64 [n], each put in position `at` of a stream, int64 [N].

        Args:
            precision: relative precision of the charges.
        """

    def see_last(self, record: Record) -> None:
        """The given stream once more, after all other runs."""

    def tests(self) -> list[Test]:
        """The answers, in the report's order."""
        return []

    def unreached(self) -> list[str]:
        """What this check could not look at, in words."""
        return []


Kind = TypeVar("Kind", bound=Check)


@dataclass
class Findings:
    """What was found out about one loop.

    Args:
        name: of the loop.
        stream: the given one.
        reference: its first run.
        byte_rule: bytes of every token of a stream, int [N] -> int [N], or None; int [N] for the given stream alone.
        run: runs the loop on a stream, int64 [N], once more.
        noise: how far reruns of one stream differ.
        leak: a score that a later token moves.
        own: a distribution that its own token moves.
        kinds: altered streams for each kind of place.
        fixed_length: why streams of another length could not be asked for; None where some could.
    """

    name: str
    stream: Stream
    reference: Record
    byte_rule: ByteRule | np.ndarray | None
    run: Callable[[Tensor], Record]
    noise: Noise = field(default_factory=Noise)
    leak: Leak | None = None
    own: Leak | None = None
    kinds: dict[str, int] = field(default_factory=dict)
    fixed_length: str | None = None
    checks: list[Check] = field(default_factory=list)

    def check(self, kind: type[Kind]) -> Kind:
        """The check of a kind."""
        return next(check for check in self.checks if isinstance(check, kind))

    def show(self, hook: str, *what: Any) -> None:
        """Call one of the checks' hooks, in order."""
        for check in self.checks:
            getattr(check, hook)(*what)

    def differs(self, noise: Noise) -> None:
        """Note how far two runs of one stream differed."""
        self.noise = Noise(max(self.noise.nll, noise.nll), max(self.noise.rows, noise.rows))

    @property
    def unsteady(self) -> float:
        """Nats between reruns of one stream, where that is too much."""
        return self.noise.nll if self.noise.nll > STREAM_NOISE else 0.0
