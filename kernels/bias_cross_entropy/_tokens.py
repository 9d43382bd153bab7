"""Kernels that take tokens one by one: nll and lse, and the gradients of logits and bias from those of nll and lse."""

from .._triton import _LN2, _LOG2E, tl, triton
from ._scores import _load_targets, _scores, _slope


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
        bias = None  # not from a helper: one that returns None does not compile before Triton 3.7.1
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_b, mask=offs_v < V, other=0.0).to(tl.float32)
        z = _scores(x, bias, softcap, CAP)  # (CHUNKS, ROWS, COLS)
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
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + window * stride_bw + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
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
