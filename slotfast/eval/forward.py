"""Runs the model over consecutive windows, and gives adaptations a batch with what they need.

There are two ways: forward each window separately, or forward every token of the stream once and take the windows as
overlapping views of one tape of logits. Where no row needs logits, losses are in their place.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..compiled import Compiled
from ..data import TokenStream
from ..foreign.models import cached_forward
from ..model import GPT, CausalModel
from ..slot import Adapter, WindowBatch, first_position
from ..slot.batch import row_losses
from ..windows import Plan, Window
from ..worker import Worker, upload

_BLOCK_TOKENS = {"cpu": 1024, "cuda": 16384}  # on two CPUs 512 to 4096 are within a tenth of each other
_LOGIT_BYTES = 1 << 28  # of one batch's float32 logits, which set the default batch
_ROWS = 1024  # whose logits are in memory at once where losses alone are wanted, or those of one window


@dataclass(frozen=True)
class Streaming:
    """How a stream is forwarded.

    Args:
        sinks: first tokens that stay visible to the end, >= 0.
        block_tokens: tokens of one forward, >= 1; blocks start at its multiples.
    """

    sinks: int = 0
    block_tokens: int = 1024


class Forward(Protocol):
    """Runs the model over a rank's windows, in order."""

    compiled: Compiled

    def __call__(self, indices: range, on_windows: Callable[[int], None] | None = None) -> WindowBatch:
        """Forward consecutive windows; `on_windows` is called with the number just done."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next batch needs from earlier ones."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


class WindowForward:
    """Forwards each window separately.

    Args:
        model, stream, plan, adapters, worker: of the pass.
        batch_windows: windows of one forward; short batches are padded to it, so that shapes never change.
        keep_logits: whatever the adapters need; distributions are wanted.
    """

    def __init__(
        self,
        model: CausalModel,
        stream: TokenStream,
        plan: Plan,
        adapters: Sequence[Adapter],
        worker: Worker,
        batch_windows: int,
        keep_logits: bool = False,
    ):
        self.model, self.stream, self.plan = model, stream, plan
        self.worker, self.batch_windows = worker, batch_windows
        self.needs = Needs.of(adapters, plan, keep_logits)
        self.compiled = _compiled(self._needed, worker, model)

    def __call__(self, indices: range, on_windows: Callable[[int], None] | None = None) -> WindowBatch:
        """See `Forward`."""
        cut = self.needs.first if indices.start else 0  # the stream's first window scores all of its positions
        device, needs = self.worker.device, self.needs
        parts: list[tuple[Tensor, ...]] = []
        for first in range(0, len(indices), self.batch_windows):
            windows = [self.plan[index] for index in indices[first : first + self.batch_windows]]
            tokens = upload(self._gather(windows), device)
            inputs, targets = tokens[:, :-1], tokens[:, 1 + cut :]
            hidden, *logits = self.compiled(inputs) if cut == needs.first else self._forward(inputs, cut)
            ends = _ends(windows, cut)
            ends = upload(torch.cat([ends, ends.new_zeros(self.batch_windows - len(ends), 2)]), device)
            scores = logits[0] if needs.logits else losses(self.model, hidden, targets, self.worker)
            parts.append((scores, targets, ends, *((hidden,) if needs.hidden else ())))
            if on_windows:
                on_windows(len(windows))
        columns = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
        scores, targets, ends, *kept = columns
        return self.needs.batch(scores, targets, ends, self.worker, next(iter(kept), None), self.model)

    def _needed(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self._forward(tokens, self.needs.first)

    def _forward(self, tokens: Tensor, cut: int) -> tuple[Tensor, ...]:
        """States of the positions from `cut` on, and their logits if needed; tokens [batch_windows, positions]."""
        hidden = self.model.hidden(tokens, self.worker.dtype, cut, self.plan.seq_len)
        return (hidden, self.model.head(hidden)) if self.needs.logits else (hidden,)

    def state_dict(self) -> dict[str, Any]:
        """See `Forward`: how the model ran, and nothing else."""
        return {"compiled": self.compiled.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Forward`."""
        self.compiled.load_state_dict(state["compiled"])

    def _gather(self, windows: Sequence[Window]) -> Tensor:
        """Tokens int64 [batch_windows, positions + 1], zero past the stream's end and in unused rows."""
        length, first = self.plan.positions + 1, windows[0].start
        tokens = np.zeros((self.batch_windows, length), np.int64)
        span = self.stream.read(first, windows[-1].start + length)
        for place, window in zip(tokens, windows, strict=False):
            piece = span[window.start - first :][:length]
            place[: len(piece)] = piece
        return torch.from_numpy(tokens)


class StreamForward:
    """Forwards every token once, block by block; windows are views of one tape of logits.

    Args:
        model, stream, plan, adapters, worker: of the pass.
        first_window: the first that is wanted; of the stream before it, only what this window depends on is forwarded.
        streaming: sinks and blocks.
        keep_logits: as `WindowForward`'s.
    """

    def __init__(
        self,
        model: CausalModel,
        stream: TokenStream,
        plan: Plan,
        adapters: Sequence[Adapter],
        worker: Worker,
        first_window: int,
        streaming: Streaming,
        keep_logits: bool = False,
    ):
        self.model, self.stream, self.plan, self.block = model, stream, plan, streaming.block_tokens
        self.worker = worker
        self.needs = Needs.of(adapters, plan, keep_logits)
        self.cached = cached_forward(model, plan.seq_len, streaming.sinks, worker.dtype)
        self.compiled = _compiled(self._step, worker, model)
        self.scores, self.hidden = RollingTape(), RollingTape()  # scores: logits or losses

    def __call__(self, indices: range, on_windows: Callable[[int], None] | None = None) -> WindowBatch:
        """See `Forward`. The batch is valid until the next call."""
        windows = [self.plan[index] for index in indices]
        cut = self.needs.first if indices.start else 0
        begin, length = windows[0].start + cut, self.plan.positions - cut
        if self.scores.end == 0:
            self._start(begin)
        for tape in (self.scores, self.hidden):
            tape.drop(begin)
        end = windows[-1].start + self.plan.positions
        while self.cached.position < min(end, self.plan.predictions):
            self._read(begin)
        options = {"begin": begin, "step": self.plan.stride, "count": len(windows), "length": length}
        scores = self.scores.windows(**options)
        tokens = np.zeros(end - begin, np.int64)
        known = self.stream.read(begin + 1, end + 1)
        tokens[: len(known)] = known
        targets = upload(torch.from_numpy(tokens), self.worker.device)
        targets = overlapping(targets, self.plan.stride, len(windows), length)
        hidden = self.hidden.windows(**options) if self.needs.hidden else None
        ends = upload(_ends(windows, cut), self.worker.device)
        if on_windows:
            on_windows(len(windows))
        return self.needs.batch(scores, targets, ends, self.worker, hidden, self.model)

    def _start(self, begin: int) -> None:
        """Advance the cache until it holds all that prediction `begin` depends on."""
        start = max(0, begin - self.cached.reach) // self.block * self.block
        if start and self.cached.sinks:
            self._read(self.plan.predictions)
        if start > self.cached.position:
            self.cached.skip(start)

    def _read(self, wanted: int) -> None:
        """Forward up to the end of the block; predictions from `wanted` on go onto the tape."""
        start = self.cached.position
        stop = min((start // self.block + 1) * self.block, self.plan.predictions)
        tokens = upload(torch.from_numpy(self.stream.read(start, stop + 1).astype(np.int64)), self.worker.device)
        first = min(max(0, wanted - start), stop - start)
        inputs, whole = tokens[None, :-1], first == 0 and stop - start == self.block
        if self.compiled.mode != "off" and whole and self.cached.steady:
            hidden, logits, *kept = self.compiled(inputs, *self.cached.kept())
            self.cached.go_on(kept, self.block)
        else:
            hidden, logits = self.cached(inputs, first), None
        hidden = hidden[0]
        if first < stop - start:
            if not self.needs.logits:
                scores = losses(self.model, hidden, tokens[1 + first :], self.worker)
            else:
                scores = self.model.head(hidden) if logits is None else logits[0]
            self.scores.append(start + first, scores)
            if self.needs.hidden:
                self.hidden.append(start + first, hidden)

    def _step(self, tokens: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """States of a block, their logits - empty where none are needed - and what the stream keeps after it."""
        hidden, *kept_now = self.cached.step(tokens, *kept)
        logits = self.model.head(hidden) if self.needs.logits else hidden.new_empty(0)
        return hidden, logits, *kept_now

    def state_dict(self) -> dict[str, Any]:
        """See `Forward`."""
        parts = {"cached": self.cached, "scores": self.scores, "hidden": self.hidden, "compiled": self.compiled}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Forward`."""
        self.cached.load_state_dict(state["cached"])
        self.compiled.load_state_dict(state["compiled"])
        self.scores.load_state_dict(state["scores"], self.worker.device)
        self.hidden.load_state_dict(state["hidden"], self.worker.device)


class RollingTape:
    """A row for each of some consecutive predictions, in a buffer that drops those no longer needed."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.buffer: Tensor | None = None
        self.origin = 0  # prediction of the buffer's first row
        self.begin = self.end = 0  # predictions that are kept

    def drop(self, before: int) -> None:
        """Forget the predictions before this one."""
        self.begin = max(self.begin, before)

    def append(self, begin: int, rows: Tensor) -> None:
        """Add rows [n, ...], those of the predictions from `begin` on; they follow the rows that are kept."""
        if self.buffer is None or self.end <= self.begin:
            self.begin = self.end = begin
        room = self._room(len(rows), rows)
        room[:] = rows

    def windows(self, begin: int, step: int, count: int, length: int) -> Tensor:
        """Overlapping views [count, length, ...] of `length` rows each, which start at begin, begin + step, ...

        Past the last row that was added they show zeros.
        """
        missing = begin + (count - 1) * step + length - self.end
        if missing > 0:
            end = self.end
            self._room(missing, self._kept()).zero_()
            self.end = end  # rows that are still to come replace them
        return overlapping(self._kept()[begin - self.origin :], step, count, length)

    def _kept(self) -> Tensor:
        if self.buffer is None:
            raise ValueError("nothing was appended")
        return self.buffer

    def _room(self, count: int, like: Tensor) -> Tensor:
        kept, buffer = self.end - self.begin, self.buffer
        if buffer is None or self.end - self.origin + count > len(buffer):
            old, first = buffer, self.begin - self.origin
            if buffer is None or 2 * (kept + count) > len(buffer):
                buffer = like.new_empty(2 * (kept + count), *like.shape[1:])
            if old is not None:
                # within one buffer the two do not overlap: it is twice as long as what is kept
                buffer[:kept] = old[first : first + kept]
            self.buffer, self.origin = buffer, self.begin
        begin = self.end - self.origin
        self.end += count
        return buffer[begin : begin + count]

    def state_dict(self) -> dict[str, Any]:
        """The rows that are kept."""
        rows = None if self.buffer is None else self.buffer[self.begin - self.origin : self.end - self.origin]
        return {"begin": self.begin, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Continue from what `state_dict` returned."""
        self._clear()
        if state["rows"] is not None:
            self.append(state["begin"], state["rows"].to(device))


def overlapping(rows: Tensor, step: int, count: int, length: int) -> Tensor:
    """Views [count, length, ...] of contiguous rows [n, ...]: `length` rows each, from 0, step, 2 * step, ... on."""
    return rows.as_strided((count, length, *rows.shape[1:]), (step * rows.stride(0), *rows.stride()))


def _compiled(function: Callable[..., Any], worker: Worker, model: CausalModel) -> Compiled:
    """A forward that runs as the worker says; models of other projects always run as they are."""
    return Compiled(function, worker.compile if isinstance(model, GPT) else "off", worker.device)


@dataclass(frozen=True)
class Needs:
    """What the rows of a run need of a forward.

    Args:
        logits, hidden: whether they are needed.
        first: the first position of which anything is, in every window but the stream's first.
    """

    logits: bool
    hidden: bool
    first: int

    @classmethod
    def of(cls, adapters: Sequence[Adapter], plan: Plan, keep_logits: bool) -> Self:
        """Of rows; `keep_logits`: whatever they are."""
        rows = [adapter.row for adapter in adapters]
        positions = (first_position(row, plan.seq_len, plan.stride) for row in rows)
        logits = keep_logits or any(row.needs_logits for row in rows)
        hidden = any(row.needs_hidden for row in rows)
        return cls(logits, hidden, min(positions, default=plan.seq_len - plan.stride))

    def batch(
        self, scores: Tensor, targets: Tensor, ends: Tensor, worker: Worker, hidden: Tensor | None, model: CausalModel
    ) -> WindowBatch:
        """A batch of logits [W, T, V], or of losses [W, T] where no more is needed; ends int64 [W, 2]."""
        logits, nll = (scores, None) if self.logits else (scores.new_empty(*scores.shape, 0), scores)
        given = logits, targets, ends[:, 0], ends[:, 1], worker.backend
        return WindowBatch(*given, hidden=hidden, head=model.head, nll=nll)


def losses(model: CausalModel, hidden: Tensor, targets: Tensor, worker: Worker) -> Tensor:
    """Losses of targets, [W, T] or [n], under states [W, T, D] or [n, D], nats, without all of their logits in memory.

    Otherwise those of some windows or rows at a time; in plain torch with the bits of a run that keeps them.
    """
    if isinstance(model, GPT) and ops.fuses_output(worker.backend, hidden):
        return model.losses(hidden, targets)

    def some(states: Tensor, targets: Tensor) -> Tensor:
        if ops.uses_triton(worker.backend, hidden.device):
            return model.losses(states, targets)
        return row_losses(model.head(states), targets)

    step = max(1, _ROWS // math.prod(targets.shape[1:]))
    return torch.cat([some(*part) for part in zip(hidden.split(step), targets.split(step), strict=True)])


def _ends(windows: Sequence[Window], cut: int) -> Tensor:
    """int64 [W, 2]: context_end and scored_end, counted from position `cut`."""
    return torch.tensor([[window.context_end - cut, window.scored_end - cut] for window in windows], dtype=torch.int64)


def windows_that_fit(seq_len: int, vocab_size: int) -> int:
    """How many windows' float32 logits fit into a batch; 0 where one alone is too large."""
    return _LOGIT_BYTES // (4 * seq_len * vocab_size)


def block_that_fits(vocab_size: int, on_gpu: bool = False) -> int:
    """Tokens in a block of the stream: what suits the device, as far as their float32 logits fit."""
    fits = _LOGIT_BYTES // (4 * vocab_size)
    return max(1, min(_BLOCK_TOKENS["cuda" if on_gpu else "cpu"], fits))


def streams(model: nn.Module) -> bool:
    """Whether a model can read a stream block by block."""
    return isinstance(model, GPT) or getattr(model, "stream", None) is not None
