"""What an adaptation is given, a batch of windows, and what it gives back, adjusted scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..lbfgs.tape import Tape
from .repeats import Followers, mix, mix_rows
from .rows import Adaptation


@dataclass(frozen=True)
class WindowBatch:
    """Consecutive windows, cut to the positions that anything needs.

    Windows that overlap may be strided views of one tape of logits, and of targets: what a row of logits is needed for
    is then computed once, and a window's result has the same bits as in a tensor of its own.

    Args:
        logits: float [W, T, V], soft-capped; the last position is the window's last.
        targets: int64 [W, T].
        context_end: int64 [W]; positions before it were scored by earlier windows.
        scored_end: int64 [W]; positions from context_end up to it are scored here; both 0 for padding.
        backend: triton, torch or auto.
        hidden: float [W, T, D], the states that the logits come from; None where no row needs them.
        head: from hidden states [..., D], and a bias [..., V] to add before the soft cap or None, to logits [..., V].
    """

    logits: Tensor
    targets: Tensor
    context_end: Tensor
    scored_end: Tensor
    backend: ops.Backend = "auto"
    hidden: Tensor | None = None
    head: Callable[..., Tensor] | None = None

    @cached_property
    def scored(self) -> Tensor:
        """bool [W, T]: the positions that are scored here. In order, they are a piece of the stream."""
        position = torch.arange(self.logits.size(1), device=self.logits.device)
        return (position >= self.context_end[:, None]) & (position < self.scored_end[:, None])

    @cached_property
    def first_scored(self) -> int:
        """First position that any window scores."""
        real = self.scored_end > 0
        return int(self.context_end[real].min()) if bool(real.any()) else self.logits.size(1)

    def focus(self, row: Adaptation) -> Tensor:
        """bool [W, T]: the positions whose losses a row is fitted to."""
        length = self.logits.size(1)
        if row.positions == "scored":
            return self.scored
        begin = max(0, length - row.focal) if row.positions == "focal" else 0
        position = torch.arange(length, device=self.logits.device)
        return (position >= begin) & (position < self.context_end[:, None])

    def visible(self, row: Adaptation) -> tuple[Tensor, Tensor, Tensor]:
        """All that a row may fit to: logits [W, N, V], targets [W, N] and weights [W, N] of its positions.

        Other positions have weight 0 and target 0, so that a fit cannot depend on them.
        """
        seen = self.focus(row)
        used = seen.any(0).nonzero()
        cut = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
        return self.logits[:, cut], torch.where(seen, self.targets, 0)[:, cut], self.weights(row)[:, cut]

    def weights(self, row: Adaptation) -> Tensor:
        """float32 [W, T] of positions, 0 where a row does not see them: uniform, or half as (1 - p_target)^importance.

        They sum to the number of positions that are seen.

        Source: PR #1372's optional importance weights; that the two halves are equal is not published.
        """
        seen = self.focus(row)
        weights = seen.to(torch.float32)
        if not row.importance:
            return weights
        surprise = -torch.expm1(-self.nll.float())
        mass = torch.where(seen, surprise.clamp(min=0) ** row.importance, 0.0)
        share = mass * (weights.sum(1) / mass.sum(1).clamp(min=1e-30))[:, None]
        return (weights + share) / 2

    @cached_property
    def nll(self) -> Tensor:
        """[W, T] nats, without adaptation, of each row of a tape once; of anything where a position is not used."""
        tape, targets = Tape.of(self.logits), Tape.of(self.targets)
        if tape is None or targets is None or targets.step != tape.step:
            return ops.cross_entropy(self.logits, self.targets, backend="torch")
        nll = ops.cross_entropy(tape.rows[None], targets.rows[None], backend="torch")[0]
        return tape.windows(nll, *self.targets.shape)


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
        return nll if self.followers is None else -mix((-nll.double()).exp(), *self._mixed(nll)).log().to(nll)

    def _nll(self) -> Tensor:
        batch = self.batch
        if self.logits is not None:
            targets = batch.targets[batch.scored]
            return ops.cross_entropy(self.logits[None], targets[None], backend=batch.backend)[0]
        scored = slice(batch.first_scored, None)
        nll = ops.cross_entropy(batch.logits[:, scored], batch.targets[:, scored], self.bias, backend=batch.backend)
        return nll[batch.scored[:, scored]]

    def logprobs(self) -> Tensor:
        """Log-probabilities [n, V] of every token at the scored positions; followers need all their rows."""
        logits = self.logits
        if logits is None:
            logits = self.batch.logits[self.batch.scored]
            if self.bias is not None:
                logits = logits + self.bias[self.batch.scored.nonzero()[:, 0]]
        rows = torch.log_softmax(logits, -1, torch.promote_types(logits.dtype, torch.float32))
        return rows if self.followers is None else mix_rows(rows.double().exp(), *self._mixed(rows)).log().to(rows)

    def _mixed(self, like: Tensor) -> tuple[Followers, Tensor]:
        return self.followers, torch.tensor(self.gates, dtype=torch.float64, device=like.device)
