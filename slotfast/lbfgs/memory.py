"""Curvature pairs of W problems, and the L-BFGS direction: the two-loop recursion in matrix form.

With the pairs, oldest first, as the rows of S and Y, R the upper triangle of S Y^T, D its diagonal, K = R^-1, and
gamma = (s.y) / (y.y) of the newest pair,

    p = K S g,    c = K^T (gamma (Y g - Y Y^T p) - D p),    d = gamma (Y^T p - g) + S^T c

is what the two loops compute (their first coefficients are -p, the differences of both are c), in two passes over the
history instead of 2n dependent ones. A new pair adds one column to K, dropping the oldest deletes one row and one
column, and permuting the pairs permutes K: so all is stored by slot of the ring, whatever the slots' ages, which differ
from problem to problem.

Source: Nocedal & Wright, Numerical Optimization, 7.2; Byrd, Nocedal & Schnabel 1994.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ..kernels._rules import SMALLEST_CURVATURE
from .reductions import BLOCK_ROWS, Columns, column, index_of, padded, row_mixture, row_products, to_host


@dataclass
class Memory(Columns):
    """The last H curvature pairs of each problem, in a ring of H + 1 slots; the slot at `head` is always spare."""

    pairs: Tensor  # [A, rows, padded(V)]: s, y of slot 0, s, y of slot 1, .., then zeros: whole BLOCK_ROWS if that many
    head: np.ndarray  # [A]
    inverse: np.ndarray  # [A, H + 1, H + 1]: K; rows and columns of empty slots are zero
    yy: np.ndarray  # [A, H + 1, H + 1]: Y Y^T
    sy: np.ndarray  # [A, H + 1]: D
    gamma: np.ndarray  # [A]

    @classmethod
    def empty(cls, like: Tensor, history: int) -> Self:
        W, slots = len(like), history + 1
        rows = 2 * slots if 2 * slots <= BLOCK_ROWS else -(-2 * slots // BLOCK_ROWS) * BLOCK_ROWS
        square = (W, slots, slots)
        pairs = like.new_zeros(W, rows, padded(like.shape[1]))
        return cls(pairs, np.zeros(W, np.int64), np.zeros(square), np.zeros(square), np.zeros((W, slots)), np.ones(W))

    def direction(self, rows: np.ndarray, s: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """Remembers the pair (s, y) of the problems `rows` where y.s > 1e-10 and returns -H g; [A, V], only `rows` mean
        anything."""
        (A, slots), V = self.sy.shape, s.shape[1]
        vectors = torch.stack((s, y, g), 1)
        # every problem's: the slot at `head` is spare, and what lies in it has no weight
        by_slot = self.pairs.unflatten(1, (-1, 2))[..., :V]
        by_slot[torch.arange(A, device=s.device), index_of(self.head, s)] = vectors[:, :2]
        products = to_host(row_products(vectors[:, 1:], self.pairs))[0]
        (s_y, y_y), (s_g, y_g) = products.reshape(A, 2, -1, 2)[:, :, :slots].transpose(1, 3, 0, 2)
        curved = rows[s_y[rows, self.head[rows]] > SMALLEST_CURVATURE]
        self.append(curved, self.head[curved], s_y[curved], y_y[curved])

        gamma = self.gamma[:, None]
        p = np.einsum("kij,kj->ki", self.inverse, s_g)
        yy_p = np.einsum("kij,kj->ki", self.yy, p)
        c = np.einsum("kij,ki->kj", self.inverse, gamma * (y_g - yy_p) - self.sy * p)
        weights = np.zeros((A, self.pairs.shape[1]))
        weights[:, : 2 * slots : 2], weights[:, 1 : 2 * slots : 2] = c, gamma * p
        step = row_mixture(torch.from_numpy(weights).to(g), self.pairs)[:, :V]
        return torch.addcmul(step, g, column(-self.gamma, g))

    def append(self, rows: np.ndarray, slot: np.ndarray, s_y: np.ndarray, y_y: np.ndarray) -> None:
        each, spare = np.arange(len(rows)), (slot + 1) % self.sy.shape[1]
        ys = s_y[each, slot]
        # the oldest pair, if the ring is full, makes room; else this clears what is clear
        self.inverse[rows, spare], self.inverse[rows, :, spare], self.sy[rows, spare] = 0.0, 0.0, 0.0
        # R gains the column S y, so its inverse gains -K S y / (s.y) and, on the diagonal, 1 / (s.y)
        added = np.einsum("kij,kj->ki", self.inverse[rows], s_y) / -ys[:, None]
        added[each, slot] = 1.0 / ys
        self.inverse[rows, :, slot] = added
        self.yy[rows, slot], self.yy[rows, :, slot] = y_y, y_y
        self.sy[rows, slot], self.gamma[rows], self.head[rows] = ys, ys / y_y[each, slot], spare
