"""Passes of rows that learn over a text, beside the pass that the others share: their weights are their own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist

from .. import saved
from ..data import Text
from ..learn import Charged, DocumentLoop, FrozenLoop, Learning, LearningLoop
from ..score import Meter
from ..slot import Calibration
from ..worker import Worker
from .chunked import WindowsLoop
from .loop import PIECES

UNLEARNED = Learning(name="the stream unlearned")  # what a loop is asked for that learns nothing


class LearningPass:
    """Every token of a text, or of a rank's piece of it, charged once, chunk by chunk, in any order.

    Args:
        loop: fresh.
        rows: what is charged, rows that learn alike: with nothing on top, or with the loop's rows on top, in order.
        text: nothing is charged for the token at position 0.
        keep_nll: keep every token's losses.
        rank, world: which of the text's pieces this is; see `piece`.

    Attributes:
        meter, along: sums by document and by piece of the stream; row 0 is the same forward unlearned, and empty until
            `compare` where the loop does not charge that too.
        share: about how many tokens it will charge, for who waits.
        together: whether the ranks train one model; what is saved must then be behind the same chunk on all of them.
        charged: tokens so far.
        spent: float [PIECES], seconds of learning and of the rows on top, by where in the stream they went.
        seconds, forwards: of the loop, once it has run; after `gather` of the slowest rank, and of all.
    """

    def __init__(
        self,
        loop: LearningLoop | DocumentLoop | FrozenLoop | WindowsLoop,
        rows: Sequence[Learning],
        text: Text,
        keep_nll: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        self.loop, self.rows, self.text = loop, rows, text
        self.span = piece(rows[0], text, rank, world)
        self.together = world > 1 and isinstance(loop, WindowsLoop)
        self.share = len(self.span) // (world if rows[0].phases or self.together else 1)
        names = ["unlearned", *(row.name for row in rows)]
        self.meter, self.along = Meter(names, text.documents), Meter(names, PIECES)
        self.charged, self.forwards, self.seconds = 0, 0.0, dict(loop.seconds)
        self.spent = np.zeros(PIECES)
        self._total = 0.0  # of `spent`
        # Since it last grew: by how much, tokens that came with that by piece, and what was spent before
        self._grown, self._came, self._before = 0.0, np.zeros(PIECES), self.spent
        self._parts: dict[int, np.ndarray] | None = {} if keep_nll else None  # by the first prediction
        self._starts = text.starts

    @property
    def nll(self) -> np.ndarray:
        """Float [rows, N - 1] of every token but the first, where kept."""
        return np.concatenate([self._parts[start] for start in sorted(self._parts)], 1)

    def run(self, on_tokens: Callable[[int], None] | None = None, on_chunk: Callable[[], None] | None = None) -> Self:
        """Charge and learn what is not charged yet.

        Args:
            on_tokens: called with the number of tokens just charged.
            on_chunk: called where `state_dict` may be saved.
        """
        first, predictions = (self.span.start, len(self.span)) if self._apart else (0, self.span)
        self.loop.run(self._read, predictions, lambda charged: self._take(charged, first, on_tokens), on_chunk)
        self.seconds = dict(self.loop.seconds)
        if self.charged:
            self.forwards = getattr(self.loop, "forwards", 1.0)
        return self

    @property
    def _apart(self) -> bool:
        """Whether windows begin where documents do: what is before a piece is nothing to it."""
        return isinstance(self.loop, DocumentLoop) and self.rows[0].scope == "document"

    def _read(self, start: int, stop: int) -> np.ndarray:
        first = self.span.start if self._apart else 0
        return self.text.stream.read(first + start, first + stop)

    def _take(self, charged: Charged, origin: int, on_tokens: Callable[[int], None] | None) -> None:
        start = origin + charged.start
        plain = torch.zeros_like(charged.nll) if charged.unlearned is None else charged.unlearned
        on_top = iter(() if charged.on_top is None else charged.on_top)
        rows = [charged.nll if row.top is None else next(on_top) for row in self.rows]
        nll = torch.stack([plain, *rows]).cpu().numpy()
        tokens = self.text.stream.read(start, start + nll.shape[1] + 1)
        position, n_bytes = np.arange(start + 1, start + len(tokens)), self.text.bytes_of(tokens)
        self.meter.add(np.searchsorted(self._starts, position, "right") - 1, n_bytes, nll)
        self.along.add(position * PIECES // len(self.text.stream), n_bytes, nll)
        self.charged += nll.shape[1]
        self._spend(position[-1] * PIECES // len(self.text.stream), nll.shape[1])
        if self._parts is not None:
            self._parts[start] = nll[1:]
        if on_tokens:
            on_tokens(nll.shape[1])

    def _spend(self, at: int, count: int) -> None:
        """Count seconds towards a piece of the stream: chunks that are handed out together share theirs by tokens."""
        total = _spent(self.loop.seconds)
        if total > self._total:
            self._grown, self._came, self._before = total - self._total, np.zeros(PIECES), self.spent
            self._total = total
        self._came[at] += count
        self.spent = self._before + self._grown * self._came / self._came.sum()

    def state_dict(self) -> dict[str, Any]:
        """All that a pass with the same arguments needs to go on from here."""
        loop = self.loop.state_dict()  # hands out what is charged
        if self._parts is not None:
            self._parts = _joined(self._parts)
        nll = {start: torch.from_numpy(part) for start, part in (self._parts or {}).items()}
        return {
            "loop": loop,
            "meter": self.meter.state_dict(),
            "along": self.along.state_dict(),
            "charged": self.charged,
            "spent": torch.from_numpy(self.spent),
            "nll": nll,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, RuntimeError: it is of another pass.
        """
        charged, done = saved.whole(state["charged"], 0, len(self.span)), state["loop"].get("done")
        if done is not None:  # of a stream's loop, whose charges come in order
            saved.whole(done, self.span.start + charged, self.span.start + charged)
        elif charged and "done" in state["loop"]:
            raise ValueError(f"{charged} tokens are charged before the loop began")
        self.loop.load_state_dict(state["loop"], self._read)
        self.meter.load_state_dict(state["meter"])
        self.along.load_state_dict(state["along"])
        self.charged, self.spent = charged, saved.tensor(state["spent"], torch.float64, PIECES).numpy()
        self._total, self._before = _spent(self.loop.seconds), self.spent
        if self._parts is not None:
            self._parts = self._saved_parts(state["nll"])

    def _saved_parts(self, kept: Mapping[int, torch.Tensor]) -> dict[int, np.ndarray]:
        """Every token's losses so far; raises ValueError where they are not those of as many tokens of the piece."""
        parts, end = {}, self.span.start
        for start in sorted(kept):
            dtype = torch.float32 if kept[start].dtype == torch.float32 else torch.float64
            saved.whole(start, end, self.span.stop - 1)
            found = saved.tensor(kept[start], dtype, len(self.rows), range(1, self.span.stop - start + 1))
            parts[start], end = found.numpy(), start + found.size(1)
        if sum(part.shape[1] for part in parts.values()) != self.charged:
            raise ValueError(f"losses: expected those of {self.charged} tokens")
        return parts

    def gather(self, worker: Worker) -> None:
        """Sum up over all ranks; rank 0 has every token's losses then."""
        if worker.world == 1:
            return
        self.meter.reduce()
        self.along.reduce()
        parts: list | None = [None] * worker.world if worker.rank == 0 else None
        dist.gather_object((self._parts, self.seconds, self.charged, self.forwards, self.spent), parts)
        if parts is None:
            return
        self.seconds = {name: max(seconds[name] for _, seconds, *_ in parts) for name in self.seconds}
        self.charged = sum(charged for _, _, charged, *_ in parts)
        self.forwards = sum(charged * forwards for _, _, charged, forwards, _ in parts) / max(1, self.charged)
        self.spent = sum(part[-1] for part in parts)
        if self._parts is not None:
            self._parts = {start: nll for kept, *_ in parts for start, nll in kept.items()}

    def compare(self, unlearned: np.ndarray, seconds: float) -> None:
        """Take the sums of the same forward unlearned, float64 [documents], and what it took, from the pass that has
        them, where the loop does not charge it itself."""
        self.meter.nats[0] = unlearned
        self.seconds["unlearned"] = seconds

    def add_to(self, meter: Meter, along: Meter) -> None:
        """Add these rows' sums to those of the rows that were scored in the same places."""
        for number, row in enumerate(self.rows, 1):
            meter.append(row.name, self.meter.nats[number])
            along.append(row.name, self.along.nats[number])


def piece(row: Learning, text: Text, rank: int, world: int) -> range:
    """The predictions that one of several ranks charges: contiguous, of whole chunks, or of whole documents where
    learning starts afresh at each; a rank may have none. Of rows whose ranks take turns through all of it, it
    is all: those with phases, which deal documents out, and those that share chunks of windows."""
    predictions = len(text.stream) - 1
    if row.phases or row.keys == "windows":
        return range(predictions)
    ideal = [number * predictions // world for number in (rank, rank + 1)]
    if row.scope == "document":
        starts = np.append(text.starts, predictions)
        cuts = [int(starts[np.searchsorted(starts[:-1], at)]) if at else 0 for at in ideal]
    else:
        cuts = [at // row.chunk * row.chunk for at in ideal]
    return range(cuts[0], predictions if rank == world - 1 else cuts[1])


def _spent(seconds: Mapping[str, float]) -> float:
    """Of a loop's seconds, those that learning took, and the rows on top of it."""
    return seconds.get("learned", 0.0) + seconds.get("on top", 0.0)


def _joined(parts: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Losses [rows, n] by their first prediction, those that follow one another in one."""
    runs: dict[int, list[np.ndarray]] = {}
    first = end = -1
    for start in sorted(parts):
        first = first if start == end else start
        runs.setdefault(first, []).append(parts[start])
        end = start + parts[start].shape[1]
    return {start: np.concatenate(run, 1) for start, run in runs.items()}


def grouped(rows: Sequence[Learning], calibration: Calibration) -> list[list[Learning]]:
    """Rows that learn alike, and differ in what is on top alone, its numbers calibrated."""
    groups: dict[Learning, list[Learning]] = {}
    for row in rows:
        top = row.top and calibration.resolve(row.top)
        groups.setdefault(row.alone, []).append(row.model_copy(update={"top": top}))
    return list(groups.values())
