"""The executable specification in plain torch, and the path that CPUs take."""

import torch

from .._inputs import _scores_ref, _targets_ref


def bias_cross_entropy_ref(logits, targets, bias=None, *, softcap=None, cap_after_bias=False, ignore_index=-100):
    """`bias_cross_entropy` in plain torch; float64 logits give float64 results."""
    z = _scores_ref(logits, bias, softcap, cap_after_bias)
    used, bad, index = _targets_ref(targets, z.shape[-1], ignore_index)
    z = z.masked_fill(~used[..., None], 0.0)
    log_p = torch.log_softmax(z, dim=-1)
    top, argtop = z.max(dim=-1, keepdim=True)
    nll = -log_p.gather(-1, index[..., None]).squeeze(-1).masked_fill(~used, 0.0)
    lse = (top - log_p.gather(-1, argtop)).squeeze(-1).masked_fill(~used, 0.0)
    # A product, so that the gradient of a bad row is NaN as well.
    return nll * torch.where(bad, torch.nan, 1.0).to(nll), lse


@torch.no_grad()
def bias_cross_entropy_grad_ref(
    logits, targets, bias=None, weights=None, *, softcap=None, cap_after_bias=False, ignore_index=-100, reduction="mean"
):
    """`bias_cross_entropy_grad` in plain torch; float64 logits give float64 results."""
    z = _scores_ref(logits, bias, softcap, cap_after_bias)
    if weights is None:
        weights = torch.ones(targets.shape, dtype=z.dtype, device=z.device)
    used, bad, index = _targets_ref(targets.masked_fill(weights == 0, ignore_index), z.shape[-1], ignore_index)
    weights = weights.to(z.dtype).masked_fill(~used, 0.0).masked_fill(bad, torch.nan)
    log_p = torch.log_softmax(z.masked_fill(~used[..., None], 0.0), dim=-1)
    nll = -log_p.gather(-1, index[..., None]).squeeze(-1)
    dz = log_p.exp_().mul_(weights[..., None]).scatter_add_(-1, index[..., None], -weights[..., None])
    if cap_after_bias and softcap is not None:
        dz = (dz * (1 - (z / softcap) ** 2)).masked_fill(~used[..., None], 0.0)
    loss, dbias = (weights * nll).double().sum(-1), dz.sum(-2)
    if reduction == "mean":
        total = weights.double().sum(-1)
        scale = torch.where(total == 0, 0.0, 1 / total)
        loss, dbias = loss * scale, dbias * scale[:, None].to(z.dtype)
    return loss.to(z.dtype), dbias
