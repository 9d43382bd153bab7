"""Logit bias + softcap + cross-entropy, a loss a token, with gradients of logits and bias: for training and scoring.

For a window w with logits x [T, V], bias b [V] and targets y [T], and cap(a) = softcap * tanh(a / softcap):

    z = x + b,  cap(x) + b,  or  cap(x + b)          scores
    lse_t = log sum_v exp z_tv,  nll_t = lse_t - z_t,y
    p_t = exp(z_t - lse_t)
    d nll_t / dz_tv = p_tv - [v = y_t],              times 1 - (z / softcap)^2 where the cap came last

| tensor  | shape           | type                                     |
|---------|-----------------|------------------------------------------|
| logits  | [W, T, V]       | float32, bfloat16, float16; any strides  |
| bias    | [V] or [W, V]   | floating                                 |
| targets | [W, T]          | int64, int32                             |
| nll, lse| [W, T]          | float32                                  |

The forward reads each logit once, W T V itemsize bytes, and takes about 6 W T V flops and W T V exponentials (a softcap
doubles these and adds as many divisions): bound by memory. The backward reads them again and writes as many.

Positions that are ignored are not read: whatever their logits, they give 0 everywhere. A target outside [0, V) that is
not `ignore_index`, or a row with NaN, +inf or only -inf, makes that row NaN, and nothing else.

Rows never meet except in the bias gradient of their own window, whose order is fixed by T and V: a window's bits are
the same alone, in any batch, in any order. The softmax is that of Milakov and Gimelshein (arXiv:1805.02867) where a row
exceeds one tile; the bias is the logit-space form of SLOT (arXiv:2505.12392; parameter-golf PR #1350).
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable

from ._inputs import _check_windows, _contiguous, _scores_ref, _targets_ref
from ._rows import (
    _cap,
    _columns,
    _config,
    _empty_parts,
    _fold,
    _load_logits,
    _load_targets,
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
from .cases.cross_entropy import CASES
from .cases.windows import draw
from .spec import KernelSpec


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


# Kernels


@triton.jit
def _bias_cross_entropy_fwd_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    nll_ptr,
    lse_ptr,
    shift_ptr,
    sum_ptr,
    T,
    V,
    stride_lw,
    stride_lt,
    stride_lv,
    stride_bw,
    softcap,
    ignore_index,
    CAP: tl.constexpr,
    EVEN_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """nll, lse, and shift and sum for the backward, of ROWS rows: p = exp2(z log2(e) - shift) / sum."""
    tiles = tl.cdiv(T, ROWS)
    window = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * ROWS
    offs_t = first + tl.arange(0, ROWS)
    target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
    logits_ptr += window * stride_lw
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, V, CHUNKS * COLS):
        x = _load_logits(logits_ptr, first, start, used, V, stride_lt, stride_lv, EVEN_V, CHUNKS, ROWS, COLS)
        bias = None  # not from a helper: one that returns None does not compile before Triton 3.7.1
        if bias_ptr is not None:
            # In the shape of the logits: a row of it would be laid out otherwise, and pull the logits with it.
            offs_b = start + _tile_columns(CHUNKS, ROWS, COLS)
            bias = tl.load(bias_ptr + window * stride_bw + offs_b, mask=offs_b < V, other=0.0).to(tl.float32)
            bias = _fold(bias, CHUNKS, ROWS, COLS)
        z = _scores(x, bias, softcap, CAP)  # (CHUNKS, ROWS, COLS)
        if not EVEN_V:
            z = tl.where(start + _columns(CHUNKS, COLS) < V, z, float("-inf"))
        new_top = tl.maximum(top, _row_max(z))
        # -inf - -inf: tokens that are banned so far must not become NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top * _LOG2E)
        e = tl.exp2(z * _LOG2E - shift[None, :, None])
        total = total * tl.exp2(tl.where(top == new_top, 0.0, top * _LOG2E - shift)) + _row_sum(e)
        top = new_top
    shift = tl.where(top == float("-inf"), float("nan"), top * _LOG2E)
    offs_x = offs_t.to(tl.int64) * stride_lt + target.to(tl.int64) * stride_lv  # (ROWS,)
    x = tl.load(logits_ptr + offs_x, mask=used, other=0.0)
    bias_target = None
    if bias_ptr is not None:
        bias_target = tl.load(bias_ptr + window * stride_bw + target, mask=used, other=0.0).to(tl.float32)
    z = _scores(x, bias_target, softcap, CAP)  # (ROWS,)
    log_total = tl.log2(total)
    nll = (log_total - (z * _LOG2E - shift)) * _LN2
    row = window * T + offs_t
    mask = offs_t < T
    tl.store(nll_ptr + row, tl.where(used, tl.where(bad, float("nan"), nll), 0.0), mask=mask)
    tl.store(lse_ptr + row, tl.where(used, (log_total + shift) * _LN2, 0.0), mask=mask)
    tl.store(shift_ptr + row, shift, mask=mask)
    tl.store(sum_ptr + row, total, mask=mask)


@triton.jit
def _load_row_gradient(dnll_ptr, dlse_ptr, shift_ptr, sum_ptr, row, used, bad):
    """d loss / d nll, NaN at bad targets; and slope, shift: d loss / d lse times p is slope exp2(z log2(e) - shift)."""
    hit = tl.where(bad, float("nan"), tl.load(dnll_ptr + row, mask=used, other=0.0))
    slope = hit if dlse_ptr is None else hit + tl.load(dlse_ptr + row, mask=used, other=0.0)
    slope *= 1.0 / tl.load(sum_ptr + row, mask=used, other=1.0)
    return hit, slope, tl.load(shift_ptr + row, mask=used, other=float("inf"))  # unused rows: exp2(-inf) = 0


@triton.jit
def _bias_cross_entropy_bwd_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    shift_ptr,
    sum_ptr,
    dnll_ptr,
    dlse_ptr,
    dlogits_ptr,
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
    EVEN_V: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dlogits of PART rows and one block of columns, and their share of dbias, from the forward's shift and sum."""
    parts = tl.cdiv(T, PART)
    window = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    start = tl.program_id(1) * CHUNKS * COLS
    offs_v = start + _columns(CHUNKS, COLS)
    logits_ptr += window * stride_lw
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + window * stride_bw + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    for first in range(part * PART, min(part * PART + PART, T), ROWS):
        offs_t = first + tl.arange(0, ROWS)
        _target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
        row = window * T + offs_t
        _hit, slope, shift = _load_row_gradient(dnll_ptr, dlse_ptr, shift_ptr, sum_ptr, row, used, bad)
        x = _load_logits(logits_ptr, first, start, used, V, stride_lt, stride_lv, EVEN_V, CHUNKS, ROWS, COLS)
        z = _scores(x, bias, softcap, CAP)
        dz = tl.exp2(z * _LOG2E - shift[None, :, None]) * slope[None, :, None]
        if CAP == "sum":
            dz *= _slope(z, softcap)
        if dbias_ptr is not None:
            acc += dz
        if dlogits_ptr is not None:
            if CAP == "logits":
                dz *= _slope(_scores(x, None, softcap, CAP), softcap)
            rows = first + _tile_rows(CHUNKS, ROWS)
            columns = start + _tile_columns(CHUNKS, ROWS, COLS)
            dlogits = tl.reshape(dz, (CHUNKS * ROWS, COLS)).to(dlogits_ptr.dtype.element_ty)
            mask = (rows < T)[:, None]
            mask = mask if EVEN_V else mask & (columns < V)
            tl.store(dlogits_ptr + (window * T + rows)[:, None] * V + columns, dlogits, mask=mask)
    dbias_ptr = None if dbias_ptr is None else dbias_ptr + tl.program_id(0).to(tl.int64) * V
    if dbias_ptr is not None:
        # All rows' slots hold sums over the same columns.
        offs_v = start + tl.arange(0, CHUNKS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(dbias_ptr + offs_v, tl.sum(acc, axis=1), mask=offs_v < V)

    # The targets' own part, a value a row instead of a comparison a logit.
    tl.debug_barrier()  # dlogits and dbias are in memory
    offs_t = part * PART + tl.arange(0, PART)
    target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
    here = used & (target >= start) & (target < start + CHUNKS * COLS)
    row = window * T + offs_t
    hit, slope, shift = _load_row_gradient(dnll_ptr, dlse_ptr, shift_ptr, sum_ptr, row, used, bad)
    x = tl.load(logits_ptr + offs_t.to(tl.int64) * stride_lt + target.to(tl.int64) * stride_lv, mask=here, other=0.0)
    bias_target = None
    if bias_ptr is not None:
        bias_target = tl.load(bias_ptr + window * stride_bw + target, mask=here, other=0.0).to(tl.float32)
    z = _scores(x, bias_target, softcap, CAP)  # (PART,)
    if dlogits_ptr is not None:
        dz = tl.exp2(z * _LOG2E - shift) * slope - hit
        if CAP == "sum":
            dz *= _slope(z, softcap)
        if CAP == "logits":
            dz *= _slope(_scores(x, None, softcap, CAP), softcap)
        tl.store(dlogits_ptr + row * V + target, dz.to(dlogits_ptr.dtype.element_ty), mask=here)
    if dbias_ptr is not None:
        # Rows with the same target find the same sum and store the same bits, so that they need no atomics.
        before = tl.load(dbias_ptr + target, mask=here, other=0.0)
        hits = tl.zeros((PART,), tl.float32)
        SLICE: tl.constexpr = 16 if PART > 16 else PART
        for first in range(part * PART, part * PART + PART, SLICE):
            offs_o = first + tl.arange(0, SLICE)
            other, others_used, others_bad = _load_targets(targets_ptr, window, offs_o, T, V, ignore_index)
            others_hit = tl.load(dnll_ptr + window * T + offs_o, mask=others_used, other=0.0)
            others_hit = tl.where(others_bad, float("nan"), others_hit)
            if CAP == "sum":
                offs_x = offs_o.to(tl.int64) * stride_lt + other.to(tl.int64) * stride_lv
                others_x = tl.load(logits_ptr + offs_x, mask=others_used, other=0.0)
                others_bias = None
                if bias_ptr is not None:
                    others_bias = tl.load(bias_ptr + window * stride_bw + other).to(tl.float32)
                others_hit *= _slope(_scores(others_x, others_bias, softcap, CAP), softcap)
            same = target[:, None] == other[None, :]  # (PART, SLICE)
            hits += tl.sum(tl.where(same, others_hit[None, :], 0.0), axis=1)
        tl.debug_barrier()  # everybody has read `before`
        tl.store(dbias_ptr + target, before - hits, mask=here)


# Launches


def _check(logits, targets, bias, weights, softcap, reduction="mean"):
    _check_windows(logits, targets, weights, softcap, bias=bias)
    W, _, V = logits.shape
    if bias is not None and (bias.shape not in ((V,), (W, V)) or not bias.is_floating_point()):
        raise ValueError(f"bias: expected floating {[V]} or {[W, V]}, got {bias.dtype} {list(bias.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: expected "mean" or "sum", got {reduction!r}')


def _bias_cross_entropy_fwd(logits, targets, bias, options):
    """nll, lse, shift, sum; each [W, T]. `options` are softcap, cap_after_bias, ignore_index."""
    W, T, V = logits.shape
    targets, bias = _contiguous(targets, bias)
    nll, lse, shift, total = (torch.empty((W, T), dtype=torch.float32, device=logits.device) for _ in range(4))
    if W and T:
        tile = _config(T, V, logits.element_size())
        _launch(
            _bias_cross_entropy_fwd_kernel,
            (W * triton.cdiv(T, tile.rows),),
            "bias_cross_entropy",
            logits_ptr=logits,
            targets_ptr=targets,
            nll_ptr=nll,
            lse_ptr=lse,
            shift_ptr=shift,
            sum_ptr=total,
            **_score_arguments(logits, bias, options, tile),
        )
    return nll, lse, shift, total


def _fill_gradients(logits, targets, bias, shift, total, options, *, dnll, dlse=None, dlogits=None, dbias_parts=None):
    """Fills dlogits and dbias_parts [W, parts, V], whichever is given."""
    W, T, V = logits.shape
    if not (W and T):
        return
    targets, bias, dnll, dlse = _contiguous(targets, bias, dnll, dlse)
    tile = _config(T, V, logits.element_size())
    grid = (W * triton.cdiv(T, tile.part), triton.cdiv(V, tile.chunks * tile.cols))
    _launch(
        _bias_cross_entropy_bwd_kernel,
        grid,
        "bias_cross_entropy",
        logits_ptr=logits,
        targets_ptr=targets,
        shift_ptr=shift,
        sum_ptr=total,
        dnll_ptr=dnll,
        dlse_ptr=dlse,
        dlogits_ptr=dlogits,
        dbias_ptr=dbias_parts,
        PART=tile.part,
        **_score_arguments(logits, bias, options, tile),
    )


def _bias_cross_entropy_bwd(
    logits, targets, bias, shift, total, dnll, dlse, options, *, wants_dlogits=True, wants_dbias=True
):
    """dlogits and dbias, None where not wanted or where there is no bias; from what the forward returned."""
    W, T, V = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if wants_dlogits else None
    parts = _empty_parts(logits) if wants_dbias and bias is not None else None
    gradients = {"dnll": dnll, "dlse": dlse, "dlogits": dlogits, "dbias_parts": parts}
    _fill_gradients(logits, targets, bias, shift, total, options, **gradients)
    if parts is None:
        return dlogits, None
    dbias = _sum_parts(parts, T) if W and T else parts.new_zeros((W, V))
    return dlogits, (dbias.sum(0) if bias.dim() == 1 else dbias).to(bias.dtype)


# Public functions


class _BiasCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, bias, softcap, cap_after_bias, ignore_index):
        options = softcap, cap_after_bias, ignore_index
        nll, lse, shift, total = _bias_cross_entropy_fwd(logits, targets, bias, options)
        ctx.save_for_backward(logits, targets, bias, shift, total)
        ctx.options = options
        return nll, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll, dlse):
        wanted = {"wants_dlogits": ctx.needs_input_grad[0], "wants_dbias": ctx.needs_input_grad[2]}
        dlogits, dbias = _bias_cross_entropy_bwd(*ctx.saved_tensors, dnll, dlse, ctx.options, **wanted)
        return dlogits, None, dbias, None, None, None


def bias_cross_entropy(logits, targets, bias=None, *, softcap=None, cap_after_bias=False, ignore_index=-100):
    """Cross-entropy of biased, soft-capped logits, for each token, with gradients to logits and bias.

    Args:
        logits: [W, T, V] float32, bfloat16 or float16, any strides, V >= 1. Never written.
        targets: [W, T] int64 or int32 token ids, or `ignore_index`.
        bias: None, [V] or [W, V], floating; -inf bans a token.
        softcap: None, or c > 0: c * tanh(a / c) is applied to the logits.
        cap_after_bias: the softcap applies to logits + bias instead.
        ignore_index: target of positions that do not count. They are not read.

    Returns:
        nll: [W, T] float32, nats. 0 where ignored; NaN where the target is outside [0, V), or the row holds NaN, +inf
            or only -inf.
        lse: [W, T] float32, log of the sum of exp of the row's scores. 0 where ignored; NaN as nll, targets apart.

        The gradient of a NaN row is NaN, so that of the whole bias of its window is too. A bias [V] sums its gradient
        over the windows, in an order that depends on how many there are.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one float32 rounding and 1e-6.
    Source: SLOT, arXiv:2505.12392, in its logit-space form (parameter-golf PR #1350).
    """
    _check(logits, targets, bias, None, softcap)
    return _BiasCrossEntropy.apply(logits, targets, bias, softcap, cap_after_bias, ignore_index)


# The contract


def _compilations(*, W, T, V, softcap=None, cap_after_bias=False, **_):
    """Forward, and backward to bias and logits."""
    kernels = _bias_cross_entropy_fwd_kernel, _bias_cross_entropy_bwd_kernel
    cap = _cap(softcap, cap_after_bias)
    return [compilation for kernel in kernels for compilation in _tile_compilations(kernel, T, V, CAP=cap)]


SPEC = KernelSpec(
    name="bias_cross_entropy",
    fn=bias_cross_entropy,
    reference=bias_cross_entropy_ref,
    inputs=partial(draw, bias="windows"),
    cases=CASES,
    differentiable=("logits", "bias"),
    compilations=_compilations,
    bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 8 + 16) + 4 * W * V,
    flops=lambda *, W, T, V, **_: 6 * W * T * V,
)
