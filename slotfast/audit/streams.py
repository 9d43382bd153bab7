"""Streams to run a loop on: text-like random tokens whose probabilities are known, and altered copies of a stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

_REPEAT, _FREQUENT = 0.5, 0.3  # the rest is uniform
_ECHO = 16  # tokens
_BOS_SHARE = 0.01  # of a document start, where the stream has none to count


@dataclass(frozen=True)
class Stream:
    """The stream that a loop is run on.

    Args:
        tokens: int64 [N], on the CPU, 0..V-1.
        vocab_size: V.
        bos_id: the token that starts a document, or None.
    """

    tokens: Tensor
    vocab_size: int
    bos_id: int | None

    @classmethod
    def checked(cls, tokens: Any, vocab_size: int, bos_id: int | None) -> Self:
        """A copy of anybody's tokens, int [N].

        Raises:
            InputError: fewer than 3 tokens, ids outside the vocabulary, a vocabulary of fewer than 2.
        """
        tokens = torch.as_tensor(tokens)
        if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < 3:
            raise InputError(
                f"tokens of shape {list(tokens.shape)} and type {tokens.dtype}: expected int [N], N at least 3"
            )
        tokens = tokens.to("cpu", torch.int64).clone()
        if vocab_size < 2 or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise InputError(f"tokens {int(tokens.min())} to {int(tokens.max())}: expected 0 to {vocab_size - 1}")
        if bos_id is not None and not 0 <= bos_id < vocab_size:
            raise InputError(f"BOS {bos_id}: expected 0 to {vocab_size - 1}")
        return cls(tokens, vocab_size, bos_id)


class Source:
    """Draws tokens that look like a stream's own: they tend to repeat what followed last time, and to be frequent.

    Every token is drawn from a distribution that is known and positive everywhere, given what came before it.

    Args:
        stream: whose frequencies are taken.
        rng: all draws come from it.
    """

    def __init__(self, stream: Stream, rng: np.random.Generator):
        vocab_size, bos_id = stream.vocab_size, stream.bos_id
        self.vocab_size, self.bos_id, self.rng = vocab_size, bos_id, rng
        counts = np.bincount(stream.tokens.numpy(), minlength=vocab_size) + 1e-9
        self.frequency = counts / counts.sum()
        if bos_id is not None and self.frequency[bos_id] < _BOS_SHARE:
            self.frequency *= 1 - _BOS_SHARE
            self.frequency[bos_id] += _BOS_SHARE
        self._order = np.argsort(-self.frequency)

    def draw(
        self, before: Tensor, n: int, avoid: Tensor | None = None, uniform: bool = False
    ) -> tuple[Tensor, np.ndarray]:
        """Continue a stream.

        Args:
            before: int64 [M], M >= 1.
            n: tokens to draw.
            avoid: int64 [K], which token i must not be, for i < K.
            uniform: all tokens equally likely, which no text is.

        Returns:
            int64 [n], and the logarithm of the probability that each was drawn with, float64 [n].
        """
        rng, vocabulary = self.rng, self.vocab_size
        history = before.tolist()
        follower = dict(pairwise(history))  # what came after the last occurrence
        previous = history[-1]
        avoided = [] if avoid is None else avoid[:n].tolist()
        avoided += [-1] * (n - len(avoided))
        frequent = rng.choice(vocabulary, n, p=self.frequency).tolist()
        any_ = rng.integers(vocabulary, size=n).tolist()
        kind = rng.random(n).tolist()
        drawn, chance = [], np.empty(n)
        for i, unwanted in enumerate(avoided):
            repeated = follower.get(previous, -1)
            # Where nothing can be repeated, the repeat's share goes to the frequent tokens
            repeat = _REPEAT if repeated >= 0 and not uniform else 0.0
            plenty = 0.0 if uniform else _REPEAT + _FREQUENT - repeat
            token = repeated if kind[i] < repeat else frequent[i] if kind[i] < repeat + plenty else any_[i]
            while token == unwanted:
                again = rng.random()
                if again < repeat:
                    token = repeated
                elif again < repeat + plenty:
                    token = int(rng.choice(vocabulary, p=self.frequency))
                else:
                    token = int(rng.integers(vocabulary))
            chance[i] = self._chance(token, repeated, repeat, plenty)
            if unwanted >= 0:
                chance[i] /= 1 - self._chance(unwanted, repeated, repeat, plenty)
            drawn.append(token)
            follower[previous] = token
            previous = token
        return torch.tensor(drawn, dtype=torch.int64), np.log(chance)

    def _chance(self, token: int, repeated: int, repeat: float, plenty: float) -> float:
        rest = 1 - repeat - plenty
        return repeat * (token == repeated) + plenty * self.frequency[token] + rest / self.vocab_size

    def other(self, kind: str, tokens: Tensor, at: int) -> int:
        """A token other than the one at a position: random, rare, frequent, bos, or a copy of one just before."""
        old, rng = int(tokens[at]), self.rng
        few = max(1, self.vocab_size // 8)
        if kind == "bos" and self.bos_id is not None:
            choices = np.array([self.bos_id])
        elif kind == "rare":
            choices = self._order[-few:]
        elif kind == "frequent":
            choices = self._order[:few]
        elif kind == "copy":
            choices = tokens[max(0, at - 4) : at].numpy()
            choices = choices[-1:] if choices[-1] != old else choices
        else:
            choices = np.arange(self.vocab_size)
        choices = choices[choices != old]
        return int(rng.choice(choices)) if len(choices) else (old + 1) % self.vocab_size


@dataclass(frozen=True)
class Probe:
    """An altered copy of a stream.

    Args:
        kind: what sort of place was altered.
        change: what was done there.
        at: the first position whose token differs, or that only one of the two streams has.
        tokens: int64 [M], the altered stream.
        drawn_from: position from which its tokens were drawn by a `Source`; M where none was.
        log_chance: float64 [M - drawn_from], the logarithm of the probability that each was drawn with.
        same_shape: whether length and document starts are as before, so that a loop has no reason to round otherwise.
    """

    kind: str
    change: str
    at: int
    tokens: Tensor
    drawn_from: int
    log_chance: np.ndarray
    same_shape: bool

    @classmethod
    def of(
        cls,
        kind: str,
        change: str,
        old: Tensor,
        new: Tensor,
        bos_id: int | None,
        drawn: tuple[int, np.ndarray] | None = None,
    ):
        """A probe from the stream before and after; `drawn` is the first drawn position and its log-probabilities."""
        common = min(len(old), len(new))
        differing = (old[:common] != new[:common]).nonzero()
        at = int(differing[0]) if len(differing) else common
        same = len(old) == len(new) and (bos_id is None or bool(((old == bos_id) == (new == bos_id)).all()))
        drawn_from, log_chance = drawn or (len(new), np.empty(0))
        return cls(kind, change, at, new, drawn_from, log_chance, same)


def alter(source: Source, tokens: Tensor, kind: str, change: str, at: int) -> Probe:
    """Change a stream at one position.

    Args:
        change: `resample` draws all tokens from there anew, as `scramble` does uniformly, often behind a copy of the
            token before; `echo` puts there what came just before, last token first; `truncate` ends the stream there,
            `extend` lengthens it; `constant` is one token from there on, the easiest future or the hardest, which a
            choice among fits cannot stand; `insert bos` and `delete` shift what follows; anything else names the one
            token put there (`Source.other`).
        at: 1..N-1.
    """
    length, bos = len(tokens), source.bos_id
    drawn = None
    if change in ("resample", "scramble", "extend"):
        # A stream as long or longer, whose old tokens from there on are all replaced by others
        more = 1 + int(source.rng.integers(max(1, length // 8))) if change == "extend" else 0
        start = length if change == "extend" else at
        fresh, chance = source.draw(tokens[:start], length + more - start, tokens[start:], change == "scramble")
        repeats = change == "scramble" or (change == "resample" and source.rng.random() < 0.5)
        if repeats and tokens[at] != tokens[at - 1]:
            fresh[0] = tokens[at - 1]  # a look ahead raises its chance, which moves the charge of the token before
            start, chance = start + 1, chance[1:]
        new, drawn = torch.cat([tokens[:at] if change != "extend" else tokens, fresh]), (start, chance)
    elif change == "echo":
        # A loop that has seen these tokens ahead raises their chance, which moves their charges where they came before
        copied = min(at, length - at, _ECHO)
        new = torch.cat([tokens[:at], tokens[at - copied : at].flip(0), tokens[at + copied :]])
    elif change == "constant":
        new = tokens.clone()
        new[at:] = source.other("random", tokens, at)
    elif change == "truncate":
        new = tokens[:at].clone()
    elif change == "insert bos" and bos is not None:
        new = torch.cat([tokens[:at], tokens.new_tensor([bos]), tokens[at:-1]])
    elif change == "delete":
        fresh, chance = source.draw(tokens, 1)
        new, drawn = torch.cat([tokens[:at], tokens[at + 1 :], fresh]), (length - 1, chance)
    else:
        new = tokens.clone()
        new[at] = source.other(change, tokens, at)
    return Probe.of(kind, change, tokens, new, bos, drawn)


def recurring(source: Source, tokens: Tensor, at: int) -> Tensor:
    """A drawn stream whose last tokens before a position occurred several times before, always with the same follower.

    Caches of every order have met them and are confident, so that a wrong total shows.

    Args:
        tokens: int64 [N], N > at; its length and its first token, which may have to be a BOS, are kept.
        at: 1..N-1.
    """
    stream = torch.cat([tokens[:1], source.draw(tokens[:1], len(tokens) - 1)[0]])
    copied = min(int(source.rng.integers(1, 9)), at // 2)
    last = max(1, at - 2 * copied)  # any later, a copy would reach into the tokens before the position
    begin, *others = source.rng.integers(0, last, 1 + int(source.rng.integers(1, 8))).tolist()
    piece = stream[begin : begin + copied + 1].clone()
    for place in others:
        place = max(place, 1)
        stream[place : place + len(piece)] = piece
    stream[at - copied : at] = piece[:copied]
    return stream


def likely(source: Source, stream: Tensor, at: int, n: int) -> list[int]:
    """Up to n tokens for a position: the one there, followers of the one before, nearby ones, frequent ones, any."""
    tokens = stream[:at].tolist()
    followed = [after for token, after in pairwise(tokens) if token == tokens[-1]]
    near = [int(stream[at]), *followed[::-1], *tokens[: -n - 1 : -1]]
    frequent = np.argsort(-source.frequency)[:n].tolist()
    anything = source.rng.permutation(source.vocab_size)[:n].tolist()
    thirds = [list(dict.fromkeys(part))[: -(-n // 3)] for part in (near, frequent, anything)]
    return list(dict.fromkeys(token for part in thirds for token in part))[:n]


def rarest(tokens: Tensor, rng: np.random.Generator) -> Iterator[int]:
    """The tokens of a stream, the rarest first and equally rare ones in any order, endlessly."""
    kinds, counts = np.unique(tokens.numpy(), return_counts=True)
    return cycle(kinds[np.lexsort([rng.random(len(kinds)), counts])].tolist())


def synthetic(n: int, vocab_size: int, bos_id: int | None, rng: np.random.Generator) -> Tensor:
    """A text-like stream for a loop that comes without one, with Zipf's frequencies, repetition and documents."""
    rank = torch.from_numpy(rng.permutation(vocab_size))
    counts = (1000 / (1 + rank)).ceil().long()
    if bos_id is not None:
        counts[bos_id] = 0
    seed = torch.repeat_interleave(torch.arange(vocab_size), counts)
    first = torch.tensor([0 if bos_id is None else bos_id])
    drawn, _ = Source(Stream(seed, vocab_size, bos_id), rng).draw(first, n - 1)
    return torch.cat([first, drawn])
