"""What a wrong total looks like: whose charges in one position move with which earlier tokens."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .base import Findings

_ASKED = 64  # tokens, at most, whose charges are watched
_PLACES = 3  # earlier tokens that are changed, one at a time
_SHORTEST = 16  # tokens before the position: with fewer there is hardly a past to change
_FEWEST = 8  # tokens of the vocabulary
_FAINT = 1e-3  # nats
_HASHED = "n-grams of other contexts move what is charged here: a hashed cache with the target in its key (#779, #886)"
_GATED = (
    "a gate or tilt that looks at its target (#1420), or an entry of the target's own (#886): what followed the token "
    "before moves the charges of those followers, and of no other token"
)
_BETTER = (
    "the better of several models for each token (#573), or counts added after normalisation: how often a token came "
    "moves its own charge, and no other's"
)
_CHARGE = (
    "a charge that is not its model's probability, as a training loss, a rescaled or cut-off loss, a bonus after "
    "normalisation (#886, #978), a temperature of the target alone (#1877), or the better of models that all forget: "
    "no earlier token moves it"
)
_DENSE = (
    "a mixture over bytes (#1835, #1872), or one of the other mechanisms on a state that learns: every earlier token "
    "moves what most tokens are charged"
)


def explain(found: Findings, stream: Tensor, at: int, nll: np.ndarray) -> str | None:
    """The pattern of a position whose charges do not sum to 1, or None where runs do not tell.

    Args:
        found: of the loop, which is run once more for every token that is asked for, several times over.
        stream: int64 [N], in which the total was taken.
        at: the position.
        nll: float64 [V], what every token was charged there.
    """
    if at < _SHORTEST or len(nll) < _FEWEST:
        return None
    past = _Past(found, stream, at, nll)
    alone = [past.moved_by(*change) for change in past.elsewhere()]
    sparse = [moved for moved in alone if 2 * len(moved.tokens) <= len(past.asked)]
    if len(sparse) < len(alone) or not alone:
        return _DENSE if alone and not sparse else None
    if any(moved.faint for moved in alone):
        return None
    if any(moved.tokens - moved.changed for moved in alone):
        return _HASHED
    if any(moved.tokens for moved in alone):
        return _BETTER
    followers = past.moved_by(*past.followed())
    if followers.tokens and followers.tokens <= followers.changed:
        return _GATED
    if not followers.tokens and len(past.asked) == len(nll):
        return _CHARGE
    return None


@dataclass(frozen=True)
class _MovedBy:
    """What moved.

    Args:
        tokens: whose charges moved.
        changed: tokens that took another's place, lost it, or stand behind one that did.
        faint: whether some moved by hardly anything, as all do where a state learns.
    """

    tokens: set[int]
    changed: set[int]
    faint: bool


class _Past:
    """The stream before a position, to be changed."""

    def __init__(self, found: Findings, stream: Tensor, at: int, nll: np.ndarray):
        self.found, self.stream, self.at, self.nll = found, stream, at, nll
        rng = np.random.default_rng(at)
        likeliest = np.argsort(nll)[: _ASKED // 2]
        others = rng.permutation(np.setdiff1d(np.arange(len(nll)), likeliest))
        self.asked = np.concatenate([likeliest, others])[:_ASKED]
        self.before = int(stream[at - 1])
        words = stream[1 : at // 2].tolist()
        kinds, counts = np.unique([w for w in words if w not in (self.before, found.stream.bos_id)], return_counts=True)
        self.frequent = kinds[np.argsort(-counts)].tolist()
        self.rng = rng

    def elsewhere(self) -> list[tuple[Tensor, set[int]]]:
        """Streams in which one frequent token, behind and before others than the last one, is another frequent one."""
        ids = self.stream.tolist()
        places = [
            p for p in range(2, self.at // 2)
            if ids[p] in self.frequent[:8] and self.before not in ids[p - 1 : p + 2]
        ]  # fmt: skip
        changes = []
        for place in self.rng.permutation(places)[:_PLACES].tolist():
            new = next((token for token in self.frequent if token not in ids[place - 1 : place + 2]), None)
            if new is not None:
                tokens = self.stream.clone()
                tokens[place] = new
                changes.append((tokens, {ids[place], new, ids[place + 1]}))
        return changes

    def followed(self) -> tuple[Tensor, set[int]]:
        """The stream with one new token after the last one wherever that came early, and more often than any other."""
        ids, tokens, half = self.stream.tolist(), self.stream.clone(), self.at // 2
        avoided = {self.before, ids[self.at], self.found.stream.bos_id}
        new = next(token for token in range(len(self.nll)) if token not in avoided)
        late = sum(token == self.before for token in ids[half : self.at])
        changed = {new}
        for place in self.rng.permutation(np.arange(2, half - 1, 2))[: late + 3].tolist():
            changed |= set(ids[place - 1 : place + 2])
            tokens[place] = self.before
        for place in range(2, half + 1):
            if int(tokens[place - 1]) == self.before:
                changed |= set(ids[place : place + 2])
                tokens[place] = new
        return tokens, changed

    def moved_by(self, tokens: Tensor, changed: set[int]) -> _MovedBy:
        """Which of these tokens are charged differently in an altered stream."""
        after = []
        for token in self.asked.tolist():
            altered = tokens.clone()
            altered[self.at] = token
            after.append(self.found.run(altered).nll[self.at])
        before = self.nll[self.asked]
        same = (before == after) | (np.isnan(before) & np.isnan(after))
        gap = np.where(same, 0.0, np.abs(np.subtract(before, after, where=~same, out=np.zeros_like(before))))
        moved = ~(gap <= self.found.noise.limit(np.nan_to_num(before), True))
        return _MovedBy(set(self.asked[moved].tolist()), changed, bool((gap[moved] < _FAINT).any()))
