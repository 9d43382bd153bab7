"""What is asked of runs: have scores moved that could not, do probabilities sum to 1, is each token charged once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .log import Record
from .streams import Probe

MARGIN = 4.0  # over the largest difference between reruns of one stream
_SAME_SHAPE = 1e-6  # relative: what a float32 sum may differ by where nothing but other rows' values changed
_OTHER_SHAPE = 2e-5  # relative: where batches or documents have other sizes, matrix products round otherwise
SUM_TOLERANCE = 1e-4
STREAM_NOISE = 1e-3  # nats: reruns that differ by more cannot certify anything
COARSE = 1e-4  # relative: a type coarser than that (half precision) can hide what a record is won by
EVIDENCE = 1e6  # odds that a bet must reach before totals above 1 are held for proven
_STAKES = np.array([0.003, 0.01, 0.03, 0.1, 0.3, 0.9])


@dataclass(frozen=True)
class Noise:
    """Largest differences between reruns of one stream: of losses, and of log-probabilities, in nats."""

    nll: float = 0.0
    rows: float = 0.0

    def limit(self, values: np.ndarray, same_shape: bool, noise: float | None = None) -> np.ndarray:
        """How far values may differ without being held for moved."""
        rounding = (_SAME_SHAPE if same_shape else _OTHER_SHAPE) * (1 + np.abs(values))
        return np.maximum(MARGIN * (self.nll if noise is None else noise), rounding)


@dataclass(frozen=True)
class Moved:
    """Scores that a changed token must not move, but did.

    Args:
        score: position of the first score, or distribution, that moved.
        by: nats.
        before, after: its value.
        count: scores that moved.
        largest: nats.
    """

    score: int
    by: float
    before: float
    after: float
    count: int
    largest: float


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|; 0 where both are infinite or missing alike, infinite where only one is missing."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.where(np.isnan(gap), np.inf, gap))


def moved_before(reference: Record, other: Record, at: int, noise: Noise, same_shape: bool) -> Moved | None:
    """Scores of tokens before position `at` that differ between two streams that agree up to there."""
    before, after = reference.nll[:at], other.nll[:at]
    gap = difference(before, after)
    wrong = np.flatnonzero(gap > noise.limit(np.nan_to_num(before), same_shape))
    if not wrong.size:
        return _moved_rows(reference, other, slice(1, at), noise, same_shape)
    first = wrong[0]
    return Moved(int(first), float(gap[first]), before[first], after[first], len(wrong), float(gap[wrong].max()))


def moved_itself(reference: Record, other: Record, at: int, noise: Noise, same_shape: bool) -> Moved | None:
    """The distribution of the first token that differs, where the loop gives distributions."""
    return _moved_rows(reference, other, slice(at, at + 1), noise, same_shape)


def has_row(record: Record, position: int) -> bool:
    """Whether the loop gave the token's distribution."""
    return record.rows is not None and position < len(record.rows) and not np.isnan(record.rows[position]).all()


def _moved_rows(reference: Record, other: Record, where: slice, noise: Noise, same_shape: bool) -> Moved | None:
    if reference.rows is None or other.rows is None:
        return None
    before, after = reference.rows[where], other.rows[where]
    before, after = before[: len(after)], after[: len(before)]
    if not before.size or np.array_equal(before, after):
        return None
    gap = difference(before, after)
    finite = np.where(np.isfinite(before), before, 0)
    wrong = gap > np.maximum(noise.limit(finite, same_shape, noise.rows), reference.row_precision * np.abs(finite))
    rows = np.flatnonzero(wrong.any(1))
    if not rows.size:
        return None
    first, entry = rows[0], int(np.where(wrong[rows[0]], gap[rows[0]], -1).argmax())
    values = (float(array[first, entry]) for array in (gap, before, after))
    return Moved(int(where.start + first), *values, len(rows), float(gap[wrong].max()))


def noise_between(a: Record, b: Record) -> Noise:
    """How far two runs of one stream differ."""
    rows = 0.0
    if a.rows is not None and b.rows is not None and not np.array_equal(a.rows, b.rows, equal_nan=True):
        rows = float(difference(a.rows, b.rows).max())
    return Noise(float(difference(a.nll, b.nll).max(initial=0.0)), rows)


def pairs(length: int, probes: Sequence[Probe], tokens: np.ndarray) -> tuple[int, int]:
    """Distinct (changed token, watched earlier score) pairs that probes of one stream cover, and how many there are."""
    changed = np.zeros(length, bool)
    covered, upper = 0, None
    for probe in sorted(probes, key=lambda probe: -probe.at):
        if upper is not None:
            covered += int(changed.sum()) * (upper - probe.at)
        new = probe.tokens.numpy()
        changed |= new != tokens if len(new) == length else False
        upper = probe.at
    if upper is not None:
        covered += int(changed.sum()) * (upper - 1)  # scores 1..upper - 1
    return covered, (length - 1) * (length - 2) // 2


class Bets:
    """Wagers that a loop's probabilities come to more than 1, on tokens that were drawn with known chances.

    Whatever a predictor has seen, p_t(x) / q(x) has mean sum_x p_t(x) where x is drawn from q. If that never exceeds 1,
    a gambler who stakes a part of his money on each ratio cannot expect to gain: he reaches c times what he had with a
    chance of at most 1 / c (Ville's inequality). Several gamblers with fixed stakes play for their mean, which starts
    at 1: a third of it on every token, a third on one position each, a third behind one token each.

    Args:
        length: N of the stream; positions beyond it count as its last.
        vocab_size: V.
    """

    def __init__(self, length: int, vocab_size: int):
        groups = {"": 1, "in position": length, "behind token": vocab_size}
        self._log_wealth = {kind: np.zeros((n, len(_STAKES))) for kind, n in groups.items()}
        self._total = {kind: np.zeros(n) for kind, n in groups.items()}
        self._count = {kind: np.zeros(n, np.int64) for kind, n in groups.items()}
        self.best = 0.0  # largest mean wealth so far, as a logarithm
        self.where = ""  # what won it
        self.average = 1.0  # probability that came to, there

    def play(self, record: Record, drawn_from: int, log_chance: np.ndarray) -> None:
        """One round for each token from a position on that was drawn with a known chance, and that the loop charged."""
        nll = record.nll[drawn_from:]
        known = ~np.isnan(nll)
        ratio = np.exp(np.minimum(-nll - log_chance, 600)[known])
        position = drawn_from + np.flatnonzero(known)
        if not len(ratio):
            return
        gain = np.log1p(_STAKES * (ratio[:, None] - 1))
        logs = {}
        for kind, wealth in self._log_wealth.items():
            group = {"": 0 * position, "in position": position, "behind token": record.tokens[position - 1]}[kind]
            group = np.minimum(group, len(wealth) - 1)
            np.add.at(wealth, group, gain)
            np.add.at(self._total[kind], group, ratio)
            np.add.at(self._count[kind], group, 1)
            logs[kind] = float(wealth.max() + np.log(np.exp(wealth - wealth.max()).mean()))
        now = np.logaddexp.reduce(list(logs.values())) - np.log(len(logs))
        if now > self.best:
            kind = max(logs, key=logs.__getitem__)
            winner = int(self._log_wealth[kind].max(1).argmax())
            self.best, self.where = float(now), f" {kind} {winner}" if kind else ""
            self.average = float(self._total[kind][winner] / self._count[kind][winner])

    @property
    def count(self) -> int:
        """Tokens that were played for."""
        return int(self._count[""].sum())

    @property
    def proven(self) -> bool:
        return self.best > np.log(EVIDENCE)
