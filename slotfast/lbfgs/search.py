"""Strong Wolfe line searches in lockstep: the control flow of torch's `_strong_wolfe`, one trial point at a time.

Source: Nocedal & Wright, Numerical Optimization, 3.5; torch.optim.lbfgs for every constant and every order of tests.
"""

from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from ..kernels._rules import ARMIJO, CURVATURE, SMALLEST_BRACKET
from .reductions import Columns


@dataclass
class Search(Columns):
    """Strong Wolfe line searches in lockstep: the control flow of torch's `_strong_wolfe`, one trial point at a time.

    While bracketing, `low` is the trial before the current one; in the zoom phase `low` and `high` are the bracket,
    low the end with the lower loss. torch keeps a pair and a position; only its tie-break needs the position.
    """

    t: np.ndarray  # trial point, the next to evaluate
    loss: np.ndarray  # at t = 0
    slope: np.ndarray  # at t = 0
    largest: np.ndarray  # max |d|
    trials: np.ndarray  # evaluated after the first
    most_trials: np.ndarray
    zooming: np.ndarray
    cramped: np.ndarray  # the last trial of the zoom was close to an end of the bracket
    low_first: np.ndarray  # low is torch's bracket[0]
    low_t: np.ndarray
    low_loss: np.ndarray
    low_slope: np.ndarray
    low_steepest: np.ndarray  # max |g| at low
    high_t: np.ndarray
    high_loss: np.ndarray
    high_slope: np.ndarray

    @classmethod
    def empty(cls, W: int) -> Self:
        kinds = {"trials": np.int64, "most_trials": np.int64, "zooming": bool, "cramped": bool, "low_first": bool}
        return cls(*(np.zeros(W, dtype=kinds.get(field.name, np.float64)) for field in fields(cls)))

    def start(self, rows: np.ndarray, t, loss, slope, largest, most_trials) -> None:
        self.t = np.where(rows, t, self.t)
        self.loss, self.slope = np.where(rows, loss, self.loss), np.where(rows, slope, self.slope)
        self.largest = np.where(rows, largest, self.largest)
        self.most_trials = np.where(rows, most_trials, self.most_trials)
        self.trials[rows], self.zooming[rows], self.cramped[rows] = 0, False, False
        self.low_t = np.where(rows, 0.0, self.low_t)
        self.low_loss = np.where(rows, loss, self.low_loss)
        self.low_slope = np.where(rows, slope, self.low_slope)

    def advance(self, loss: np.ndarray, slope: np.ndarray, steepest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Takes in the loss, slope and max |g| at the trial points and chooses the next ones.

        Returns:
            [A] whether the trial is now `low`, and [A] whether the search is over, with `low` as its result.
        """
        usable = np.isfinite(loss) & np.isfinite(slope)
        loss, slope = np.where(usable, loss, np.inf), np.where(usable, slope, np.nan)
        t, zoom = self.t, self.zooming
        too_high = loss > self.loss + ARMIJO * t * self.slope
        flat = np.abs(slope) <= -CURVATURE * self.slope

        # bracketing: walk on until a bracket is found, the point is good, or the trials are used up
        last = ~zoom & (self.trials >= self.most_trials)
        back = last & (self.loss <= loss)
        looking = ~zoom & ~last
        passed = looking & (too_high | ((self.trials > 1) & (loss >= self.low_loss)))
        good = looking & ~passed & flat
        if good.all():  # the usual case, which nothing below changes
            self.low_t, self.low_loss, self.low_slope, self.low_steepest = t, loss, slope, steepest
            return good, good
        found = passed | (looking & ~passed & ~flat & (slope >= 0))
        onward = looking & ~found & ~good

        # zoom: the trial replaces one end of the bracket
        worse = zoom & (too_high | (loss >= self.low_loss))
        better = zoom & ~worse
        good |= better & flat
        turned = better & ~flat & (slope * (self.high_t - self.low_t) >= 0)

        # a point that enters a bracket at its far end becomes low if it is lower, or level and torch's bracket[0]
        lower = (loss < self.low_loss) | (worse & ~self.low_first & (loss == self.low_loss))
        swapped = (found | worse) & lower
        as_low = swapped | good | better | onward | (last & ~back)
        as_high = (found | worse) & ~lower
        demoted = swapped | turned | onward
        self.low_first = np.where(found, ~lower, self.low_first ^ (worse & lower))
        self.high_t = np.where(demoted, self.low_t, np.where(as_high, t, self.high_t))
        self.high_loss = np.where(demoted, self.low_loss, np.where(as_high, loss, self.high_loss))
        self.high_slope = np.where(demoted, self.low_slope, np.where(as_high, slope, self.high_slope))
        self.low_t = np.where(as_low, t, self.low_t)
        self.low_loss = np.where(as_low, loss, self.low_loss)
        self.low_slope = np.where(as_low, slope, self.low_slope)
        self.low_steepest = np.where(as_low, steepest, self.low_steepest)
        # nothing found: a step of 0, back to the start, which ends the problem
        self.low_t = np.where(back, 0.0, self.low_t)
        self.low_loss = np.where(back, self.loss, self.low_loss)
        self.low_steepest = np.where(back, np.inf, self.low_steepest)

        self.zooming = zoom | found
        left, right = np.minimum(self.low_t, self.high_t), np.maximum(self.low_t, self.high_t)
        small = (right - left) * self.largest < SMALLEST_BRACKET
        over = good | last | (self.zooming & ((self.trials >= self.most_trials) | small))
        if over.all():  # there is no next trial
            return as_low, over

        floor = np.where(onward, self.low_t + 0.01 * (self.low_t - self.high_t), left)
        ceiling = np.where(onward, self.low_t * 10, right)
        trial = np.clip(self.interpolate(left, right), floor, ceiling)
        trial = np.where(np.isfinite(trial), trial, (floor + ceiling) / 2)
        # a trial close to an end of the bracket is let through once, then moved 10% of the bracket away from it
        margin = 0.1 * (right - left)
        close = self.zooming & (np.minimum(right - trial, trial - left) < margin)
        moved = close & (self.cramped | (trial >= right) | (trial <= left))
        inside = np.where(np.abs(trial - right) < np.abs(trial - left), right - margin, left + margin)
        self.cramped = close & ~moved
        self.t = np.where(moved, inside, trial)
        self.trials = self.trials + 1
        return as_low, over

    def interpolate(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Minimum of the cubic through low and high; NaN where there is none."""
        low_is_left = self.low_t <= self.high_t
        slope_left = np.where(low_is_left, self.low_slope, self.high_slope)
        slope_right = np.where(low_is_left, self.high_slope, self.low_slope)
        secant = (self.low_loss - self.high_loss) / (self.low_t - self.high_t)
        d1 = slope_left + slope_right - 3 * secant
        d2 = np.sqrt(d1 * d1 - slope_left * slope_right)
        return right - (right - left) * ((slope_right + d2 - d1) / (slope_right - slope_left + 2 * d2))
