"""What a loop charges, and the loop that learns nothing, with which those that learn are compared."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import saved
from ..foreign.models import cached_forward
from ..model import CausalModel
from ..stream import CachedForward
from ..timing import Stopwatch
from ..worker import upload

Read = Callable[[int, int], np.ndarray]  # tokens [start, stop) of a stream, integers
_BLOCK = 256  # tokens of one forward that only catches up
_SECONDS = 1.0  # from one time that charges are fetched from the device to the next


@dataclass(frozen=True)
class Charged:
    """Tokens that were charged, and not yet learned from.

    Args:
        start: the first prediction, which is charged for token start + 1 of the stream.
        nll: float32 (float64 for float64) [n], nats.
        unlearned: the same without what has been learned, where the loop's forward is no other loop's; else None.
        logprobs: float [n, V], the distributions that nll was taken from; None unless asked for.
        on_top: like nll [rows, n], of the rows on top; None where there are none.
        on_top_logprobs: like logprobs, of each of these rows; empty unless asked for.
    """

    start: int
    nll: Tensor
    unlearned: Tensor | None = None
    logprobs: Tensor | None = None
    on_top: Tensor | None = None
    on_top_logprobs: Sequence[Tensor] = ()


class Outbox:
    """Charges that are still on the device: fetched together, so that the host waits for it once a second at most.

    Args:
        at_once: whether each chunk's are due behind it: where distributions come with them, which take memory.
    """

    def __init__(self, at_once: bool = False):
        self._parts: list[Charged] = []
        self._wait = 0.0 if at_once else _SECONDS
        self._due = time.perf_counter() + self._wait

    def put(self, charged: Charged) -> None:
        """Take a chunk's charges."""
        self._parts.append(charged)

    @property
    def due(self) -> bool:
        """Whether it is time to `fetch`."""
        return time.perf_counter() >= self._due

    def fetch(self) -> list[Charged]:
        """All that were put since the last time, in order, their losses on the host; it waits for the device."""
        parts, self._parts = self._parts, []
        if parts:
            counts = [len(part.nll) for part in parts]
            nll = torch.cat([part.nll for part in parts]).cpu().split(counts)
            top = [part.on_top for part in parts if part.on_top is not None]
            on_top = torch.cat(top, 1).cpu().split(counts, 1) if top else [None] * len(parts)
            own = [part.unlearned for part in parts if part.unlearned is not None]
            unlearned = torch.cat(own).cpu().split(counts) if own else [None] * len(parts)
            fetched = zip(parts, nll, on_top, unlearned, strict=True)
            parts = [replace(part, nll=a, on_top=b, unlearned=c) for part, a, b, c in fetched]
        self._due = time.perf_counter() + self._wait
        return parts


class FrozenLoop:
    """Charges a stream block by block and learns nothing: rows that learn are compared with it.

    Args:
        model, window, sinks, dtype: of `LearningLoop`.
        block: tokens of one forward, >= 1.

    Attributes:
        seconds: of forwarding.
    """

    def __init__(
        self, model: CausalModel, window: int, sinks: int = 0, dtype: torch.dtype | None = None, block: int = 256
    ):
        self.model, self.block = model, block
        self._cached = cached_forward(model, window, sinks, dtype, block)
        self._watch, self._outbox = Stopwatch(next(model.parameters()).device), Outbox()
        self._done: int | None = None  # predictions before this one are charged; None before any is

    @property
    def seconds(self) -> dict[str, float]:
        return {"unlearned": 0.0} | self._watch.seconds

    @torch.no_grad()
    def run(
        self,
        read: Read,
        predictions: int | range,
        on_charged: Callable[[Charged], None],
        on_chunk: Callable[[], None] | None = None,
    ) -> None:
        """Charge; see `LearningLoop.run`."""
        span = range(predictions) if isinstance(predictions, int) else predictions
        self._on_charged = on_charged
        try:
            if self._done is None:
                catch_up(self._cached, read, span.start, self.model)
                self._done = span.start
            while self._done < span.stop:
                start, stop = self._done, min(self._done + self.block, span.stop)
                with self._watch("unlearned"):
                    tokens = on_device(read(start, stop + 1), self.model)
                    nll = self.model.losses(self._cached(tokens[None, :-1]), tokens[None, 1:])[0]
                self._outbox.put(Charged(start, nll))
                self._done = stop
                if self._outbox.due:
                    self._hand_out()
                if on_chunk:
                    on_chunk()
        finally:
            self._hand_out()

    def state_dict(self) -> dict[str, Any]:
        """All that a loop with the same arguments needs to continue from here; what is charged is handed out first."""
        self._hand_out()
        return {"done": self._done, "seconds": self.seconds, "cached": self._cached.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], read: Read) -> None:
        """Continue from what `state_dict` returned."""
        self._done = state["done"] and saved.whole(state["done"], 0, 1 << 60)
        self._watch.go_on(saved.seconds(state["seconds"]))
        load_cached(self._cached, state["cached"])

    def _hand_out(self) -> None:
        for charged in self._outbox.fetch():
            self._on_charged(charged)


@torch.no_grad()
def catch_up(cached: Any, read: Read, start: int, model: CausalModel) -> None:
    """Forward what a fresh cache needs of the stream before token `start`, with the weights as they are."""
    begin = max(0, start - cached.reach)

    def forward(first: int, stop: int) -> None:
        for at in range(first, stop, _BLOCK):
            cached(on_device(read(at, min(at + _BLOCK, stop)), model)[None])

    if begin:
        forward(0, min(cached.sinks, start))
        if begin > cached.position:
            cached.skip(begin)
    forward(cached.position, start)


def load_cached(cached: Any, state: Mapping[str, Any]) -> None:
    """Go on from a saved cache; raises ValueError where it remembers tokens that the model has not."""
    if isinstance(cached, CachedForward):
        vocabulary = len(cached.model.tok_emb.weight)
        saved.tensor(state["tokens"], torch.int64, 1, range(1 << 20), below=vocabulary)
    cached.load_state_dict(state)


def on_device(tokens: np.ndarray, model: CausalModel) -> Tensor:
    """Tokens of a stream as int64 on the model's device; the host does not wait for what that does meanwhile."""
    return upload(torch.from_numpy(np.asarray(tokens).astype(np.int64)), next(model.parameters()).device)
