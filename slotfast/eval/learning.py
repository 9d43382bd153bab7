"""Passes of rows that learn over a text, beside the pass that the others share: their weights are their own."""

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch

from ..data import Text
from ..learn import Charged, DocumentLoop, FrozenLoop, Learning, LearningLoop
from ..score import Meter
from ..slot import Calibration
from .chunked import WindowsLoop
from .loop import PIECES

UNLEARNED = Learning(name="the stream unlearned")  # what a loop is asked for that learns nothing


class LearningPass:
    """Every token of a text charged once, chunk by chunk, in any order.

    Args:
        loop: fresh.
        rows: what is charged, rows that learn alike: with nothing on top, or with the loop's rows on top, in order.
        text: nothing is charged for the token at position 0.
        keep_nll: keep every token's losses.

    Attributes:
        meter, along: sums by document and by piece of the stream; row 0 is the same forward unlearned, and empty until
            `compare` where the loop does not charge that too.
        unlearned_seconds: that this forward took.
        nll: float [rows, N - 1] of every token but the first, where kept.
    """

    def __init__(
        self,
        loop: LearningLoop | DocumentLoop | FrozenLoop | WindowsLoop,
        rows: Sequence[Learning],
        text: Text,
        keep_nll: bool = False,
    ):
        self.loop, self.rows, self.text = loop, rows, text
        names = ["unlearned", *(row.name for row in rows)]
        self.meter, self.along = Meter(names, text.documents), Meter(names, PIECES)
        self._parts: dict[int, np.ndarray] | None = {} if keep_nll else None  # by the first prediction
        self._starts = text.starts

    @property
    def nll(self) -> np.ndarray:
        return np.concatenate([self._parts[start] for start in sorted(self._parts)], 1)

    @property
    def unlearned_seconds(self) -> float:
        return self.loop.seconds["unlearned"]

    def run(self, on_tokens: Callable[[int], None] | None = None) -> Self:
        """Charge and learn; `on_tokens` is called with the number of tokens just charged."""

        def take(charged: Charged) -> None:
            start = charged.start
            plain = torch.zeros_like(charged.nll) if charged.unlearned is None else charged.unlearned
            on_top = iter(() if charged.on_top is None else charged.on_top)
            rows = [charged.nll if row.top is None else next(on_top) for row in self.rows]
            nll = torch.stack([plain, *rows]).cpu().numpy()
            tokens = self.text.stream.read(start, start + nll.shape[1] + 1)
            position, n_bytes = np.arange(start + 1, start + len(tokens)), self.text.bytes_of(tokens)
            self.meter.add(np.searchsorted(self._starts, position, "right") - 1, n_bytes, nll)
            self.along.add(position * PIECES // len(self.text.stream), n_bytes, nll)
            if self._parts is not None:
                self._parts[start] = nll[1:]
            if on_tokens:
                on_tokens(nll.shape[1])

        self.loop.run(self.text.stream.read, len(self.text.stream) - 1, take)
        return self

    def compare(self, unlearned: np.ndarray, seconds: float) -> None:
        """Take the sums of the same forward unlearned, float64 [documents], and what it took, from the pass that has
        them, where the loop does not charge it itself."""
        self.meter.nats[0] = unlearned
        self.loop.seconds["unlearned"] = seconds

    def add_to(self, meter: Meter, along: Meter) -> None:
        """Add these rows' sums to those of the rows that were scored in the same places."""
        for number, row in enumerate(self.rows, 1):
            meter.append(row.name, self.meter.nats[number])
            along.append(row.name, self.along.nats[number])


def grouped(rows: Sequence[Learning], calibration: Calibration) -> list[list[Learning]]:
    """Rows that learn alike, and differ in what is on top alone, its numbers calibrated."""
    groups: dict[Learning, list[Learning]] = {}
    for row in rows:
        top = row.top and calibration.resolve(row.top)
        groups.setdefault(row.alone, []).append(row.model_copy(update={"top": top}))
    return list(groups.values())
