"""Residual and scale per channel behind a product: y = x + scale * (h W^T), with what the next normalisation needs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import tl, triton
from ..cases.linear import RESIDUAL_CASES, residual_inputs
from ..spec import KernelSpec
from ._product import MOST_COLUMNS, _check, _compilation, _launch_tiles, _product, _store


def linear_residual_ref(h: Tensor, weight: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_residual` in plain torch, any floating dtype."""
    y = x + scale.to(x.dtype) * F.linear(h, weight)
    wide = y.to(torch.promote_types(y.dtype, torch.float32)).square()
    return y, torch.stack([part.sum(-1) for part in wide.split(MOST_COLUMNS, -1)])


@triton.jit
def _linear_residual_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    residual_ptr,
    y_ptr,
    squares_ptr,
    M,
    K,
    N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # neighbours share rows of x
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles * BLOCK_M).to(tl.int64)
    left = M - tl.program_id(0) // tiles * BLOCK_M
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _product(x_ptr + first * K, w_ptr, left, columns, K, N, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    mask = (offs_m < left)[:, None] & (columns < N)[None, :]
    residual_ptrs = residual_ptr + first * N + offs_m[:, None] * N + columns[None, :]
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + columns, mask=columns < N, other=0.0)
    y = (residual + scale[None, :] * acc).to(y_ptr.dtype.element_ty)
    _store(y_ptr + first * N, columns, y, left, N)
    y = y.to(tl.float32)  # as it is stored: what is normalised next
    tl.store(squares_ptr + tile * M + first + offs_m, tl.sum(y * y, axis=1), mask=offs_m < left)


def linear_residual(h: Tensor, weight: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A residual stream and the scaled result of a linear layer, in the layer's pass.

    Args:
        h: [..., K] float32, bfloat16 or float16: the layer's input.
        weight: [N, K] in h's dtype.
        scale: float32 [N].
        x: [..., N] in h's dtype: the stream.

    Returns:
        x + scale * (h W^T), [..., N] in h's dtype; and float32 [ceil(N / 128), ...], of each of its rows the
        sums of squares of every 128 columns.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding of it and 1e-6.
    Source: parameter-golf PR #1019.
    """
    N = len(weight)
    _check(h, {"weight": weight}, scale=(scale, (N,)))
    if x.shape != (*h.shape[:-1], N) or x.dtype != h.dtype or x.device != h.device:
        raise ValueError(f"x: expected {h.dtype} {[*h.shape[:-1], N]} on {h.device}, got {x.dtype} {list(x.shape)}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    squares = torch.empty((-(-N // MOST_COLUMNS), *x.shape[:-1]), dtype=torch.float32, device=x.device)
    _launch_tiles(
        _linear_residual_kernel,
        "linear_residual",
        h.contiguous(),
        N,
        w_ptr=weight.contiguous(),
        scale_ptr=scale.contiguous(),
        residual_ptr=x.contiguous(),
        y_ptr=y,
        squares_ptr=squares,
    )
    return y, squares


SPEC = KernelSpec(
    name="linear_residual",
    fn=linear_residual,
    reference=linear_residual_ref,
    inputs=residual_inputs,
    cases=RESIDUAL_CASES,
    compilations=lambda *, N, K, **_: [
        _compilation(_linear_residual_kernel, N, K, wide=("scale_ptr", "squares_ptr")),
    ],
    bytes_moved=lambda *, M, N, K, itemsize, **_: itemsize * (M * K + N * K + 2 * M * N) + 4 * (M + N),
    flops=lambda *, M, N, K, **_: 2 * M * N * K,
)
