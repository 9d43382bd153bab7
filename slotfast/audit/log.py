"""What a loop reports while it scores a stream, kept as it was when it was reported."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import extract_tb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..command.run import no_exit
from ..errors import InputError, first_line
from .opened import Opened, watched

Loop = Callable[[Tensor, "Log"], Any]
_MAX_ROW_VALUES = 1 << 26  # of all distributions of one run; beyond, only their sums and charged entries are kept
_CHUNK_VALUES = 1 << 22


class Log:
    """Takes a loop's reports in the order in which they come, and copies them, so that later changes have no effect."""

    def __init__(self) -> None:
        self.scores: list[tuple[int, Tensor, Tensor, Tensor | None, Tensor | None]] = []
        self.updates: list[tuple[int, Tensor]] = []

    def score(self, positions: Any, nll: Any, bytes: Any = None, logprobs: Any = None) -> None:
        """Tokens are being charged; all positions of one call are one event.

        Args:
            positions: int [n], indices into the stream.
            nll: float [n], nats.
            bytes: int [n], what the loop counts these tokens as, or None.
            logprobs: float [n, V], the distributions that the charges were taken from, or None.
        """
        counts, rows = (None if value is None else _copy(value) for value in (bytes, logprobs))
        self.scores.append((self._time, _copy(positions).reshape(-1), _copy(nll).reshape(-1), counts, rows))

    def update(self, positions: Any) -> None:
        """The loop's state has now used the values of these tokens.

        Args:
            positions: int [n].
        """
        self.updates.append((self._time, _copy(positions).reshape(-1)))

    @property
    def _time(self) -> int:
        return len(self.scores) + len(self.updates)


@dataclass
class Record:
    """One run of a loop, by position of the stream; position 0 has no predecessor and is never charged.

    Args:
        tokens: int64 [N].
        nll: float64 [N], nats, of a token's first charge; NaN where there was none, or none that is a number.
        charges: int64 [N], how often each token was charged with a number.
        event: int64 [N], number of the event that charged the token first; -1 where none did.
        bytes: float64 [N], what the loop counted; NaN where it did not say.
        total: float64 [N], what the token's distribution sums to; NaN where none was given.
        mismatch: float64 [N], charge less the loss under the distribution given with it; NaN where none was given.
        rows: float32 [N, V], the distributions, NaN where none was given; None without any, or with too many to keep.
        row_precision, nll_precision: relative precision of the coarsest type that distributions, charges were given in.
        ordered: whether the loop reported events; one that only returns losses says nothing about order.
        misordered, early, narrow, endless: in words, the first charge in the wrong order, the first update too early,
            the first distribution that is not as long as the vocabulary, and the first charge of NaN or -inf; None
            without.
        updates: how many updates were reported.
        opened: what the loop opened while it ran.
    """

    tokens: np.ndarray
    nll: np.ndarray
    charges: np.ndarray
    event: np.ndarray
    bytes: np.ndarray
    total: np.ndarray
    mismatch: np.ndarray
    rows: np.ndarray | None = None
    row_precision: float = 0.0
    nll_precision: float = 0.0
    ordered: bool = True
    misordered: str | None = None
    early: str | None = None
    narrow: str | None = None
    endless: str | None = None
    updates: int = 0
    opened: Opened = field(default_factory=Opened)

    @property
    def starts(self) -> np.ndarray:
        """First position of each event, sorted; empty where the loop reports none."""
        if not self.ordered:
            return np.empty(0, np.int64)
        numbers, first = np.unique(self.event, return_index=True)
        return np.sort(first[numbers >= 0])

    def span(self, position: int) -> tuple[int, int]:
        """First and last position of the event that charged a token."""
        same = np.flatnonzero(self.event == self.event[position])
        return int(same[0]), int(same[-1])


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the global random generators, which runs of loops seed."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def run_loop(score: Loop, tokens: Tensor, vocab_size: int) -> Record:
    """Run a loop once, on a copy of the stream that it may spoil, with the global random generators seeded alike.

    Raises:
        InputError: the loop raised, or reported what cannot be read.
    """
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond to find that there is no GPU
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    log = Log()
    try:
        with no_exit("the loop"), watched() as opened:
            returned = score(tokens.clone(), log)
    except InputError:
        raise
    except Exception as error:
        where = extract_tb(error.__traceback__)[-1]
        text = first_line(error)
        if where.filename == __file__ and isinstance(error, TypeError):
            raise InputError(f"the loop cannot be called as loop(tokens, log): {text}") from error
        raise InputError(f"the loop failed at {Path(where.filename).name}, line {where.lineno}: {text}") from error
    return replace(read_log(log, tokens, vocab_size, returned), opened=opened)


def read_log(log: Log, tokens: Tensor, vocab_size: int, returned: Any = None) -> Record:
    """Everything reported about one run, by position.

    Args:
        tokens: int64 [N], the stream.
        returned: what the loop returned: its losses, [N - 1] or [N], if it reported nothing.

    Raises:
        InputError: reports of the wrong shape, or positions outside the stream.
    """
    length, scores = len(tokens), log.scores
    if not scores:
        scores = [(-1, torch.arange(1, length), _returned(returned, length), None, None)]
    sizes = [call[1].numel() for call in scores]
    for call, (_, _, nll, counts, rows) in enumerate(scores):
        for name, value in (("nll", nll), ("bytes", counts)):
            if value is not None and value.numel() != sizes[call]:
                raise InputError(f"log.score, call {call}: {value.numel()} {name} for {sizes[call]} positions")
        if rows is not None and (rows.ndim != 2 or len(rows) != sizes[call]):
            expected = [sizes[call], vocab_size]
            raise InputError(f"log.score, call {call}: logprobs of shape {list(rows.shape)}, expected {expected}")
    position = _positions([call[1] for call in scores], length, "log.score")
    losses = torch.cat([call[2] for call in scores]).double().numpy()
    # A loss of NaN or -inf is not a charge. A loss of inf is one: the loop thought its token impossible.
    real = losses > -np.inf
    first = int((~real).argmax()) if not real.all() else None
    event = np.repeat(np.arange(len(scores)), sizes)
    record = Record(
        tokens.numpy(),
        nll=_first(position, np.where(real, losses, np.nan), np.full(length, np.nan)),
        charges=np.bincount(position[real], minlength=length),
        event=_first(position, event, np.full(length, -1)),
        bytes=np.full(length, np.nan),
        total=np.full(length, np.nan),
        mismatch=np.full(length, np.nan),
        ordered=bool(log.scores),
        misordered=_misordered(position, sizes),
        endless=None if first is None else f"token {position[first]} is charged {losses[first]} nats",
        updates=len(log.updates),
        nll_precision=_precision(call[2] for call in scores),
    )
    if any(call[3] is not None for call in scores):
        unknown = [
            torch.full((n,), torch.nan) if call[3] is None else call[3] for n, call in zip(sizes, scores, strict=True)
        ]
        _first(position, torch.cat([part.reshape(-1).double() for part in unknown]).numpy(), record.bytes)
    _read_rows(record, scores, vocab_size)
    charged_at = np.array([call[0] for call in scores])[record.event]
    for call, (time, used) in enumerate(log.updates):
        learned = _positions([used], length, f"log.update, call {call}")
        early = learned[(learned > 0) & ((record.event[learned] < 0) | (charged_at[learned] > time))]
        if early.size and record.early is None:
            record.early = f"update {call} uses token {early[0]} before it is charged"
    return record


def _read_rows(record: Record, scores: Sequence[tuple], vocab_size: int) -> None:
    """Take down the distributions' sums and charged entries, and themselves where there are not too many."""
    given = [(call[1], call[2], call[4]) for call in scores if call[4] is not None]
    for position, _, rows in given:
        if rows.size(1) != vocab_size and len(rows):
            record.narrow = f"{rows.size(1)} probabilities for token {position[0]}, of a vocabulary of {vocab_size}"
    given = [call for call in given if call[2].size(1) == vocab_size]
    if not given:
        return
    keep = sum(call[2].numel() for call in given) <= _MAX_ROW_VALUES
    position, nll, rows = (torch.cat(part) for part in zip(*given, strict=True))
    position = position.long()
    record.row_precision = _precision(call[2] for call in given)
    kept = np.full((len(record.nll), vocab_size), np.nan, np.float32) if keep else None
    record.rows = kept
    tokens = torch.from_numpy(record.tokens)
    step = max(1, _CHUNK_VALUES // vocab_size)
    for part in (slice(start, start + step) for start in range(0, len(position), step)):
        index, values, charge = position[part].numpy(), rows[part].double(), nll[part].double()
        fair = -values.gather(1, tokens[position[part]][:, None])[:, 0]
        record.total[index] = values.exp().sum(1).numpy()
        record.mismatch[index] = torch.where(charge == fair, 0.0, charge - fair).numpy()  # both may be infinite
        if kept is not None:
            kept[index] = values.float().numpy()


def _misordered(position: np.ndarray, sizes: Sequence[int]) -> str | None:
    """The first event that charges a token behind one that an earlier event charged."""
    if not len(position):
        return None
    nonempty = np.flatnonzero(sizes)
    starts = (np.cumsum(sizes, dtype=np.int64) - np.asarray(sizes, np.int64))[nonempty]
    lowest, highest = np.minimum.reduceat(position, starts), np.maximum.reduceat(position, starts)
    reached = np.maximum.accumulate(highest)
    wrong = np.flatnonzero(lowest[1:] <= reached[:-1])
    if not wrong.size:
        return None
    return f"token {lowest[wrong[0] + 1]} is charged after token {reached[wrong[0]]}"


def _first(position: np.ndarray, values: np.ndarray, into: np.ndarray) -> np.ndarray:
    """Put values at positions; where a position gets several, the first stays."""
    into[position[::-1]] = values[::-1]
    return into


def _precision(parts: Iterable[Tensor]) -> float:
    """Relative precision of the coarsest of some tensors."""
    return max((torch.finfo(part.dtype).eps for part in parts if part.is_floating_point()), default=0.0)


def _positions(parts: Sequence[Tensor], length: int, where: str) -> np.ndarray:
    for part in parts:
        if part.numel() and (part.is_floating_point() or part.dtype == torch.bool):
            raise InputError(f"{where}: positions of type {part.dtype}, expected integers")
    position = torch.cat(list(parts)).long().numpy()
    if position.size and not 0 <= position.min() <= position.max() < length:
        raise InputError(f"{where}: position {position.min()} to {position.max()} in a stream of {length} tokens")
    return position


def _copy(value: Any) -> Tensor:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else torch.as_tensor(np.array(value))


def _returned(value: Any, length: int) -> Tensor:
    """Losses [N - 1] of a loop that reports no events."""
    expected = f"expected calls of log.score, or {length - 1} returned losses"
    if value is None:
        raise InputError(f"the loop reported no scores and returned nothing: {expected}")
    try:
        losses = _copy(value)
        losses.double()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"the loop reported no scores and returned {type(value).__name__}: {expected}") from None
    if losses.shape not in ((length,), (length - 1,)):
        raise InputError(f"the loop reported no scores and returned shape {list(losses.shape)}: {expected}")
    return losses[len(losses) - length + 1 :]
