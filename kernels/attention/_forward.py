"""The forward: one pass over the keys of a tile of queries, with a running maximum and sum."""

from .._triton import _LOG2E, tl, triton
from ._tiles import _cover, _in_band, _load, _oldest_key, _own_direction, _row_offsets, _store


@triton.jit
def _meet(q, k, v, visible, top, total, acc, scale):
    """One tile of keys joins the softmax; `scale` is in base 2, `visible` (M, N) or None for all."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (M, N)
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    shift = new_top
    if visible is not None:  # a query that has seen no key yet
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale - shift[:, None])
    kept = tl.exp2(top - shift)
    total = total * kept + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=["T", "C", "S", "window"])
def _banded_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    q_sink_ptr,
    k_sink_ptr,
    v_sink_ptr,
    y_ptr,
    lse_ptr,
    along_ptr,
    T,
    C,
    S,
    Hkv,
    stride_q,
    window,
    scale,
    EXCLUDE_OWN: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y, lse (base 2) and, with EXCLUDE_OWN, o . n, of BLOCK_M rows of one key head.

    `stride_q`: elements from one position's queries to the next one's, of q alone; q_sink and y are contiguous.
    """
    tiles = tl.cdiv(T * GROUP, BLOCK_M)
    head = tl.program_id(0) // tiles  # of all sequences
    batch = (head // Hkv).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < T * GROUP
    first_t = tl.program_id(0) % tiles * BLOCK_M // GROUP
    last_t = tl.minimum((tl.program_id(0) % tiles * BLOCK_M + BLOCK_M - 1) // GROUP, T - 1)
    own = C + rows // GROUP  # (BLOCK_M,)
    offs_q = ((batch * T * Hkv + head % Hkv) * GROUP) * D + _row_offsets(rows, Hkv, D, GROUP)
    offs_n = tl.arange(0, BLOCK_N)
    step = Hkv * D
    keys = (batch * (C + T) * Hkv + head % Hkv) * D  # offset of the head's first key
    scale *= _LOG2E

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    if q_sink_ptr is not None:
        offs_s = tl.arange(0, BLOCK_S)
        behind = tl.load(position_ptr + batch) - (window - 1)  # sinks that have left the band of query 0
        mask_s = (offs_s < S) & (offs_s < behind + last_t)
        sinks = (batch * S * Hkv + head % Hkv) * D + offs_s.to(tl.int64) * step
        left = behind + rows // GROUP
        q_sink = _load(q_sink_ptr, offs_q, mask_m & (left > 0), D, BLOCK_D, UPCAST)
        k_sink = _load(k_sink_ptr, sinks, mask_s, D, BLOCK_D, UPCAST)
        v_sink = _load(v_sink_ptr, sinks, mask_s, D, BLOCK_D, UPCAST)
        left_band = (offs_s[None, :] < left[:, None]) & (offs_s < S)[None, :]
        top, total, acc = _meet(q_sink, k_sink, v_sink, left_band, top, total, acc, scale)

    of_q = batch * T * stride_q + (rows // GROUP).to(tl.int64) * stride_q + (head % Hkv * GROUP + rows % GROUP) * D
    q = _load(q_ptr, of_q, mask_m, D, BLOCK_D, UPCAST)
    band = tl.minimum(window, C + T)
    first = tl.maximum(C + first_t - band + 1, _oldest_key(position_ptr, batch, C))
    end = C + last_t + 1
    before, within, tiles_n = _cover(first, end, C + last_t - band + 1, C + first_t + 1, BLOCK_N)
    for i in range(0, tiles_n - within):  # the band's two edges
        start = first + (i + tl.where(i < before, 0, within)) * BLOCK_N
        tile = start.to(tl.int64) * step + keys
        k = _load(k_ptr + tile, offs_n * step, offs_n < end - start, D, BLOCK_D, UPCAST)
        v = _load(v_ptr + tile, offs_n * step, offs_n < end - start, D, BLOCK_D, UPCAST)
        visible = _in_band(own[:, None] - start, offs_n[None, :], band)
        top, total, acc = _meet(q, k, v, visible, top, total, acc, scale)
    for i in range(before, before + within):
        tile = (first + i * BLOCK_N).to(tl.int64) * step + keys
        k = _load(k_ptr + tile, offs_n * step, None, D, BLOCK_D, UPCAST)
        v = _load(v_ptr + tile, offs_n * step, None, D, BLOCK_D, UPCAST)
        top, total, acc = _meet(q, k, v, None, top, total, acc, scale)

    out = acc / total[:, None]
    offs_r = head.to(tl.int64) * T * GROUP + rows
    if EXCLUDE_OWN:
        n = _own_direction(v_ptr, keys + own.to(tl.int64) * step, mask_m, D, BLOCK_D)[0]
        along = tl.sum(out * n, axis=1)
        out -= along[:, None] * n
        tl.store(along_ptr + offs_r, along, mask=mask_m)
    _store(y_ptr, offs_q, mask_m, out, D, BLOCK_D)
    tl.store(lse_ptr + offs_r, top + tl.log2(total), mask=mask_m)
