"""L-BFGS with a strong Wolfe line search, one program a window, as a flat state machine.

One `while`; each trip evaluates the bias x + t d once. What the evaluation is for is `mode`:

    _START ----------> _BRACKET ----------> _ZOOM       _START    first of a phase, t = 0
      ^ |  direction    |  ^ ^   bracket    |  |        _BRACKET  a trial that looks for a bracket
      | |               |  | |   found      |  |        _ZOOM     a trial inside the bracket
      | |        point  |  | +--------------+  |        _FINISH   the loss of the clamped result
      | |     accepted  +--+  point accepted   |        _DONE
      | |               |                      |
      | +---------------+----------------------+
      |  next phase     |  stopped
      +-----------------+---------> _FINISH ---------> _DONE
                        |  outside the box             ^
                        +------------------------------+
                           inside it

A line search (`_search.py`) that ends accepts its point, remembers the pair (s, y), and asks for a direction, all in
the same trip.
The bracket holds scalars, in float64; the gradient of its better end is kept: a point that is accepted but was not the
last trial needs no second evaluation.

The direction is the two-loop recursion in matrix form (Byrd, Nocedal & Schnabel 1994): with the pairs as rows of S and
Y, oldest first, R the upper triangle of S Y^T, D its diagonal, K = R^-1 and gamma = (s.y) / (y.y) of the newest,

    p = K S g,    c = K^T (gamma (Y g - Y Y^T p) - D p),    d = gamma (Y^T p - g) + S^T c

Two passes over the pairs whose rows are independent, instead of two loops of dependent steps with a reduction over the
whole program in each. K, Y Y^T and D are indexed by slot of a ring of history + 1, whatever the ages: a new pair adds
one column to K, and clearing a row and a column forgets the oldest. The slot after the newest is always clear. A pair
with s.y <= 1e-10 lies in that slot, unused, until the next one overwrites it.

Source: Nocedal & Wright, Numerical Optimization, 7.2; torch.optim.lbfgs for constants and the order of tests.
"""

from .._rows import _fold, _row_sum, _tile_columns, _tile_rows
from .._rules import SMALLEST_CURVATURE
from .._triton import tl, triton
from ._search import _BRACKET, _DONE, _FINISH, _START, _advance
from ._window import (
    _CHANGE,
    _GRADIENT,
    _NOT_FINITE,
    _OUT_OF_EVALUATIONS,
    _OUT_OF_ITERATIONS,
    _RUNNING,
    _SLOPE,
    _evaluate,
    _largest,
    _load_row,
    _prepare,
)

_SMALLEST_CURVATURE = tl.constexpr(SMALLEST_CURVATURE)

# Rows of VP floats in a program's scratch; `_RING` and on: s and y of slot 0, s and y of slot 1, ...
_ROWS_BEFORE_RING = 6
_COUNTS, _U, _X, _D, _G, _BEST, _RING = (tl.constexpr(row) for row in (0, 1, 2, 3, 4, 5, _ROWS_BEFORE_RING))


def _scratch(block_h):
    """Rows of vectors, and float64 numbers: K, Y Y^T, D; products of all pairs with g and y; their coefficients."""
    return _ROWS_BEFORE_RING + 2 * block_h, (2 * block_h + 7) * block_h


def _pack(values):
    """Up to 4 numbers below 2**15 in a 61-bit number (always: its size must not change the kernel's signature)."""
    return sum(value << 15 * index for index, value in enumerate(values)) + (1 << 60)


def _phase_arguments(phases):
    """No phase needs more pairs than it has iterations to make them."""
    histories = tuple(max(1, min(history, most - 1)) for most, history in phases)
    block_h = 1 << max(histories).bit_length()
    return {
        "PHASES": len(phases),
        "packed_iterations": _pack([most for most, _ in phases]),
        "packed_histories": _pack(histories),
        "BLOCK_H": block_h,
    }


@triton.jit
def _unpack(packed, index):
    return ((packed >> (15 * index)) & 0x7FFF).to(tl.int32)


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
def _verdict(begins, finite, flat, stalled, out_of_iterations, out_of_evaluations):
    """Whether an accepted point, or the first of a phase (`begins`), is the last, and why; what comes later counts."""
    status = tl.where((begins == 0) & out_of_evaluations, _OUT_OF_EVALUATIONS, _RUNNING)
    status = tl.where(out_of_iterations, _OUT_OF_ITERATIONS, status)
    status = tl.where((begins == 0) & stalled, _CHANGE, status)
    status = tl.where(flat, _GRADIENT, status)
    return tl.where(begins & (finite == 0), _NOT_FINITE, status)


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


@triton.jit
def _lbfgs_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    start_ptr,
    prior_ptr,
    probs_ptr,
    row_weights_ptr,
    vectors_ptr,
    small_ptr,
    bias_ptr,
    loss_ptr,
    iterations_ptr,
    evaluations_ptr,
    status_ptr,
    W,
    T,
    V,
    VP,
    stride_lw,
    stride_lt,
    stride_lv,
    ridge,
    box,
    tolerance_grad,
    tolerance_change,
    packed_iterations,
    packed_histories,
    max_eval,
    max_line_search,
    ignore_index,
    PHASES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Every programs-th window from this program's on; scratch is the program's, one window after another."""
    program = tl.program_id(0).to(tl.int64)
    padded = tl.cdiv(T, ROWS) * ROWS
    probs_ptr += program * padded * VP
    row_weights_ptr += program * padded
    vectors_ptr += program * (_RING + 2 * BLOCK_H) * VP
    small_ptr += program * (2 * BLOCK_H + 7) * BLOCK_H
    offs_v = tl.arange(0, CHUNKS * COLS)
    inside = offs_v < V
    in_row = offs_v < VP
    counts_ptr = vectors_ptr + _COUNTS * VP
    u_ptr = vectors_ptr + _U * VP
    x_ptr = vectors_ptr + _X * VP + offs_v
    d_ptr = vectors_ptr + _D * VP + offs_v
    g_ptr = vectors_ptr + _G * VP + offs_v
    best_ptr = vectors_ptr + _BEST * VP + offs_v
    ring_ptr = vectors_ptr + _RING * VP
    nothing = tl.zeros((CHUNKS * COLS,), tl.float32)
    for turn in range(tl.cdiv(W - tl.program_id(0), tl.num_programs(0))):
        window = program + turn * tl.num_programs(0)  # 64 bits
        tl.debug_barrier()  # the last window's loads of scratch before this window's stores to it
        base, total = _prepare(
            logits_ptr + window * stride_lw, targets_ptr + window * T,
            None if weights_ptr is None else weights_ptr + window * T,
            probs_ptr, row_weights_ptr, counts_ptr, T, V, VP, stride_lt, stride_lv, ignore_index,
            EVEN, CHUNKS, ROWS, COLS,
        )  # fmt: skip
        begin = nothing
        if start_ptr is not None:
            begin = tl.load(start_ptr + window * V + offs_v, mask=inside, other=0.0)
        tl.store(x_ptr, begin, mask=in_row)
        tl.store(d_ptr, nothing, mask=in_row)

        zero = tl.full((), 0.0, tl.float64)
        mode = _START + 0
        phase = 0
        iterations = 0  # of this phase, as are evaluations
        evaluations = 0
        past_iterations = 0
        past_evaluations = 0
        status = _RUNNING + 0
        # The line search: trial point; loss, slope and max |d| at its start; trials after the first, and their bound.
        t = zero
        start_loss = zero
        start_slope = zero
        largest = tl.full((), 0.0, tl.float32)
        trials = 0
        most_trials = 0
        # Looking for a bracket, `low` is the trial before this one; in the zoom, `low` and `high` are the bracket, low
        # the lower. torch has a pair instead; where two losses are equal, which is its first decides.
        low_t = zero
        low_loss = zero
        low_slope = zero
        low_steepest = tl.full((), 0.0, tl.float32)
        high_t = zero
        high_loss = zero
        high_slope = zero
        low_first = zero < 0
        cramped = zero < 0  # the last trial of the zoom was close to an end of the bracket
        slot = 0  # of the ring, where the next pair goes
        filled = 0
        gamma = zero + 1.0
        while mode != _DONE:
            # The stores of the last trip, or of `_prepare`, before this trip's loads; its loads before this trip's
            # stores: of x, d, gradients, pairs, K and its kin, products, coefficients, and as `_evaluate` asks.
            tl.debug_barrier()
            trial = tl.load(x_ptr, mask=in_row, other=0.0)
            trial += t.to(tl.float32) * tl.load(d_ptr, mask=in_row, other=0.0)
            loss, g, _ = _evaluate(
                trial, probs_ptr, row_weights_ptr, counts_ptr, u_ptr,
                None if prior_ptr is None else prior_ptr + window * V,
                base, total, ridge, T, V, VP, EVEN, CHUNKS, ROWS, COLS,
            )  # fmt: skip
            d = tl.load(d_ptr, mask=in_row, other=0.0)  # again, as is x below: the evaluation needs the registers
            slope = tl.sum(g * d, axis=0).to(tl.float64)
            steepest = _largest(g)
            evaluations += 1

            begins = mode == _START
            (
                mode, t, trials, low_t, low_loss, low_slope, low_steepest, high_t, high_loss, high_slope, low_first,
                cramped, as_low, over,
            ) = _advance(
                loss, slope, steepest, mode, t, start_loss, start_slope, largest, trials, most_trials, low_t, low_loss,
                low_slope, low_steepest, high_t, high_loss, high_slope, low_first, cramped,
            )  # fmt: skip
            if mode == _FINISH:
                low_loss = loss
                mode = _DONE + 0
            elif over | begins:
                best = tl.load(best_ptr, mask=in_row, other=0.0)
                best = tl.where(as_low | begins, g, best)
                step = low_t.to(tl.float32) * d
                y = best - tl.load(g_ptr, mask=in_row, other=0.0)
                x = tl.load(x_ptr, mask=in_row, other=0.0) + step
                tl.debug_barrier()  # the loads of x, d and g above, by all threads, before the stores below
                tl.store(x_ptr, x, mask=in_row)
                tl.store(g_ptr, best, mask=in_row)

                max_iterations = _unpack(packed_iterations, phase if PHASES > 1 else 0)
                slots = _unpack(packed_histories, phase if PHASES > 1 else 0) + 1
                allowed = tl.where(max_eval < 0, max_iterations * 5 // 4, max_eval)
                length = tl.sum(tl.abs(best), axis=0)
                finite = (tl.abs(loss) < float("inf")) & (length < float("inf"))
                change = tl.abs(low_loss - start_loss)
                stalled = (low_t * largest <= tolerance_change) | (change < tolerance_change)
                status = _verdict(
                    begins, finite, low_steepest <= tolerance_grad, stalled, iterations >= max_iterations,
                    evaluations >= allowed,
                )  # fmt: skip
                if status == _RUNNING:
                    if begins:
                        offs_h = tl.arange(0, BLOCK_H)
                        square = offs_h[:, None] * BLOCK_H + offs_h[None, :]
                        for block in tl.static_range(2):  # K and Y Y^T of no pairs
                            tl.store(small_ptr + block * BLOCK_H * BLOCK_H + square, square.to(tl.float64) * 0.0)
                        tl.store(small_ptr + 2 * BLOCK_H * BLOCK_H + offs_h, offs_h.to(tl.float64) * 0.0)
                        slot = 0
                        filled = 0
                        gamma = zero + 1.0
                        d = -best
                        t = tl.minimum(1.0, 1.0 / length.to(tl.float64))
                    else:
                        slot_ptr = ring_ptr + 2 * slot * VP + offs_v
                        tl.store(slot_ptr, step, mask=in_row)
                        tl.store(slot_ptr + VP, y, mask=in_row)
                        tl.debug_barrier()  # the stores of s, y and g above before their loads
                        d, slot, filled, gamma = _direction(
                            best, vectors_ptr + _G * VP, ring_ptr, small_ptr, slot, filled, gamma, slots, VP,
                            BLOCK_H, EVEN, CHUNKS, ROWS, COLS,
                        )  # fmt: skip
                        t = zero + 1.0
                    tl.store(d_ptr, d, mask=in_row)
                    iterations += 1
                    start_loss = low_loss
                    start_slope = tl.sum(best * d, axis=0).to(tl.float64)
                    largest = _largest(d)
                    status = tl.where(start_slope <= -tolerance_change, status, _SLOPE)
                    low_t = zero
                    low_slope = start_slope
                    trials = 0
                    most_trials = tl.where(max_line_search < 0, allowed - evaluations, max_line_search)
                    cramped = zero < 0
                    mode = _BRACKET + 0
                if status != _RUNNING:
                    past_iterations += iterations
                    past_evaluations += evaluations  # the one for the clamp comes after, uncounted
                    phase += 1
                    t = zero
                    if (PHASES > 1) and (phase < PHASES):
                        iterations = 0
                        evaluations = 0
                        status = _RUNNING + 0
                        mode = _START + 0
                    elif (status != _NOT_FINITE) & (_largest(x) > box):
                        tl.debug_barrier()  # the stores of x above before these
                        tl.store(x_ptr, tl.minimum(tl.maximum(x, -box), box), mask=in_row)
                        mode = _FINISH + 0
                    else:
                        mode = _DONE + 0
            elif as_low:
                tl.store(best_ptr, g, mask=in_row)
        tl.debug_barrier()  # the stores of x before its loads
        x = tl.load(x_ptr, mask=in_row, other=0.0)
        tl.store(bias_ptr + window * V + offs_v, x, mask=inside)
        tl.store(loss_ptr + window, low_loss.to(tl.float32))
        tl.store(iterations_ptr + window, past_iterations)
        tl.store(evaluations_ptr + window, past_evaluations)
        tl.store(status_ptr + window, status)
