"""The strong Wolfe line search of `_lbfgs.py`: takes in a trial, chooses the next. Scalars of one window, in float64.

Source: Nocedal & Wright, Numerical Optimization, 3.5; torch.optim.lbfgs for constants and the order of tests.
"""

from .._rules import ARMIJO, CURVATURE, SMALLEST_BRACKET
from .._triton import tl, triton

# What an evaluation is for: the first of a phase, a trial that looks for a bracket, one inside it, the clamped result.
_START, _BRACKET, _ZOOM, _FINISH, _DONE = (tl.constexpr(mode) for mode in range(5))
_ARMIJO, _CURVATURE, _SMALLEST_BRACKET = map(tl.constexpr, (ARMIJO, CURVATURE, SMALLEST_BRACKET))


@triton.jit
def _lowest_of_cubic(low_t, low_loss, low_slope, high_t, high_loss, high_slope):
    """Minimum of the cubic through two points; NaN or infinite where it has none."""
    ordered = low_t <= high_t
    left = tl.where(ordered, low_t, high_t)
    right = tl.where(ordered, high_t, low_t)
    left_slope = tl.where(ordered, low_slope, high_slope)
    right_slope = tl.where(ordered, high_slope, low_slope)
    d1 = left_slope + right_slope - 3.0 * ((low_loss - high_loss) / (low_t - high_t))
    square = d1 * d1 - left_slope * right_slope
    d2 = tl.sqrt(tl.maximum(square, 0.0))
    lowest = right - (right - left) * ((right_slope + d2 - d1) / (right_slope - left_slope + 2.0 * d2))
    return tl.where(square >= 0, lowest, float("nan"))


@triton.jit
def _judge(loss, slope, mode, t, start_loss, start_slope, trials, most_trials, low_loss, width):
    """What the trial is, by mode; `width` is high_t - low_t.

    Looking for a bracket: `last`, and no better than the start (`back`); `good`, to be accepted; `found`, the other end
    of a bracket; `onward`, a step on the way. In the zoom: `worse` than `low`, or `better`, of that `good`, or
    `turned`, with the slope up: `low` is then the other end.
    """
    zoom = mode == _ZOOM
    too_high = loss > start_loss + _ARMIJO * t * start_slope
    flat = tl.abs(slope) <= -_CURVATURE * start_slope

    bracketing = mode == _BRACKET
    last = bracketing & (trials >= most_trials)
    back = last & (start_loss <= loss)
    looking = bracketing & (trials < most_trials)
    passed = looking & (too_high | ((trials > 1) & (loss >= low_loss)))
    good = looking & (passed == 0) & flat
    found = passed | (looking & (flat == 0) & (slope >= 0))
    onward = looking & (found == 0) & (good == 0)

    worse = zoom & (too_high | (loss >= low_loss))
    better = zoom & (worse == 0)
    good |= better & flat
    turned = better & (flat == 0) & (slope * width >= 0)
    return last, back, good, found, onward, worse, better, turned


@triton.jit
def _take_in(as_low, as_high, demoted, trial, low, high):
    """One quantity of the bracket's ends once the trial has its place; `demoted`: `low` becomes `high`."""
    high = tl.where(demoted, low, tl.where(as_high, trial, high))
    return tl.where(as_low, trial, low), high


@triton.jit
def _next_trial(onward, zoom, left, right, low_t, low_loss, low_slope, high_t, high_loss, high_slope, cramped):
    """Where to look next, and whether that is close to an end of the bracket."""
    floor = tl.where(onward, low_t + 0.01 * (low_t - high_t), left)
    ceiling = tl.where(onward, low_t * 10.0, right)
    lowest = _lowest_of_cubic(low_t, low_loss, low_slope, high_t, high_loss, high_slope)
    middle = (floor + ceiling) / 2
    t = tl.where(tl.abs(lowest) < float("inf"), tl.minimum(tl.maximum(lowest, floor), ceiling), middle)
    # A trial close to an end of the bracket is let through once, then moved 10% of the bracket away from it.
    margin = 0.1 * (right - left)
    close = zoom & (tl.minimum(right - t, t - left) < margin)
    moved = close & (cramped | (t >= right) | (t <= left))
    inner = tl.where(tl.abs(t - right) < tl.abs(t - left), right - margin, left + margin)
    return tl.where(moved, inner, t), close & (moved == 0)


@triton.jit
def _advance(
    loss,
    slope,
    mode,
    t,
    start_loss,
    start_slope,
    largest,
    trials,
    most_trials,
    low_t,
    low_loss,
    low_slope,
    high_t,
    high_loss,
    high_slope,
    low_first,
    cramped,
):
    """The line search takes in loss and slope at the trial point t, and chooses the next.

    Returns what changes of its state, whether the trial is now `low`, whether `low` went back to the start, and whether
    the search is over, with `low` as its result. In other modes than _BRACKET and _ZOOM, what it returns means nothing
    but the last three, all False, and `low`, which is the start's.
    """
    usable = (tl.abs(loss) < float("inf")) & (tl.abs(slope) < float("inf"))
    trial_loss = tl.where(usable, loss, float("inf"))
    trial_slope = tl.where(usable, slope, float("nan"))
    last, back, good, found, onward, worse, better, turned = _judge(
        trial_loss, trial_slope, mode, t, start_loss, start_slope, trials, most_trials, low_loss, high_t - low_t
    )

    # A point that enters a bracket becomes `low` if it is lower, or level and torch's first.
    lower = (trial_loss < low_loss) | (worse & (low_first == 0) & (trial_loss == low_loss))
    enters = found | worse
    as_low = (enters & lower) | good | better | onward | (last & (back == 0))
    as_high = enters & (lower == 0)
    demoted = (enters & lower) | turned | onward
    low_first = tl.where(found, lower == 0, low_first ^ (worse & lower))
    low_t, high_t = _take_in(as_low, as_high, demoted, t, low_t, high_t)
    low_loss, high_loss = _take_in(as_low, as_high, demoted, trial_loss, low_loss, high_loss)
    low_slope, high_slope = _take_in(as_low, as_high, demoted, trial_slope, low_slope, high_slope)
    begins = mode == _START
    low_t = tl.where(back | begins, 0.0, low_t)
    low_loss = tl.where(back, start_loss, tl.where(begins, loss, low_loss))

    zoom = (mode == _ZOOM) | found
    left = tl.minimum(low_t, high_t)
    right = tl.maximum(low_t, high_t)
    small = (right - left) * largest < _SMALLEST_BRACKET
    over = good | last | (zoom & ((trials >= most_trials) | small))
    t, cramped = _next_trial(
        onward, zoom, left, right, low_t, low_loss, low_slope, high_t, high_loss, high_slope, cramped
    )  # fmt: skip
    mode = tl.where(found, _ZOOM, mode)
    return (
        mode, t, trials + 1, low_t, low_loss, low_slope, high_t, high_loss, high_slope, low_first, cramped, as_low,
        back, over,
    )  # fmt: skip
