"""Logit bias + softcap + cross-entropy: per-token NLL, logit gradient, and per-window loss with its bias gradient.

For a window w with logits x [T, V], bias b [V] and targets y [T], and cap(a) = softcap * tanh(a / softcap):

    z = x + b,  cap(x) + b,  or  cap(x + b)          scores
    lse_t = log sum_v exp z_tv,  nll_t = lse_t - z_t,y
    p_t = exp(z_t - lse_t)
    d nll_t / dz_tv = p_tv - [v = y_t],              times 1 - (z / softcap)^2 where the cap came last
    loss = sum_t weight_t nll_t / sum_t weight_t,    dbias_v = the same mean of d nll_t / db_v

`bias_cross_entropy` gives nll and lse and propagates gradients to logits and bias: training and scoring.
`bias_cross_entropy_grad` gives loss and dbias in one pass over the logits, for an optimiser that asks for both.

| tensor  | shape           | type                                     |
|---------|-----------------|------------------------------------------|
| logits  | [W, T, V]       | float32, bfloat16, float16; any strides  |
| bias    | [V] or [W, V]   | floating                                 |
| targets | [W, T]          | int64, int32                             |
| weights | [W, T]          | float32, >= 0                            |
| nll, lse| [W, T]          | float32                                  |
| loss    | [W]             | float32, summed in float64               |
| dbias   | [W, V]          | float32                                  |

Value and bias gradient read each logit once and write V floats a window: W T V itemsize + 4 W V bytes, about
8 W T V flops and W T V exponentials (a softcap doubles these and adds as many divisions): bound by memory.

Positions that are ignored, or weigh 0, are not read: whatever their logits, they give 0 everywhere. A window of such
positions alone has loss 0 and gradient 0. A target outside [0, V) that is not `ignore_index`, or a row with NaN,
+inf or only -inf, makes that row NaN, and loss and gradient of its window if it weighs anything there; nothing else.

Rows never meet except in the sums of their own window, whose order is fixed by T and V: a window's bits are the same
alone, in any batch, in any order. The softmax is that of Milakov and Gimelshein (arXiv:1805.02867) where a row
exceeds one tile; the bias is the logit-space form of SLOT (arXiv:2505.12392; parameter-golf PR #1350).
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable

from ._inputs import _check_windows, _contiguous, _draw, _scores_ref, _targets_ref
from ._tile import _OPTIONS, _config, _tile_arguments, _tile_compilations
from ._triton import _LN2, _LOG2E, tl, triton
from .spec import Case, KernelSpec

# The reference: plain torch, and the path that CPUs take


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


@triton.jit
def _softcap(a, softcap):
    """softcap * tanh(a / softcap) to 2 ulp.

    1 - 2 / (exp(2x) + 1) cancels near 0; there an odd polynomial, fitted by least squares, takes over.
    """
    inverse = 1.0 / softcap
    y = a * a * (inverse * inverse)
    q = -0.005893945302384097 * y + 0.020794617709385475
    q = q * y - 0.05378329300012262
    q = q * y + 0.13331915298812771
    q = q * y - 0.33333297510128557
    far = softcap - 2.0 * softcap / (tl.exp2(a * (inverse * (2.0 * _LOG2E))) + 1.0)
    return tl.where(y < 0.36, a + a * y * q, far)


@triton.jit
def _scores(x, bias, softcap, CAP: tl.constexpr):
    z = x.to(tl.float32)
    if CAP == "before":
        z = _softcap(z, softcap)
    if bias is not None:
        z += bias
    if CAP == "after":
        z = _softcap(z, softcap)
    return z


@triton.jit
def _slope(z, softcap):
    """Derivative of softcap * tanh(a / softcap), from its value."""
    t = z * (1.0 / softcap)
    return 1.0 - t * t


@triton.jit
def _load_bias(bias_ptr, offs, mask):
    return None if bias_ptr is None else tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_targets(targets_ptr, window, offs_t, T, V, ignore_index):
    target = tl.load(targets_ptr + window * T + offs_t, mask=offs_t < T, other=ignore_index)
    used = target != ignore_index
    bad = used & ((target < 0) | (target >= V))
    return tl.where(used & (target >= 0) & (target < V), target, 0).to(tl.int32), used, bad


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
    offs_t = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
    row_ptr = logits_ptr + window * stride_lw + offs_t.to(tl.int64) * stride_lt  # (ROWS,)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, V, CHUNKS * COLS):
        offs_v = start + tl.arange(0, CHUNKS)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]
        mask = used[None, :, None] if EVEN_V else used[None, :, None] & (offs_v < V)
        x = tl.load(row_ptr[None, :, None] + offs_v.to(tl.int64) * stride_lv, mask=mask, other=0.0)
        # In the shape of the logits: a (CHUNKS, 1, COLS) tile would be laid out otherwise, and pull the logits with it.
        offs_b = window * stride_bw + tl.broadcast_to(offs_v, (CHUNKS, ROWS, COLS))
        z = _scores(x, _load_bias(bias_ptr, offs_b, offs_v < V), softcap, CAP)  # (CHUNKS, ROWS, COLS)
        if not EVEN_V:
            z = tl.where(offs_v < V, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(tl.max(z, axis=0), axis=1))
        # -inf - -inf: tokens that are banned so far must not become NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top * _LOG2E)
        e = tl.exp2(z * _LOG2E - shift[None, :, None])
        total = total * tl.exp2(tl.where(top == new_top, 0.0, top * _LOG2E - shift)) + tl.sum(tl.sum(e, axis=0), axis=1)
        top = new_top
    shift = tl.where(top == float("-inf"), float("nan"), top * _LOG2E)
    x = tl.load(row_ptr + target.to(tl.int64) * stride_lv, mask=used, other=0.0)
    z = _scores(x, _load_bias(bias_ptr, window * stride_bw + target, used), softcap, CAP)  # (ROWS,)
    log_total = tl.log2(total)
    nll = (log_total - (z * _LOG2E - shift)) * _LN2
    row = window * T + offs_t
    mask = offs_t < T
    tl.store(nll_ptr + row, tl.where(used, tl.where(bad, float("nan"), nll), 0.0), mask=mask)
    tl.store(lse_ptr + row, tl.where(used, (log_total + shift) * _LN2, 0.0), mask=mask)
    tl.store(shift_ptr + row, shift, mask=mask)
    tl.store(sum_ptr + row, total, mask=mask)


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
    """dlogits of PART rows and one block of columns, and their share of dbias, from the forward's shift and sum.

    Without dnll, what goes to dlogits is the softmax itself.
    """
    parts = tl.cdiv(T, PART)
    window = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    start = tl.program_id(1) * CHUNKS * COLS
    offs_v = start + tl.arange(0, CHUNKS)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]
    logits_ptr += window * stride_lw + offs_v.to(tl.int64) * stride_lv  # (CHUNKS, 1, COLS)
    bias = _load_bias(bias_ptr, window * stride_bw + offs_v, offs_v < V)
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    for first in range(part * PART, min(part * PART + PART, T), ROWS):
        offs_t = first + tl.arange(0, ROWS)
        target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
        row = window * T + offs_t
        slope = 1.0 / tl.load(sum_ptr + row, mask=used, other=1.0)
        if dnll_ptr is not None:
            hit = tl.where(bad, float("nan"), tl.load(dnll_ptr + row, mask=used, other=0.0))
            slope *= hit if dlse_ptr is None else hit + tl.load(dlse_ptr + row, mask=used, other=0.0)
        shift = tl.load(shift_ptr + row, mask=used, other=float("inf"))  # unused rows: exp2(-inf) = 0
        mask = used[None, :, None] if EVEN_V else used[None, :, None] & (offs_v < V)
        x = tl.load(logits_ptr + offs_t.to(tl.int64)[None, :, None] * stride_lt, mask=mask, other=0.0)
        z = _scores(x, bias, softcap, CAP)
        dz = tl.exp2(z * _LOG2E - shift[None, :, None]) * slope[None, :, None]
        if dnll_ptr is not None:
            dz -= tl.where(offs_v == target[None, :, None], hit[None, :, None], 0.0)
            if CAP == "after":
                dz *= _slope(z, softcap)
        if dbias_ptr is not None:
            acc += dz
        if dlogits_ptr is not None:
            if CAP == "before" and dnll_ptr is not None:
                dz *= _slope(_scores(x, None, softcap, CAP), softcap)
            row_ptr = dlogits_ptr + row[None, :, None] * V + offs_v
            tl.store(row_ptr, dz, mask=(offs_t < T)[None, :, None] & (offs_v < V))
    if dbias_ptr is not None:
        # All rows' slots hold sums over the same columns.
        offs_v = start + tl.arange(0, CHUNKS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * V + offs_v, tl.sum(acc, axis=1), mask=offs_v < V)


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
    offs_v = tl.arange(0, CHUNKS)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]
    logits_ptr += window * stride_lw
    bias = _load_bias(bias_ptr, window * stride_bw + offs_v, offs_v < V)
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

        row_ptr = logits_ptr + offs_t.to(tl.int64) * stride_lt  # (ROWS,)
        mask = used[None, :, None] if EVEN_V else used[None, :, None] & (offs_v < V)
        x = tl.load(row_ptr[None, :, None] + offs_v.to(tl.int64) * stride_lv, mask=mask, other=0.0)
        z = _scores(x, bias, softcap, CAP)  # (CHUNKS, ROWS, COLS)
        if not EVEN_V:
            z = tl.where(offs_v < V, z, float("-inf"))
        shift = tl.max(tl.max(z, axis=0), axis=1) * _LOG2E
        e = tl.exp2(z * _LOG2E - shift[None, :, None])
        total = tl.sum(tl.sum(e, axis=0), axis=1)

        x_target = tl.load(row_ptr + target.to(tl.int64) * stride_lv, mask=used, other=0.0)
        bias_target = _load_bias(bias_ptr, window * stride_bw + target, used)
        z_target = _scores(x_target, bias_target, softcap, CAP)
        nll = (tl.log2(total) - (z_target * _LOG2E - shift)) * _LN2
        if WHOLE:
            loss += tl.where(used, w.to(tl.float64) * nll.to(tl.float64), 0.0)
            weight += w.to(tl.float64)
        else:
            tl.store(nll_ptr + row, tl.where(used, tl.where(bad, float("nan"), nll), 0.0), mask=offs_t < T)

        dz = e * (w / total)[None, :, None]
        hit = w
        if CAP == "after":
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


@triton.jit
def _bias_cross_entropy_sum_kernel(
    parts_ptr,
    nll_ptr,
    targets_ptr,
    weights_ptr,
    loss_ptr,
    dbias_ptr,
    T,
    V,
    ignore_index,
    parts,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One window: its parts of dbias [W, parts, V] added in order, its loss from nll, both divided by its weight."""
    window = tl.program_id(0).to(tl.int64)
    scale = 1.0
    if loss_ptr is not None:
        loss = tl.zeros((BLOCK_T,), tl.float64)
        weight = tl.zeros((BLOCK_T,), tl.float64)
        for first in range(0, T, BLOCK_T):
            offs_t = first + tl.arange(0, BLOCK_T)
            _target, used, bad = _load_targets(targets_ptr, window, offs_t, T, V, ignore_index)
            w = used.to(tl.float32)
            if weights_ptr is not None:
                w = tl.load(weights_ptr + window * T + offs_t, mask=used, other=0.0)
                used &= w != 0
            w = tl.where(used & bad, float("nan"), w).to(tl.float64)
            nll = tl.load(nll_ptr + window * T + offs_t, mask=used, other=0.0)
            loss += w * nll.to(tl.float64)
            weight += w
        window_loss = tl.sum(loss, axis=0)
        if MEAN:
            window_weight = tl.sum(weight, axis=0)
            inverse = tl.where(window_weight == 0, 0.0, 1.0 / window_weight)
            window_loss *= inverse
            scale = inverse.to(tl.float32)
        if tl.program_id(1) == 0:
            tl.store(loss_ptr + window, window_loss.to(tl.float32))
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for part in range(0, parts):
        acc += tl.load(parts_ptr + (window * parts + part) * V + offs_v, mask=offs_v < V, other=0.0)
    tl.store(dbias_ptr + window * V + offs_v, acc * scale, mask=offs_v < V)


# Launches


def _check(logits, targets, bias, weights, softcap, reduction="mean"):
    _check_windows(logits, targets, weights, softcap, bias=bias)
    W, _, V = logits.shape
    if bias is not None and (bias.shape not in ((V,), (W, V)) or not bias.is_floating_point()):
        raise ValueError(f"bias: expected floating {[V]} or {[W, V]}, got {bias.dtype} {list(bias.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: expected "mean" or "sum", got {reduction!r}')


def _cap(softcap, cap_after_bias):
    return "none" if softcap is None else "after" if cap_after_bias else "before"


def _shared_arguments(logits, bias, softcap, cap_after_bias, ignore_index, tile):
    """What every kernel that reads logits takes, by name."""
    return {
        "bias_ptr": bias,
        "T": logits.shape[1],
        "V": logits.shape[2],
        "stride_lw": logits.stride(0),
        "stride_lt": logits.stride(1),
        "stride_lv": logits.stride(2),
        "stride_bw": 0 if bias is None or bias.dim() == 1 else bias.stride(0),
        "softcap": 1.0 if softcap is None else float(softcap),
        "ignore_index": ignore_index,
        "CAP": _cap(softcap, cap_after_bias),
        **_tile_arguments(tile, logits.shape[2]),
    }


def _bias_cross_entropy_fwd(logits, targets, bias, softcap, cap_after_bias, ignore_index):
    """nll, lse, shift, sum; each [W, T]."""
    W, T, V = logits.shape
    targets, bias = _contiguous(targets, bias)
    nll, lse, shift, total = (torch.empty((W, T), dtype=torch.float32, device=logits.device) for _ in range(4))
    if W and T:
        tile = _config(T, V, logits.element_size())
        with torch.cuda.device_of(logits):
            _bias_cross_entropy_fwd_kernel[(W * triton.cdiv(T, tile.rows),)](
                logits_ptr=logits,
                targets_ptr=targets,
                nll_ptr=nll,
                lse_ptr=lse,
                shift_ptr=shift,
                sum_ptr=total,
                **_shared_arguments(logits, bias, softcap, cap_after_bias, ignore_index, tile),
            )
    return nll, lse, shift, total


def _bias_cross_entropy_bwd(
    logits, targets, bias, shift, total, dnll, dlse, softcap, cap_after_bias, ignore_index, dlogits, dbias_parts
):
    """Fills dlogits and dbias_parts [W, parts, V], either of which may be None. Without dnll: dlogits = softmax."""
    W, T, V = logits.shape
    targets, bias, dnll, dlse = _contiguous(targets, bias, dnll, dlse)
    tile = _config(T, V, logits.element_size())
    grid = (W * triton.cdiv(T, tile.part), triton.cdiv(V, tile.chunks * tile.cols))
    with torch.cuda.device_of(logits):
        _bias_cross_entropy_bwd_kernel[grid](
            logits_ptr=logits,
            targets_ptr=targets,
            shift_ptr=shift,
            sum_ptr=total,
            dnll_ptr=dnll,
            dlse_ptr=dlse,
            dlogits_ptr=dlogits,
            dbias_ptr=dbias_parts,
            PART=tile.part,
            **_shared_arguments(logits, bias, softcap, cap_after_bias, ignore_index, tile),
        )


def _sum_parts(parts, T, nll=None, targets=None, weights=None, ignore_index=-100, loss=None, mean=False):
    W, count, V = parts.shape
    dbias = torch.empty((W, V), dtype=torch.float32, device=parts.device)
    with torch.cuda.device_of(parts):
        _bias_cross_entropy_sum_kernel[(W, triton.cdiv(V, 1024))](
            parts_ptr=parts,
            nll_ptr=nll,
            targets_ptr=targets,
            weights_ptr=weights,
            loss_ptr=loss,
            dbias_ptr=dbias,
            T=T,
            V=V,
            ignore_index=ignore_index,
            MEAN=mean,
            parts=count,
            BLOCK_T=128,
            BLOCK_V=1024,
            num_warps=4,
            **_OPTIONS,
        )
    return dbias


class _BiasCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, bias, softcap, cap_after_bias, ignore_index):
        nll, lse, shift, total = _bias_cross_entropy_fwd(logits, targets, bias, softcap, cap_after_bias, ignore_index)
        ctx.save_for_backward(logits, targets, bias, shift, total)
        ctx.options = softcap, cap_after_bias, ignore_index
        return nll, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll, dlse):
        logits, targets, bias, shift, total = ctx.saved_tensors
        W, T, V = logits.shape
        dlogits = parts = dbias = None
        if ctx.needs_input_grad[0]:
            dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if ctx.needs_input_grad[2]:
            count = triton.cdiv(T, _config(T, V, logits.element_size()).part)
            parts = torch.empty((W, count, V), dtype=torch.float32, device=logits.device)
        if W and T:
            _bias_cross_entropy_bwd(logits, targets, bias, shift, total, dnll, dlse, *ctx.options, dlogits, parts)
        if parts is not None:
            dbias = _sum_parts(parts, T) if W and T else parts.new_zeros((W, V))
            dbias = (dbias.sum(0) if bias.dim() == 1 else dbias).to(bias.dtype)
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


@torch.no_grad()
def bias_cross_entropy_grad(
    logits, targets, bias=None, weights=None, *, softcap=None, cap_after_bias=False, ignore_index=-100, reduction="mean"
):
    """Weighted mean cross-entropy of each window and its gradient with respect to the window's bias, in one pass.

    With `reduction="sum"` and no bias, dbias is E - C: what the softmax expects of each token at the weighted positions
    minus what came. So E = dbias + `target_counts(targets, V, weights)`.

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
    count = triton.cdiv(T, tile.part)
    targets, bias, weights = _contiguous(targets, bias, weights)
    mean = reduction == "mean"
    parts = torch.empty((W, count, V), dtype=torch.float32, device=logits.device)
    if tile.chunks * tile.cols < V:  # a row exceeds the registers: read it twice
        if weights is not None:
            targets = targets.masked_fill(weights == 0, ignore_index)
        options = softcap, cap_after_bias, ignore_index
        nll, _, shift, total = _bias_cross_entropy_fwd(logits, targets, bias, *options)
        dnll = torch.ones_like(nll) if weights is None else weights
        _bias_cross_entropy_bwd(logits, targets, bias, shift, total, dnll, None, *options, None, parts)
    else:
        hits = torch.empty((W, T), dtype=torch.float32, device=logits.device)
        nll = None if count == 1 else torch.empty_like(hits)
        with torch.cuda.device_of(logits):
            _bias_cross_entropy_grad_kernel[(W * count,)](
                logits_ptr=logits,
                targets_ptr=targets,
                weights_ptr=weights,
                nll_ptr=nll,
                hits_ptr=hits,
                loss_ptr=loss,
                dbias_ptr=parts,
                MEAN=mean,
                WHOLE=count == 1,
                PART=tile.part,
                **_shared_arguments(logits, bias, softcap, cap_after_bias, ignore_index, tile),
            )
        if count == 1:
            return loss, parts.squeeze(1)
    return loss, _sum_parts(parts, T, nll, targets, weights, ignore_index, loss, mean)


# The contract


_CASES = (
    Case("one element", {"W": 1, "T": 1, "V": 1}),
    Case("two tokens", {"W": 2, "T": 3, "V": 2}),
    Case("no windows", {"W": 0, "T": 4, "V": 16}),
    Case("no positions", {"W": 2, "T": 0, "V": 16}),
    Case("primes", {"W": 3, "T": 7, "V": 61}),
    Case("below a tile", {"W": 2, "T": 3, "V": 127}, torch.bfloat16),
    Case("a tile", {"W": 2, "T": 4, "V": 1024}),
    Case("above a tile", {"W": 1, "T": 5, "V": 1025}, torch.bfloat16),
    Case("no bias", {"W": 2, "T": 5, "V": 64, "bias": None}),
    Case("shared bias", {"W": 3, "T": 5, "V": 64, "bias": "shared"}),
    Case("float16", {"W": 2, "T": 5, "V": 64}, torch.float16),
    Case("capped before the bias", {"W": 2, "T": 5, "V": 48, "softcap": 3.0}),
    Case("capped after the bias", {"W": 2, "T": 5, "V": 48, "softcap": 3.0, "cap_after_bias": True}),
    Case("capped without bias", {"W": 2, "T": 5, "V": 48, "softcap": 30.0, "bias": None}, torch.bfloat16),
    Case("strided", {"W": 3, "T": 5, "V": 37, "edit": "strided"}),
    Case("slice of a wider vocabulary", {"W": 2, "T": 5, "V": 40, "edit": "narrow"}, torch.bfloat16),
    Case("some ignored", {"W": 3, "T": 9, "V": 33, "edit": "some ignored"}),
    Case("another ignore index", {"W": 2, "T": 9, "V": 33, "edit": "some ignored", "ignore_index": 5}),
    Case("all ignored", {"W": 2, "T": 5, "V": 33, "edit": "all ignored"}),
    Case("rows that are NaN", {"W": 3, "T": 6, "V": 33, "edit": "poor rows"}),
    Case("banned tokens", {"W": 2, "T": 4, "V": 64, "edit": "banned"}),
    Case("logits of 1e4", {"W": 2, "T": 6, "V": 96, "scale": 1e4}),
    Case("two parts", {"W": 2, "T": 131, "V": 24}),
    Case("large vocabulary", {"W": 1, "T": 2, "V": 16411}),
    Case("large vocabulary, banned tokens", {"W": 1, "T": 2, "V": 40000, "edit": "banned"}, torch.bfloat16),
    *(
        Case(f"V {V} {str(dtype)[6:]}", {"W": 2**29 // (64 * V), "T": 64, "V": V}, dtype, production=True)
        for V in (1024, 4096, 8192)
        for dtype in (torch.bfloat16, torch.float32)
    ),
)
_GRAD_CASES = (
    *_CASES,
    Case("weights", {"W": 3, "T": 9, "V": 33, "weights": True}),
    Case("sums", {"W": 3, "T": 9, "V": 33, "weights": True, "reduction": "sum"}),
    Case("sums without bias", {"W": 2, "T": 9, "V": 33, "bias": None, "reduction": "sum"}, torch.bfloat16),
    Case("weights and ignored, two parts", {"W": 3, "T": 130, "V": 16, "weights": True, "edit": "some ignored"}),
    Case("weights, rows that are NaN", {"W": 4, "T": 6, "V": 33, "weights": True, "edit": "poor rows"}),
    Case("weights, large vocabulary", {"W": 3, "T": 3, "V": 16400, "weights": True, "softcap": 9.0}),
)


def _compilations(*, W, T, V, softcap=None, cap_after_bias=False, **_):
    """Forward, and backward to bias and logits."""
    kernels = _bias_cross_entropy_fwd_kernel, _bias_cross_entropy_bwd_kernel
    cap = _cap(softcap, cap_after_bias)
    return [compilation for kernel in kernels for compilation in _tile_compilations(kernel, T, V, CAP=cap)]


def _grad_compilations(*, W, T, V, softcap=None, cap_after_bias=False, **_):
    """Value and bias gradient in one pass, V that fits a tile."""
    constants = {"CAP": _cap(softcap, cap_after_bias), "weights_ptr": None, "nll_ptr": None}
    return _tile_compilations(_bias_cross_entropy_grad_kernel, T, V, **constants)


SPECS = (
    KernelSpec(
        name="bias_cross_entropy",
        fn=bias_cross_entropy,
        reference=bias_cross_entropy_ref,
        inputs=partial(_draw, bias="windows"),
        cases=_CASES,
        differentiable=("logits", "bias"),
        compilations=_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 8 + 16) + 4 * W * V,
        flops=lambda *, W, T, V, **_: 6 * W * T * V,
    ),
    KernelSpec(
        name="bias_cross_entropy_grad",
        fn=bias_cross_entropy_grad,
        reference=bias_cross_entropy_grad_ref,
        inputs=partial(_draw, bias="windows"),
        cases=_GRAD_CASES,
        compilations=_grad_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 8) + W * (8 * V + 4),
        flops=lambda *, W, T, V, **_: 8 * W * T * V,
    ),
)
