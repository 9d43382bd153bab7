"""What a finding looks like: the pattern that usually causes it, with published cases; advice, not evidence."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import Moved
from .findings import Findings, Leak
from .log import Record

if TYPE_CHECKING:
    from .report import Test

_NEAR = 64  # tokens


def reach_of(base: Record, leak: Leak, moved_by: Callable[[int], Moved | None]) -> dict[str, Any]:
    """How far a leak reaches: fields of a `Leak`.

    Args:
        base: the run of the unaltered stream.
        leak: one pair of a changed token and a score that it moved.
        moved_by: what a change of the one token at a position moves.
    """
    last = len(base.tokens) - 1
    end = moved_by(last)
    if not base.ordered or len(base.starts) <= 1:
        whole = end is not None and end.score <= last // 4
        return {"one_event": base.ordered, "whole": whole}
    first = int(base.event[base.event >= 0].min())
    if end is not None and base.event[end.score] == first:
        return {"whole": True}
    if leak.events_apart < 0:
        return {}
    # Events that a batch holds: the last one whose tokens move the event that moved
    event = int(base.event[leak.moved.score])
    near, far = int(base.event[leak.token]), int(base.event.max()) + 1
    while far - near > 1:
        middle = (near + far) // 2
        moved = moved_by(int(np.flatnonzero(base.event == middle)[-1]))
        if moved is not None and base.event[moved.score] <= event:
            near, event = middle, int(base.event[moved.score])
        else:
            far = middle
    # The tokens of a block's last windows may be in no context of it: where does the next block begin?
    for later in range(near + 1, min(near + 4, int(base.event.max()) + 1)):
        moved = moved_by(int(np.flatnonzero(base.event == later)[-1]))
        if moved is not None and base.event[moved.score] > near:
            return {"block": int(base.event[moved.score]) - event}
    return {"block": near - event + 1}


def looks_like(leak: Leak) -> str:
    """The pattern that usually moves what moved."""
    distance = leak.token - leak.moved.score
    if leak.relation == "own":
        return (
            "a gate, a cache key or a temperature that looks at the realised token (#1420, #779, #1877), or a fit to "
            "the very tokens that are scored (#1240)"
        )
    if leak.events_apart < 0:
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
    text += f"token {leak.token} was charged before token {leak.moved.score}"
    if not leak.became_bos:
        return text
    text += "; the change moved a document's start"
    if leak.moves_without_bos is None:
        return text
    without = "scores move" if leak.moves_without_bos else "nothing moves"
    return f"{text}, and {without} where documents start as before"


def charged_amiss(record: Record) -> str:
    """What tokens that are charged never, or more than once, look like."""
    length, charges = len(record.charges), record.charges[1:]
    again, never = np.flatnonzero(charges > 1) + 1, np.flatnonzero(charges == 0) + 1
    if record.charges[0] and record.ordered:
        return "a charge for token 0, which nothing foretells"
    if record.endless:
        return "a charge that is no number, which a mean may skip"
    if len(again) and not len(never):
        if len(again) == length - again[0] and again[0] > length // 2:
            return "tail windows: the last tokens are scored again until one is left (fixed in #1394)"
        return "rescoring (#846), or the best of several passes (#573)"
    if len(never) and not len(again):
        if len(never) == length - never[0]:
            return "the stream's end left out, as an incomplete last window or batch"
        return "only a part of the stream: documents or tokens left out"
    return "some tokens charged never and others more than once: windows that do not meet"


_TOTALS = (
    "a hashed cache with the target in its key (#779, #886), a gate or tilt that looks at its target (#1420), the "
    "better of several models for each token (#573), a mixture over bytes (#1835, #1872), or a training loss"
)
_ADVICE = {
    "repeats": "several passes, or a cache that survives the call (#846, #991)",
    "charges": "a rescaled charge beside an honest distribution, or a training loss in its place",
    "distributions": "weights or bonuses added after normalisation (#886, #978)",
    "substituted totals": _TOTALS,
    "drawn totals": _TOTALS,
    "updates after charges": "an update before the score, as in pre-quantisation training (#1306)",
    "left to right": "documents in another order (#402, #1530), or a second pass (#846)",
    "bytes": "a leading space counted twice (#1719), byte pieces counted as 3 (#1143), a constant (#897, #2071)",
}


def patterns(tests: list["Test"], found: Findings) -> list[tuple["Test", str]]:
    """Failed tests, each with the pattern that it looks like."""
    advice = _ADVICE | {"every token once": found.once_cause}
    if found.leak or found.own:  # a charge that knows its token, or what follows, need not come from a distribution
        same = "what the leak above explains: charges that know what comes need not sum to 1"
        advice |= {"substituted totals": same, "drawn totals": same}
    return [(test, advice[test.name]) for test in tests if test.verdict == "FAIL" and test.name in advice]
