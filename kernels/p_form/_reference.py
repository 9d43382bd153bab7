"""The executable specification in plain torch, and the path that CPUs take."""

from typing import NamedTuple

import torch

from .._inputs import _scores_ref, _targets_ref
from ..bias_cross_entropy import bias_cross_entropy_ref


class PForm(NamedTuple):
    """What evaluations need of W windows; `__init__.py` has a table of them."""

    probs: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor
    base_loss: torch.Tensor


def _counted_weights_ref(targets, weights, vocabulary, ignore_index, dtype):
    """Weights with 0 where nothing counts and NaN at bad targets; safe indices; the weights that counts may add."""
    weights = torch.ones(targets.shape, device=targets.device, dtype=dtype) if weights is None else weights.to(dtype)
    used, bad, index = _targets_ref(targets.masked_fill(weights == 0, ignore_index), vocabulary, ignore_index)
    weights = weights.masked_fill(~used, 0.0)
    return used, index, weights.masked_fill(bad, torch.nan), weights.masked_fill(bad, 0.0)


def target_counts_ref(targets, vocabulary, weights=None, *, ignore_index=-100):
    """`target_counts` in plain torch; float64 weights give float64 counts."""
    dtype = torch.float32 if weights is None else weights.dtype
    _, index, _, weights = _counted_weights_ref(targets, weights, vocabulary, ignore_index, dtype)
    return weights.new_zeros((targets.shape[0], vocabulary)).scatter_add_(1, index, weights)


@torch.no_grad()
def p_form_prepare_ref(logits, targets, weights=None, *, softcap=None, ignore_index=-100, probs_dtype=None):
    """`p_form_prepare` in plain torch; float64 logits give float64 results."""
    dtype, V = torch.promote_types(logits.dtype, torch.float32), logits.shape[-1]
    used, index, weights, added = _counted_weights_ref(targets, weights, V, ignore_index, dtype)
    targets = targets.masked_fill(~used, ignore_index)
    nll, _ = bias_cross_entropy_ref(logits, targets, softcap=softcap, ignore_index=ignore_index)
    z = _scores_ref(logits, None, softcap, False)
    probs = torch.softmax(z.masked_fill(~used[..., None], 0.0), -1)
    probs = probs.masked_fill_(~used[..., None], 0.0).to(probs_dtype or dtype)
    counts = added.new_zeros((logits.shape[0], V)).scatter_add_(1, index, added)
    total = weights.double().sum(-1)
    return PForm(probs, weights, counts, total.to(dtype), (weights * nll).double().sum(-1).to(dtype))


def _aligned(tensor):
    """Where BLAS cuts a product, and so how it rounds, depends on alignment: torch allocates at multiples of 64."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


@torch.no_grad()
def p_form_evaluate_ref(form, bias, *, reduction="mean"):
    """`p_form_evaluate` in plain torch; float64 tensors give float64 results."""
    probs, weights, counts, total, _ = form
    shift = bias.amax(-1, keepdim=True)
    u = torch.exp(bias - shift)
    # Window by window: a batched product rounds differently in another batch, a matrix times a vector does not.
    s = torch.empty_like(weights)
    ratio_sums = torch.empty_like(bias)
    for window, wide in enumerate(probs):
        wide = _aligned(wide.to(bias.dtype))
        s[window] = torch.mv(wide, _aligned(u[window])).masked_fill_(weights[window] == 0, 1.0)
        ratio_sums[window] = torch.mv(wide.T, weights[window] / s[window])
    loss = (weights * s.log()).double().sum(-1) + total.double() * shift[:, 0] - (counts * bias).double().sum(-1)
    dbias = u * ratio_sums - counts
    if reduction == "mean":
        scale = torch.where(total == 0, 0.0, 1 / total.double())
        loss, dbias = loss * scale, dbias * scale[:, None].to(bias.dtype)
    return loss.to(bias.dtype), dbias
