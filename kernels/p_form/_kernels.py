"""The kernels: target counts, and the evaluation of a bias, in one pass or in parts that a second one adds up."""

from .._triton import _LN2, _LOG2E, tl, triton


@triton.jit
def _target_counts_kernel(
    targets_ptr,
    weights_ptr,
    nll_ptr,
    counts_ptr,
    weights_out_ptr,
    total_ptr,
    base_loss_ptr,
    T,
    V,
    ignore_index,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """counts of one window and block of tokens; with nll, also the weights that count, their sum and the base loss."""
    window = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    counts = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float64)
    base_loss = tl.zeros((BLOCK_T,), tl.float64)
    for first in range(0, T, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        row = window * T + offs_t
        target = tl.load(targets_ptr + row, mask=offs_t < T, other=ignore_index)
        used = target != ignore_index
        w = used.to(tl.float32)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + row, mask=used, other=0.0)
            used &= w != 0
        hit = used[:, None] & (offs_v[None, :] == target[:, None])  # (BLOCK_T, BLOCK_V)
        counts += tl.sum(tl.where(hit, w[:, None], 0.0), axis=0)
        if nll_ptr is not None:
            w = tl.where(used & ((target < 0) | (target >= V)), float("nan"), w)
            total += w.to(tl.float64)
            nll = tl.load(nll_ptr + row, mask=used, other=0.0)
            base_loss += tl.where(used, w.to(tl.float64) * nll.to(tl.float64), 0.0)
            if tl.program_id(1) == 0:
                tl.store(weights_out_ptr + row, w, mask=offs_t < T)
    tl.store(counts_ptr + window * V + offs_v, counts, mask=offs_v < V)
    if (nll_ptr is not None) and (tl.program_id(1) == 0):
        tl.store(total_ptr + window, tl.sum(total, axis=0).to(tl.float32))
        tl.store(base_loss_ptr + window, tl.sum(base_loss, axis=0).to(tl.float32))


@triton.jit
def _finish(loss, dbias, bias, counts, shift, total, MEAN: tl.constexpr):
    """From sum_t weight log s and u * P^T (weight / s) to the results; dbias, bias, counts are (CHUNKS, COLS)."""
    bias = tl.where(bias == float("-inf"), 0.0, bias)  # columns beyond V
    dot = tl.sum(tl.sum(counts * bias, axis=0).to(tl.float64), axis=0)
    loss += total.to(tl.float64) * shift.to(tl.float64) - dot
    dbias -= counts
    if MEAN:
        scale = tl.where(total == 0, 0.0, 1.0 / total.to(tl.float64))
        loss *= scale
        dbias *= scale.to(tl.float32)
    return loss.to(tl.float32), dbias


@triton.jit
def _p_form_evaluate_kernel(
    probs_ptr,
    weights_ptr,
    counts_ptr,
    total_ptr,
    bias_ptr,
    log_s_ptr,
    loss_ptr,
    dbias_ptr,
    T,
    V,
    MEAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_V: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """PART rows of a window, each probability read once. WHOLE: they are the window; otherwise, sums go to scratch."""
    parts = tl.cdiv(T, PART)
    window = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    offs_v = tl.arange(0, CHUNKS)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]
    bias = tl.load(bias_ptr + window * V + offs_v, mask=offs_v < V, other=float("-inf"))
    shift = tl.max(tl.reshape(bias, (CHUNKS * COLS,)), axis=0)
    u = tl.exp2((bias - shift) * _LOG2E)  # (CHUNKS, 1, COLS)
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    loss = tl.zeros((ROWS,), tl.float64)
    for first in range(part * PART, min(part * PART + PART, T), ROWS):
        offs_t = first + tl.arange(0, ROWS)
        row = window * T + offs_t
        w = tl.load(weights_ptr + row, mask=offs_t < T, other=0.0)
        used = w != 0
        mask = used[None, :, None] if EVEN_V else used[None, :, None] & (offs_v < V)
        probs = tl.load(probs_ptr + row[None, :, None] * V + offs_v, mask=mask, other=0.0).to(tl.float32)
        s = tl.sum(tl.sum(probs * u, axis=0), axis=1)
        s = tl.where(used, s, 1.0)
        acc += probs * (w / s)[None, :, None]
        log_s = tl.log2(s) * _LN2
        if WHOLE:
            loss += w.to(tl.float64) * log_s.to(tl.float64)
        else:
            tl.store(log_s_ptr + row, log_s, mask=offs_t < T)
    offs_v = tl.arange(0, CHUNKS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    mask_v = offs_v < V
    bias = tl.load(bias_ptr + window * V + offs_v, mask=mask_v, other=float("-inf"))
    dbias = tl.sum(acc, axis=1) * tl.exp2((bias - shift) * _LOG2E)  # (CHUNKS, COLS)
    if WHOLE:
        counts = tl.load(counts_ptr + window * V + offs_v, mask=mask_v, other=0.0)
        total = tl.load(total_ptr + window)
        window_loss, dbias = _finish(tl.sum(loss, axis=0), dbias, bias, counts, shift, total, MEAN)
        tl.store(loss_ptr + window, window_loss)
    tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * V + offs_v, dbias, mask=mask_v)


@triton.jit
def _p_form_sum_kernel(
    parts_ptr,
    log_s_ptr,
    weights_ptr,
    counts_ptr,
    total_ptr,
    bias_ptr,
    loss_ptr,
    dbias_ptr,
    T,
    V,
    parts,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One window: its parts [W, parts, V] added in order, then what `_finish` does. V <= BLOCK_V."""
    window = tl.program_id(0).to(tl.int64)
    loss = tl.zeros((BLOCK_T,), tl.float64)
    for first in range(0, T, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        w = tl.load(weights_ptr + window * T + offs_t, mask=offs_t < T, other=0.0)
        log_s = tl.load(log_s_ptr + window * T + offs_t, mask=offs_t < T, other=0.0)
        loss += w.to(tl.float64) * log_s.to(tl.float64)
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    mask_v = offs_v < V
    dbias = tl.zeros((1, BLOCK_V), tl.float32)
    for part in range(0, parts):
        dbias += tl.load(parts_ptr + (window * parts + part) * V + offs_v, mask=mask_v, other=0.0)
    bias = tl.load(bias_ptr + window * V + offs_v, mask=mask_v, other=float("-inf"))
    counts = tl.load(counts_ptr + window * V + offs_v, mask=mask_v, other=0.0)
    shift = tl.max(tl.max(bias, axis=0), axis=0)
    total = tl.load(total_ptr + window)
    window_loss, dbias = _finish(tl.sum(loss, axis=0), dbias, bias, counts, shift, total, MEAN)
    tl.store(loss_ptr + window, window_loss)
    tl.store(dbias_ptr + window * V + offs_v, dbias, mask=mask_v)
