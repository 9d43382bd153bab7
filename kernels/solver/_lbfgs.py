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

A line search (`_search.py`) that ends accepts its point, remembers the pair (s, y), and asks for a direction
(`_direction.py`), all in the same trip.
The bracket holds scalars, in float64; the gradient of its better end is kept: a point that is accepted but was not the
last trial needs no second evaluation.

Source: Nocedal & Wright, Numerical Optimization, 7.2; torch.optim.lbfgs for constants and the order of tests.
"""

from .._triton import tl, triton
from ._direction import _direction
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
    _prepare,
)

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
def _verdict(begins, finite, flat, stalled, out_of_iterations, out_of_evaluations):
    """Whether an accepted point, or the first of a phase (`begins`), is the last, and why; what comes later counts."""
    status = tl.where((begins == 0) & out_of_evaluations, _OUT_OF_EVALUATIONS, _RUNNING)
    status = tl.where(out_of_iterations, _OUT_OF_ITERATIONS, status)
    status = tl.where((begins == 0) & stalled, _CHANGE, status)
    status = tl.where(flat, _GRADIENT, status)
    return tl.where(begins & (finite == 0), _NOT_FINITE, status)


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
                mode, t, trials, low_t, low_loss, low_slope, high_t, high_loss, high_slope, low_first, cramped, as_low,
                back, over,
            ) = _advance(
                loss, slope, mode, t, start_loss, start_slope, largest, trials, most_trials, low_t, low_loss, low_slope,
                high_t, high_loss, high_slope, low_first, cramped,
            )  # fmt: skip
            low_steepest = tl.where(as_low | begins, steepest, tl.where(back, float("inf"), low_steepest))
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
