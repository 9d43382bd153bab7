"""Score-first test-time training: each chunk of the stream is scored, and only then trained on.

Source: PR #549: SGD with momentum on all weights, several epochs a chunk, the rate a cosine over the chunks.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .data import TokenStream
from .model import CausalModel
from .windows import Plan
from .worker import ALONE, Worker


class ScoreFirst:
    """Trains on each chunk once it has been scored: the protocol that the contest allows.

    Args:
        chunk: predictions of a chunk, >= 1; a window belongs to the chunk of its first scored prediction.
        lr: of the first chunk; a cosine takes it to 0 at the last.
        epochs: over each chunk.
        batch: sequences of one step on each rank.
        momentum, clip: of SGD; bound on the gradient's norm.
        cosine: whether the rate falls; else it stays.

    Attributes:
        trained: tokens that were trained on, by any rank, each time that they were.
    """

    def __init__(
        self,
        chunk: int = 32768,
        lr: float = 0.002,
        epochs: int = 3,
        batch: int = 32,
        momentum: float = 0.9,
        clip: float = 1.0,
        cosine: bool = True,
    ):
        self.chunk, self.lr, self.epochs, self.batch = chunk, lr, epochs, batch
        self.momentum, self.clip, self.cosine, self.trained = momentum, clip, cosine, 0
        self._optimizer: torch.optim.SGD | None = None
        self._chunks: tuple[Plan, list[range]] | None = None

    def chunks(self, plan: Plan) -> list[range]:
        """The windows of each chunk, in order; chunks without a window are left out."""
        if self._chunks is None or self._chunks[0] != plan:  # a contest's plan has a million windows
            self._chunks = plan, self._cut(plan)
        return self._chunks[1]

    def _cut(self, plan: Plan) -> list[range]:
        borders, last = [], None
        for index in range(len(plan)):
            window = plan[index]
            chunk = (window.start + window.context_end) // self.chunk
            if chunk != last:
                borders.append(index)
                last = chunk
        return [range(a, b) for a, b in zip(borders, [*borders[1:], len(plan)], strict=True)]

    def state_dict(self, model: CausalModel) -> dict[str, Any]:
        """The model as trained so far, and the optimiser's memory."""
        return {"model": model.state_dict(), "optimizer": self._optimizer and self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], model: CausalModel) -> None:
        """Continue from what `state_dict` returned."""
        model.load_state_dict(state["model"])
        if state["optimizer"] is not None:
            self._begin(model).load_state_dict(state["optimizer"])

    def _begin(self, model: CausalModel) -> torch.optim.SGD:
        model.requires_grad_(True)
        self._optimizer = torch.optim.SGD(model.parameters(), self.lr, self.momentum)
        return self._optimizer

    def train(
        self,
        model: CausalModel,
        stream: TokenStream,
        plan: Plan,
        chunk: int,
        worker: Worker = ALONE,
    ) -> None:
        """Train on what the windows of chunk number `chunk` have scored; nothing to do after the last one.

        Every rank takes its share of the sequences, and gradients are summed over ranks.
        """
        chunks = self.chunks(plan)
        if chunk == len(chunks) - 1:
            return
        optimizer = self._optimizer or self._begin(model)
        rate = self.lr
        if self.cosine:
            rate *= (1 + math.cos(math.pi * chunk / max(1, len(chunks) - 1))) / 2
        optimizer.param_groups[0]["lr"] = rate
        first, end = (plan[chunks[number].start] for number in (chunk, chunk + 1))
        begin, stop = first.start + first.context_end, end.start + end.context_end  # exactly what has been scored
        starts = range(begin, stop, plan.seq_len)
        parameters = list(model.parameters())
        for _ in range(self.epochs):
            for step in range(0, len(starts), self.batch * worker.world):
                together = starts[step : step + self.batch * worker.world]
                predictions = min(together.start + len(together) * plan.seq_len, stop) - together.start
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                for start in together[worker.rank :: worker.world]:
                    piece = torch.from_numpy(stream.read(start, min(start + plan.seq_len, stop) + 1).astype("int64"))
                    piece = piece[None].to(worker.device)
                    with torch.enable_grad():
                        hidden = model.hidden(piece[:, :-1], worker.dtype)
                        loss = model.losses(hidden, piece[:, 1:]).sum() / predictions
                    loss.backward()
                if worker.world > 1:
                    for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
                        dist.all_reduce(gradient)
                nn.utils.clip_grad_norm_(parameters, self.clip)
                optimizer.step()
                self.trained += predictions
        for parameter in parameters:
            parameter.grad = None
