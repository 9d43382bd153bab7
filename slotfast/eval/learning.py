"""One pass of a learning row over a stream, beside the pass that the others share: its weights are its own."""

from collections.abc import Callable
from typing import Self

import numpy as np
import torch

from ..data import Text
from ..learn import Charged, Learning, LearningLoop
from ..score import Meter
from .loop import PIECES


class LearningPass:
    """Every token of a stream charged once, chunk by chunk, while the model learns.

    Args:
        loop: fresh.
        text: what is charged; nothing is for the token at position 0.
        keep_nll: keep every token's losses.

    Attributes:
        meter, along: sums by document and by piece of the stream; row 0 is the same forward unlearned.
        nll: float [N - 1] of every token but the first, where kept.
    """

    def __init__(self, loop: LearningLoop, text: Text, keep_nll: bool = False):
        self.loop, self.text = loop, text
        rows = ["unlearned", loop.row.name]
        self.meter, self.along = Meter(rows, text.documents), Meter(rows, PIECES)
        self._parts: list[np.ndarray] | None = [] if keep_nll else None
        self._document = 0

    @property
    def row(self) -> Learning:
        return self.loop.row

    @property
    def nll(self) -> np.ndarray:
        return np.concatenate(self._parts)

    def run(self, on_tokens: Callable[[int], None] | None = None) -> Self:
        """Charge and learn; `on_tokens` is called with the number of tokens just charged."""

        def take(charged: Charged) -> None:
            start, nll = charged.start, torch.stack([charged.unlearned, charged.nll]).cpu().numpy()
            tokens = self.text.stream.read(start, start + nll.shape[1] + 1)
            documents = self._document + np.cumsum(tokens[1:] == self.text.bos_id)
            n_bytes = self.text.bytes_of(tokens)
            self._document = int(documents[-1])
            self.meter.add(documents, n_bytes, nll)
            self.along.add(np.arange(start + 1, start + len(tokens)) * PIECES // len(self.text.stream), n_bytes, nll)
            if self._parts is not None:
                self._parts.append(nll[1])
            if on_tokens:
                on_tokens(nll.shape[1])

        self.loop.run(self.text.stream.read, len(self.text.stream) - 1, take)
        return self

    def add_to(self, meter: Meter, along: Meter) -> None:
        """Add this row's sums to those of the rows that were scored in the same places."""
        meter.append(self.row.name, self.meter.nats[1])
        along.append(self.row.name, self.along.nats[1])
