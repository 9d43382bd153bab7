"""Where to change a stream: the borders of whatever structure a loop has, and places in between."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle

import numpy as np

from ..windows import Plan
from .log import Record

# What is done at a place, in turn. A whole new future moves whatever depends on any part of it. A copy of the token
# before moves what looks one token ahead: the copy's chance rises, and so the charge of the token before it moves. A
# change of one token leaves all else as it is, so that a loop cannot tell that it is being audited.
CHANGES = (
    "scramble",
    "copy",
    "resample",
    "echo",
    "scramble",
    "constant",
    "random",
    "resample",
    "copy",
    "rare",
    "echo",
    "resample",
    "copy",
    "frequent",
    "scramble",
    "bos",
)
# The order of visits: each event should be looked into once, and no place be asked about one token only
_ROUND = (
    "inside an event",
    "anywhere",
    "event border",
    "cheap charge",
    "document border",
    "inside an event",
    "rank border",
    "anywhere",
    "inside an event",
    "window border",
    "cheap charge",
    "batch border",
)


@dataclass(frozen=True)
class Hints:
    """What is known about a loop's structure beyond the events that it reports; None where nothing is.

    Args:
        seq_len, stride: of its windows, tokens.
        batch_windows: windows of one batch.
        ranks: processes that it emulates, each with a contiguous range of windows.
    """

    seq_len: int | None = None
    stride: int | None = None
    batch_windows: int | None = None
    ranks: int | None = None


def visits(
    record: Record, bos_id: int | None, hints: Hints, rng: np.random.Generator
) -> Iterator[tuple[str, str, int]]:
    """Endless kinds of place, changes and positions 2..N-1, with the changes spread evenly over every kind."""
    found = places(record, bos_id, hints, rng)
    turns = {kind: int(rng.integers(len(CHANGES))) for kind in found}
    for number in count():
        for kind in (*_ROUND, *(["far end"] if number % 2 == 0 else [])):
            if kind not in found:
                continue
            change = CHANGES[turns[kind] % len(CHANGES)]
            if kind == "document border" and turns[kind] % 2:
                change = "delete"
            if change == "bos":
                change = "insert bos" if bos_id is not None else "random"
            turns[kind] += 1
            yield kind, change, max(2, next(found[kind]))


def places(record: Record, bos_id: int | None, hints: Hints, rng: np.random.Generator) -> dict[str, Iterator[int]]:
    """Endless positions 1..N-1 by the kind of place; kinds that the stream does not have are absent."""
    length, starts = len(record.tokens), record.starts
    kinds = {"anywhere": _spread(length, rng)}
    if len(starts) > 1:
        kinds["event border"] = _around(starts[1:], length, rng)
    sizes = np.diff([*starts, length])
    if (sizes > 2).any():
        kinds["inside an event"] = _inside(starts[sizes > 2], sizes[sizes > 2], rng)
    if bos_id is not None and (documents := np.flatnonzero(record.tokens[2:] == bos_id) + 2).size:
        kinds["document border"] = _around(documents, length, rng)
    for kind, borders in _planned(length, starts, hints).items():
        if borders.size:
            kinds[kind] = _around(borders, length, rng)
    kinds["far end"] = _around(np.array([length - 1]), length, rng)
    kinds["cheap charge"] = _at_and_behind(cheap_charges(record, rng), length)
    return kinds


def cheap_charges(record: Record, rng: np.random.Generator) -> np.ndarray:
    """Positions 1..N-1, each once, in an order that is drawn: the further a charge lies below what its token's
    frequency would cost, the sooner it comes, the n-th furthest as 1 / n^2.

    A loop that knows few of its tokens shows it there, or gains little.
    """
    tokens = record.tokens
    gain = np.log(len(tokens) / np.bincount(tokens)[tokens]) - record.nll
    ranked = 1 + np.argsort(-np.nan_to_num(gain[1:], nan=-np.inf), kind="stable")
    return ranked[np.argsort(2 * np.log1p(np.arange(len(ranked))) - rng.gumbel(size=len(ranked)))]


def _planned(length: int, starts: np.ndarray, hints: Hints) -> dict[str, np.ndarray]:
    """Borders that follow from the hints: the first token that a window, a batch or a rank charges."""
    if hints.seq_len and hints.stride:
        plan = Plan(length - 1, hints.seq_len, hints.stride)
        first = np.array([plan[index].start + plan[index].context_end + 1 for index in range(len(plan))])
        owned = [plan.owned(rank, hints.ranks or 1) for rank in range(hints.ranks or 1)]
        batch = hints.batch_windows or len(plan)
        batches = [index for part in owned for index in part[::batch]]
        ranks = [part.start for part in owned[1:] if part]
        return {"window border": first[1:], "batch border": first[batches][1:], "rank border": first[ranks]}
    # Without windows, ranks are assumed to share the tokens evenly; where nobody says how many, there may be two
    found = {"rank border": length * np.arange(1, hints.ranks or 2) // (hints.ranks or 2)}
    if hints.stride and len(starts):
        inside = [np.arange(a, b, hints.stride)[1:] for a, b in zip(starts, [*starts[1:], length], strict=True)]
        found["window border"] = np.concatenate(inside)
    return found


def _around(borders: np.ndarray, length: int, rng: np.random.Generator) -> Iterator[int]:
    """Borders in shuffled order: the tokens there, then those one later and one earlier."""
    while True:
        for offset in (0, 1, 0, -1):
            for border in rng.permutation(borders):
                yield int(np.clip(border + offset, 1, length - 1))


def _at_and_behind(found: np.ndarray, length: int) -> Iterator[int]:
    """Each of some positions, where a token's own value shows, and the next, where a look ahead does."""
    return cycle(np.stack([found, np.minimum(found + 1, length - 1)], 1).flatten().tolist())


def _inside(starts: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    inside = [_spread(size, rng) for size in sizes]
    while True:
        for event in rng.permutation(len(starts)):
            yield int(starts[event] + next(inside[event]))


def _spread(length: int, rng: np.random.Generator) -> Iterator[int]:
    """Positions 1..N-1 that cover the stream ever more finely, each once before any comes twice."""
    shares = (rng.random() + 0.6180339887 * np.arange(length - 1)) % 1  # leaves no gap twice as wide as another
    return cycle((1 + shares.argsort().argsort()).tolist())
