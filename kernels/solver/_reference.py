"""The executable specification: one window after another, in plain torch and Python numbers.

On purpose it shares nothing with the kernels but the mathematics: the direct form instead of the P-form, the two-loop
recursion instead of the compact form, a line search with structure instead of a state machine.
"""

import math
from collections import deque
from typing import NamedTuple

import torch

from .._rules import ARMIJO, CURVATURE, SMALLEST_BRACKET, SMALLEST_CURVATURE, Status


class SlotSolution(NamedTuple):
    """What a solve returns; iterations and evaluations are summed over the phases, status is the last phase's."""

    bias: torch.Tensor  # [W, V] float32
    loss: torch.Tensor  # [W] float32
    iterations: torch.Tensor  # [W] int32
    evaluations: torch.Tensor  # [W] int32
    status: torch.Tensor  # [W] int32, values of Status


class _Window:
    """F of one window, its gradient, and E = sum_t w_t softmax(z_t + b), which the gradient holds."""

    def __init__(self, logits, targets, weights, prior, ridge, ignore_index):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weights = torch.ones(targets.shape, device=targets.device) if weights is None else weights
        used = (targets != ignore_index) & (weights != 0)
        self.z, self.targets, self.weights = logits[used].to(dtype), targets[used].long(), weights[used].double()
        self.known = bool(((self.targets >= 0) & (self.targets < logits.shape[-1])).all())
        self.prior = self.z.new_zeros(logits.shape[-1]) if prior is None else prior.to(dtype)
        self.ridge, self.total = ridge, float(self.weights.sum())
        if self.known:
            self.counts = torch.zeros_like(self.prior).scatter_add_(0, self.targets, self.weights.to(dtype))

    def __call__(self, b):
        if not self.known:
            return math.nan, torch.full_like(b, math.nan), None
        log_p = torch.log_softmax(self.z + b, -1)
        nll = -log_p.gather(1, self.targets[:, None])[:, 0].double()
        offset = b - self.prior
        loss = float((self.weights * nll).sum()) + self.ridge / 2 * float(offset.double().square().sum())
        expected = (log_p.exp() * self.weights[:, None].to(b)).sum(0)
        scale = 1.0 / self.total if self.total > 0 else 0.0
        return loss * scale, (expected - self.counts + self.ridge * offset) * scale, expected


def _lowest_of_cubic(left, right):
    """Minimum of the cubic through two points (t, loss, slope); NaN where it has none."""
    (t0, f0, g0), (t1, f1, g1) = sorted((left, right))
    if not all(map(math.isfinite, (f0, g0, f1, g1))) or t0 == t1:
        return math.nan
    d1 = g0 + g1 - 3 * (f0 - f1) / (t0 - t1)
    square = d1 * d1 - g0 * g1
    if square < 0:
        return math.nan
    d2 = math.sqrt(square)
    bottom = g1 - g0 + 2 * d2
    return t1 - (t1 - t0) * ((g1 + d2 - d1) / bottom) if bottom else math.nan


def _within(t, low, high):
    return min(max(t, low), high) if math.isfinite(t) else (low + high) / 2


def _strong_wolfe(along, t, loss, slope, largest, most):
    """A point (t, loss, slope) that satisfies the strong Wolfe conditions, or the lowest found; Nocedal & Wright 3.5.

    `along(t)` is (t, loss, slope) there; `most` bounds the trials after the first, `largest` is max |d|.
    """

    def too_high(point):
        return point[1] > loss + ARMIJO * point[0] * slope

    def flat(point):
        return abs(point[2]) <= -CURVATURE * slope

    start = before = (0.0, loss, slope)
    here, trials = along(t), 0
    while True:
        if trials >= most:
            return start if loss <= here[1] else here
        if too_high(here) or (trials > 1 and here[1] >= before[1]):
            break
        if flat(here):
            return here
        if here[2] >= 0:
            break
        t = _within(_lowest_of_cubic(before, here), here[0] + 0.01 * (here[0] - before[0]), here[0] * 10)
        before, here, trials = here, along(t), trials + 1

    ends, cramped = [before, here], False
    low = 0 if before[1] <= here[1] else 1
    while trials < most:
        left, right = sorted(end[0] for end in ends)
        if (right - left) * largest < SMALLEST_BRACKET:
            break
        t, margin = _within(_lowest_of_cubic(*ends), left, right), 0.1 * (right - left)
        close = min(right - t, t - left) < margin
        if close and (cramped or t >= right or t <= left):
            t, close = (right - margin if abs(t - right) < abs(t - left) else left + margin), False
        cramped = close
        here, trials = along(t), trials + 1
        if too_high(here) or here[1] >= ends[low][1]:
            ends[1 - low] = here
            low = 0 if ends[0][1] <= ends[1][1] else 1
            continue
        if flat(here):
            return here
        if here[2] * (ends[1 - low][0] - ends[low][0]) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = here
    return ends[low]


def _two_loops(pairs, g):
    """-H g; Nocedal & Wright 7.4. `pairs` are (s, y, s.y), oldest first."""
    d, first = -g, []
    for s, y, sy in reversed(pairs):
        first.append(s.dot(d) / sy)
        d = d - first[-1] * y
    if pairs:
        _, y, sy = pairs[-1]
        d = d * (sy / y.dot(y))
    for s, y, sy in pairs:
        d = d + (first.pop() - y.dot(d) / sy) * s
    return d


def _lbfgs_phase(window, x, most, history, max_eval, max_line_search, tolerance_grad, tolerance_change):
    """One torch.optim.LBFGS object's life -> x, loss, iterations, evaluations, status."""
    loss, g, _ = window(x)
    evaluations, pairs, d = 1, deque(maxlen=history), -g
    max_eval = most * 5 // 4 if max_eval is None else max_eval
    if not (math.isfinite(loss) and g.isfinite().all()):
        return x, loss, 0, 1, Status.NOT_FINITE
    if g.abs().max() <= tolerance_grad:
        return x, loss, 0, 1, Status.GRADIENT
    for iteration in range(1, most + 1):
        slope, largest = float(g.dot(d)), float(d.abs().max())
        if not slope <= -tolerance_change:
            return x, loss, iteration, evaluations, Status.SLOPE
        gradients, trials = {0.0: g}, []

        def along(t, x=x, d=d, gradients=gradients, trials=trials):
            trials.append(t)
            value, gradients[t], _ = window(x + t * d)
            slope = float(gradients[t].dot(d))
            return (t, value, slope) if math.isfinite(value) and math.isfinite(slope) else (t, math.inf, math.nan)

        step = 1.0 if iteration > 1 else min(1.0, 1.0 / float(g.abs().sum()))
        left = max_eval - evaluations if max_line_search is None else max_line_search
        t, lowest, _ = _strong_wolfe(along, step, loss, slope, largest, left)
        evaluations += len(trials)
        s, y = t * d, gradients[t] - g
        change, x, loss, g = abs(lowest - loss), x + s, lowest, gradients[t]
        if t and g.abs().max() <= tolerance_grad:
            return x, loss, iteration, evaluations, Status.GRADIENT
        if t * largest <= tolerance_change or change < tolerance_change:
            return x, loss, iteration, evaluations, Status.CHANGE
        if iteration == most:
            break
        if evaluations >= max_eval:
            return x, loss, iteration, evaluations, Status.OUT_OF_EVALUATIONS
        if (sy := s.dot(y)) > SMALLEST_CURVATURE:
            pairs.append((s, y, sy))
        d = _two_loops(pairs, g)
    return x, loss, most, evaluations, Status.OUT_OF_ITERATIONS


def _each_window(solve, logits, targets, weights, start, prior, ridge, ignore_index):
    """`solve(window, start)` of every window, stacked."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    W, _, V = logits.shape
    bias = logits.new_zeros((W, V), dtype=dtype) if start is None else start.to(dtype).clone()
    loss = logits.new_zeros(W, dtype=dtype)
    iterations, evaluations, status = (torch.zeros(W, dtype=torch.int32, device=logits.device) for _ in range(3))
    for w in range(W):
        mine = (None if t is None else t[w] for t in (weights, prior))
        window = _Window(logits[w], targets[w], *mine, ridge, ignore_index)
        bias[w], loss[w], iterations[w], evaluations[w], status[w] = solve(window, bias[w].clone())
    return SlotSolution(bias, loss, iterations, evaluations, status)


@torch.no_grad()
def slot_solve_ref(
    logits,
    targets,
    weights=None,
    start=None,
    prior=None,
    *,
    ridge=0.0,
    clamp=None,
    phases=((25, 20),),
    max_eval=None,
    max_line_search=None,
    tolerance_grad=1e-7,
    tolerance_change=1e-9,
    ignore_index=-100,
    probs_dtype=None,
):
    """`slot_solve` in plain torch; float64 logits give float64 results. Waits for the device in every step."""
    limits = max_eval, max_line_search, tolerance_grad, tolerance_change

    def solve(window, x):
        iterations = evaluations = 0
        for most, history in phases:
            x, loss, more, calls, status = _lbfgs_phase(window, x, most, history, *limits)
            iterations, evaluations = iterations + more, evaluations + calls
        if clamp is not None and status != Status.NOT_FINITE and x.abs().max() > clamp:
            x = x.clamp(-clamp, clamp)
            loss = window(x)[0]
        return x, loss, iterations, evaluations, status

    return _each_window(solve, logits, targets, weights, start, prior, ridge, ignore_index)


def _tilt(expected, counts, offset, ridge):
    """The d that minimises E (e^d - 1) - c d + r / 2 (d + offset)^2, each coordinate: see _majorise.py."""
    if not ridge:
        return torch.where(counts > 0, torch.log(counts / expected), -math.inf)  # the box holds it
    log_ratio, a = torch.log(expected / ridge), counts / ridge - offset
    level = log_ratio + a
    tau = torch.where(level > 1, level - level.clamp(min=1).log(), torch.sigmoid(level))
    for _ in range(5):
        tau = torch.where(tau > 0, tau * (1 + level - tau.log()) / (1 + tau), 0.0)
    return torch.where(tau > 1, tau.log() - log_ratio, a - tau)


@torch.no_grad()
def slot_solve_mm_ref(
    logits,
    targets,
    weights=None,
    start=None,
    prior=None,
    *,
    ridge=0.0,
    clamp=None,
    iterations=10,
    tolerance_grad=1e-7,
    tolerance_change=1e-9,
    ignore_index=-100,
    probs_dtype=None,
):
    """`slot_solve_mm` in plain torch; float64 logits give float64 results. Waits for the device in every step."""
    box = math.inf if clamp is None else clamp

    def solve(window, start):
        x, before, step = start.clamp(-box, box), math.inf, math.inf
        for done in range(iterations + 1):
            loss, g, expected = window(x)
            if not done and not (math.isfinite(loss) and g.isfinite().all()):
                return start, loss, 0, 1, Status.NOT_FINITE
            if (x - (x - g).clamp(-box, box)).abs().max() <= tolerance_grad:
                return x, loss, done, done + 1, Status.GRADIENT
            if step <= tolerance_change or abs(before - loss) < tolerance_change:
                return x, loss, done, done + 1, Status.CHANGE
            if done < iterations:
                new = (x + _tilt(expected, window.counts, x - window.prior, ridge)).clamp(-box, box)
                step, before, x = (new - x).abs().max(), loss, new
        return x, loss, iterations, iterations + 1, Status.OUT_OF_ITERATIONS

    return _each_window(solve, logits, targets, weights, start, prior, ridge, ignore_index)
