"""What an adaptation is given, a batch of windows, and what it gives back, adjusted scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..lbfgs.tape import Tape, WindowRows, probabilities, softmax, to_front
from ..worker import upload
from .adaptation import Adaptation
from .repeats import Followers, mix, mix_rows

_STEEPEST = 40.0  # nats between two tokens' biases; beyond it a product with their exponentials may underflow


@dataclass(frozen=True)
class WindowBatch:
    """Consecutive windows, cut to the positions that anything needs.

    Windows that overlap may be strided views of one tape of logits, and of targets: each row of logits is then worked
    on once, and a window's result has the same bits as from a tensor of its own.

    Args:
        logits: float [W, T, V], soft-capped; the last position is the window's last. No columns where `nll` is given.
        targets: int64 [W, T].
        context_end: int64 [W]; positions before it were scored by earlier windows.
        scored_end: int64 [W]; positions from context_end up to it are scored here; both 0 for padding.
        backend: triton, torch or auto.
        hidden: float [W, T, D], the states that the logits come from; None where no row needs them.
        head: from hidden states [..., D], and a bias [..., V] to add before the soft cap or None, to logits [..., V].
        nll: float [W, T], nats: the losses without adaptation, where no row needs logits.
        run: the positions that are scored, where they are the same in every window and the host knows them: it then
            waits for no device to learn which they are.
    """

    logits: Tensor
    targets: Tensor
    context_end: Tensor
    scored_end: Tensor
    backend: ops.Backend = "auto"
    hidden: Tensor | None = None
    head: Callable[..., Tensor] | None = None
    nll: Tensor | None = None
    run: range | None = None

    @cached_property
    def scored(self) -> Tensor:
        """bool [W, T]: the positions that are scored here; in order, they form one piece of the stream."""
        return (self._position >= self.context_end[:, None]) & (self._position < self.scored_end[:, None])

    @cached_property
    def first_scored(self) -> int:
        """First position that any window scores."""
        if self.run:
            return self.run.start
        real = self.scored_end > 0
        return int(self.context_end[real].min()) if bool(real.any()) else self.logits.size(1)

    @cached_property
    def charges(self) -> "Packed":
        """The positions that are scored here."""
        return Packed(self, self.scored, self.run)

    @cached_property
    def contexts(self) -> "Packed":
        """The positions that earlier windows scored."""
        return Packed(self, self._position < self.context_end[:, None], self.run and range(self.run.start))

    def of_scored(self, values: Tensor, first: int = 0) -> Tensor:
        """Values [n, ...] at the positions that are scored here, of values [W, T - first, ...] from `first` on."""
        if self.run:
            return values[:, self.run.start - first : self.run.stop - first].flatten(0, 1)
        return values[self.scored[:, first:]]

    @cached_property
    def _position(self) -> Tensor:
        return torch.arange(self.logits.size(1), device=self.logits.device)

    def focus(self, row: Adaptation) -> Tensor:
        """bool [W, T]: the positions whose losses a row is fitted to."""
        length = self.logits.size(1)
        if row.positions == "scored":
            return self.scored
        begin = max(0, length - row.focal) if row.positions == "focal" else 0
        return (self._position >= begin) & (self._position < self.context_end[:, None])

    def visible(self, row: Adaptation) -> tuple[Tensor, Tensor, Tensor]:
        """All that a row may fit to: logits [W, N, V], targets [W, N] and weights [W, N] of its positions.

        Other positions have weight 0 and target 0, so that a fit cannot depend on them.
        """
        seen = self.focus(row)
        used = seen.any(0).nonzero()
        cut = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        return self.logits[:, cut], torch.where(seen, self.targets, 0)[:, cut], self.weights(row)[:, cut]

    def weights(self, row: Adaptation) -> Tensor:
        """float32 [W, T], 0 where a row does not see the position: uniform, or half of it as (1 - p_target)^importance.

        The weights sum to the number of positions that are seen.

        Source: PR #1372's optional importance weights; that the two halves are equal is not published.
        """
        seen = self.focus(row)
        weights = seen.to(torch.float32)
        if not row.importance:
            return weights
        surprise = -torch.expm1(-self._losses.float())
        mass = torch.where(seen, surprise.clamp(min=0) ** row.importance, 0.0)
        share = mass * (weights.sum(1) / mass.sum(1).clamp(min=1e-30))[:, None]
        return (weights + share) / 2

    @cached_property
    def _losses(self) -> Tensor:
        """[W, T] nats, without adaptation, of each row of a tape once; of anything where a position is not used."""
        tape, targets = Tape.of(self.logits), Tape.of(self.targets)
        if tape is None or targets is None or targets.step != tape.step:
            return ops.cross_entropy(self.logits, self.targets, backend="torch")
        nll = ops.cross_entropy(tape.rows[None], targets.rows[None], backend="torch")[0]
        return tape.windows(nll, *self.targets.shape)


class Packed:
    """Positions of each window, packed to the front, and the model's probabilities there, made once.

    A window's sums then round alike whatever else is in the batch.

    Args:
        batch: the windows.
        used: bool [W, T], the positions.
        run: the same, where the host knows them; see `WindowBatch`.
    """

    def __init__(self, batch: WindowBatch, used: Tensor, run: range | None = None):
        self.run = run
        # [W, R], [W, up to R, V], [W, R]
        self.taken, self.logits, self.targets = to_front(used, batch.logits, batch.targets, run=run)
        self.dtype = torch.promote_types(self.logits.dtype, torch.float32)
        p, self.lse = probabilities(self.logits, self.dtype, self.taken.shape[1])
        self.rows = WindowRows(p)

    def of(self, window: int) -> tuple[Tensor, Tensor]:
        """Logits [n, V] and targets [n] of one window."""
        count = int(self.taken[window].sum())
        return self.logits[window, :count], self.targets[window, :count]

    def mixture(self, weight: Tensor) -> Tensor:
        """sum_t weight_t p_t of each window's positions, float64 [W, V], for weight [W, R], 0 where none is taken."""
        mixture = self.rows.mixture(weight.to(self.dtype))[:, : self.logits.size(-1)].double()
        broken = (self.taken[:, : self.lse.size(1)] & ~self.lse.isfinite()).any(1)
        return mixture.masked_fill(broken[:, None], math.nan)

    @cached_property
    def _mass(self) -> Tensor:
        """Sum of p [W, R]: 1 but for rounding, as a product rounds, so that a bias of 0 changes no loss."""
        return self.rows.products(self.lse.new_ones(len(self.lse), self.logits.size(-1), dtype=self.dtype))

    def nll(self, bias: Tensor | None = None) -> Tensor:
        """Losses of the targets under the logits, or these and a bias [W, V]; of all windows in order, [n], nats."""
        count = self.lse.size(1)
        targets, taken = self.targets[:, :count], self.taken[:, :count]
        nll = losses(self.logits, self.lse, targets)
        if bias is not None:
            # log sum exp(z + b) - log sum exp(z) = log(p . exp(b)): no exponential of each logit
            bias = bias.to(self.dtype)
            largest = bias.amax(1, keepdim=True)
            s = (self.rows.products((bias - largest).exp()) / self._mass)[:, :count]
            nll = nll + s.double().log() + (largest.double() - bias.gather(1, targets).double())
            for window in (largest[:, 0] - bias.amin(1) > _STEEPEST).nonzero()[:, 0].tolist():
                biased = self.logits[window].to(self.dtype) + bias[window]
                nll[window] = losses(biased, softmax(biased, self.dtype)[1], targets[window])
        nll = nll.clamp(min=0).to(self.dtype)
        return nll.flatten() if self.run else nll[taken]


def losses(logits: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """float64 [...] of targets [...] under logits [..., V] and their log-sum-exp, float64 [...]."""
    return lse - logits.gather(-1, targets[..., None])[..., 0].double()


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses [...] of targets [...] under logits [..., V], in plain torch: with `Packed`'s bits."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return losses(logits, softmax(logits, dtype)[1], targets).clamp(min=0).to(dtype)


@dataclass(frozen=True)
class Adjusted:
    """Distributions that a batch's tokens are scored with.

    Args:
        batch: the windows.
        bias: float [W, V], added to the windows' soft-capped logits; or None.
        logits: float [n, V], instead of the batch's own, of the scored positions in order; or None.
        followers, gates: repeats to mix in, and how; or None.
    """

    batch: WindowBatch
    bias: Tensor | None = None
    logits: Tensor | None = None
    followers: Followers | None = None
    gates: tuple[tuple[float, float], ...] | None = None

    def nll(self) -> Tensor:
        """Negative log-likelihoods of the scored tokens in order: float32 (float64 for float64) [n], nats."""
        nll = self._nll()
        if self.followers is None:
            return nll
        return -mix((-nll.double()).exp(), self.followers, self._gates_like(nll)).log().to(nll)

    def _nll(self) -> Tensor:
        batch = self.batch
        if batch.nll is not None:
            return batch.of_scored(batch.nll)
        triton = ops.uses_triton(batch.backend, batch.logits.device)
        if self.logits is None and not triton:
            return batch.charges.nll(self.bias)
        if self.logits is None:
            scored = slice(batch.first_scored, None)
            nll = ops.cross_entropy(batch.logits[:, scored], batch.targets[:, scored], self.bias, backend=batch.backend)
            return batch.of_scored(nll, batch.first_scored)
        targets = batch.of_scored(batch.targets)
        if triton:
            return ops.cross_entropy(self.logits[None], targets[None], backend=batch.backend)[0]
        return row_losses(self.logits, targets)

    def logprobs(self) -> Tensor:
        """Log-probabilities [n, V] of every token at the scored positions; followers need all their rows."""
        logits = self.logits
        if logits is None:
            logits = self.batch.logits[self.batch.scored]
            if self.bias is not None:
                logits = logits + self.bias[self.batch.scored.nonzero()[:, 0]]
        rows = torch.log_softmax(logits, -1, torch.promote_types(logits.dtype, torch.float32))
        if self.followers is None:
            return rows
        return mix_rows(rows.double().exp(), self.followers, self._gates_like(rows)).log().to(rows)

    def _gates_like(self, values: Tensor) -> Tensor:
        return upload(torch.tensor(self.gates, dtype=torch.float64), values.device)
