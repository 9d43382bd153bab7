"""Batched L-BFGS in plain torch: W independent problems, each with the semantics of torch.optim.LBFGS.

`minimize` runs `torch.optim.LBFGS(line_search_fn="strong_wolfe")` on W problems at once. Every problem has its own
line search, curvature pairs and stopping; the problems only share the calls of the objective. `BiasObjective` is the
one this package fits: cross-entropy as a function of a logit bias.

A problem's solution is bit-identical alone, in any batch, in any order, and after compaction, on CPU and for a given
number of threads: every operation rounds a problem's numbers in an order that does not depend on the batch.
`reductions` has the operations where that took care.

    solver.py     minimize: the state machine
    search.py     strong Wolfe line searches in lockstep
    memory.py     curvature pairs and the direction
    launched.py   the same by kernels, and windows that share a bias
    objective.py  BiasObjective
    tape.py       windows that overlap: each row's softmax once, products without a copy
    reductions.py products and sums of rows, the same bits in any batch; numpy <-> torch
"""

from .launched import SharedBias
from .objective import BiasObjective
from .solver import Objective, Solution, Status, minimize

__all__ = ["BiasObjective", "Objective", "SharedBias", "Solution", "Status", "minimize"]
