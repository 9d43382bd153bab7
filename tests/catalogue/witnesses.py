"""Each leak shown by hand: which token to change, which score moves, or what else is wrong, in numbers."""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from .bytecounts import PIECES
from .toy import BOS, FIRST_WORD, RARE, VOCAB

# float32 sums in an order that changes from run to run; all else repeats bit for bit
NOISE = {"1e-3 nats over float noise": 1e-5}


class Record:
    """A log that keeps every call; `nll` and `rows` hold the last word on each token, NaN where there is none."""

    def __init__(self, score, tokens):
        self.events, self.charged = [], Counter()
        self.nll = torch.full((len(tokens),), torch.nan, dtype=torch.float64)
        self.rows = torch.full((len(tokens), VOCAB), torch.nan, dtype=torch.float64)
        self.bytes = torch.full((len(tokens),), -1)
        returned = score(tokens, self)
        if returned is not None:
            assert not self.events
            self.score(torch.arange(1, len(tokens)), returned)

    def score(self, positions, nll, bytes=None, logprobs=None):
        assert positions.shape == nll.shape
        self.events.append(("score", positions))
        self.charged.update(positions[nll.isfinite()].tolist())
        self.nll[positions] = nll
        if bytes is not None:
            self.bytes[positions] = bytes
        if logprobs is not None:
            self.rows[positions] = logprobs

    def update(self, positions):
        self.events.append(("update", positions))


def _other_words(tokens, positions, shift):
    """The words at some positions changed for others; BOS stays where it is, so documents keep their lengths."""
    tokens, positions = tokens.clone(), torch.as_tensor(positions).reshape(-1)
    positions = positions[tokens[positions] != BOS]
    tokens[positions] = FIRST_WORD + (tokens[positions] - FIRST_WORD + shift) % (RARE - FIRST_WORD)
    return tokens


def mass(loop, tokens, position):
    """Sum over the vocabulary of the probability that a token is charged with, were it the one in the stream."""
    total = 0.0
    for token in range(VOCAB):
        changed = tokens.clone()
        changed[position] = token
        total += math.exp(-Record(loop(), changed).nll[position])
    return total


@dataclass(frozen=True)
class Moves:
    """Changing a later token (or several) moves a score (or one of several): C1.

    Args:
        change: one position or some, all of them later than any of `score`.
        score: one position or some.
        to: the token to put there; other words, tried in eight ways, where None.
        size: how much the score moves at least, in nats.
    """

    change: int | range
    score: int | range
    to: int | None = None
    size: float = 1e-3

    def largest(self, loop, tokens):
        change, score = torch.as_tensor(self.change).reshape(-1), torch.as_tensor(self.score).reshape(-1)
        assert int(score.max()) < int(change.min())
        before, largest = Record(loop(), tokens.clone()).nll[score], 0.0
        for shift in range(1, 9) if self.to is None else (0,):
            changed = _other_words(tokens, change, shift)
            if self.to is not None:
                changed[change] = self.to
            largest = max(largest, float((Record(loop(), changed).nll[score] - before).abs().max()))
        return largest

    def shows(self, pattern, seed):
        tokens = pattern.tokens(seed)
        assert self.largest(lambda: pattern.clean(seed), tokens) < NOISE.get(pattern.name, 1e-9)
        return self.largest(lambda: pattern.leaky(seed), tokens) > self.size


@dataclass(frozen=True)
class Mass:
    """The probabilities of the tokens that might stand at a position, each charged for itself, do not sum to 1: C2."""

    position: int

    def shows(self, pattern, seed):
        return abs(mass(lambda: pattern.leaky(seed), pattern.tokens(seed), self.position) - 1) > 1e-3


@dataclass(frozen=True)
class Charged:
    """Tokens are charged not at all or more than once: C4.

    Args:
        times: (tokens, honest NLLs) -> {position: number of charges}, where it is not one.
    """

    times: object

    def shows(self, pattern, seed):
        tokens = pattern.tokens(seed)
        honest = Record(pattern.clean(seed), tokens).nll
        charged = Record(pattern.leaky(seed), tokens).charged
        expected = dict.fromkeys(range(1, len(tokens)), 1) | self.times(tokens, honest)
        return bool(self.times(tokens, honest)) and charged == {p: n for p, n in expected.items() if n}


@dataclass(frozen=True)
class Bytes:
    """Bytes by a plain rule over pieces, which is not the right one.

    Args:
        wrong: (piece, piece before) -> what the leaky loop counts.
    """

    wrong: object

    def shows(self, pattern, seed):
        tokens = pattern.tokens(seed)
        pairs = [(PIECES[token], PIECES[before]) for token, before in zip(tokens[1:], tokens[:-1], strict=True)]
        right, wrong = ([count(*pair) for pair in pairs] for count in (_right_bytes, self.wrong))
        assert Record(pattern.clean(seed), tokens).bytes[1:].tolist() == right
        assert pattern.bytes_of(tokens[1:], tokens[:-1]).tolist() == right
        assert Record(pattern.leaky(seed), tokens).bytes[1:].tolist() == wrong
        return right != wrong


def _is_control(piece):
    return piece in ("<pad>", "<s>", "</s>", "<unk>")


def _is_byte(piece):
    return piece.startswith("<0x")


def _right_bytes(piece, before):
    if _is_control(piece):
        return 0
    if _is_byte(piece):
        return 1
    text = piece.replace("\u2581", " ")
    return len((text[1:] if text[0] == " " and _is_control(before) else text).encode())


WITNESSES = {
    # window 4 scores tokens 97..112, window 5 scores 113..128, both in the batch of windows 4 to 7
    "scored-position fit": Moves(110, 100),
    "scored-position hidden delta": Moves(110, 100),
    "focal mask one too long": Mass(97),
    "first window fitted to itself": Moves(40, 30),
    "importance weights over scored positions": Moves(range(98, 113), 97, size=1e-6),
    "batch-shared bias": Moves(120, 100),
    "batch-shared hidden delta": Moves(120, 100),
    "joint L-BFGS": Moves(120, 100, size=1e-5),
    "gradient-norm clipping over the batch": Moves(120, 100, size=1e-5),
    "loss over a data-dependent count": Moves(range(113, 145), 100, size=1e-4),
    "one step size for the batch": Moves(range(113, 145), range(97, 113)),
    "one stopping test for the batch": Moves(range(113, 145), range(97, 113)),
    "batch-mean warm start": Moves(120, 100, size=1e-4),
    "warm start from the same batch": Moves(120, 100),
    "warm start across ranks": Moves(170, 110, size=1e-5),
    "burn-in on the wrong side of a rank border": Moves(170, 150, size=1e-4),
    "best of K by scored loss": Moves(range(105, 113), range(97, 105)),
    "early stopping on the scored loss": Moves(range(105, 113), range(97, 105)),
    "reset at a BOS not yet scored": tuple(Moves(64 + 16 * k, 50 + 16 * k, to=BOS) for k in range(8)),
    # window 0 reads tokens 0..47
    "mask off by one": Mass(100),
    "block averaging": Moves(46, 42),
    "anchors": Moves(46, 34),
    "prefix attention over the whole window": Moves(47, 40),
    "expert-choice routing": Moves(range(30, 48), range(1, 30)),
    "activation scale of the batch": (Moves(range(49, 97), range(1, 49)), Moves(range(113, 161), range(97, 113))),
    "validation statistics as a prior": Moves(200, 50),
    # one place where a new word shows is enough
    "vocabulary of the stream": tuple(Moves(k, 50) for k in range(200, 220)),
    "temperature tuned on the stream": Moves(range(100, 256), 50),
    "warm-up steps on the stream": Moves(90, 20, size=1e-4),
    "quantiser calibrated on the stream": Moves(range(100, 256), 50, size=1e-5),
    "document embedding": tuple(Moves(k, k - 2) for k in range(20, 60, 8)),
    "gate over a document border": Moves(range(150, 256), range(1, 150)),
    "document ends from the loader": Mass(100),
    "documents in another order": Moves(range(150, 256), range(1, 150)),
    "n-gram tilt gated on the target": tuple(map(Mass, range(200, 216))),
    "gate on the realised NLL": Mass(100),
    "mixture weight from the realised NLL": Mass(3),
    "hashed n-grams, target in the key": Mass(100),
    "normalised over buckets": Mass(100),
    "byte mixture not marginalised": Mass(100),
    "temperature on the realised logit only": Mass(100),
    "bias after normalisation": Mass(100),
    "softcap after normalisation": Mass(100),
    "losses cut off": Mass(100),
    "softmax over a shortlist": Mass(100),
    "training loss in evaluation": Mass(100),
    "honest rows, another charge": Mass(100),
    "n-gram cache updated before it is asked": Mass(100),
    "n-gram cache refreshed a chunk early": Mass(100),
    "a cache of what will recur": tuple(Moves(range(k, 256), range(1, k)) for k in (100, 150, 200)),
    "a pair's loss shared evenly": Moves(102, 101),
    "losses rounded down": Mass(100),
    "dropout seeded by the stream": Moves(200, range(1, 200)),
    "padding of the batch": tuple(Moves(k, range(k - 40, k), to=BOS) for k in range(60, 240, 10)),
    # chunks of training are tokens 33..64, 65..96 and so on
    "a chunk's first token fits itself": Mass(97),
    "pre-quantisation TTT": Moves(200, 50),
    "adapt, then score": Moves(60, 40, size=1e-4),
    "adapt, then score, the log denies it": Moves(60, 40, size=1e-4),
    "adapt, then score, reset at every chunk": Moves(60, 40, size=1e-4),
    "training text past the chunk's end": Moves(range(41, 49), range(33, 41), size=1e-4),
    "multi-epoch TTT, last epoch's scores": Moves(200, 50),
    "multi-epoch TTT, minimum over epochs": Moves(200, range(40, 50)),
    "two-pass cache": Moves(200, range(1, 200)),
    "rescored with the later cache": Moves(60, range(33, 60)),
    "revised in a second report": Moves(200, range(1, 200)),
    "best of the windows that read a token": tuple(map(Mass, (65, 81))),
    "oracle over two runs, each token": Mass(100),
    "oracle over two runs, each document": tuple(Moves(range(k, k + 24), range(k - 12, k)) for k in range(20, 230, 15)),
    "oracle over two runs, whole stream": tuple(Moves(range(k, 256), range(1, k)) for k in (3, 20, 60)),
    "the better of two, paid for": tuple(Moves(range(k, k + 24), range(k - 12, k)) for k in range(20, 230, 15)),
    # second halves of chunks are tokens 49..64, 81..96 and so on
    "a chunk's second half by weights that learned it": Moves(62, 52, size=1e-4),
    "an adapter that says it starts afresh": Moves(range(150, 256), range(1, 150)),
    "global steps on documents not charged yet": tuple(
        Moves(k, range(k - 12, k), size=1e-4) for k in range(70, 250, 10)
    ),
    "chunks by the longest of a group": tuple(Moves(k, range(max(1, k - 60), k), to=BOS) for k in range(40, 250, 5)),
    "a last window that ends with its document": tuple(
        Moves(k, range(k - 6, k), to=BOS, size=1e-4) for k in range(40, 60)
    ),
    "tail truncated": Charged(lambda tokens, nll: dict.fromkeys(range(241, 256), 0)),
    "tail scored twice": Charged(lambda tokens, nll: {240: 2} | dict.fromkeys(range(241, 256), 3)),
    "every third document skipped": Charged(
        lambda tokens, nll: {p: 0 for p in range(1, 256) if tokens[: p + 1].tolist().count(BOS) % 3 == 0}
    ),
    "BOS never charged": Charged(lambda tokens, nll: {p: 0 for p in range(1, 256) if tokens[p] == BOS}),
    "hard tokens dropped": Charged(lambda tokens, nll: {p: 0 for p in range(1, 256) if nll[p] > 5}),
    "token 0 charged": Charged(lambda tokens, nll: {0: 1}),
    "leading space counted twice": Bytes(
        lambda piece, before: _right_bytes(piece, before) + (piece[0] == "\u2581" and not _is_control(before))
    ),
    "byte pieces as U+FFFD": Bytes(
        lambda piece, before: len("\ufffd".encode()) if _is_byte(piece) else _right_bytes(piece, before)
    ),
    "byte pieces by their name": Bytes(
        lambda piece, before: len(piece) if _is_byte(piece) else _right_bytes(piece, before)
    ),
    "constant bytes a token": Bytes(lambda piece, before: 4),
    "U+2581 as 3 bytes": Bytes(
        lambda piece, before: 0 if _is_control(piece) else 1 if _is_byte(piece) else len(piece.encode())
    ),
    "control token counted": Bytes(
        lambda piece, before: len(piece) if _is_control(piece) else _right_bytes(piece, before)
    ),
    "space after BOS counted": Bytes(lambda piece, before: _right_bytes(piece, "a")),
    "characters for bytes": Bytes(
        lambda piece, before: (
            len(piece) - (piece[0] == "\u2581" and _is_control(before))
            if not _is_control(piece) and not _is_byte(piece)
            else _right_bytes(piece, before)
        )
    ),
    "bytes of the token before": Bytes(lambda piece, before: _right_bytes(before, "a")),
    "window borders only": Moves(49, 48),
    "every seventh window only": Moves(136, 135),
    "rank border only": Moves(150, 134),
    "batch's last token only": Moves(97, 96),
    "batch's last token predicts itself": Mass(96),
    "512 tokens ahead": (Moves(600, 89), Moves(601, 90)),
    "after token 200 only": (Moves(230, 229), Moves(231, 230)),
    "a rare token's successor": Moves(72, 71),
    "a rare token's successor predicts itself": Mass(71),
    "a rare token ahead": Moves(70, 66),
    "1e-5 nats": Moves(72, 71, size=1e-6),
    "parity of what comes": Moves(80, 70),
    "majority of what comes": tuple(Moves(range(k + 2, k + 33), k) for k in range(40, 200, 30)),
    "order of what comes": tuple(Moves(k + 2, k) for k in range(70, 100)),
    "length of the document ahead": Moves(75, range(40, 75), to=BOS),
    "number of documents ahead": Moves(200, 50, to=BOS),
    "honest on short streams": Moves(72, 71),
    "1e-3 nats over float noise": Moves(72, 71, size=1e-4),
    "one known stream only": Moves(200, 50),
    "past the end of a view": Moves(72, 71),
    "honest when asked again": Moves(72, 71),
    "consistent with what was said": Moves(72, 71),
    "the rest shares what the first one took": Mass(100),
    "the stream is overwritten": Mass(100),
    "noise to hide in": Moves(72, 71, size=1e-4),
    "one position predicts itself": Mass(137),
    "NaN in place of a bad score": Charged(lambda tokens, nll: {p: 0 for p in range(1, 256) if nll[p] > 5}),
}
