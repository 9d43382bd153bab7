"""Cross-entropy as a function of a logit bias, for `minimize`."""

import copy
from typing import Self

import torch
from torch import Tensor

from .reductions import block_sum, row_sum
from .tape import WindowRows, probabilities, to_front


class BiasObjective:
    """Cross-entropy of W windows as a function of one logit bias each, in P-form.

        F(b) = (sum_t w_t (log sum_v exp(z_tv + b_v) - z_t,y_t - b_y_t) + (r / 2) |b - prior|^2) / sum_t w_t

    With P = softmax(z), made once, and u = exp(b - max b): s = P u, log sum_v exp(z_tv + b_v) = log s + max b + lse z,
    and the gradient is (u * P^T (w / s) - counts + r (b - prior)) / sum_t w_t. One evaluation is two passes over P and
    V exponentials; weights, counts and r are divided by sum_t w_t beforehand. Where s underflows (a bias spread over
    more than ~85 nats in float32, ~700 in float64) the loss is not finite, and a line search steps back.

    Args:
        z: [W, T, V] logits, any float dtype; computed in float64 if they are, else in float32.
        targets: [W, T] int64; one outside [0, V) with a positive weight makes its problem not finite.
        weights: [W, T] >= 0; rows of weight 0 are never read. A window without weight has loss 0 and gradient 0.
        ridge: r >= 0.
        prior: [W, V] or None for zero.
    """

    def __init__(
        self, z: Tensor, targets: Tensor, weights: Tensor, ridge: float = 0.0, prior: Tensor | None = None
    ) -> None:
        W, T, V = z.shape
        if targets.shape != (W, T) or weights.shape != (W, T):
            raise ValueError(
                f"targets, weights: expected {[W, T]}, got {list(targets.shape)} and {list(weights.shape)}"
            )
        if not ridge >= 0:
            raise ValueError(f"ridge: expected a number >= 0, got {ridge!r}")
        if prior is not None and prior.shape != (W, V):
            raise ValueError(f"prior: expected {[W, V]}, got {list(prior.shape)}")
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        if T == 0:
            z, targets, weights = z.new_zeros(W, 1, V), targets.new_zeros(W, 1), weights.new_zeros(W, 1)

        used, z, targets, weights = to_front(weights != 0, z, targets, weights)
        count, length = z.shape[1], used.shape[1]
        p, lse = probabilities(z, dtype, length)
        self.p = WindowRows(p)
        known, targets = (targets >= 0) & (targets < V), targets.clamp(0, V - 1)
        nll = (lse - z.gather(2, targets[:, :count, None])[:, :, 0].double()).masked_fill(~known[:, :count], torch.nan)
        nll = torch.where(used, torch.nn.functional.pad(nll, (0, length - count)), 0.0)
        self.idle = None if bool(used.all()) else ~used  # [W, length]: rows without weight
        self.weights = weights.double()  # [W, length]
        total = block_sum(self.weights)
        scale = torch.where(total > 0, 1.0 / total, 0.0)
        counts = self.weights.new_zeros(W, V).scatter_add_(1, targets, self.weights)
        self.base, self.weights = scale * block_sum(self.weights * nll), scale[:, None] * self.weights
        self.narrow_weights, self.minus_counts = self.weights.to(dtype), (-scale[:, None] * counts).to(dtype)
        self.targets = targets
        self.ridge, self.prior = ridge * scale if ridge else None, None if prior is None else prior.to(dtype)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.amax(-1, keepdim=True)
        u = (x - largest).exp_()
        s = self.p.products(u)
        if self.idle is not None:
            s.masked_fill_(self.idle, 1.0)  # it may be 0 there, and its logarithm infinite
        loss = self.base + block_sum(self.weights * (s.double().log() + (largest - x.gather(1, self.targets))))
        expected = self.p.mixture(self.narrow_weights / s)[:, : x.shape[1]]
        g = torch.addcmul(self.minus_counts, u, expected)
        if self.ridge is not None:
            offset = x if self.prior is None else x - self.prior
            loss = loss + self.ridge / 2 * row_sum(offset * offset, torch.float64)
            g = g.addcmul_(offset, self.ridge.to(g)[:, None])
        return loss, g

    def take(self, index: Tensor) -> Self:
        part = copy.copy(self)
        part.p = self.p.take(index)
        for name in ("targets", "weights", "narrow_weights", "idle", "base", "minus_counts", "ridge", "prior"):
            rows = getattr(self, name)
            setattr(part, name, None if rows is None else rows[index])
        return part
