"""Windows that overlap: views of one tape, whose rows are computed once and read in place.

A product over a window's rows is made block by block, for all windows at once: neighbours share most of their rows,
which stay in the cache. The blocks are those of `row_products` and `row_mixture`, so a window's bits are the same on
a tape as in windows of its own.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from .reductions import BLOCK_ROWS, aligned, batch_product, block_tree_sum, padded, row_mixture, row_products


@dataclass(frozen=True)
class Tape:
    """What overlapping windows are views of.

    Args:
        rows: [N, ...]; window w is rows[w * step : w * step + T].
        step: rows from the start of one window to that of the next, less than T.
    """

    rows: Tensor
    step: int

    @classmethod
    def of(cls, windows: Tensor) -> Self | None:
        """The tape behind windows [W, T, ...], or None where they do not overlap."""
        if windows.dim() < 2 or min(windows.shape[:2]) < 2:
            return None
        count, length = windows.shape[:2]
        across, down, *inner = windows.stride()
        if down <= 0 or across % down or across // down >= length:
            return None
        step = across // down
        rows = windows.as_strided(((count - 1) * step + length, *windows.shape[2:]), (down, *inner))
        return cls(rows, step)

    def windows(self, rows: Tensor, count: int, length: int) -> Tensor:
        """Windows [count, length, ...] of other rows [N, ...] laid out like the tape's, without a copy."""
        down, *inner = rows.stride()
        return rows.as_strided((count, length, *rows.shape[1:]), (self.step * down, down, *inner))


def to_front(used: Tensor, logits: Tensor, *columns: Tensor, run: range | None = None) -> tuple[Tensor, ...]:
    """The positions that each window uses, moved to its front in their order, in whole blocks of rows.

    No sum over them then depends on how many others there are, or on where these were. Where all windows use the same
    run of positions, the results stay views.

    Args:
        used: bool [W, T].
        logits: [W, T, V], T >= 1.
        columns: [W, T] each.
        run: the positions that every window uses, where the host knows them; else it waits for the device.

    Returns:
        used [W, R], R a multiple of BLOCK_ROWS; logits [W, up to R, V], with anything where a row is not used; and the
        columns [W, R], 0 there.
    """
    W, T = used.shape
    count = used.sum(1, keepdim=True)
    longest = len(run) if run else max(1, int(count.max()) if W else 0)
    length = -(-longest // BLOCK_ROWS) * BLOCK_ROWS
    first = run.start if run else int(used.any(0).byte().argmax()) if W else 0
    position = torch.arange(T, device=used.device)
    if run or torch.equal(used, (position >= first) & (position < first + count)):
        cut = slice(first, first + longest)
        logits, columns = logits[:, cut], tuple(column[:, cut] for column in columns)
    else:
        order = torch.argsort(used.byte(), dim=1, descending=True, stable=True)[:, :longest]
        logits = logits[torch.arange(W, device=used.device)[:, None], order]
        columns = tuple(column.gather(1, order) for column in columns)
    kept = torch.arange(length, device=used.device) < count
    padded_columns = (torch.nn.functional.pad(column, (0, length - column.shape[1])) for column in columns)
    return kept, logits, *(torch.where(kept, column, 0) for column in padded_columns)


def softmax(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """softmax(z) [..., V], and log-sum-exp float64 [...], which costs no further exponentials."""
    p = torch.softmax(z, -1, dtype=dtype)
    # the largest p is 1 / sum exp(z - max z)
    return p, z.amax(-1).double() - p.amax(-1).double().log()


def probabilities(z: Tensor, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
    """softmax of windows z [W, T, V], each row of a tape once.

    Returns:
        p [W, length, padded(V)], for `WindowRows`, and log-sum-exp float64 [W, T]. Where that is not finite, and past
        the windows, p still is: a row without weight may hold anything.
    """
    W, T, V = z.shape
    tape = Tape.of(z)
    p, lse = softmax(z if tape is None else tape.rows, dtype)
    broken = ~lse.isfinite()
    if p.device.type != "cpu" or bool(broken.any()):
        p.masked_fill_(broken[..., None], 1 / V)
    if length > T or padded(V) > V:
        p = torch.nn.functional.pad(p, (0, padded(V) - V, 0, length - T), value=1 / V)
    return (p, lse) if tape is None else (tape.windows(p, W, length), tape.windows(lse, W, T))


class WindowRows:
    """Rows of A problems, in whole blocks, and the products with them.

    Args:
        rows: [A, R, V], R a multiple of BLOCK_ROWS, V as `padded`; they may overlap.
    """

    def __init__(self, rows: Tensor):
        self.rows = rows
        self.tape = Tape.of(rows) is not None
        self.left: list[int] | None = None  # problems that are left, once a tape's windows are no longer at equal steps

    def products(self, vectors: Tensor) -> Tensor:
        """vectors [A, V] times each problem's rows -> [A, R]."""
        if not self.tape:
            return row_products(vectors[:, None], self.rows)[:, 0]
        vectors = aligned(vectors)
        found = vectors.new_empty(len(vectors), self.rows.shape[1])
        if self.left is None:
            for first in range(0, found.shape[1], BLOCK_ROWS):
                block = slice(first, first + BLOCK_ROWS)
                found[:, block] = batch_product(vectors[:, None], self.rows[:, block].mT)[:, 0]
        else:
            for place, problem in enumerate(self.left):
                blocks = self.rows[problem].unflatten(0, (-1, BLOCK_ROWS))
                product = batch_product(vectors[place].expand(len(blocks), 1, -1), blocks.mT)
                found[place] = product.flatten()
        return found

    def mixture(self, weights: Tensor) -> Tensor:
        """weights [A, R] times each problem's rows, over the rows -> [A, V]."""
        if not self.tape:
            return row_mixture(weights, self.rows)
        count, columns = weights.shape[1] // BLOCK_ROWS, self.rows.shape[2]
        parts = weights.new_empty(len(weights), count, columns)
        if self.left is None:
            for index in range(count):
                block = slice(index * BLOCK_ROWS, (index + 1) * BLOCK_ROWS)
                parts[:, index] = batch_product(weights[:, None, block], self.rows[:, block])[:, 0]
        else:
            for place, problem in enumerate(self.left):
                blocks = self.rows[problem].unflatten(0, (-1, BLOCK_ROWS))
                parts[place] = batch_product(weights[place].view(count, 1, BLOCK_ROWS), blocks)[:, 0]
        return block_tree_sum(parts)

    def take(self, index: Tensor) -> Self:
        """Those of some of the problems, int64 [B]; a tape is not copied."""
        if not self.tape:
            return type(self)(self.rows[index])
        part = type(self)(self.rows)
        part.left = index.tolist() if self.left is None else [self.left[place] for place in index.tolist()]
        return part
