"""Rows that learn from chunks of windows, as PR #549 and #1413 do: a pass of their own, on a copy of the model."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..data import Text
from ..learn import Charged, Learning
from ..learn.schedule import Read
from ..model import CausalModel
from ..slot import Adapter
from ..ttt import ScoreFirst
from ..windows import Plan
from ..worker import ALONE, Worker
from .loop import Scored, SlidingPass


class WindowsLoop:
    """Charges a text's windows chunk by chunk, and trains all weights on each chunk once it is charged; runs once.

    Args:
        model: in evaluation mode; left as it was.
        row: how to learn; its `keys` are "windows".
        text: what is charged.
        plan: windows over it.
        adapters: fresh, of the rows on top.
        batch_windows: windows of one forward.
        worker: where and how it computes.
        keep_logprobs: give the distributions too.

    Attributes:
        seconds: of forwarding and training, and of the rows on top.
    """

    def __init__(
        self,
        model: CausalModel,
        row: Learning,
        text: Text,
        plan: Plan,
        adapters: Sequence[Adapter] = (),
        *,
        batch_windows: int,
        worker: Worker = ALONE,
        keep_logprobs: bool = False,
    ):
        self.row, self.sinks, self.seconds = row, None, {"learned": 0.0, "on top": 0.0}
        self._training = ScoreFirst(
            row.chunk, row.lr, row.steps, row.batch, row.momentum, row.clip or math.inf, row.schedule == "cosine"
        )
        self._pass = SlidingPass(
            copy.deepcopy(model),
            text,
            plan,
            adapters,
            batch_windows=batch_windows,
            worker=replace(worker, compile="off"),  # weights that are trained between forwards
            training=self._training,
            keep_logprobs=keep_logprobs,
        )

    @property
    def forwards(self) -> float:
        """Passes through the model for each token: its windows', and 3 for each time that it is trained on."""
        plan = self._pass.plan
        return (len(plan) * plan.seq_len + 3 * self._training.trained) / max(1, plan.predictions)

    @property
    def chunks(self) -> int:
        """Chunks charged and trained on, by all ranks."""
        return self._pass.chunks

    @property
    def ended(self) -> bool:
        """Whether there are no more."""
        return self.chunks == len(self._training.chunks(self._pass.plan))

    def run(
        self,
        read: Read,
        predictions: int | range,
        on_charged: Callable[[Charged], None],
        on_chunk: Callable[[], None] | None = None,
    ) -> None:
        """Charge and learn; see `LearningLoop.run`. The text is its own, whatever `read` reads."""
        self._pass.run(on_scored=lambda scored: on_charged(_charged(scored)), on_piece=on_chunk)
        self._read_seconds()

    def state_dict(self) -> dict[str, Any]:
        """All that a loop with the same arguments needs to go on from here; None before it began."""
        begun = self._pass.windows > 0 or self.chunks > 0
        return {"pass": self._pass.state_dict() if begun else None, "trained": self._training.trained}

    def load_state_dict(self, state: Mapping[str, Any], read: Read) -> None:
        """Continue from what `state_dict` returned."""
        if state["pass"] is not None:
            self._pass.load_state_dict(state["pass"])
            self._training.trained = state["trained"]
            self._read_seconds()

    def _read_seconds(self) -> None:
        seconds = dict(self._pass.seconds)
        self.seconds["on top"] = seconds.pop("adapt")
        self.seconds["learned"] = sum(seconds.values())


def _charged(scored: Scored) -> Charged:
    nll: Any = torch.from_numpy(scored.nll)
    own, *others = [None] if scored.logprobs is None else scored.logprobs
    return Charged(int(scored.position[0]) - 1, nll[0], None, own, nll[1:] if len(nll) > 1 else None, others)
