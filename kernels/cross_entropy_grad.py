"""Logit bias + softcap + cross-entropy, a mean and a bias gradient a window: for an optimiser that asks for both.

With scores z and losses nll_t as in `cross_entropy.py`,

    loss = sum_t weight_t nll_t / sum_t weight_t,    dbias_v = the same mean of d nll_t / db_v

in one pass over the logits where a row fits the registers (V <= 16384), else in two.

| tensor  | shape           | type                                     |
|---------|-----------------|------------------------------------------|
| logits  | [W, T, V]       | float32, bfloat16, float16; any strides  |
| bias    | [V] or [W, V]   | floating                                 |
| targets | [W, T]          | int64, int32                             |
| weights | [W, T]          | float32, >= 0                            |
| loss    | [W]             | float32, summed in float64               |
| dbias   | [W, V]          | float32                                  |

Each logit is read once and V floats are written a window: W T V itemsize + 4 W V bytes, about 8 W T V flops and W T V
exponentials (a softcap doubles these and adds as many divisions): bound by memory.

Positions that are ignored, or weigh 0, are not read. A window of such positions alone has loss 0 and gradient 0. Bad
targets and bad rows make loss and gradient of their window NaN if they weigh anything there; nothing else. Sums are in
an order that T and V fix: a window's bits are the same alone, in any batch, in any order.
"""

from functools import partial

import torch

from ._inputs import _contiguous, _scores_ref, _targets_ref
from ._rows import (
    _cap,
    _columns,
    _config,
    _empty_parts,
    _load_logits,
    _load_targets,
    _row_max,
    _row_sum,
    _score_arguments,
    _scores,
    _slope,
    _sum_parts,
    _tile_compilations,
)
from ._triton import _LN2, _LOG2E, _launch, tl, triton
from .cases.cross_entropy_grad import CASES
from .cases.windows import draw
from .cross_entropy import _bias_cross_entropy_fwd, _check, _fill_gradients
from .spec import KernelSpec


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


# Kernel


@triton.jit
def _bias_cross_entropy_grad_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    weights_ptr,
    nll_ptr,
    hits_ptr,
    loss_ptr,
    dbias_ptr,
    T,
    V,
    stride_lw,
    stride_lt,
    stride_lv,
    stride_bw,
    softcap,
    ignore_index,
    CAP: tl.constexpr,
    MEAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_V: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Loss and dbias of PART rows of a window, each logit read once: a whole row is in registers, V <= CHUNKS * COLS.

    WHOLE: T <= PART, so these are the window's. Otherwise nll and sums are scratch, for the kernel below.
    """
    parts = tl.cdiv(T, PART)
    window = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    offs_v = _columns(CHUNKS, COLS)
    logits_ptr += window * stride_lw
    bias = None  # not from a helper: one that returns None does not compile before Triton 3.7.1
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + window * stride_bw + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    loss = tl.zeros((ROWS,), tl.float64)
    weight = tl.zeros((ROWS,), tl.float64)
    for first in range(part * PART, min(part * PART + PART, T), ROWS):
        offs_t = first + tl.arange(0, ROWS)
        target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
        row = window * T + offs_t
        w = used.to(tl.float32)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + row, mask=used, other=0.0)
            used &= w != 0
        w = tl.where(used & bad, float("nan"), w)

        x = _load_logits(logits_ptr, first, 0, used, V, stride_lt, stride_lv, EVEN_V, CHUNKS, ROWS, COLS)
        z = _scores(x, bias, softcap, CAP)  # (CHUNKS, ROWS, COLS)
        if not EVEN_V:
            z = tl.where(offs_v < V, z, float("-inf"))
        shift = _row_max(z) * _LOG2E
        e = tl.exp2(z * _LOG2E - shift[None, :, None])
        total = _row_sum(e)

        offs_x = offs_t.to(tl.int64) * stride_lt + target.to(tl.int64) * stride_lv  # (ROWS,)
        x_target = tl.load(logits_ptr + offs_x, mask=used, other=0.0)
        bias_target = None
        if bias_ptr is not None:
            bias_target = tl.load(bias_ptr + window * stride_bw + target, mask=used, other=0.0).to(tl.float32)
        z_target = _scores(x_target, bias_target, softcap, CAP)
        nll = (tl.log2(total) - (z_target * _LOG2E - shift)) * _LN2
        if WHOLE:
            loss += tl.where(used, w.to(tl.float64) * nll.to(tl.float64), 0.0)
            weight += w.to(tl.float64)
        else:
            tl.store(nll_ptr + row, tl.where(used, tl.where(bad, float("nan"), nll), 0.0), mask=offs_t < T)

        dz = e * (w / total)[None, :, None]
        hit = w
        if CAP == "sum":
            dz *= _slope(z, softcap)
            hit *= _slope(z_target, softcap)
        acc += dz
        tl.store(hits_ptr + row, hit, mask=offs_t < T)
    dbias = tl.sum(acc, axis=1)  # (CHUNKS, COLS)
    scale = 1.0
    if WHOLE:
        window_loss = tl.sum(loss, axis=0)
        if MEAN:
            window_weight = tl.sum(weight, axis=0)
            inverse = tl.where(window_weight == 0, 0.0, 1.0 / window_weight)
            window_loss *= inverse
            scale = inverse.to(tl.float32)
        tl.store(loss_ptr + window, window_loss.to(tl.float32))
    offs_v = tl.arange(0, CHUNKS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    dbias_ptr += tl.program_id(0).to(tl.int64) * V
    tl.store(dbias_ptr + offs_v, dbias * scale, mask=offs_v < V)

    # The targets' share: PART^2 comparisons instead of PART * V. Rows with the same target find the same sum and store
    # the same bits, so that they need no atomics.
    tl.debug_barrier()  # dbias and hits are in memory
    target, used, bad = _load_targets(targets_ptr, window, part * PART + tl.arange(0, PART), T, V, ignore_index)
    before = tl.load(dbias_ptr + target)
    hits = tl.zeros((PART,), tl.float32)
    SLICE: tl.constexpr = 16 if PART > 16 else PART
    for first in range(part * PART, part * PART + PART, SLICE):
        offs_t = first + tl.arange(0, SLICE)
        other, _others_used, _others_bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
        hit = tl.load(hits_ptr + window * T + offs_t, mask=offs_t < T, other=0.0)
        hits += tl.sum(tl.where(target[:, None] == other[None, :], hit[None, :], 0.0), axis=1)  # (PART, SLICE)
    tl.debug_barrier()  # everybody has read `before`
    tl.store(dbias_ptr + target, before - hits * scale)


# Public function


@torch.no_grad()
def bias_cross_entropy_grad(
    logits, targets, bias=None, weights=None, *, softcap=None, cap_after_bias=False, ignore_index=-100, reduction="mean"
):
    """Weighted mean cross-entropy of each window and its gradient with respect to the window's bias, in one pass.

    With `reduction="sum"` and no bias, dbias is E - C: what the softmax expects of each token at the weighted positions
    minus what came.

    Args:
        logits: [W, T, V] float32, bfloat16 or float16, any strides, V >= 1. Never written.
        targets: [W, T] int64 or int32 token ids, or `ignore_index`.
        bias: None for 0, [V] or [W, V], floating; -inf bans a token.
        weights: None for 1, or [W, T] float32 >= 0 (unchecked). Positions of weight 0 are not read.
        softcap: None, or c > 0: c * tanh(a / c) is applied to the logits.
        cap_after_bias: the softcap applies to logits + bias instead.
        ignore_index: target of positions that do not count. They are not read.
        reduction: "mean" divides by the window's sum of weights of positions that count, "sum" does not.

    Returns:
        loss: [W] float32, nats, summed in float64. 0 where no position counts.
        dbias: [W, V] float32, for a bias [V] too: each window's own gradient. 0 where no position counts.

        Both are NaN for a window with a counting position whose target is outside [0, V), or whose row holds NaN, +inf
        or only -inf.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one float32 rounding and 1e-6.
    Source: as `bias_cross_entropy`; the gradient in closed form.
    """
    _check(logits, targets, bias, weights, softcap, reduction)
    W, T, V = logits.shape
    loss = torch.empty((W,), dtype=torch.float32, device=logits.device)
    if not (W and T):
        return loss.zero_(), torch.zeros((W, V), dtype=torch.float32, device=logits.device)
    tile = _config(T, V, logits.element_size())
    targets, bias, weights = _contiguous(targets, bias, weights)
    options = softcap, cap_after_bias, ignore_index
    mean = reduction == "mean"
    parts = _empty_parts(logits)
    if tile.chunks * tile.cols < V:  # a row exceeds the registers: read it twice
        if weights is not None:
            targets = targets.masked_fill(weights == 0, ignore_index)
        nll, _, shift, total = _bias_cross_entropy_fwd(logits, targets, bias, options)
        dnll = torch.ones_like(nll) if weights is None else weights
        _fill_gradients(logits, targets, bias, shift, total, options, dnll=dnll, dbias_parts=parts)
        return loss, _sum_parts(parts, T, nll, targets, weights, ignore_index, loss, mean)
    whole = tile.part >= T
    hits = torch.empty((W, T), dtype=torch.float32, device=logits.device)
    nll = None if whole else torch.empty_like(hits)
    _launch(
        _bias_cross_entropy_grad_kernel,
        (W * parts.shape[1],),
        "bias_cross_entropy_grad",
        logits_ptr=logits,
        targets_ptr=targets,
        weights_ptr=weights,
        nll_ptr=nll,
        hits_ptr=hits,
        loss_ptr=loss,
        dbias_ptr=parts,
        MEAN=mean,
        WHOLE=whole,
        PART=tile.part,
        **_score_arguments(logits, bias, options, tile),
    )
    if whole:
        return loss, parts.squeeze(1)
    return loss, _sum_parts(parts, T, nll, targets, weights, ignore_index, loss, mean)


# The contract


def _compilations(*, W, T, V, softcap=None, cap_after_bias=False, **_):
    """Value and bias gradient in one pass, V that fits a tile."""
    constants = {"CAP": _cap(softcap, cap_after_bias), "weights_ptr": None, "nll_ptr": None}
    return _tile_compilations(_bias_cross_entropy_grad_kernel, T, V, **constants)


SPEC = KernelSpec(
    name="bias_cross_entropy_grad",
    fn=bias_cross_entropy_grad,
    reference=bias_cross_entropy_grad_ref,
    inputs=partial(draw, bias="windows"),
    cases=CASES,
    compilations=_compilations,
    bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 8) + W * (8 * V + 4),
    flops=lambda *, W, T, V, **_: 8 * W * T * V,
)
