"""Fitting a row's parameter to the losses of its positions: one problem for each window, or for windows together."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from .. import ops
from ..kernels import Status, slot_solve, slot_solve_mm, slot_solve_mm_ref
from ..lbfgs import BiasObjective, SharedBias, minimize
from .adaptation import Adaptation
from .batch import Adjusted, WindowBatch
from .presets import is_published


def stored_probabilities(row: Adaptation) -> torch.dtype:
    """How a launched fit keeps the softmax that each evaluation reads: bfloat16 where a ridge holds the solution.

    There rounding moves the loss by 1.3e-6 at most, and what the programs of a GPU read stays in its L2: 43 MB of 50,
    not 61. Published rows keep float32, whatever their ridge.
    """
    return torch.bfloat16 if row.ridge >= 1 and not is_published(row) else torch.float32


class Fit:
    """Fits one row over the consecutive batches of a stream.

    Args:
        row: with optimizer lbfgs, adamw or mm.
    """

    def __init__(self, row: Adaptation):
        self.row = row
        self.work: list[Tensor] = []  # of every batch of problems: iterations, evaluations, status
        self.last: Tensor | None = None  # [1 or batch, P]: parameters of the batch before

    def state_dict(self) -> dict[str, Any]:
        """The warm start, and the work so far."""
        return {"last": self.last, "work": torch.cat(self.work, 1) if self.work else None}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Continue from what `state_dict` returned."""
        last, work = state["last"], state["work"]
        self.last = None if last is None else last.to(device)
        self.work = [] if work is None else [work.to(device)]

    def __call__(self, batch: WindowBatch) -> Adjusted:
        """Each window's parameter, applied. Advances the warm start."""
        parameters = self.parameters(batch)
        if self.row.plain:
            return Adjusted(batch, bias=parameters)
        layout = Layout.of(self.row, batch)
        logits = [
            layout.logits(parameters[window], batch, window, batch.scored[window])
            for window in batch.scored.any(1).nonzero()[:, 0].tolist()
        ]
        return Adjusted(batch, logits=torch.cat(logits) if logits else batch.logits.new_zeros(0, layout.vocabulary))

    def parameters(self, batch: WindowBatch) -> Tensor:
        """The fitted parameters of every window, [W, P]."""
        row, windows, found = self.row, batch.logits.size(0), []
        layout, used = Layout.of(row, batch), batch.focus(row).any(1)
        visible = batch.visible(row) if row.plain and row.scope != "joint" else None
        together = row.unit if row.unit > 1 else max(windows, 1)
        for first in range(0, windows, together):
            group = slice(first, min(first + together, windows))
            count = 1 if row.scope == "batch" else group.stop - first
            start = self._start(layout, count)
            if visible:
                logits, targets, weights = visible
                solution = self._solve_bias(logits[group], targets[group], weights[group], start, batch.backend)
            else:
                solution = self._solve_any(batch, range(windows)[group], start)
            solution = layout.clamp(solution, row.clamp)
            if row.warm_start != "no" and bool(used[group].any()):
                # windows that saw nothing are still where they started, so they are left out of the mean
                kept = solution if row.warm_start == "place" or count == 1 else solution[used[group]]
                self.last = kept if row.warm_start == "place" else kept.mean(0, keepdim=True)
            found.append(solution.expand(group.stop - first, -1))
        return torch.cat(found) if found else layout.start(row, 0)

    def _start(self, layout: "Layout", count: int) -> Tensor:
        start = layout.start(self.row, count)
        if self.last is not None:
            known = min(len(self.last), count) if self.row.warm_start == "place" else count
            start[:known] = self.last[:known]
        return start

    def _solve_bias(
        self, logits: Tensor, targets: Tensor, weights: Tensor, start: Tensor, backend: ops.Backend
    ) -> Tensor:
        row, windows = self.row, (logits, targets, weights)
        if row.scope == "batch":
            logits, targets, weights = logits.flatten(0, 1)[None], targets.reshape(1, -1), weights.reshape(1, -1)
        problems = weights.bool().any(1)
        if row.optimizer == "adamw":
            return self._adamw(BiasObjective(logits, targets, weights, ridge=row.ridge), start, problems)
        if row.optimizer == "mm":
            solve = ops.choose(backend, logits.device, slot_solve_mm, slot_solve_mm_ref)
            x, _, *work = solve(
                logits,
                targets,
                weights,
                start,
                ridge=row.ridge,
                clamp=row.clamp,
                iterations=row.steps,
                probs_dtype=stored_probabilities(row),
            )
        elif row.scope != "batch" and ops.solves_in_one_launch(backend, logits, row.phases):
            x, _, *work = slot_solve(
                logits,
                targets,
                weights,
                start,
                ridge=row.ridge,
                clamp=row.clamp,
                phases=row.phases,
                tolerance_change=row.tolerance,
                probs_dtype=stored_probabilities(row),
            )
        else:
            objective: SharedBias | BiasObjective
            if row.scope == "batch" and ops.launches_lbfgs(backend, start) and logits.dtype != torch.float64:
                # one problem of many rows: one program for each window, as a single program would leave a GPU idle
                objective = SharedBias(*windows, ridge=row.ridge)
            else:
                objective = BiasObjective(logits, targets, weights, ridge=row.ridge)
            solution = minimize(objective, start, phases=row.phases, tolerance_change=row.tolerance, backend=backend)
            x, work = solution.x, [solution.iterations, solution.evaluations, solution.status]
        self._count(problems, *work)
        return x

    def _solve_any(self, batch: WindowBatch, windows: range, start: Tensor) -> Tensor:
        row = self.row
        objective = HeadObjective(row, batch, [[w] for w in windows] if row.scope == "window" else [list(windows)])
        problems = objective.weight > 0
        if row.optimizer == "adamw":
            return self._adamw(objective, start, problems)
        x = start.reshape(len(problems), -1)
        solution = minimize(objective, x, phases=row.phases, tolerance_change=row.tolerance, backend=batch.backend)
        self._count(problems, solution.iterations, solution.evaluations, solution.status)
        return solution.x.view_as(start)

    def _adamw(self, objective: "BiasObjective | HeadObjective", start: Tensor, problems: Tensor) -> Tensor:
        row, found = self.row, start.clone()
        # one problem at a time: a vector's last elements may round differently from its first
        for index in problems.nonzero()[:, 0].tolist():
            mine = objective.take(torch.tensor([index], device=start.device))
            x = found[index : index + 1].clone()
            optimizer = torch.optim.AdamW([x], row.lr, row.betas, row.eps, row.weight_decay)
            for step in range(row.steps):
                optimizer.param_groups[0]["lr"] = learning_rate(row, step)
                x.grad = mine(x)[1]
                optimizer.step()
            found[index] = x[0]
        steps = torch.full((len(found),), row.steps, device=start.device)
        self._count(problems, steps, steps, torch.full_like(steps, Status.OUT_OF_ITERATIONS))
        return found

    def _count(self, problems: Tensor, *work: Tensor) -> None:
        self.work.append(torch.stack([values.long() for values in work])[:, problems])


def learning_rate(row: Adaptation, step: int) -> float:
    """AdamW's rate at step 0, 1, ...: constant, or a cosine from lr down towards lr_end."""
    if row.lr_end is None:
        return row.lr
    return row.lr_end + (row.lr - row.lr_end) * (1 + math.cos(math.pi * step / row.steps)) / 2


@dataclass(frozen=True)
class Layout:
    """How a row's parameter lies in a vector [P], and what it does to logits.

    Args:
        sizes: elements of each part, in order.
        through_head: logits are made again from hidden states.
        before: a bias is added before the soft cap.
        rank: of the low-rank map.
        vocabulary: V.
        like: a tensor of the dtype and device of parameters.
    """

    sizes: dict[str, int]
    through_head: bool
    before: bool
    rank: int
    vocabulary: int
    like: Tensor

    @classmethod
    def of(cls, row: Adaptation, batch: WindowBatch) -> Self:
        if row.needs_hidden and (batch.hidden is None or batch.head is None):
            raise ValueError(f"batch: preset {row.name!r} needs hidden states and a head")
        vocabulary = batch.logits.size(-1)
        width = 0 if batch.hidden is None else batch.hidden.size(-1)
        parts = {
            "bias": {"bias": vocabulary},
            "bias+temperature": {"bias": vocabulary, "log_temperature": 1},
            "hidden": {"delta": width},
            "hidden+bias": {"delta": width, "bias": vocabulary},
            "lowrank": {"first": width * row.rank, "second": row.rank * vocabulary},
        }[row.parameter]
        dtype = torch.promote_types(batch.logits.dtype, torch.float32)
        before, like = row.softcap == "before", batch.logits.new_empty(0, dtype=dtype)
        return cls(parts, row.needs_hidden, before, row.rank, vocabulary, like)

    def start(self, row: Adaptation, count: int) -> Tensor:
        """[count, P]: zeros, but for a low-rank map's first factor where the row says so."""
        start = self.like.new_zeros(count, sum(self.sizes.values()))
        if row.parameter == "lowrank" and row.start == "random":
            size = self.sizes["first"]
            random = torch.randn(size, generator=torch.Generator().manual_seed(0))
            start[:, :size] = (random / math.sqrt(size / self.rank)).to(start)
        return start

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """x [..., P] as its parts."""
        return dict(zip(self.sizes, x.split(list(self.sizes.values()), -1), strict=True))

    def clamp(self, x: Tensor, bound: float | None) -> Tensor:
        """x [..., P] with its bias bounded."""
        if bound is None or "bias" not in self.sizes:
            return x
        parts = self.parts(x)
        return torch.cat([part.clamp(-bound, bound) if name == "bias" else part for name, part in parts.items()], -1)

    def logits(self, x: Tensor, batch: WindowBatch, window: int, positions: Tensor) -> Tensor:
        """Logits [n, V] at some positions (bool [T]) of a window under parameter x [P]."""
        parts = self.parts(x)
        bias, temperature = parts.get("bias"), parts.get("log_temperature")
        if batch.hidden is None or batch.head is None or not self.through_head:
            logits = batch.logits[window][positions]
        else:
            hidden, before = batch.hidden[window][positions], None
            if "delta" in parts:
                hidden = hidden + parts["delta"].to(hidden.dtype)
            if "first" in parts:
                first = parts["first"].view(-1, self.rank).to(hidden.dtype)
                before = hidden @ first @ parts["second"].view(self.rank, -1).to(hidden.dtype)
            elif self.before:
                before = bias
            logits = batch.head(hidden) if before is None else batch.head(hidden, before)
        if temperature is not None:
            logits = logits * temperature.exp()
        return logits if bias is None or self.before else logits + bias


class HeadObjective:
    """Weighted mean cross-entropy, and its gradient, of problems of one or more windows each, for any parameter.

    Each window is computed by itself, so that no sum's rounding depends on the batch.

    Args:
        row: the adaptation.
        batch: the windows.
        problems: the windows of each problem. They share a parameter where the row's scope is batch; else each window
            has its own, P numbers one after the other.
    """

    def __init__(self, row: Adaptation, batch: WindowBatch, problems: Sequence[Sequence[int]]):
        self.row, self.batch, self.problems = row, batch, problems
        self.layout, self.focus = Layout.of(row, batch), batch.focus(row)
        self.losses: dict[int, Callable[[Tensor], Tensor]] = {}
        totals, weights_of = [], batch.weights(row)
        for problem in problems:
            total = 0.0
            for window in problem:
                positions = self.focus[window]
                targets = batch.targets[window][positions]
                weights = weights_of[window][positions]
                self.losses[window] = self._loss(window, positions, targets, weights)
                total += float(weights.sum())
            totals.append(total)
        self.weight = torch.tensor(totals, dtype=torch.float64, device=batch.logits.device)

    def _loss(self, window: int, positions: Tensor, targets: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            logits = self.layout.logits(x, self.batch, window, positions)
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            return (nll * weights.to(nll)).sum(dtype=torch.float64)

        return loss

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss float64 [A] and gradient [A, ...] at x [A, ...]."""
        losses, gradients = torch.zeros_like(self.weight), torch.zeros_like(x)
        for index, problem in enumerate(self.problems):
            if not self.weight[index] > 0:
                continue
            parameters = x[index].view(-1, sum(self.layout.sizes.values()))
            total, gradient = self.weight.new_zeros(()), torch.zeros_like(parameters)
            for place, window in enumerate(problem):
                if not bool(self.focus[window].any()):
                    continue
                place = place if len(parameters) > 1 else 0
                with torch.enable_grad():
                    mine = parameters[place].detach().requires_grad_()
                    loss = self.losses[window](mine)
                gradient[place] += torch.autograd.grad(loss, mine)[0]
                total = total + loss.detach()
            if self.row.ridge:
                total = total + self.row.ridge / 2 * parameters.double().square().sum()
                gradient += self.row.ridge * parameters
            losses[index] = total / self.weight[index]
            gradients[index] = (gradient / self.weight[index].to(gradient)).view(-1)
        return losses, gradients

    def take(self, index: Tensor) -> Self:
        """The objective of some of the problems."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part.problems, part.weight = [self.problems[i] for i in index.tolist()], self.weight[index]
        return part
