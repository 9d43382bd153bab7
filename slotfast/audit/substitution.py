"""Totals by substitution: the vocabulary's tokens are put in one position in turn, and their charges added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .checks import Charges, Totals
from .places import cheap_charges
from .streams import Source, likely, rarest, recurring

if TYPE_CHECKING:
    from .engine import Auditor

SHORTEST_SUM = 24  # tokens: nearer the start a loop has hardly any state
_SHARE, _FEW_SHARE = 0.4, 0.1  # shares of the budget: where all tokens can be tried, and where only a few can
# Positions whose totals are taken, one kind after another: the last of a stream; the first of an event; one of the
# given stream, where experts may be as good as each other and choices close; one with more tokens behind it, since a
# loop that reads them may score the token again; the first of a document; one behind a rare token; and one of the given
# stream that is charged little for what it is. Rare tokens are many, and short streams are enough for them.
_KINDS = ("end", "event", "given", "rare", "cheap", "inside", "rare", "document", "rare", "rare")
_LATE_KINDS = ("end", "cheap", "given", "inside", "event")
_LATE_SHARE = 1 / 3  # share of what totals cost: a late one takes every token over most of the stream


def share_budget(auditor: Auditor) -> None:
    """Divide the budget; distributions need no totals, and where not all tokens can be tried, a few tell little."""
    auditor.budget.share(_SHARE)
    length, vocab_size = len(auditor.tokens), auditor.stream.vocab_size
    complete = _affordable(auditor, 1) * length >= SHORTEST_SUM * vocab_size
    given = all(found.check(Charges).clear for found in auditor.found.values())
    auditor.budget.share(0.0 if given else _SHARE if complete else _FEW_SHARE)
    for totals in _checks(auditor):
        totals.late_reruns = int(np.ceil(totals.late * vocab_size / length / _SHARE)) + 1


def _checks(auditor: Auditor) -> list[Totals]:
    return [found.check(Totals) for found in auditor.found.values()]


def take_totals(auditor: Auditor, source: Source, rounds: int) -> None:
    """Add up what the tokens of the vocabulary are charged in one position, and in others while the budget lasts.

    It takes all tokens where the budget has room for that, else those that a loop is likeliest to favour, which can
    only show that a total is too large. Late positions come first: a state that takes most of the stream to fill shows
    there.
    """
    tokens, budget, length = auditor.tokens, auditor.budget, len(auditor.tokens)
    behind, turn = rarest(tokens, source.rng), rounds - 1
    reference = auditor.found[auditor.names[0]].reference
    starts = reference.starts[reference.starts > 0]  # nothing predicts token 0
    cheap = cheap_charges(reference, source.rng)
    silent = np.flatnonzero(np.isnan(reference.total[1:])) + 1
    late, vocab_size = max(totals.late for totals in _checks(auditor)), auditor.stream.vocab_size
    taken = refused = 0
    cost = late_cost = 0.0  # in runs of the whole stream
    while budget.shares["sums"] and (not taken or budget.left("sums", rounds)) and refused < 8:
        affordable = _affordable(auditor, rounds)
        # One late total is added where a round's reruns would pay for it: nothing else can clear such a loop
        extra = min(budget.reruns, budget.limit_left("sums", rounds) * auditor.speed)
        on_top = not taken and late * vocab_size / length <= extra
        affordable = extra if on_top else affordable
        # A stream that ends early costs less: the longest in which every token can be tried
        reach = min(int(affordable * length / vocab_size), length - 1)
        cut = auditor.fixed_length is None
        shortest = max(SHORTEST_SUM, auditor.shortest - 1)
        short = cut and (reach >= shortest or reach == length - 1)
        everything = short or affordable >= vocab_size
        reach = reach if short else length - 1
        is_late = late_cost <= _LATE_SHARE * cost and everything and reach >= late
        kind = (_LATE_KINDS if is_late else _KINDS)[turn % len(_LATE_KINDS if is_late else _KINDS)]
        turn += 1
        if kind == "rare" and short:  # there are many rare tokens
            reach = min(reach, max(2 * SHORTEST_SUM, shortest))
        first = late if is_late else min(shortest, reach)
        last = at = int(first * ((reach + 1) / first) ** source.rng.random())  # both short and long ones
        if kind in ("inside", "given"):
            at = int(source.rng.integers(first, last + 1))
        if kind == "event":
            near = starts[(starts >= (late if is_late else shortest)) & (starts <= reach)]
            last = at = int(source.rng.choice(near)) if len(starts) > 1 and len(near) else last
        if kind == "cheap" and (near := cheap[(cheap >= first) & (cheap <= reach)]).size:
            last = at = int(near[0])
            cheap = cheap[cheap != at]
        elif len(silent) < length - 1 and (hidden := silent[silent <= last]).size:
            at = int(source.rng.choice(hidden))  # the other tokens came with their distributions
        stream = tokens.clone() if kind in ("given", "cheap") else recurring(source, tokens, at)
        if kind == "rare":
            stream[at - 1] = next(behind)
        if kind == "document" and auditor.stream.bos_id is not None:
            stream[max(0, at - 1 - int(source.rng.integers(2)))] = auditor.stream.bos_id
        stream = stream[: last + 1] if cut else stream
        if not auditor.takes(stream):
            refused += 1
            continue
        candidates = range(vocab_size) if everything else likely(source, stream, at, int(affordable))
        if not candidates:
            return
        _put(auditor, stream, at, candidates, None if on_top else "sums")
        taken += 1
        cost += len(candidates) * len(stream) / length
        late_cost += len(candidates) * len(stream) / length if is_late else 0.0


def _put(auditor: Auditor, stream: Tensor, at: int, candidates: Sequence[int], phase: str | None) -> None:
    """Show the checks what candidates for one position are charged; `phase` pays for the runs."""
    nll: dict[str, list[float]] = {name: [] for name in auditor.names}
    precision = 0.0
    for token in candidates:
        tokens = stream.clone()
        tokens[at] = token
        for name, record in auditor.records(tokens, phase).items():
            nll[name].append(record.nll[at])
            precision = max(precision, record.nll_precision)
    for name, found in auditor.found.items():
        found.show("see_total", stream, at, candidates, np.array(nll[name]), precision)


def _affordable(auditor: Auditor, rounds: int) -> float:
    """Runs of the whole stream that the totals may still take."""
    speed, budget = auditor.speed, auditor.budget
    runs = max(budget.seconds_left("sums", rounds) * speed, budget.runs_left("sums", rounds))
    return max(min(runs, budget.limit_left("sums", rounds) * speed), 0)
