"""Cross-entropy of many biases on the same logits: softmax once, then two passes of multiplications for each bias.

With P = softmax(z), z the (soft-capped) logits of a window, and u = exp(bias - shift), shift = max(bias):

    s_t = sum_v P_tv u_v                        exp(lse_t(z + bias) - lse_t(z) - shift)
    loss = sum_t weight_t (log s_t + shift - bias[y_t]) / sum_t weight_t
    dbias = u * (P^T (weight / s)) / sum_t weight_t - counts / sum_t weight_t

The loss is relative to that of bias 0, which is `base_loss`: a difference is small, so float32 resolves it finely. V
exponentials an evaluation, not T V. `sum_t weight_t bias[y_t] = counts . bias`: targets are needed only once. P and the
NLLs without bias come from the kernels of `bias_cross_entropy`.

| tensor    | shape     | type                                                                  |
|-----------|-----------|-----------------------------------------------------------------------|
| probs     | [W, T, V] | float32 or bfloat16; P, and 0 at positions that do not count          |
| weights   | [W, T]    | float32; 0 at positions that do not count, NaN at bad targets         |
| counts    | [W, V]    | float32; the weights of each target, added                            |
| total     | [W]       | float32; sum of weights                                               |
| base_loss | [W]       | float32; weighted sum of the NLLs without bias                        |
| bias      | [W, V]    | float32, finite                                                       |

An evaluation reads P once and writes V floats a window: W T V itemsize + 12 W V bytes, 4 W T V flops. Order of sums,
positions that do not count, bad targets and NaN rows: as in `bias_cross_entropy_grad`. The bias must not be
so uneven that exp(bias - max) leaves no probability in float32: a spread below 80 is safe.

Source: the partition function of an exponential family tilted by `bias`; own derivation.
"""

import torch

from .._inputs import _check_windows, _contiguous, _draw
from .._tile import _OPTIONS, _config, _tile_arguments
from .._triton import triton
from ..bias_cross_entropy import _bias_cross_entropy_fwd, _fill_gradients
from ..spec import KernelSpec
from ._contract import (
    _CASES,
    _EVALUATE_CASES,
    _PREPARE_CASES,
    _counts_compilations,
    _counts_inputs,
    _evaluate_compilations,
    _evaluate_inputs,
    _prepare_compilations,
)
from ._kernels import _p_form_evaluate_kernel, _p_form_sum_kernel, _target_counts_kernel
from ._reference import PForm, p_form_evaluate_ref, p_form_prepare_ref, target_counts_ref

__all__ = [
    "PForm",
    "p_form_evaluate",
    "p_form_evaluate_ref",
    "p_form_prepare",
    "p_form_prepare_ref",
    "target_counts",
    "target_counts_ref",
]

# Launches and public functions


def _launch_counts(targets, weights, V, ignore_index, nll=None, weights_out=None, total=None, base_loss=None):
    W, T = targets.shape
    targets, weights = _contiguous(targets, weights)
    counts = torch.empty((W, V), dtype=torch.float32, device=targets.device)
    if W:
        with torch.cuda.device_of(targets):
            _target_counts_kernel[(W, triton.cdiv(V, 512))](
                targets, weights, nll, counts, weights_out, total, base_loss, T, V, ignore_index,
                BLOCK_T=16, BLOCK_V=512, num_warps=4, **_OPTIONS,
            )  # unmeasured  # fmt: skip
    return counts


def target_counts(targets, vocabulary, weights=None, *, ignore_index=-100):
    """How often each token is the target in each window, weighted: C of the rate model, deterministic on a GPU too.

    Args:
        targets: [W, T] int64 or int32 token ids, or `ignore_index`. Ids outside [0, vocabulary) are not counted.
        vocabulary: V >= 1.
        weights: None for 1, or [W, T] float32.
        ignore_index: target of positions that do not count.

    Returns:
        [W, V] float32; 0 where there are no positions.

    Raises:
        ValueError: a shape or type is not as above.

    Tolerance: 2x the error of plain torch against float64, plus one float32 rounding and 1e-6.
    Source: own.
    """
    if targets.dim() != 2 or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32 [W, T], got {targets.dtype} {list(targets.shape)}")
    if vocabulary < 1:
        raise ValueError(f"vocabulary: expected at least 1, got {vocabulary}")
    if weights is not None and (weights.shape != targets.shape or weights.dtype != torch.float32):
        raise ValueError(f"weights: expected float32 {list(targets.shape)}, got {weights.dtype} {list(weights.shape)}")
    return _launch_counts(targets, weights, vocabulary, ignore_index)


@torch.no_grad()
def p_form_prepare(logits, targets, weights=None, *, softcap=None, ignore_index=-100, probs_dtype=None):
    """Softmax and target counts of each window, for `p_form_evaluate`.

    Args:
        logits: [W, T, V] float32, bfloat16 or float16, any strides, V >= 1. Never written.
        targets: [W, T] int64 or int32 token ids, or `ignore_index`.
        weights: None for 1, or [W, T] float32 >= 0 (unchecked). Positions of weight 0 are not read.
        softcap: None, or c > 0: c * tanh(logits / c) takes the logits' place. A bias is added after it.
        ignore_index: target of positions that do not count. They are not read.
        probs_dtype: None for float32; bfloat16 halves the traffic and costs up to 1e-5 of the loss.

    Returns:
        A `PForm`; `base_loss` is a weighted sum, not a mean.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding and 1e-6.
    Source: own.
    """
    _check_windows(logits, targets, weights, softcap)
    probs_dtype = probs_dtype or torch.float32
    if probs_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"probs_dtype: expected float32 or bfloat16, got {probs_dtype}")
    W, T, V = logits.shape
    probs = torch.empty((W, T, V), dtype=probs_dtype, device=logits.device)
    weights_out = torch.empty((W, T), dtype=torch.float32, device=logits.device)
    total, base_loss = (torch.empty((W,), dtype=torch.float32, device=logits.device) for _ in range(2))
    used = targets if weights is None else targets.masked_fill(weights == 0, ignore_index)
    options = softcap, False, ignore_index
    nll, _, shift, row_sum = _bias_cross_entropy_fwd(logits, used, None, options)
    _fill_gradients(logits, used, None, shift, row_sum, options, dlogits=probs)
    counts = _launch_counts(targets, weights, V, ignore_index, nll, weights_out, total, base_loss)
    return PForm(probs, weights_out, counts, total, base_loss)


@torch.no_grad()
def p_form_evaluate(form, bias, *, reduction="mean"):
    """What a bias changes in the weighted mean cross-entropy of each window, and its gradient.

    Args:
        form: from `p_form_prepare`; V at most 16384.
        bias: [W, V] float32, finite, contiguous.
        reduction: "mean" divides by the window's sum of weights, "sum" does not.

    Returns:
        loss: [W] float32, nats, relative to bias 0. The loss itself: plus `form.base_loss` (for means, over total).
        dbias: [W, V] float32.

        Both are 0 for a window where no position counts, and NaN for one with a bad target or a NaN row that counts.

    Raises:
        ValueError: a shape or type is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one float32 rounding and 1e-6.
    Source: own.
    """
    probs, weights, counts, total, _ = form
    W, T, V = probs.shape
    if bias.shape != (W, V) or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise ValueError(f"bias: expected contiguous float32 {[W, V]}, got {bias.dtype} {list(bias.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: expected "mean" or "sum", got {reduction!r}')
    tile = _config(T, V, probs.element_size())
    if tile.chunks * tile.cols < V:
        raise ValueError(f"form: V is at most {tile.chunks * tile.cols}, got {V}; `bias_cross_entropy_grad` takes any")
    loss = torch.empty((W,), dtype=torch.float32, device=bias.device)
    if not (W and T):
        return loss.zero_(), torch.zeros_like(bias)
    count = triton.cdiv(T, tile.part)
    whole, mean = count == 1, reduction == "mean"
    parts = torch.empty((W, count, V), dtype=torch.float32, device=bias.device)
    log_s = None if whole else torch.empty((W, T), dtype=torch.float32, device=bias.device)
    probs, weights, counts, total = _contiguous(probs, weights, counts, total)
    with torch.cuda.device_of(bias):
        _p_form_evaluate_kernel[(W * count,)](
            probs, weights, counts, total, bias, log_s, loss, parts, T, V,
            MEAN=mean, WHOLE=whole, PART=tile.part, **_tile_arguments(tile, V),
        )  # fmt: skip
        if whole:
            return loss, parts.squeeze(1)
        dbias = torch.empty_like(bias)
        _p_form_sum_kernel[(W,)](
            parts, log_s, weights, counts, total, bias, loss, dbias, T, V, count,
            MEAN=mean, BLOCK_T=128, BLOCK_V=max(triton.next_power_of_2(V), 8), num_warps=8, **_OPTIONS,
        )  # unmeasured  # fmt: skip
    return loss, dbias


# The contract

SPECS = (
    KernelSpec(
        name="p_form_prepare",
        fn=p_form_prepare,
        reference=p_form_prepare_ref,
        inputs=_draw,
        cases=_PREPARE_CASES,
        compilations=_prepare_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * (itemsize + 4) + 12) + 4 * W * V,
        flops=lambda *, W, T, V, **_: 6 * W * T * V,
    ),
    KernelSpec(
        name="p_form_evaluate",
        fn=p_form_evaluate,
        reference=p_form_evaluate_ref,
        inputs=_evaluate_inputs,
        cases=_EVALUATE_CASES,
        compilations=_evaluate_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 4) + 12 * W * V,
        flops=lambda *, W, T, V, **_: 4 * W * T * V,
    ),
    KernelSpec(
        name="target_counts",
        fn=target_counts,
        reference=target_counts_ref,
        inputs=_counts_inputs,
        cases=_CASES,
        compilations=_counts_compilations,
        bytes_moved=lambda *, W, T, V, **_: 8 * W * T + 4 * W * V,
        flops=lambda *, W, T, V, **_: W * T,
    ),
)
