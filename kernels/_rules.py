"""The rules of L-BFGS with a strong Wolfe line search: one place for the kernels, their references and slotfast.lbfgs.

Source: torch.optim.LBFGS; Nocedal & Wright, Numerical Optimization, 3.5.
"""

import enum

ARMIJO = 1e-4  # a trial is too high above start + ARMIJO * t * slope
CURVATURE = 0.9  # a trial is flat where |slope| <= CURVATURE * |slope at the start|
# A bracket whose ends differ by less in every coordinate is left; torch never passes tolerance_change on to the search.
SMALLEST_BRACKET = 1e-9
SMALLEST_CURVATURE = 1e-10  # a pair is kept where y.s is above


class Status(enum.IntEnum):
    """Why a window's solve stopped."""

    GRADIENT = 0  # max |gradient| <= tolerance_grad
    CHANGE = 1  # the last step or the last change of the loss was below tolerance_change
    SLOPE = 2  # the directional derivative was above -tolerance_change
    OUT_OF_ITERATIONS = 3
    OUT_OF_EVALUATIONS = 4
    NOT_FINITE = 5  # the loss or the gradient at the start is not finite: the bias is the start, untouched
