"""The parts of `minimize` that kernels can take over: curvature pairs in their ring, and windows under a shared bias.

The arithmetic is that of `memory.py` and `objective.py` with other roundings: the two-loop recursion instead of the
matrix form, the direct form instead of the P-form.
"""

import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..kernels import History, bias_cross_entropy_grad, lbfgs_direction, lbfgs_history, lbfgs_push_
from .reductions import index_of


@dataclass
class LaunchedMemory:
    """The last H curvature pairs of each problem; `Memory` has the same methods."""

    history: History

    @classmethod
    def empty(cls, like: Tensor, history: int) -> Self:
        W, V = like.shape
        return cls(lbfgs_history(W, history, V, like.device))

    def direction(self, rows: np.ndarray, s: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """Remembers the pair (s, y) of the problems `rows` where y.s > 1e-10 and returns -H g; [A, V], only `rows` mean
        anything."""
        ends = torch.zeros(len(s), 1, dtype=torch.bool, device=s.device)
        ends[index_of(rows, s)] = True
        # a change of 0 is refused: the other problems keep what they have
        lbfgs_push_(self.history, s, torch.where(ends, y, 0.0))
        return lbfgs_direction(self.history, g)

    def take(self, index: np.ndarray) -> Self:
        at = index_of(index, self.history.s)
        return type(self)(History(*(tensor[at] for tensor in self.history)))


class SharedBias:
    """Cross-entropy of W windows under one logit bias, for `minimize`: one program for each window, then their sum.

        F(b) = (sum_wt weight_wt nll_wt(b) + (r / 2) |b|^2) / sum_wt weight_wt

    Args:
        logits: [W, T, V] float32, bfloat16 or float16.
        targets: int [W, T].
        weights: float32 [W, T] >= 0.
        ridge: r >= 0.
    """

    def __init__(self, logits: Tensor, targets: Tensor, weights: Tensor, ridge: float = 0.0):
        self.windows, self.ridge = (logits, targets, weights), ridge
        total = weights.sum(dtype=torch.float64)
        self.scale = torch.where(total > 0, 1.0 / total, 0.0)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss float64 [1] and gradient [1, V] at x [1, V]."""
        logits, targets, weights = self.windows
        losses, gradients = bias_cross_entropy_grad(logits, targets, x[0], weights, reduction="sum")
        loss, gradient = losses.sum(dtype=torch.float64), gradients.sum(0, dtype=torch.float64)
        if self.ridge:
            loss, gradient = loss + self.ridge / 2 * x.double().square().sum(), gradient + self.ridge * x[0].double()
        return (loss * self.scale)[None], (gradient * self.scale).to(x)[None]

    def take(self, index: Tensor) -> Self:
        """The objective itself: it is one problem."""
        return copy.copy(self)
