"""What two streams of tokens have in common: exactly, or with one of them known by a sketch alone.

Streams are compared by their runs of 32 tokens, wherever they lie. A sketch is the 512 smallest hashes of a stream's
runs: a sample that depends on the runs alone, so that the samples of two streams agree on what both have. It
takes 5.5 KB and travels with a model, which can then say that it has seen the text that it is scored on.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .data import TokenStream
from .errors import InputError

BLOCK = 32  # tokens of a run
MAX_OVERLAP = 0.01  # texts share less than this by chance
_SKETCH_HASHES = 512
_NONE = np.empty(0, np.uint64)


def overlap(stream: TokenStream, other: TokenStream) -> float:
    """Share of a stream's runs of 32 tokens, cut one after the other, that occur anywhere in another stream; 0..1."""
    keys, which = np.unique(
        np.concatenate([_NONE, *(hashes[::BLOCK] for hashes in _hashes(stream))]), return_inverse=True
    )
    if not len(keys):
        return 0.0
    found = np.zeros(len(keys), bool)
    for hashes in _hashes(other):
        place = np.searchsorted(keys, hashes).clip(max=len(keys) - 1)
        found[place[keys[place] == hashes]] = True
    return float(found[which].mean())


def sketch(stream: TokenStream) -> str:
    """The smallest hashes of a stream's runs, little-endian uint64 in base64."""
    kept = _NONE
    for hashes in _hashes(stream):
        if len(kept) == _SKETCH_HASHES:
            hashes = hashes[hashes < kept[-1]]
        kept = np.unique(np.concatenate([kept, hashes]))[:_SKETCH_HASHES]
    return base64.b64encode(kept.astype("<u8").tobytes()).decode()


def shared(stream: TokenStream, sketched: str) -> float:
    """About what share of a stream is in the text behind a sketch, or of that text in the stream: the larger one, 0..1.

    Both ways count: a small part of a long text may be all that was seen, and the reverse.

    Raises:
        InputError: no sketch.
    """
    return _shares(stream, [sketched])[0]


def _shares(stream: TokenStream, sketches: Iterable[str]) -> list[float]:
    """`shared` for each of several sketches, reading the stream once."""
    known = [_kept(sketched) for sketched in sketches]
    highest = max((kept[-1] for kept in known if len(kept)), default=np.uint64(0))
    sampled = np.unique(np.concatenate([_NONE, *(hashes[hashes <= highest] for hashes in _hashes(stream))]))
    shares = []
    for kept in known:
        comparable = sampled[sampled <= kept[-1]] if len(kept) else _NONE
        both = len(np.intersect1d(kept, comparable, assume_unique=True))
        shares.append(both / max(1, min(len(kept), len(comparable))))
    return shares


def _kept(sketched: str) -> np.ndarray:
    """The hashes of a sketch, uint64 in rising order; raises InputError where it is no sketch."""
    try:
        kept = np.frombuffer(base64.b64decode(sketched, validate=True), "<u8")
    except (binascii.Error, ValueError, TypeError):
        raise InputError("not a sketch of a text: expected uint64 numbers in base64") from None
    if np.any(kept[1:] <= kept[:-1]):
        raise InputError("not a sketch of a text: expected rising uint64 numbers")
    return kept


def seen(stream: TokenStream, metadata: Mapping[str, Any]) -> dict[str, float]:
    """About what share a stream has in common with each text that a model was made from and says so.

    Args:
        metadata: of the model; its `sketches` are of the `training` text and of that of its `calibration`.

    Raises:
        InputError: damaged sketches.
    """
    sketches = metadata.get("sketches") or {}
    if not isinstance(sketches, Mapping):
        raise InputError("the model's sketches: expected one for each text that it was made from")
    return dict(zip(sketches, _shares(stream, sketches.values()), strict=True)) if sketches else {}


def _hashes(stream: TokenStream, size: int = 1 << 16) -> Iterator[np.ndarray]:
    """A hash of the run that starts at each position, uint64, `size` positions at a time.

    Stored, so it may never change: a polynomial modulo 2^64, then SplitMix64's finaliser, which spreads it evenly.
    """
    for start in range(0, len(stream) - BLOCK + 1, size):
        hashes = stream.read(start, start + size + BLOCK - 1).astype(np.uint64) + np.uint64(1)
        length, factor = 1, 0x9E3779B97F4A7C15
        while length < BLOCK:  # of runs twice as long
            hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]
            length, factor = 2 * length, factor * factor % (1 << 64)
        for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(multiplier)
        yield hashes
