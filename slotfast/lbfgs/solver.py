"""W runs of torch.optim.LBFGS(line_search_fn="strong_wolfe") as one state machine, whose steps evaluate the batch.

Scalars (loss, step, slope) live in float64 on the host, where numpy is quicker than torch at [W]; vectors live in
torch, in the problem's dtype and on its device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..kernels import Status
from .launched import LaunchedMemory
from .memory import Memory
from .reductions import choose, column, index_of, row_sum, to_host
from .search import Search


@dataclass(frozen=True)
class Solution:
    """W solutions; iterations and evaluations are summed over the phases, status is the last phase's."""

    x: Tensor  # [W, V], dtype of start
    loss: Tensor  # [W], float64
    iterations: Tensor  # [W], int64
    evaluations: Tensor  # [W], int64
    status: Tensor  # [W], int64, values of Status


class Objective(Protocol):
    """A batch of functions to minimise."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [A] and gradient [A, V] of the A problems at x [A, V], as new tensors."""

    def take(self, index: Tensor) -> Self:
        """The objective of the problems index [B] (int64, positions in this batch)."""


def minimize(
    objective: Objective,
    start: Tensor,
    *,
    phases: Sequence[tuple[int, int]] = ((25, 20),),
    lr: float = 1.0,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    max_eval: int | None = None,
    max_line_search: int | None = None,
    trace: list[list[float]] | None = None,
    backend: ops.Backend = "auto",
) -> Solution:
    """Minimises W functions independently, each as torch.optim.LBFGS with strong Wolfe line search would.

    Where torch would carry on with a loss that is not finite, a trial point counts as infinitely bad: a problem that
    starts finite ends finite.

    Args:
        objective: the W functions; problems that have stopped leave the batch, by `take`, once they are half of it.
        start: [W, V], float32 or float64; not written to.
        phases: (iterations, history) of each phase; a phase starts from the previous one's result, with empty memory.
        lr: first trial step of every iteration, and factor on that of the first, min(1, 1/|g|_1).
        tolerance_grad, tolerance_change: as in torch.optim.LBFGS.
        max_eval: evaluations after which a phase starts no further iteration; None: iterations * 5 // 4.
        max_line_search: trial points of one line search after its first; None: what is left of max_eval, as in recent
            torch (in older versions: 25).
        trace: an empty list, which receives W lists: the loss after each iteration.
        backend: of the curvature pairs: triton, torch or auto.
    Returns:
        Solution.
    Raises:
        ValueError: an argument outside its range.
    Tolerance: with a ridge of 0.1 over 40 positions a bias ends within 1e-4 of the optimum in float64 with
        tolerance_change 0, and within 5e-4 with the default, whose stops are torch's. In float32, losses that differ by
        1e-7 cannot be told apart: that is 3e-3.
    """
    if start.ndim != 2 or start.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"start: expected [W, V] in float32 or float64, got {list(start.shape)} in {start.dtype}")
    if not phases or any(iterations < 0 or history < 1 for iterations, history in phases):
        raise ValueError(f"phases: expected (iterations >= 0, history >= 1) at least once, got {phases!r}")
    if not lr > 0 or not tolerance_change >= 0:
        raise ValueError(f"lr, tolerance_change: expected > 0 and >= 0, got {lr!r} and {tolerance_change!r}")
    x = start
    losses: list[list[float]] | None = None if trace is None else [[] for _ in start]
    iterations, evaluations = np.zeros((2, len(start)), np.int64)
    with np.errstate(all="ignore"), torch.no_grad():
        for most_iterations, history in phases:
            limits = _Limits(
                iterations=most_iterations,
                evaluations=max_eval if max_eval is not None else most_iterations * 5 // 4,
                line_search=max_line_search,
                lr=lr,
                gradient=tolerance_grad,
                change=tolerance_change,
            )
            memory = LaunchedMemory if ops.launches_lbfgs(backend, start) else Memory
            phase = _Phase(objective, x, memory.empty(x, history), limits, losses)
            x, loss, status = phase.solve()
            iterations, evaluations = iterations + phase.iterations, evaluations + phase.evaluations
    if trace is not None and losses is not None:
        trace += losses
    return Solution(x, *(torch.from_numpy(a).to(x.device) for a in (loss, iterations, evaluations, status)))


@dataclass(frozen=True)
class _Limits:
    iterations: int
    evaluations: int
    line_search: int | None
    lr: float
    gradient: float
    change: float


class _Phase:
    """The life of W torch.optim.LBFGS objects.

    Attributes with [W] in their comment are indexed by problem, those with [A] by position in the batch.
    """

    def __init__(
        self,
        objective: Objective,
        start: Tensor,
        memory: Memory | LaunchedMemory,
        limits: _Limits,
        losses: list[list[float]] | None,
    ) -> None:
        self.objective, self.limits, self.losses = objective, limits, losses
        W = len(start)
        self.solution, self.final_loss = start.clone(), np.zeros(W)  # [W, V], [W]
        self.iterations, self.evaluations = np.zeros(W, dtype=np.int64), np.zeros(W, dtype=np.int64)  # [W]
        self.status = np.full(W, -1, dtype=np.int64)  # [W]
        self.ids, self.running = np.arange(W), np.ones(W, dtype=bool)  # [A]: the problem, whether it still runs
        self.x = start  # [A, V]: where the current iteration started, as are loss [A] and g [A, V]
        self.search, self.memory = Search.empty(W), memory

    def solve(self) -> tuple[Tensor, np.ndarray, np.ndarray]:
        loss, self.g = self.objective(self.x)
        self.loss, steepest, length = to_host(loss, self.g.abs().amax(-1), row_sum(self.g.abs()))
        self.evaluations += 1
        self.stop(~np.isfinite(self.loss) | ~np.isfinite(length), Status.NOT_FINITE)
        self.stop(steepest <= self.limits.gradient, Status.GRADIENT)
        if self.limits.iterations == 0:
            self.stop(self.running, Status.OUT_OF_ITERATIONS)
        self.best_g, self.d = self.g, -self.g  # [A, V]: gradient at the line search's best point; direction
        self.aim(self.running.copy(), np.minimum(1.0, 1.0 / length) * self.limits.lr)
        while self.running.any():
            self.compact()
            self.try_step()
        return self.solution, self.final_loss, self.status

    def try_step(self) -> None:
        """One evaluation of every problem, at its line search's trial point."""
        loss, g = self.objective(self.at(self.search.t))
        loss, slope, steepest = to_host(loss, row_sum(g * self.d), g.abs().amax(-1))
        self.evaluations[self.ids[self.running]] += 1
        improved, done = self.search.advance(loss, slope, steepest)
        self.best_g = choose(improved, g, self.best_g)
        if (done & self.running).any():
            self.accept(done & self.running)

    def accept(self, done: np.ndarray) -> None:
        """Moves the problems whose line search is done, and gives those that continue a new direction."""
        search, limits = self.search, self.limits
        t = np.where(done, search.low_t, 0.0)
        s, y = self.d * column(t, self.d), self.best_g - self.g
        self.x = self.at(t)
        self.g = choose(done, self.best_g.clone(), self.g)
        change = np.abs(search.low_loss - self.loss)
        self.loss = np.where(done, search.low_loss, self.loss)
        if self.losses is not None:
            for row in np.flatnonzero(done):
                self.losses[self.ids[row]].append(float(self.loss[row]))

        self.stop(done & (search.low_steepest <= limits.gradient), Status.GRADIENT)
        self.stop(done & (search.low_t * search.largest <= limits.change), Status.CHANGE)
        self.stop(done & (change < limits.change), Status.CHANGE)
        self.stop(done & (self.iterations[self.ids] >= limits.iterations), Status.OUT_OF_ITERATIONS)
        self.stop(done & (self.evaluations[self.ids] >= limits.evaluations), Status.OUT_OF_EVALUATIONS)
        done = done & self.running
        if done.any():
            self.d = choose(done, self.memory.direction(done.nonzero()[0], s, y, self.g), self.d)
            self.aim(done, np.full(len(done), limits.lr))

    def aim(self, rows: np.ndarray, first_trial: np.ndarray) -> None:
        """Starts an iteration: a line search along d."""
        slope, largest = to_host(row_sum(self.g * self.d), self.d.abs().amax(-1))
        self.iterations[self.ids[rows]] += 1
        self.stop(rows & ~(slope <= -self.limits.change), Status.SLOPE)
        left = self.limits.evaluations - self.evaluations[self.ids]
        most = left if self.limits.line_search is None else np.full_like(left, self.limits.line_search)
        self.search.start(rows, first_trial, self.loss, slope, largest, most)

    def at(self, t: np.ndarray) -> Tensor:
        return torch.addcmul(self.x, self.d, column(t, self.d))

    def stop(self, mask: np.ndarray, status: Status) -> None:
        rows = (mask & self.running).nonzero()[0]
        if len(rows):
            ids = self.ids[rows]
            self.solution[index_of(ids, self.x)] = self.x[index_of(rows, self.x)]
            self.final_loss[ids], self.status[ids] = self.loss[rows], status
            self.running[rows] = False

    def compact(self) -> None:
        """Drops the problems that have stopped once they are half of the batch: until then they ride along unread."""
        keep = self.running.nonzero()[0]
        if 2 * len(keep) <= len(self.running):
            rows = index_of(keep, self.x)
            self.objective = self.objective.take(rows)
            self.search, self.memory = self.search.take(keep), self.memory.take(keep)
            self.ids, self.running, self.loss = self.ids[keep], self.running[keep], self.loss[keep]
            self.x, self.g, self.d, self.best_g = self.x[rows], self.g[rows], self.d[rows], self.best_g[rows]
