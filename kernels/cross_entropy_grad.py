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

from dataclasses import replace
from functools import partial

import torch

from ._inputs import _contiguous, _scores_ref, _targets_ref
from ._rows import (
    _cap,
    _columns,
    _config,
    _empty_parts,
    _fold,
    _load_targets,
    _repeat,
    _row_max,
    _row_sum,
    _score_arguments,
    _scores,
    _slope,
    _sum_parts,
    _tile_columns,
    _tile_compilations,
    _tile_rows,
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


def _ahead(tile, cap):
    """Options: logits are loaded a trip ahead where one warp has a row. With more, it would halve the programs.

    There 128 registers, four programs a multiprocessor, are enough without a spill; a softcap's terms need more.
    """
    ahead = tile.rows >= tile.num_warps
    most = {"maxnreg": 128} if ahead and cap is None and not torch.version.hip else {}
    return {"AHEAD": ahead}, most


@triton.jit
def _bias_cross_entropy_grad_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    weights_ptr,
    rows_ptr,
    nll_ptr,
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
    AHEAD: tl.constexpr,
    EVEN_V: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Loss and dbias of PART rows of a window, each logit read once: a whole row is in registers, V <= CHUNKS * COLS.

    WHOLE: T <= PART, so these are the window's. Otherwise nll and sums are scratch, for the kernel below.
    AHEAD: a tile of logits is loaded a trip before its own.

    What belongs to a row and not to a logit is done for all PART rows at once, before and behind the loop. Between them
    and it go four numbers a row, rows_ptr [programs, 4, PART]: its weight, its shift and its sum, and where scores are
    capped what its target's gradient is (its hit), else the weight.
    """
    parts = tl.cdiv(T, PART)
    window = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    offs_v = _columns(CHUNKS, COLS)
    offs_p = tl.arange(0, PART)
    offs_t = part * PART + offs_p
    rows_ptr += tl.program_id(0).to(tl.int64) * (4 * PART)
    logits_ptr += window * stride_lw + (part * PART).to(tl.int64) * stride_lt
    target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)  # (PART,)
    w = used.to(tl.float32)
    if weights_ptr is not None:
        w = tl.load(weights_ptr + window * T + offs_t, mask=used, other=0.0)
    tl.store(rows_ptr + offs_p, tl.where(used & bad & (w != 0), float("nan"), w))
    bias = None  # not from a helper: one that returns None does not compile before Triton 3.7.1
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + window * stride_bw + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    # Every lane of a row's warps has its shift and its sum, one stores them. A store of (ROWS,) would go through shared
    # memory, with barriers, as would one whose addresses do not run along the lanes.
    lane = tl.arange(0, 32)[None, :]

    tl.debug_barrier()  # the weights are in memory
    offs_r = tl.arange(0, ROWS)
    w = tl.load(rows_ptr + offs_r)
    if AHEAD:
        x = _load_tile(logits_ptr, 0, w != 0, V, stride_lt, stride_lv, EVEN_V, CHUNKS, ROWS, COLS)
        x = x.to(tl.float32) + 0.0  # without the addition LLVM carries 16 bits, and repacks them in every trip
    for first in range(0, min(PART, T - part * PART), ROWS):
        after = first + ROWS + offs_r
        next_w = tl.load(rows_ptr + after, mask=after < PART, other=0.0)
        if AHEAD:
            next_x = _load_tile(
                logits_ptr, first + ROWS, next_w != 0, V, stride_lt, stride_lv, EVEN_V, CHUNKS, ROWS, COLS
            )
        else:
            x = _load_tile(logits_ptr, first, w != 0, V, stride_lt, stride_lv, EVEN_V, CHUNKS, ROWS, COLS)

        z = _scores(_fold(x, CHUNKS, ROWS, COLS), bias, softcap, CAP)
        if not EVEN_V:
            z = tl.where(offs_v < V, z, float("-inf"))
        shift = _row_max(z) * _LOG2E
        e = tl.exp2(z * _LOG2E - shift[None, :, None])
        total = _row_sum(e)
        dz = e * (w / total)[None, :, None]
        if CAP == "sum":
            dz *= _slope(z, softcap)
        acc += dz
        lane_ptr = rows_ptr + PART + 2 * (first + offs_r)[:, None] + lane
        tl.store(lane_ptr, tl.broadcast_to(shift[:, None], (ROWS, 32)), mask=lane == 0)
        tl.store(lane_ptr + 1, tl.broadcast_to(total[:, None], (ROWS, 32)), mask=lane == 0)
        if AHEAD:
            x = next_x.to(tl.float32)
        w = next_w
    dbias = tl.sum(acc, axis=1)  # (CHUNKS, COLS)

    tl.debug_barrier()  # shifts and sums are in memory
    target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
    w = tl.load(rows_ptr + offs_p)
    used &= w != 0
    shift = tl.load(rows_ptr + PART + 2 * offs_p, mask=used, other=0.0)
    total = tl.load(rows_ptr + PART + 2 * offs_p + 1, mask=used, other=1.0)
    offs_x = offs_p.to(tl.int64) * stride_lt + target.to(tl.int64) * stride_lv
    x_target = tl.load(logits_ptr + offs_x, mask=used, other=0.0)
    bias_target = None
    if bias_ptr is not None:
        bias_target = tl.load(bias_ptr + window * stride_bw + target, mask=used, other=0.0).to(tl.float32)
    z_target = _scores(x_target, bias_target, softcap, CAP)
    nll = (tl.log2(total) - (z_target * _LOG2E - shift)) * _LN2
    scale = 1.0
    if WHOLE:
        window_loss = tl.sum(tl.where(used, w.to(tl.float64) * nll.to(tl.float64), 0.0), axis=0)
        if MEAN:
            window_weight = tl.sum(w.to(tl.float64), axis=0)
            inverse = tl.where(window_weight == 0, 0.0, 1.0 / window_weight)
            window_loss *= inverse
            scale = inverse.to(tl.float32)
        tl.store(loss_ptr + window, window_loss.to(tl.float32))
    else:
        tl.store(nll_ptr + window * T + offs_t, tl.where(used, tl.where(bad, float("nan"), nll), 0.0), mask=offs_t < T)
    if CAP == "sum":
        rows_ptr += 3 * PART  # beside the weights, which other threads may still have to read
        tl.store(rows_ptr + offs_p, tl.where(used, w * _slope(z_target, softcap), 0.0))
    offs_v = tl.arange(0, CHUNKS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    dbias_ptr += tl.program_id(0).to(tl.int64) * V
    tl.store(dbias_ptr + offs_v, dbias * scale, mask=offs_v < V)

    # The targets' share: PART^2 comparisons instead of PART * V. Rows with the same target find the same sum and store
    # the same bits, so that they need no atomics.
    tl.debug_barrier()  # dbias and hits are in memory
    before = tl.load(dbias_ptr + target)
    hits = tl.zeros((PART,), tl.float32)
    SLICE: tl.constexpr = 16 if PART > 16 else PART
    for first in range(0, PART, SLICE):
        offs_o = first + tl.arange(0, SLICE)
        other, _used, _bad = _load_targets(targets_ptr, window, part * PART + offs_o, T, V, ignore_index)
        hit = tl.load(rows_ptr + offs_o)
        hits += tl.sum(tl.where(target[:, None] == other[None, :], hit[None, :], 0.0), axis=1)  # (PART, SLICE)
    tl.debug_barrier()  # everybody has read `before`
    tl.store(dbias_ptr + target, before - hits * scale)


@triton.jit
def _load_tile(
    ptr,
    first,
    used,
    V,
    stride_lt,
    stride_lv,
    EVEN_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Logits of ROWS rows from `first` on, as memory sees them: (CHUNKS * ROWS, COLS); rows not `used` are not read."""
    offs_t = first + _tile_rows(CHUNKS, ROWS)
    offs_v = _tile_columns(CHUNKS, ROWS, COLS)
    mask = _repeat(used, CHUNKS, ROWS)[:, None]
    mask = mask if EVEN_V else mask & (offs_v < V)
    ptrs = ptr + offs_t.to(tl.int64)[:, None] * stride_lt + offs_v.to(tl.int64) * stride_lv
    return tl.load(ptrs, mask=mask, other=0.0)


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
    constants, most = _ahead(tile, _cap(softcap, cap_after_bias))
    rows = torch.empty((W * parts.shape[1], 4, tile.part), dtype=torch.float32, device=logits.device)
    nll = None if whole else torch.empty((W, T), dtype=torch.float32, device=logits.device)
    _launch(
        _bias_cross_entropy_grad_kernel,
        (W * parts.shape[1],),
        "bias_cross_entropy_grad",
        logits_ptr=logits,
        targets_ptr=targets,
        weights_ptr=weights,
        rows_ptr=rows,
        nll_ptr=nll,
        loss_ptr=loss,
        dbias_ptr=parts,
        MEAN=mean,
        WHOLE=whole,
        **constants,
        **most,
        PART=tile.part,
        **_score_arguments(logits, bias, options, tile),
    )
    if whole:
        return loss, parts.squeeze(1)
    return loss, _sum_parts(parts, T, nll, targets, weights, ignore_index, loss, mean)


# The contract


def _compilations(*, W, T, V, softcap=None, cap_after_bias=False, **_):
    """Value and bias gradient in one pass, V that fits a tile."""
    cap = _cap(softcap, cap_after_bias)
    constants, most = _ahead(_config(T, V, 2), cap)  # a row's warps do not depend on the type
    constants |= {"CAP": cap, "weights_ptr": None, "nll_ptr": None}
    found = _tile_compilations(_bias_cross_entropy_grad_kernel, T, V, **constants)
    return [replace(each, options={**each.options, **most}) for each in found]


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
