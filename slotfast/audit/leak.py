"""A score that depends on what it must not: what moved it, how far that reaches, and which pattern it looks like."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from .log import Record
from .moves import Moved
from .streams import Probe

_NEAR = 64  # tokens
_ENDS = 4  # last tokens that are changed, to see whether the first scores move


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
        another_order: whether events charge each token once, but in another order than the stream's.
        one_event: whether the loop reported all its charges in one event.
        whole: whether one of the stream's last tokens moves its first scores.
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
    another_order: bool = False
    one_event: bool = False
    whole: bool = False
    block: int = 0
    became_bos: bool = False
    moves_without_bos: bool | None = None

    @classmethod
    def of(cls, relation: str, token: int, moved: Moved, probe: Probe, base: Record, alone: bool, stream: str) -> Self:
        """A leak between one token and one score of a stream that a probe altered."""
        events = base.event[[moved.score, token]] if base.ordered else None
        same = None if events is None else bool(events[0] == events[1])
        apart = 0 if events is None else int(events[1] - events[0])
        another = apart < 0 or (base.misordered is not None and bool((base.charges <= 1).all()))
        return cls(relation, token, moved, probe.kind, probe.change, alone, same, apart, stream, another)

    @property
    def text(self) -> str:
        """What was changed, and what moved."""
        what = "its own distribution" if self.relation == "own" else f"the score of token {self.moved.score}"
        alone = "" if self.alone else " together with the ones before it"
        more = f"; {self.moved.count:,} scores move, by up to {self.moved.largest:.3g}" if self.moved.count > 1 else ""
        stream = "" if self.stream == "given" else f" (stream {self.stream})"
        before, after = self.moved.before, self.moved.after
        return f"changing token {self.token}{alone} moves {what} from {before:.6g} to {after:.6g} nats{more}{stream}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able keys."""
        known = asdict(self)
        # JSON has no infinities: a score that only one of the streams has is null
        known["moved"] = {key: value if np.isfinite(value) else None for key, value in known["moved"].items()}
        return {**known, "text": self.text, "looks_like": looks_like(self)}


def reach_of(base: Record, leak: Leak, moved_by: Callable[[int], Moved | None]) -> dict[str, Any]:
    """How far a leak reaches, as fields of a `Leak`.

    Args:
        base: the run of the unaltered stream.
        leak: one pair of a changed token and a score that it moved.
        moved_by: what a change of the one token at a position moves.
    """
    last, parts = len(base.tokens) - 1, base.ordered and len(base.starts) > 1

    def early(score: int) -> bool:
        return base.event[score] == base.event[base.event >= 0].min() if parts else score <= last // 4

    # Where tokens move only the scores of equal tokens, the last token may have no equal among the first ones
    ends = (moved_by(at) for at in range(last, max(0, last - _ENDS), -1))
    whole = any(end is not None and early(end.score) for end in ends)
    if whole or not parts:
        return {"one_event": base.ordered and not parts, "whole": whole}
    if leak.another_order:
        return {}
    block = _block(base, int(base.event[leak.moved.score]), int(base.event[leak.token]), moved_by)
    events = int(base.event.max()) + 1
    if block > 2 or events < 8:
        return {"block": block}
    for event in range(events // 2 - 1, events // 2 + 2):  # the stream's last block may be cut short
        moved = moved_by(_last_of(base, event))
        if moved is not None:
            return {"block": max(block, _block(base, int(base.event[moved.score]), event, moved_by))}
    return {"block": block}


def _block(base: Record, event: int, near: int, moved_by: Callable[[int], Moved | None]) -> int:
    """How many events a batch holds, where tokens of event `near` move event `event`, by the last one that does."""
    last = int(base.event.max())
    far = last + 1
    while far - near > 1:
        middle = (near + far) // 2
        moved = moved_by(_last_of(base, middle))
        if moved is not None and base.event[moved.score] <= event:
            near, event = middle, int(base.event[moved.score])
        else:
            far = middle
    # The tokens of a block's last windows may be in no context of that block, so look for the next block's start
    for later in range(near + 1, min(near + 4, last + 1)):
        moved = moved_by(_last_of(base, later))
        if moved is not None and base.event[moved.score] > near:
            return int(base.event[moved.score]) - event
    return near - event + 1


def _last_of(base: Record, event: int) -> int:
    """The last position that an event charged."""
    return int(np.flatnonzero(base.event == event)[-1])


def looks_like(leak: Leak) -> str:
    """The pattern that usually shows itself so."""
    distance = leak.token - leak.moved.score
    if leak.relation == "own":
        return (
            "a gate, a cache key or a temperature that looks at the realised token (#1420, #779, #1877), or a fit to "
            "the very tokens that are scored (#1240)"
        )
    if leak.another_order:
        return _another_order(leak)
    if leak.whole:
        unknown = " The loop reports everything at its end, so that its order cannot be told." if leak.one_event else ""
        return (
            "a state built from the whole stream before it is scored: training on it (#1306), its statistics (#728), a "
            "second pass (#846, #916, #991), a choice among passes (#573, #659), or one batch as long as the stream."
            + unknown
        )
    if distance == 1 and leak.moved.count == 1:
        return "a look-ahead by one token, or pooling that is not causal (#2028)"
    if leak.same_event is None or leak.one_event:
        return (
            "a look-ahead, a pooling over blocks, or tokens of one batch that share a state (#2028, #1350)"
            if distance <= _NEAR
            else "tokens of one batch that share a state (#1217, #1350, #1372), or a document's own future (#1530)"
        )
    if leak.block > 2:
        return (
            f"blocks of {leak.block} events: windows of one batch share a state, as one parameter, one optimiser or "
            "one warm start (#1217, #1306, #1350, #1372)"
        )
    if leak.same_event:
        return (
            "a fit to the very positions that are scored (#1240, #1176), or one parameter, one optimiser or one warm "
            "start for several windows that are scored together (#1217, #1350, #1372)"
        )
    return (
        "a state that is updated with a batch before that batch is charged, or handed over between ranks (#548, #1319)"
    )


def _another_order(leak: Leak) -> str:
    text = "documents in another order than the stream's, as longest first (#1530 to #1855): "
    text += f"token {leak.token} was charged {'before' if leak.events_apart < 0 else 'behind'} token {leak.moved.score}"
    if not leak.became_bos:
        return text
    text += "; the change moved a document's start"
    if leak.moves_without_bos is None:
        return text
    without = "scores move" if leak.moves_without_bos else "nothing moves"
    return f"{text}, and {without} where documents start as before"
