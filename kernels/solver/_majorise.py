"""Majorise-minimise: one evaluation a step, no line search, no memory, and the loss never increases.

At a bias b let q_t = softmax(z_t + b), E = sum_t w_t q_t, c the target counts, o = b - prior. For any step d, as
log a <= a - 1,

    log sum_v exp(z_tv + b_v + d_v) - log sum_v exp(z_tv + b_v) = log sum_v q_tv e^d_v <= sum_v q_tv (e^d_v - 1)

with equality at d = 0. Weighted and added up, with the linear and the quadratic part as they are,

    N (F(b + d) - F(b)) <= sum_v phi_v(d_v),   phi(d) = E (e^d - 1) - c d + (r / 2) ((o + d)^2 - o^2)

The bound is 0 at d = 0 and a sum of convex functions of one coordinate each. So its minimum in the box |b + d| <= clamp
is each coordinate's own minimum, moved to the nearest end of its interval where it lies outside: the step taken. It
makes the bound, thus the loss, no larger. Without ridge d = log(c / E): generalised iterative scaling. With a ridge

    E e^d + r d + r o = c,   or with tau = (E / r) e^d:   tau + log tau = log(E / r) + c / r - o =: level

tau is Lambert's W of e^level. Newton's steps on the concave tau + log tau - level rise monotonically from any start
below tau, and converge quadratically: the starts are level - log level (level > 1) and e^level / (1 + e^level), within
27% of tau. Then d = log(tau r / E) where tau > 1, else c / r - o - tau: neither cancels.

Coordinates with neither counts, nor ridge, nor box would run to -inf: the ridge or the clamp must be given.

Source: Darroch & Ratcliff 1972, with the bound of de Leeuw & Heiser's majorisation in place of their slack feature;
ridge and box by own derivation.
"""

from .._triton import _LN2, _LOG2E, tl, triton
from ._window import (
    _CHANGE,
    _GRADIENT,
    _NOT_FINITE,
    _OUT_OF_ITERATIONS,
    _RUNNING,
    _evaluate,
    _largest,
    _prepare,
)


@triton.jit
def _tilt(expected, counts, offset, ridge):
    """The d that minimises phi, without the box."""
    if ridge == 0:
        d = tl.where(counts > 0, (tl.log2(counts) - tl.log2(expected)) * _LN2, float("-inf"))
    else:
        log_ratio = tl.log2(expected / ridge) * _LN2
        a = counts / ridge - offset
        level = log_ratio + a
        low = tl.exp2(tl.minimum(level, 1.0) * _LOG2E)
        tau = tl.where(level > 1, level - tl.log2(tl.maximum(level, 1.0)) * _LN2, low / (1.0 + low))
        for _ in tl.static_range(4):
            tau = tl.where(tau > 0, tau * (1.0 + level - tl.log2(tau) * _LN2) / (1.0 + tau), 0.0)
        d = tl.where(tau > 1, tl.log2(tau) * _LN2 - log_ratio, a - tau)
    return d


@triton.jit
def _majorise_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    start_ptr,
    prior_ptr,
    probs_ptr,
    row_weights_ptr,
    vectors_ptr,
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
    max_iterations,
    ignore_index,
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
    counts_ptr = vectors_ptr + program * 2 * VP
    u_ptr = counts_ptr + VP
    offs_v = tl.arange(0, CHUNKS * COLS)
    inside = offs_v < V
    for turn in range(tl.cdiv(W - tl.program_id(0), tl.num_programs(0))):
        window = program + turn * tl.num_programs(0)  # 64 bits
        tl.debug_barrier()  # the last window's loads of scratch before this window's stores to it
        base, total = _prepare(
            logits_ptr + window * stride_lw, targets_ptr + window * T,
            None if weights_ptr is None else weights_ptr + window * T,
            probs_ptr, row_weights_ptr, counts_ptr, T, V, VP, stride_lt, stride_lv, ignore_index,
            EVEN, CHUNKS, ROWS, COLS,
        )  # fmt: skip
        begin = tl.zeros((CHUNKS * COLS,), tl.float32)
        if start_ptr is not None:
            begin = tl.load(start_ptr + window * V + offs_v, mask=inside, other=0.0)
        x = tl.minimum(tl.maximum(begin, -box), box)
        loss = tl.full((), 0.0, tl.float64)
        before = tl.full((), float("inf"), tl.float64)
        step = tl.full((), float("inf"), tl.float32)
        iterations = 0
        status = _RUNNING + 0
        while status == _RUNNING:
            tl.debug_barrier()  # as `_evaluate` asks
            loss, g, expected = _evaluate(
                x, probs_ptr, row_weights_ptr, counts_ptr, u_ptr, None if prior_ptr is None else prior_ptr + window * V,
                base, total, ridge, T, V, VP, EVEN, CHUNKS, ROWS, COLS,
            )  # fmt: skip
            steepest = _largest(tl.where(inside, x - tl.minimum(tl.maximum(x - g, -box), box), 0.0))
            finite = (tl.abs(loss) < float("inf")) & (tl.sum(tl.abs(g), axis=0) < float("inf"))
            done = iterations >= max_iterations
            status = tl.where(done, _OUT_OF_ITERATIONS, _RUNNING)
            stalled = (step <= tolerance_change) | (tl.abs(before - loss) < tolerance_change)
            status = tl.where(stalled, _CHANGE, status)
            status = tl.where(steepest <= tolerance_grad, _GRADIENT, status)
            status = tl.where((iterations == 0) & (finite == 0), _NOT_FINITE, status)
            if status == _RUNNING:
                counts = tl.load(counts_ptr + offs_v, mask=inside, other=0.0)
                offset = x
                if prior_ptr is not None:
                    offset -= tl.load(prior_ptr + window * V + offs_v, mask=inside, other=0.0)
                new = x + _tilt(expected, counts, offset, ridge)
                new = tl.where(inside, tl.minimum(tl.maximum(new, -box), box), 0.0)
                step = _largest(new - x)
                before = loss
                x = new
                iterations += 1
        tl.store(bias_ptr + window * V + offs_v, tl.where(status == _NOT_FINITE, begin, x), mask=inside)
        tl.store(loss_ptr + window, loss.to(tl.float32))
        tl.store(iterations_ptr + window, iterations)
        tl.store(evaluations_ptr + window, iterations + 1)
        tl.store(status_ptr + window, status)
