"""Rows on top of one that learns: they adapt the logits that it charges with, and take in each chunk at its end."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..slot import Adaptation, Adapter, Calibration, WindowBatch, first_position
from .row import Learning


def check_top(row: Adaptation, where: str) -> None:
    """Raise InputError, which begins with `where`, at a row that needs more than logits up to a chunk's end."""
    if row.optimizer == "none" or row.scope not in ("prefix", "window") or row.needs_hidden or row.unit > 1:
        raise InputError(
            f"{where}: {row.name!r} on top: expected a row that counts, or that fits a bias to each window alone"
        )


class OnTop:
    """Rows over consecutive chunks of charged tokens.

    Args:
        rows: see `check_top`.
        window, chunk: tokens of a window, and the most that are charged at once; what is left of a window is what a
            row may fit to, by the logits that were charged with.
        calibration: of the rows.
        bos_id: the token that starts a document.
    """

    def __init__(
        self,
        rows: Sequence[Adaptation],
        window: int,
        chunk: int,
        calibration: Calibration | None = None,
        bos_id: int | None = None,
    ):
        self.rows, self.calibration, self.bos_id = rows, calibration, bos_id
        self._how = (rows, window, chunk, calibration, bos_id)
        # A prefix row needs none of it: it counts
        self._context = max((window - chunk - first_position(row, window, chunk) for row in rows), default=0)
        self.reset()

    @classmethod
    def of(
        cls,
        rows: Sequence[Learning],
        window: int,
        calibration: Calibration | None = None,
        bos_id: int | None = None,
    ) -> Self | None:
        """What is on top of rows that learn alike, in order; None: nothing."""
        tops = [row.top for row in rows if row.top is not None]
        return cls(tops, window, rows[0].chunk, calibration, bos_id) if tops else None

    def fresh(self) -> Self:
        """Another one like it, before any charge."""
        return type(self)(*self._how)

    def reset(self) -> None:
        """Forget all that was charged."""
        self._adapters = [Adapter(row, self.calibration, self.bos_id) for row in self.rows]
        self._past: tuple[Tensor, Tensor] | None = None  # logits and targets of the context

    @torch.no_grad()
    def charge(self, logits: Tensor, targets: Tensor, keep_logprobs: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Charge a chunk and take it in.

        Args:
            logits: float [n, V], learned.
            targets: int64 [n].
            keep_logprobs: give the distributions too.

        Returns:
            Losses float32 (float64 for float64) [rows, n], nats, and of each row log-probabilities [n, V] if asked for.
        """
        count = len(targets)
        if self._past is not None:
            logits, targets = (torch.cat(pair) for pair in zip(self._past, (logits, targets), strict=True))
        run = range(len(targets) - count, len(targets))
        context, end = (torch.full((1,), x, device=logits.device) for x in (run.start, run.stop))
        batch = WindowBatch(logits[None], targets[None], context, end, run=run)
        adjusted = [adapter.step(batch, keep_logprobs) for adapter in self._adapters]
        if self._context:
            self._past = logits[-self._context :].clone(), targets[-self._context :]
        return torch.stack([each.nll() for each in adjusted]), [x.logprobs() for x in adjusted if keep_logprobs]

    def state_dict(self) -> dict[str, Any]:
        """All that the next chunk depends on, apart from the tokens that were charged."""
        return {"adapters": [adapter.state_dict() for adapter in self._adapters], "past": self._past}

    def load_state_dict(self, state: Mapping[str, Any], past: np.ndarray, device: torch.device | str) -> None:
        """Continue from what `state_dict` returned.

        Args:
            past: int [n], all tokens that were charged since the start or the last reset.
            device: of the chunks to come.
        """
        self.reset()
        for adapter, saved in zip(self._adapters, state["adapters"], strict=True):
            adapter.load_state_dict(saved, past, device)
        self._past = state["past"] and tuple(part.to(device) for part in state["past"])
