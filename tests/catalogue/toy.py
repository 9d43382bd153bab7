"""What the loops of the catalogue are built from: a stream, a tiny causal model, batches of windows, bias fits.

Windows of 48 predictions slide by 16 and go in batches of 4, so in a stream of 256 tokens the charged tokens are

    window        0      1      2      3  |   4       5  ...     7   |  8  ...  11   |  12       13
    scores     1..48  49..64 65..80 81..96  97..112 113..128  145..160  161..224    225..240  241..255

and a window reads the 32 tokens in front of the ones it scores. Everything is float64 and rerun bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from slotfast.windows import Plan, Window

VOCAB, BOS, FIRST_WORD, RARE = 64, 1, 4, 63  # ids 0, 2, 3 never occur, RARE only where a pattern puts it
SEQ, STRIDE, BATCH = 48, 16, 4
LENGTH, LONG = 256, 640
RANK_BORDER = 7  # first window of the second of two ranks; fixed, or its place would tell the stream's length
_WIDTH, _DECAY = 16, 0.6


# the model


@cache
def decaying(size: int) -> Tensor:
    """The causal mixer: row p averages what lies at p and before with decaying weights; [size, size]."""
    distance = torch.arange(size, dtype=torch.float64)[:, None] - torch.arange(size)
    return torch.where(distance >= 0, _DECAY ** distance.clamp(min=0), 0.0)


class Toy:
    """A one-layer language model: embed, mix the past, project."""

    def __init__(self, seed: int):
        source = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(VOCAB, _WIDTH, generator=source, dtype=torch.float64)
        self.head = 0.25 * torch.randn(_WIDTH, VOCAB, generator=source, dtype=torch.float64)
        self.tilt = torch.randn(VOCAB, VOCAB, generator=source, dtype=torch.float64)  # a logit row for each token

    def hidden(self, inputs: Tensor) -> Tensor:
        """States [..., T, width] of input tokens [..., T]; each reads the tokens up to its own position."""
        return decaying(inputs.shape[-1]) @ self.embed[inputs]

    def logits(self, inputs: Tensor) -> Tensor:
        return self.hidden(inputs) @ self.head


# streams


@cache
def _text(seed: int, source_seed: int, length: int) -> Tensor:
    toy = Toy(seed)
    source = torch.Generator().manual_seed(source_seed)
    tokens, hidden, left = [], torch.zeros(_WIDTH, dtype=torch.float64), 0
    while len(tokens) < length:
        if left == 0:
            token, left = BOS, int(torch.randint(24, 64, (), generator=source))
            taste = torch.randn(RARE - FIRST_WORD, generator=source, dtype=torch.float64)
        else:
            logits = (hidden @ toy.head)[FIRST_WORD:RARE] + taste
            token = FIRST_WORD + int(torch.multinomial(torch.softmax(logits, 0), 1, generator=source))
        tokens.append(token)
        hidden = _DECAY * hidden + toy.embed[token]
        left -= 1
    return torch.tensor(tokens)


def stream(seed: int, length: int = LENGTH) -> Tensor:
    """What the model of this seed writes: documents of 24 to 63 tokens, BOS first, each with a taste of its own."""
    return _text(seed, 1000 + seed, length).clone()


def training_text(seed: int) -> Tensor:
    """More of the same, which nothing is scored on."""
    return _text(seed, 2000 + seed, LENGTH).clone()


def documents(tokens: Tensor) -> list[tuple[int, int]]:
    """Where each document starts and stops."""
    starts = [0, *(torch.nonzero(tokens[1:] == BOS)[:, 0] + 1).tolist()]
    return list(zip(starts, [*starts[1:], len(tokens)], strict=True))


# windows


@dataclass(frozen=True)
class Batch:
    """Windows side by side; every tensor is [W, SEQ], padding is neither context nor scored.

    Args:
        inputs, targets: tokens read, tokens to predict.
        positions: places of the targets in the stream.
        context, scored: which predictions earlier windows charged, which are charged here.
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor
    context: Tensor
    scored: Tensor


def collate(tokens: Tensor, windows: Sequence[Window]) -> Batch:
    place = torch.arange(SEQ)
    index = torch.tensor([window.start for window in windows])[:, None] + place
    padded = torch.cat([tokens, tokens.new_zeros(SEQ + 1)])
    context_end = torch.tensor([window.context_end for window in windows])[:, None]
    scored_end = torch.tensor([window.scored_end for window in windows])[:, None]
    return Batch(
        inputs=padded[index],
        targets=padded[index + 1],
        positions=index + 1,
        context=place < context_end,
        scored=(place >= context_end) & (place < scored_end),
    )


def batches(tokens: Tensor, size: int = BATCH) -> Iterator[Batch]:
    plan = Plan(len(tokens) - 1, SEQ, STRIDE)
    for first in range(0, len(plan), size):
        yield collate(tokens, [plan[index] for index in range(first, min(first + size, len(plan)))])


# fits of a logit bias


def excess(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Gradient of each window's masked sum of losses with respect to a bias on its logits; [W, 1, V]."""
    weight = mask.to(logits.dtype)
    expected = (torch.softmax(logits, -1) * weight[..., None]).sum(1)
    return expected.scatter_add(1, targets, -weight)[:, None]


def fit(logits: Tensor, targets: Tensor, mask: Tensor, bias: Tensor | None = None, steps: int = 3, rate: float = 0.05):
    """Plain gradient descent of one bias a window on the masked positions; [W, 1, V]."""
    bias = logits.new_zeros(len(logits), 1, VOCAB) if bias is None else bias
    for _ in range(steps):
        bias = bias - rate * excess(logits + bias, targets, mask)
    return bias


# the charge


def nll(logprobs: Tensor, targets: Tensor) -> Tensor:
    return -logprobs.gather(-1, targets[..., None])[..., 0]


def charge(log, batch: Batch, logprobs: Tensor) -> None:
    """Report the scored positions of a batch as one event."""
    losses = nll(logprobs, batch.targets)
    log.score(batch.positions[batch.scored], losses[batch.scored], logprobs=logprobs[batch.scored])


def charge_all(log, tokens: Tensor, logprobs: Tensor, show: bool = True) -> None:
    """Report a whole stream as one event; logprobs [N - 1, V], row p for token p + 1, shown to the log or not."""
    losses = nll(logprobs, tokens[1:])
    log.score(torch.arange(1, len(tokens)), losses, logprobs=logprobs if show else None)


# patterns


@dataclass(frozen=True)
class Pattern:
    """One way to cheat, as a loop that does it and a loop that differs from it in nothing else.

    Args:
        name: the field's term.
        entry: number of the pattern's kin in the list of known cases, 1-25.
        breaks: conditions of "C1", "C2", "C3", "C4", "bytes" that an auditor may rightly report; one of them is a hit.
        leaky: seed -> score(tokens, log), the loop that cheats.
        clean: seed -> score(tokens, log), the honest twin.
        vocab_size: tokens are 0..vocab_size - 1.
        bos_id: the token that starts every document.
        tokens: seed -> int64 stream [N] on which the leak occurs.
        bytes_of: (tokens, previous) -> right byte counts, int64, in the type they come in; None where none are counted.
        about: what happens, in a sentence.
    """

    name: str
    entry: int
    breaks: frozenset[str]
    leaky: Callable[[int], Callable]
    clean: Callable[[int], Callable]
    vocab_size: int
    bos_id: int
    tokens: Callable[[int], Tensor]
    bytes_of: Callable | None
    about: str


def pattern(name: str, entry: int, breaks: str, tokens: Callable[[int], Tensor] = stream, bytes_of=None):
    """Turn loop(seed, leak) -> score(tokens, log) into a `Pattern`; its docstring becomes the pattern's `about`."""

    def decorate(loop: Callable[[int, bool], Callable]) -> Pattern:
        return Pattern(
            name=name,
            entry=entry,
            breaks=frozenset(breaks.split()),
            leaky=partial(loop, leak=True),
            clean=partial(loop, leak=False),
            vocab_size=VOCAB,
            bos_id=BOS,
            tokens=tokens,
            bytes_of=bytes_of,
            about=" ".join(loop.__doc__.split()),
        )

    return decorate
