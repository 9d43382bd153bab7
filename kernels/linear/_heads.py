"""Queries, keys and values as attention takes them, of one product: normalised by head, scaled and rotated.

With u = n W^T, n = x norm / rms(x), in heads of D; W holds the rows of H queries, then of as many keys and values:

    q = turn(gain_h u / rms(u)),    k = turn(u / rms(u)),    v = u + value

turn rotates dimensions i and i + R of the first 2 R by the position's angle, and leaves the others. A tile's columns
come in another order, free where W's rows are loaded: those two stand side by side, in one thread of a tensor core's
result, so that a rotation moves nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import tl, triton
from ..cases.linear import HEADS_CASES, heads_inputs
from ..spec import KernelSpec
from ._product import _EPS, EPS, MOST_COLUMNS, _check, _compilation, _inverse_rms, _launch_tiles, _normed_ref, _product


def linear_heads_ref(
    x: Tensor,
    weight: Tensor,
    squares: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    width: int,
    value: Tensor | None = None,
    norm: float = 1.0,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear_heads` in plain torch, any floating dtype."""
    u = F.linear(_normed_ref(x, squares, norm), weight)
    heads, H = u.unflatten(-1, (-1, width)), len(gain)
    shared = (heads.size(-2) - H) // 2
    q, k, v = heads.split((H, shared, shared), -2)
    v = v if value is None else v + value.unflatten(-1, (shared, width))
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    q = turned(F.rms_norm(q, (width,), eps=EPS) * gain.to(x.dtype)[:, None], cos, sin)
    k = turned(F.rms_norm(k, (width,), eps=EPS), cos, sin)
    return torch.cat([q, k, v], -2), u if keep else u.new_empty(0)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The leading dimensions of x [..., heads, D] turned pairwise, i and i + R, by angles [..., 1, R]."""
    half = cos.size(-1)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, x[..., 2 * half :]], -1)


@triton.jit
def _linear_heads_kernel(
    x_ptr,
    w_ptr,
    squares_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    value_ptr,
    y_ptr,
    u_ptr,
    M,
    K,
    T,
    parts,
    norm,
    H: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    RUN: tl.constexpr,
    N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # neighbours share rows of x
    HEADS: tl.constexpr = BLOCK_N // D
    HALF: tl.constexpr = D // 2
    first = (tl.program_id(0) // tiles * BLOCK_M).to(tl.int64)
    left = M - tl.program_id(0) // tiles * BLOCK_M
    start = tl.program_id(0) % tiles * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)

    c = tl.arange(0, BLOCK_N)
    dim = _dimension(c // 2 % HALF, c % 2, HALF, R)
    columns = start + c // D * D + dim
    acc = _product(x_ptr + first * K, w_ptr, left, columns, K, N, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
    u = acc * _inverse_rms(squares_ptr + first, left, M, K, parts, norm, BLOCK_M)[:, None]
    a, b = tl.split(tl.reshape(u, (BLOCK_M, HEADS * HALF, 2)))

    pair = tl.arange(0, HEADS * HALF)
    base = start + pair // HALF * D
    columns_a = tl.max_contiguous(tl.multiple_of(base + _dimension(pair % HALF, 0, HALF, R), RUN), RUN)
    columns_b = tl.max_contiguous(tl.multiple_of(base + _dimension(pair % HALF, 1, HALF, R), RUN), RUN)
    rows = offs_m[:, None] * N
    mask = (offs_m < left)[:, None] & (base < N)[None, :]
    if u_ptr is not None:
        tl.store(u_ptr + first * N + rows + columns_a[None, :], a.to(u_ptr.dtype.element_ty), mask=mask)
        tl.store(u_ptr + first * N + rows + columns_b[None, :], b.to(u_ptr.dtype.element_ty), mask=mask)
    if value_ptr is not None:
        V: tl.constexpr = SHARED * D
        has_value = mask & (base >= N - V)[None, :]
        values = value_ptr + first * V + offs_m[:, None] * V - (N - V)
        a += tl.load(values + columns_a[None, :], mask=has_value, other=0.0).to(tl.float32)
        b += tl.load(values + columns_b[None, :], mask=has_value, other=0.0).to(tl.float32)

    a = tl.reshape(a, (BLOCK_M, HEADS, HALF))
    b = tl.reshape(b, (BLOCK_M, HEADS, HALF))
    head = start // D + tl.arange(0, HEADS)
    gain = tl.load(gain_ptr + head, mask=head < H, other=1.0)[None, :]
    inverse = gain / tl.sqrt((tl.sum(a * a, axis=2) + tl.sum(b * b, axis=2)) / D + _EPS)  # (BLOCK_M, HEADS)
    inverse = tl.where((head < H + SHARED)[None, :], inverse, 1.0)[:, :, None]
    a, b = a * inverse, b * inverse
    if R > 0:
        p = tl.arange(0, HALF)
        offs_t = ((first + offs_m) % T).to(tl.int32)[:, None] * R + p[None, :]
        turned = (p < R)[None, :] & (offs_m < left)[:, None]
        whole = (head >= H + SHARED)[None, :, None]
        cos = tl.where(whole, 1.0, tl.load(cos_ptr + offs_t, mask=turned, other=1.0)[:, None, :])
        sin = tl.where(whole, 0.0, tl.load(sin_ptr + offs_t, mask=turned, other=0.0)[:, None, :])
        a, b = a * cos + b * sin, b * cos - a * sin
    a = tl.reshape(a, (BLOCK_M, HEADS * HALF)).to(y_ptr.dtype.element_ty)
    b = tl.reshape(b, (BLOCK_M, HEADS * HALF)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + first * N + rows + columns_a[None, :], a, mask=mask)
    tl.store(y_ptr + first * N + rows + columns_b[None, :], b, mask=mask)


@triton.jit
def _dimension(p, side, HALF: tl.constexpr, R: tl.constexpr):
    """Dimension of a head on one side of pair p: i and i + R of those that turn, then halves of the rest."""
    return tl.where(p < R, p + side * R, p + tl.where(side == 1, HALF, R))


def linear_heads(
    x: Tensor,
    weight: Tensor,
    squares: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    width: int,
    value: Tensor | None = None,
    norm: float = 1.0,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of x * norm / rms(x), ready for attention, in one pass over x.

    Args:
        x: [..., T, K] float32, bfloat16 or float16, not normalised.
        weight: [(H + 2 Hkv) D, K] in x's dtype: of the queries, the keys and the values.
        squares: float32 [parts, ..., T], parts of the sum of squares of each row of x.
        gain: float32 [H], of the normalised queries.
        cos, sin: float32 [T, R], 2 R <= D, of each position's angles.
        width: D, a power of 2 from 2 to 128.
        value: [..., T, Hkv D] in x's dtype, added to the values; or None.
        norm: factor of the normalised rows.
        keep: also give the product itself, for a backward pass.

    Returns:
        [..., T, H + 2 Hkv, D] in x's dtype; and x * norm / rms(x) times the weight, [..., T, (H + 2 Hkv) D], empty
        unless `keep`.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding of it and 1e-6.
    Source: parameter-golf PR #1019.
    """
    N, H, (T, R) = len(weight), len(gain), cos.shape
    SHARED = (N // width - H) // 2
    if width & (width - 1) or not 2 <= width <= MOST_COLUMNS or N != (H + 2 * SHARED) * width or 2 * R > width:
        raise ValueError(
            f"weight: expected [(H + 2 Hkv) D, K] with H = {H}, D = {width} a power of 2 from 2 to {MOST_COLUMNS} and "
            f"2 R = {2 * R} <= D, got {list(weight.shape)}"
        )
    wanted = {"squares": (squares, (len(squares), *x.shape[:-1])), "gain": (gain, (H,))}
    _check(x, {"weight": weight}, **wanted, cos=(cos, (x.shape[-2], R)), sin=(sin, (T, R)))
    if value is not None and (value.shape != (*x.shape[:-1], SHARED * width) or value.dtype != x.dtype):
        raise ValueError(f"value: expected {x.dtype} {[*x.shape[:-1], SHARED * width]}, got {list(value.shape)}")
    y = torch.empty((*x.shape[:-1], N // width, width), dtype=x.dtype, device=x.device)
    u = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device) if keep else y.new_empty(0)
    _launch_tiles(
        _linear_heads_kernel,
        "linear_heads",
        x.contiguous(),
        N,
        w_ptr=weight.contiguous(),
        squares_ptr=squares.contiguous(),
        gain_ptr=gain.contiguous(),
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        value_ptr=None if value is None else value.contiguous(),
        y_ptr=y,
        u_ptr=u if keep else None,
        T=T,
        parts=len(squares),
        norm=float(norm),
        **_shape(H, SHARED, width, R),
    )
    return y, u


def _shape(H: int, SHARED: int, D: int, R: int) -> dict[str, int]:
    """Constants: heads, pairs that turn, and how many neighbouring pairs of a head are neighbours in memory."""
    run = min(8, (R | D // 2) & -(R | D // 2))
    return {"H": H, "SHARED": SHARED, "D": D, "R": R, "RUN": run}


def _compilations(*, K, H, SHARED, D, R, value=False, keep=False, **_):
    absent = () if value else ("value_ptr",)
    absent += () if keep else ("u_ptr",)
    wide = ("squares_ptr", "gain_ptr", "cos_ptr", "sin_ptr")
    N = (H + 2 * SHARED) * D
    return [
        _compilation(_linear_heads_kernel, N, K, wide=wide, absent=absent, given=_shape(H, SHARED, D, R)),
    ]


SPEC = KernelSpec(
    name="linear_heads",
    fn=linear_heads,
    reference=linear_heads_ref,
    inputs=heads_inputs,
    cases=HEADS_CASES,
    compilations=_compilations,
    bytes_moved=lambda *, B, T, K, H, SHARED, D, value=False, keep=False, itemsize, **_: (
        itemsize * (B * T + (H + 2 * SHARED) * D) * K
        + itemsize * B * T * D * ((H + 2 * SHARED) * (1 + keep) + value * SHARED)
    ),
    flops=lambda *, B, T, K, H, SHARED, D, **_: 2 * B * T * K * (H + 2 * SHARED) * D,
)
