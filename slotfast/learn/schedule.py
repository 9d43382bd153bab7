"""Which documents are side by side: those of a stream as they come, or in groups of about one length, longest first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Self

import numpy as np

from .row import Learning

_BLOCK = 1 << 16  # tokens that are looked through at a time
Read = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Document:
    """Tokens that are predicted from one start.

    Args:
        number: among those that have a prediction, in the order of the stream.
        start: position of its first token, which is not charged.
        targets: tokens charged, >= 1; the last is the BOS of the next document, or the stream's last token.
        seen: of these, leading ones that are charged elsewhere: windows begin among them, nothing is learned from them.
    """

    number: int
    start: int
    targets: int
    seen: int = 0


@dataclass
class Progress:
    """How far a loop is through its rounds.

    Args:
        round: number of the one under way, or of the next.
        count: documents taken in it.
        phase: how many phases are over.
        redraw: whether A is to be drawn anew.
    """

    round: int = 0
    count: int = 0
    phase: int = 0
    redraw: bool = True

    def state_dict(self) -> dict[str, Any]:
        """All of it, in plain types."""
        return dict(vars(self))

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """What `state_dict` gave."""
        return cls(**state)


@dataclass
class Round:
    """Documents that are all charged before those of the next round begin.

    Args:
        own: this rank's, in the order in which they begin.
        everybody: those of all ranks, where a phase may train on them; complete once `own` is at its end.
    """

    own: Iterator[Document]
    everybody: list[Document] = field(default_factory=list)


def documents(read: Read, predictions: int | range, bos_id: int | None, window: int = 0) -> Iterator[Document]:
    """Documents in the order of the stream; one BOS behind the other, or at the very end, has nothing to predict.

    Args:
        read: tokens [start, stop) of the stream, integers.
        predictions: tokens of the stream but the first; where the stream is one document, a piece of it may be charged.
        bos_id: the token that starts a document; None: the stream is one.
        window: tokens before a piece that its first window may begin at.

    Raises:
        ValueError: a piece of a stream of several documents that does not begin where the stream does.
    """
    if isinstance(predictions, range):
        if bos_id is None:
            start = max(0, predictions.start - window)
            if predictions:
                yield Document(0, start, predictions.stop - start, predictions.start - start)
            return
        if predictions.start:
            raise ValueError(
                f"a piece from prediction {predictions.start} on: documents are read from where one starts"
            )
        predictions = predictions.stop
    number, start = 0, 0
    for begin in range(1, predictions + 1, _BLOCK):
        tokens = read(begin, min(begin + _BLOCK, predictions + 1))
        for end in (np.flatnonzero(tokens == bos_id) + begin).tolist() if bos_id is not None else ():
            yield Document(number, start, end - start)
            number, start = number + 1, end
    if start < predictions:
        yield Document(number, start, predictions - start)


def boundaries(row: Learning) -> list[int]:
    """How many documents are charged when each phase begins."""
    return [row.prefix * (phase + 1) // row.phases for phase in range(row.phases)]


def rounds(row: Learning, found: Iterator[Document], rank: int = 0, world: int = 1) -> Iterator[Round]:
    """The rounds of one of several ranks that deal the documents out: which are whose follows from the text alone.

    In the stream's order, a round is what lies between two phases, and each rank takes every `world`-th document, for
    its slots one after the other. Longest first, it is a group for each rank, and a group has a document for each slot,
    the shortest in the first one: documents sorted by length, cut into groups from the shortest on, and the last group,
    which may be short of documents, is the first to be charged.
    """
    if row.order == "longest":
        ordered, size = sorted(found, key=lambda document: document.targets), row.slots or 1
        groups = [ordered[first : first + size] for first in reversed(range(0, len(ordered), size))]
        for first in range(0, len(groups), world):
            together = groups[first : first + world]
            yield Round(iter(together[rank] if rank < len(together) else ()), list(chain(*together)))
        return

    def deal(part: Iterator[Document], everybody: list[Document] | None = None) -> Iterator[Document]:
        for document in part:
            if everybody is not None:
                everybody.append(document)
            if document.number % world == rank:
                yield document

    done = 0
    for boundary in boundaries(row):
        each = Round(iter(()))
        each.own = deal(islice(found, boundary - done), each.everybody)
        yield each
        done = boundary
    yield Round(deal(found))


def chunk_of(row: Learning, tokens: int) -> int:
    """Tokens of a chunk where the longest document of the group has so many tokens, its start and end included."""
    fitting = [(most, chunk) for most, chunk in row.short if tokens <= most]
    return min(fitting)[1] if fitting else row.chunk


def prefix(row: Learning, charged: Sequence[Document], boundary: int) -> list[Document]:
    """The documents that a phase trains on: the first ones charged; longest first, the shorter ones of them."""
    if row.order == "longest":
        charged = sorted(charged, key=lambda document: document.targets)
    return list(charged[:boundary])
