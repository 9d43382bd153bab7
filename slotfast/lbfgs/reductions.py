"""Sums over rows that round the same in any batch, and conversions between numpy and torch.

Torch's elementwise operations and its sums over the last dimension round a row's numbers in an order that the other
rows do not change, except that one long sum alone is split among threads. Matrix products do not in general:
the library underneath picks a kernel by the whole shape. Measured, form by form, with 1, 2, 3, 4 and 8 threads
(torch 2.13, MKL): per batch entry [m, V] x [V, R] and [1, R] x [R, V] with R <= 64 qualify in batches of two or more;
matrix x column does not, nor a longer reduction over rows. On AMD processors they qualify only where all rows are
equally aligned: so rows are padded to whole cache lines. tests/test_lbfgs.py holds the forms used here to it.
"""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

BLOCK_ROWS = 64  # rows that one matrix product reduces over; longer reductions are sums of blocks
_ALIGNMENT = 16  # elements of 4 or 8 bytes


def padded(columns: int) -> int:
    """V rounded up to whole cache lines: the length of a row of V elements and zeros."""
    return -(-columns // _ALIGNMENT) * _ALIGNMENT


def aligned(rows: Tensor) -> Tensor:
    """Zeros at the end of rows [..., V], up to padded(V); without a copy where there are none."""
    V = rows.shape[-1]
    return rows if V == padded(V) else torch.nn.functional.pad(rows, (0, padded(V) - V))


def row_products(vectors: Tensor, rows: Tensor) -> Tensor:
    """vectors [A, m, V] times rows [A, R, V] over V -> [A, m, R]; R at most BLOCK_ROWS or a multiple of it."""
    vectors, rows = aligned(vectors), aligned(rows)
    A, m, V = vectors.shape
    if rows.shape[1] <= BLOCK_ROWS:
        return batch_product(vectors, rows.mT)
    blocks = rows.shape[1] // BLOCK_ROWS
    vectors = vectors[:, None].expand(A, blocks, m, V).reshape(A * blocks, m, V)
    products = batch_product(vectors, rows.view(A * blocks, BLOCK_ROWS, V).mT)
    return products.view(A, blocks, m, BLOCK_ROWS).transpose(1, 2).reshape(A, m, blocks * BLOCK_ROWS)


def row_mixture(weights: Tensor, rows: Tensor) -> Tensor:
    """weights [A, R] times rows [A, R, V] over R -> [A, V]; R at most BLOCK_ROWS or a multiple of it."""
    columns, rows = rows.shape[2], aligned(rows)
    A, R, V = rows.shape
    block = min(R, BLOCK_ROWS)
    count = R // block
    parts = batch_product(weights.view(A * count, 1, block), rows.view(A * count, block, V)).view(A, count, V)
    return block_tree_sum(parts)[:, :columns]


def block_tree_sum(parts: Tensor) -> Tensor:
    """[A, count, V] -> [A, V]; writes into its argument."""
    count = parts.shape[1]
    while count > 1:  # a tree over the next power of two, zeros for missing leaves: more zeros change nothing
        half = 1 << (count - 1).bit_length() - 1
        parts[:, : count - half] += parts[:, half:count]
        count = half
    return parts[:, 0]


def batch_product(a: Tensor, b: Tensor) -> Tensor:
    """a [A, m, k] times b [A, k, n] -> [A, m, n]; one product is computed as the first of two, which keeps its bits."""
    return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1] if len(a) == 1 else torch.bmm(a, b)


def block_sum(x: Tensor) -> Tensor:
    """[A, n * BLOCK_ROWS] -> [A]: blocks, then the blocks' sums in order, so that zeros at the end change nothing."""
    return x.view(len(x), x.shape[1] // BLOCK_ROWS, BLOCK_ROWS).sum(-1).cumsum(-1)[:, -1]


def row_sum(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[A, V] -> [A]; a single sum is computed as the first of two, so that it is not split among threads."""
    return x.expand(2, -1).sum(-1, dtype=dtype)[:1] if len(x) == 1 else x.sum(-1, dtype=dtype)


def choose(mask: np.ndarray, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where mask holds, else of `old`; they are written into `new`, which is returned."""
    others = (~mask).nonzero()[0]
    if len(others):
        index = index_of(others, new)
        new[index] = old[index]
    return new


def column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like)[:, None]


def index_of(index: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device)


def to_host(*tensors: Tensor) -> np.ndarray:
    """Tensors of one shape -> float64 array with a leading dimension over them, in one transfer."""
    return torch.stack(tensors).double().cpu().numpy()


class Columns:
    """A dataclass whose fields are arrays and tensors with one row a problem."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def take(self, index: np.ndarray) -> Self:
        columns = [getattr(self, name) for name in self.__dataclass_fields__]
        return type(self)(*(a[index] if isinstance(a, np.ndarray) else a[index_of(index, a)] for a in columns))
