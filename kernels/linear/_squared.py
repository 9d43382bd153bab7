"""Squared leaky ReLU behind the product of a normalised input: y = leaky(n W^T)^2, n = x norm / rms(x)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import tl, triton
from ..cases.linear import SQUARED_CASES, squared_inputs
from ..spec import KernelSpec
from ._product import _check, _compilation, _inverse_rms, _launch_tiles, _normed_ref, _product, _store


def linear_squared_ref(
    x: Tensor, weight: Tensor, squares: Tensor, norm: float = 1.0, slope: float = 0.5, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """`linear_squared` in plain torch, any floating dtype."""
    u = F.linear(_normed_ref(x, squares, norm), weight)
    return F.leaky_relu(u, slope).square(), u if keep else u.new_empty(0)


@triton.jit
def _linear_squared_kernel(
    x_ptr,
    w_ptr,
    squares_ptr,
    y_ptr,
    u_ptr,
    M,
    K,
    parts,
    norm,
    slope,
    N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # neighbours share rows of x
    first = (tl.program_id(0) // tiles * BLOCK_M).to(tl.int64)
    left = M - tl.program_id(0) // tiles * BLOCK_M
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _product(x_ptr + first * K, w_ptr, left, columns, K, N, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
    u = acc * _inverse_rms(squares_ptr + first, left, M, K, parts, norm, BLOCK_M)[:, None]
    if u_ptr is not None:
        _store(u_ptr + first * N, columns, u, left, N)
    y = tl.where(u > 0, u, u * slope)
    _store(y_ptr + first * N, columns, y * y, left, N)


def linear_squared(
    x: Tensor, weight: Tensor, squares: Tensor, norm: float = 1.0, slope: float = 0.5, keep: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared leaky ReLU of x * norm / rms(x) times a weight, in one pass over x.

    Args:
        x: [..., K] float32, bfloat16 or float16, not normalised.
        weight: [N, K] in x's dtype.
        squares: float32 [parts, ...], parts of the sum of squares of each row of x.
        norm: factor of the normalised rows.
        slope: of the leaky ReLU below 0.
        keep: also give what went into it, for a backward pass.

    Returns:
        [..., N] in x's dtype; and the same before the activation, empty unless `keep`.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding of it and 1e-6.
    Source: parameter-golf PR #1019.
    """
    _check(x, {"weight": weight}, squares=(squares, (len(squares), *x.shape[:-1])))
    N = len(weight)
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    u = torch.empty_like(y) if keep else y.new_empty(0)
    _launch_tiles(
        _linear_squared_kernel,
        "linear_squared",
        x.contiguous(),
        N,
        w_ptr=weight.contiguous(),
        squares_ptr=squares.contiguous(),
        y_ptr=y,
        u_ptr=u if keep else None,
        parts=len(squares),
        norm=float(norm),
        slope=float(slope),
    )
    return y, u


def _compilations(*, N, K, keep=False, **_):
    absent = () if keep else ("u_ptr",)
    return [_compilation(_linear_squared_kernel, N, K, wide=("squares_ptr",), absent=absent)]


SPEC = KernelSpec(
    name="linear_squared",
    fn=linear_squared,
    reference=linear_squared_ref,
    inputs=squared_inputs,
    cases=SQUARED_CASES,
    compilations=_compilations,
    bytes_moved=lambda *, M, N, K, keep=False, itemsize, **_: itemsize * (M * K + N * K + M * N * (1 + keep)) + 4 * M,
    flops=lambda *, M, N, K, **_: 2 * M * N * K,
)
