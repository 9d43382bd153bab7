"""Kernels that take windows as a whole: loss and bias gradient in one pass, and the sum of a window's parts."""

from .._triton import _LN2, _LOG2E, tl, triton
from ._scores import _load_targets, _scores, _slope


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
