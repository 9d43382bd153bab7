"""What both solvers do with a window: softmax and counts once, then the loss and gradient of any bias in P-form.

A program owns one window at a time and all of its scratch. Tiles are those of `_rows.py`: (CHUNKS, ROWS, COLS).
Vectors are (BLOCK_V,), BLOCK_V = CHUNKS * COLS. Rows of scratch are VP elements apart, V rounded up to 16, so that
loads are wide for any V; what lies beyond V is written as 0.

Order through memory: programs never share memory, but the threads of one do, and what one thread stores another loads.
`tl.debug_barrier` (all earlier stores of the program are visible to all its threads, all earlier loads are done) stands
between; each says which stores and loads it orders. The interpreter runs a program as one thread: it would not notice
a missing one; `python -m tests.ptx slot_solve` does.
"""

from typing import NamedTuple

from .._rows import _columns, _fold, _load_logits, _row_max, _row_sum, _tile_columns, _tile_rows
from .._rules import Status
from .._triton import _LOG2E, tl, triton

_GRADIENT, _CHANGE, _SLOPE, _OUT_OF_ITERATIONS, _OUT_OF_EVALUATIONS, _NOT_FINITE = (
    tl.constexpr(status.value) for status in Status
)
_RUNNING = tl.constexpr(-1)


class _Tile(NamedTuple):
    chunks: int
    rows: int
    cols: int
    num_warps: int


def _config(V, itemsize):
    """Tile and warps, by V and the size of a logit or a probability, whichever is smaller, alone.

    Triton hands out columns of 16 bytes a lane to as many warps as COLS has room for, then rows. Up to V = 1024 a warp
    has whole rows, and the loop over rows needs no barrier; above, a row is shared by as few warps as hold it with 32
    elements a thread: u, the sums and the row itself then stay in registers.
    """
    block_v = max(triton.next_power_of_2(V), 64)  # several elements a lane: then all lanes round a fused sum alike
    warps_per_row = min(max(block_v // 1024, 1), 16)  # unmeasured
    num_warps = max(8, warps_per_row)  # unmeasured
    cols = min(block_v, warps_per_row * 32 * 16 // itemsize)
    rows = min(max(num_warps * 1024 // block_v, 1), 64)
    return _Tile(block_v // cols, rows, cols, num_warps)


@triton.jit
def _load_row(ptr, VP, EVEN: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    """A vector of scratch as a row of a tile: (CHUNKS, 1, COLS); without a mask where it would always hold."""
    offs_v = _columns(CHUNKS, COLS)
    return tl.load(ptr + offs_v) if EVEN else tl.load(ptr + offs_v, mask=offs_v < VP, other=0.0)


@triton.jit
def _log(s):
    """log s in float64 with the error of a float32 logarithm near 1, whatever s; NaN unless s is a normal number > 0.

    The whole powers of 2 go to float64 exactly. A float32 log s errs by 1e-7 at s = 10, which is what a line search
    near the optimum has to tell apart.
    """
    bits = s.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)  # in [0.75, 1.5)
    log = exponent.to(tl.float64) * 0.6931471805599453 + tl.log(mantissa).to(tl.float64)
    return tl.where(s > 1.2e-38, log, float("nan"))


@triton.jit
def _largest(x):
    return tl.max(tl.abs(x), axis=0)


@triton.jit
def _prepare(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    probs_ptr,
    row_weights_ptr,
    counts_ptr,
    T,
    V,
    VP,
    stride_lt,
    stride_lv,
    ignore_index,
    EVEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """P, the weights that count (row_weights_ptr) and the counts of the window that the pointers point to.

    P and weights are 0 at positions that do not count and at those that fill T up to a multiple of ROWS.

    Returns sum_t w_t nll_t at bias 0 and sum_t w_t. The first is relative to P as it was rounded: the loss at bias 0
    is exact whatever the type of P.
    """
    offs_v = _columns(CHUNKS, COLS)
    base = tl.zeros((ROWS,), tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, T, ROWS):
        offs_t = first + tl.arange(0, ROWS)
        target = tl.load(targets_ptr + offs_t, mask=offs_t < T, other=ignore_index)
        used = target != ignore_index
        w = used.to(tl.float32)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + offs_t, mask=used, other=0.0)
            used &= w != 0
        known = used & (target >= 0) & (target < V)
        z = _load_logits(logits_ptr, first, 0, used, V, stride_lt, stride_lv, False, CHUNKS, ROWS, COLS)
        z = tl.where(offs_v < V, z.to(tl.float32), float("-inf"))
        top = _row_max(z)
        e = tl.exp2((z - top[None, :, None]) * _LOG2E)
        sum_e = _row_sum(e)
        probs = (e * tl.where(used, 1.0 / sum_e, 0.0)[None, :, None]).to(probs_ptr.dtype.element_ty)
        rounded = _row_sum(probs.to(tl.float32))
        columns = _tile_columns(CHUNKS, ROWS, COLS)
        probs_ptrs = probs_ptr + (first + _tile_rows(CHUNKS, ROWS)).to(tl.int64)[:, None] * VP + columns
        probs = tl.reshape(probs, (CHUNKS * ROWS, COLS))
        if EVEN:
            tl.store(probs_ptrs, probs)
        else:
            tl.store(probs_ptrs, probs, mask=columns < VP)
        offs_z = offs_t.to(tl.int64) * stride_lt + target.to(tl.int64) * stride_lv  # (ROWS,)
        z_target = tl.load(logits_ptr + offs_z, mask=known, other=0.0).to(tl.float32)
        nll = (top - z_target).to(tl.float64) + tl.log(sum_e.to(tl.float64) / rounded.to(tl.float64))
        w = tl.where(used, tl.where(known, w, float("nan")), 0.0)
        tl.store(row_weights_ptr + offs_t, w)
        base += tl.where(used, w.to(tl.float64) * nll, 0.0)
        total += w.to(tl.float64)
    tl.debug_barrier()  # the stores of the weights above before their loads below
    offs_v = tl.arange(0, CHUNKS * COLS)
    counts = tl.zeros((CHUNKS * COLS,), tl.float32)
    for t in range(0, T):  # apart from the loop above, whose tiles need the registers
        hit = (offs_v == tl.load(targets_ptr + t)) & (offs_v < V)
        counts += tl.where(hit, tl.load(row_weights_ptr + t), 0.0)
    tl.store(counts_ptr + offs_v, counts, mask=offs_v < VP)
    return tl.sum(base, axis=0), tl.sum(total, axis=0)


@triton.jit
def _evaluate(
    x,
    probs_ptr,
    row_weights_ptr,
    counts_ptr,
    u_ptr,
    prior_ptr,
    base,
    total,
    ridge,
    T,
    V,
    VP,
    EVEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Loss (float64), gradient, and E = sum_t w_t softmax(z_t + x), at the bias x (BLOCK_V,), 0 beyond V.

    The caller's barrier, before, has ordered the loads of P, weights and counts after the stores of `_prepare`, and the
    store of u after its loads in the last evaluation.
    """
    BLOCK_V: tl.constexpr = CHUNKS * COLS
    offs_v = tl.arange(0, BLOCK_V)
    inside = offs_v < V
    shift = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    u = tl.where(inside, tl.exp2((x - shift) * _LOG2E), 0.0)
    # Through memory, to all warps that hold a part of a row: a reshape would bring its own layout into the loop below.
    tl.store(u_ptr + offs_v, u, mask=offs_v < VP)
    tl.debug_barrier()  # the store of u above before its load below
    u_row = _load_row(u_ptr, VP, EVEN, CHUNKS, COLS)
    columns = _tile_columns(CHUNKS, ROWS, COLS)
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    log_s = tl.zeros((ROWS,), tl.float64)
    for first in range(0, T, ROWS):
        offs_t = first + tl.arange(0, ROWS)
        w = tl.load(row_weights_ptr + offs_t)
        ptrs = probs_ptr + (first + _tile_rows(CHUNKS, ROWS)).to(tl.int64)[:, None] * VP + columns
        probs = tl.load(ptrs) if EVEN else tl.load(ptrs, mask=columns < VP, other=0.0)
        probs = _fold(probs, CHUNKS, ROWS, COLS).to(tl.float32)
        s = tl.where(w != 0, _row_sum(probs * u_row), 1.0)
        acc += probs * (w / s)[None, :, None]
        log_s += w.to(tl.float64) * _log(s)
    expected = u * tl.reshape(tl.sum(acc, axis=1), (BLOCK_V,))
    pull = tl.load(counts_ptr + offs_v, mask=inside, other=0.0)
    offset = x
    if prior_ptr is not None:
        offset -= tl.load(prior_ptr + offs_v, mask=inside, other=0.0)
    wide = offset.to(tl.float64)
    linear = 0.5 * ridge * wide * wide - pull.to(tl.float64) * x.to(tl.float64)
    pull -= ridge * offset
    rest = tl.sum(linear, axis=0) + total * shift.to(tl.float64)
    scale = tl.where(total > 0, 1.0 / total, tl.where(total == 0, 0.0, float("nan")))
    return (base + tl.sum(log_s, axis=0) + rest) * scale, (expected - pull) * scale.to(tl.float32), expected
