"""What a loop charges, and the loop that learns nothing, with which those that learn are compared."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..foreign.models import cached_forward
from ..model import CausalModel

Read = Callable[[int, int], np.ndarray]  # tokens [start, stop) of a stream, integers
_BLOCK = 256  # tokens of one forward that only catches up


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
        self.model, self.block, self.seconds = model, block, {"unlearned": 0.0}
        self._cached = cached_forward(model, window, sinks, dtype, block)
        self._done: int | None = None  # predictions before this one are charged; None before any is

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
        clock = Clock(self.model)
        if self._done is None:
            catch_up(self._cached, read, span.start, self.model)
            self._done = span.start
        while self._done < span.stop:
            start = self._done
            tokens = read_tokens(read, start, min(start + self.block, span.stop), self.model)
            nll = self.model.losses(self._cached(tokens[None, :-1]), tokens[None, 1:])[0]
            self._done = start + len(nll)
            self.seconds["unlearned"] += clock.lap()
            on_charged(Charged(start, nll))
            if on_chunk:
                on_chunk()
            clock.lap()

    def state_dict(self) -> dict[str, Any]:
        """All that a loop with the same arguments needs to continue from here."""
        return {"done": self._done, "seconds": dict(self.seconds), "cached": self._cached.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], read: Read) -> None:
        """Continue from what `state_dict` returned."""
        self._done = state["done"]
        self.seconds.update(state["seconds"])
        self._cached.load_state_dict(state["cached"])


@torch.no_grad()
def catch_up(cached: Any, read: Read, start: int, model: CausalModel) -> None:
    """Forward what a fresh cache needs of the stream before token `start`, with the weights as they are."""
    begin = max(0, start - cached.reach)
    device = next(model.parameters()).device

    def forward(first: int, stop: int) -> None:
        for at in range(first, stop, _BLOCK):
            tokens = torch.from_numpy(np.asarray(read(at, min(at + _BLOCK, stop))).astype(np.int64))
            cached(tokens[None].to(device))

    if begin:
        forward(0, min(cached.sinks, start))
        if begin > cached.position:
            cached.skip(begin)
    forward(cached.position, start)


def read_tokens(read: Callable[[int, int], np.ndarray], start: int, stop: int, model: CausalModel) -> Tensor:
    """int64 [stop - start + 1], on the model's device: what predictions [start, stop) read, and are charged for."""
    tokens = torch.from_numpy(np.asarray(read(start, stop + 1)).astype(np.int64))
    return tokens.to(next(model.parameters()).device)


class Clock:
    """Seconds since the last lap, including what the device still had to do."""

    def __init__(self, model: CausalModel):
        self._cuda = next(model.parameters()).is_cuda
        self._last = time.perf_counter()

    def lap(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        since, self._last = self._last, time.perf_counter()
        return self._last - since
