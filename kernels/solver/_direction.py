"""The direction of L-BFGS, in the program that solves a window: the two-loop recursion in matrix form.

With the pairs as rows of S and Y, oldest first, R the upper triangle of S Y^T, D its diagonal, K = R^-1 and
gamma = (s.y) / (y.y) of the newest,

    p = K S g,    c = K^T (gamma (Y g - Y Y^T p) - D p),    d = gamma (Y^T p - g) + S^T c

Two passes over the pairs whose rows are independent, instead of two loops of dependent steps with a reduction over the
whole program in each. K, Y Y^T and D are indexed by slot of a ring of history + 1, whatever the ages: a new pair adds
one column to K, and clearing a row and a column forgets the oldest. The slot after the newest is always clear. A pair
with s.y <= 1e-10 lies in that slot, unused, until the next one overwrites it.

Source: Byrd, Nocedal & Schnabel, Representations of quasi-Newton matrices, 1994.
"""

from .._rows import _fold, _row_sum, _tile_columns, _tile_rows
from .._rules import SMALLEST_CURVATURE
from .._triton import tl, triton
from ._window import _load_row

_SMALLEST_CURVATURE = tl.constexpr(SMALLEST_CURVATURE)


@triton.jit
def _load_pairs(
    ring_ptr,
    first,
    end,
    columns,
    VP,
    EVEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Vectors `first` to `end`, at most ROWS, of the ring."""
    offs_r = first + _tile_rows(CHUNKS, ROWS)
    mask = (offs_r < end)[:, None]
    mask = mask if EVEN else mask & (columns < VP)
    # ".cg": not through L1, which has room for a bfloat16 P of V = 1024, T = 64, but not for the pairs besides
    pairs = tl.load(ring_ptr + offs_r[:, None] * VP + columns, mask=mask, other=0.0, cache_modifier=".cg")
    return _fold(pairs, CHUNKS, ROWS, COLS)


@triton.jit
def _product(a, b):
    """a * b, rounded before anything is added.

    A plain product would be fused with the first step of a sum, fma(a, b, product of another lane), and lanes that hold
    the same element would store different bits of it.
    """
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def _direction(
    g,
    g_ptr,
    ring_ptr,
    small_ptr,
    slot,
    filled,
    gamma,
    slots,
    VP,
    BLOCK_H: tl.constexpr,
    EVEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """-H g (BLOCK_V,), and what `slot` (of the newest pair), `filled` (slots before it) and `gamma` are from now on.

    The caller's barrier, before, has ordered the stores of that pair and of g.
    """
    columns = _tile_columns(CHUNKS, ROWS, COLS)
    inverse_ptr = small_ptr
    yy_ptr = inverse_ptr + BLOCK_H * BLOCK_H
    sy_ptr = yy_ptr + BLOCK_H * BLOCK_H
    with_g_ptr = sy_ptr + BLOCK_H
    with_y_ptr = with_g_ptr + 2 * BLOCK_H
    weights_ptr = with_y_ptr + 2 * BLOCK_H
    used = tl.minimum(filled + 1, slots)
    next_slot = tl.where(slot + 1 == slots, 0, slot + 1)
    new_slot = slot
    g_row = _load_row(g_ptr, VP, EVEN, CHUNKS, COLS)
    y_row = _load_row(ring_ptr + (2 * slot + 1) * VP, VP, EVEN, CHUNKS, COLS)
    for first in range(0, 2 * used, ROWS):
        offs_r = first + tl.arange(0, ROWS)
        pairs = _load_pairs(ring_ptr, first, 2 * used, columns, VP, EVEN, CHUNKS, ROWS, COLS)
        with_g = _row_sum(pairs * g_row)
        with_y = _row_sum(pairs * y_row)
        tl.store(with_g_ptr + offs_r, with_g.to(tl.float64), mask=offs_r < 2 * used)
        tl.store(with_y_ptr + offs_r, with_y.to(tl.float64), mask=offs_r < 2 * used)
    tl.debug_barrier()  # the stores of the products above before their loads below
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < used
    s_g = tl.load(with_g_ptr + 2 * offs_h, mask=mask_h, other=0.0)
    y_g = tl.load(with_g_ptr + 2 * offs_h + 1, mask=mask_h, other=0.0)
    s_y = tl.load(with_y_ptr + 2 * offs_h, mask=mask_h, other=0.0)
    y_y = tl.load(with_y_ptr + 2 * offs_h + 1, mask=mask_h, other=0.0)
    square = offs_h[:, None] * BLOCK_H + offs_h[None, :]
    inverse = tl.load(inverse_ptr + square)  # (BLOCK_H, BLOCK_H)
    yy = tl.load(yy_ptr + square)
    sy = tl.load(sy_ptr + offs_h)
    new = offs_h == slot
    curvature = tl.sum(tl.where(new, s_y, 0.0), axis=0)
    if curvature > _SMALLEST_CURVATURE:
        inverse = tl.where((offs_h[:, None] == next_slot) | (offs_h[None, :] == next_slot), 0.0, inverse)
        column = tl.where(new, 1.0, -tl.sum(_product(inverse, s_y[None, :]), axis=1)) / curvature
        inverse = tl.where(offs_h[None, :] == slot, column[:, None], inverse)
        yy = tl.where(offs_h[:, None] == slot, y_y[None, :], yy)
        yy = tl.where(offs_h[None, :] == slot, y_y[:, None], yy)
        sy = tl.where(new, curvature, sy)
        tl.debug_barrier()  # the loads above, by all threads, before the stores below; next loaded in a later trip
        tl.store(inverse_ptr + square, inverse)
        tl.store(yy_ptr + square, yy)
        tl.store(sy_ptr + offs_h, sy)
        gamma = curvature / tl.sum(tl.where(new, y_y, 0.0), axis=0)
        filled = used
        new_slot = next_slot
    p = tl.sum(_product(inverse, s_g[None, :]), axis=1)
    yy_p = tl.sum(_product(yy, p[:, None]), axis=0)  # Y Y^T is symmetric
    c = tl.sum(_product(inverse, (gamma * (y_g - yy_p) - sy * p)[:, None]), axis=0)
    tl.store(weights_ptr + 2 * offs_h, c)
    tl.store(weights_ptr + 2 * offs_h + 1, gamma * p)
    tl.debug_barrier()  # the stores of the coefficients above before their loads below
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    for first in range(0, 2 * used, ROWS):
        offs_r = first + tl.arange(0, ROWS)
        pairs = _load_pairs(ring_ptr, first, 2 * used, columns, VP, EVEN, CHUNKS, ROWS, COLS)
        weight = tl.load(weights_ptr + offs_r, mask=offs_r < 2 * used, other=0.0).to(tl.float32)
        acc += pairs * weight[None, :, None]
    d = tl.reshape(tl.sum(acc, axis=1), (CHUNKS * COLS,)) - gamma.to(tl.float32) * g
    return d, new_slot, filled, gamma
