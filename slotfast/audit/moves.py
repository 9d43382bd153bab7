"""Whether scores moved that must not: two runs side by side, and how far reruns of one stream differ."""

from dataclasses import dataclass

import numpy as np

from .log import Record

MARGIN = 4.0  # factor on the largest difference between reruns of one stream
_SAME_SHAPE = 1e-6  # relative: how far a float32 sum may differ where only the values of other rows changed
_OTHER_SHAPE = 2e-5  # relative: where batches or documents have other sizes, matrix products round differently
STREAM_NOISE = 1e-3  # nats: reruns that differ by more cannot certify anything
COARSE = 1e-4  # relative: a coarser type (half precision) can hide the margin of a record


@dataclass(frozen=True)
class Noise:
    """Largest differences between reruns of one stream: of losses, and of log-probabilities, in nats."""

    nll: float = 0.0
    rows: float = 0.0

    def limit(self, values: np.ndarray, same_shape: bool, noise: float | None = None) -> np.ndarray:
        """How far values may differ without counting as moved."""
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
    values = [float(array[first, entry]) for array in (gap, before, after)]
    return Moved(int(where.start + first), values[0], values[1], values[2], len(rows), float(gap[wrong].max()))


def noise_between(a: Record, b: Record) -> Noise:
    """How far two runs of one stream differ."""
    rows = 0.0
    if a.rows is not None and b.rows is not None and not np.array_equal(a.rows, b.rows, equal_nan=True):
        rows = float(difference(a.rows, b.rows).max())
    return Noise(float(difference(a.nll, b.nll).max(initial=0.0)), rows)
