"""The backward: what each row's gradient is multiplied with, then dq row by row and dk, dv key by key; no atomics."""

from .._triton import _LOG2E, tl, triton
from ._tiles import _cover, _in_band, _load, _oldest_key, _own_direction, _row_offsets, _store


@triton.jit(do_not_specialize=["T", "C"])
def _banded_attention_prepare_kernel(
    v_ptr,
    y_ptr,
    dy_ptr,
    along_ptr,
    do_ptr,
    delta_ptr,
    dv_own_ptr,
    T,
    C,
    Hkv,
    EXCLUDE_OWN: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = do . o of BLOCK_M queries; with EXCLUDE_OWN also do, and what dv gets through n.

    y = o - (o . n) n, so do = dy - (dy . n) n and dn = -(dy . n) o - (o . n) dy.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // tiles
    batch = (head // Hkv).to(tl.int64)
    offs_t = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_t = offs_t < T
    base = ((batch * T * Hkv + head % Hkv) * GROUP) * D
    if EXCLUDE_OWN:
        offs_v = (batch * (C + T) * Hkv + head % Hkv) * D + (C + offs_t).to(tl.int64) * (Hkv * D)
        n, inverse = _own_direction(v_ptr, offs_v, mask_t, D, BLOCK_D)
        dn = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for g in range(GROUP):
        rows = offs_t * GROUP + g
        offs_q = base + _row_offsets(rows, Hkv, D, GROUP)
        offs_r = head.to(tl.int64) * T * GROUP + rows
        o = _load(y_ptr, offs_q, mask_t, D, BLOCK_D, True)
        do = _load(dy_ptr, offs_q, mask_t, D, BLOCK_D, True)
        if EXCLUDE_OWN:
            along = tl.load(along_ptr + offs_r, mask=mask_t, other=0.0)
            o += along[:, None] * n
            slope = tl.sum(do * n, axis=1)
            dn -= slope[:, None] * o + along[:, None] * do
            do -= slope[:, None] * n
            _store(do_ptr, offs_q, mask_t, do, D, BLOCK_D)
        tl.store(delta_ptr + offs_r, tl.sum(do * o, axis=1), mask=mask_t)
    if EXCLUDE_OWN:
        # The length's own derivative, where it is not cut off at 1e-12
        turned = tl.where(inverse < 9e11, tl.sum(dn * n, axis=1), 0.0)
        dv = (dn - turned[:, None] * n) * inverse[:, None]
        _store(dv_own_ptr, (batch * T * Hkv + head % Hkv) * D + offs_t.to(tl.int64) * (Hkv * D), mask_t, dv, D, BLOCK_D)


@triton.jit
def _slopes(left, right, left_do, right_v, lse, delta, visible, scale):
    """Probabilities of a tile, and the gradient of its scores: rows by keys, or with sides exchanged keys by rows."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee")
    p = tl.exp2(scores * scale - lse)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    return p, p * (tl.dot(left_do, tl.trans(right_v), input_precision="ieee") - delta)


@triton.jit(do_not_specialize=["T", "C", "S", "window"])
def _banded_attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    q_sink_ptr,
    k_sink_ptr,
    v_sink_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dq_sink_ptr,
    sink_parts_ptr,
    T,
    C,
    S,
    Hkv,
    window,
    scale,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dq and dq_sink of BLOCK_M rows of one key head, and their part of the sinks' dk and dv."""
    tiles = tl.cdiv(T * GROUP, BLOCK_M)
    head = tl.program_id(0) // tiles
    batch = (head // Hkv).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < T * GROUP
    first_t = tl.program_id(0) % tiles * BLOCK_M // GROUP
    last_t = tl.minimum((tl.program_id(0) % tiles * BLOCK_M + BLOCK_M - 1) // GROUP, T - 1)
    own = C + rows // GROUP
    offs_q = ((batch * T * Hkv + head % Hkv) * GROUP) * D + _row_offsets(rows, Hkv, D, GROUP)
    offs_r = head.to(tl.int64) * T * GROUP + rows
    offs_n = tl.arange(0, BLOCK_N)
    step = Hkv * D
    keys = (batch * (C + T) * Hkv + head % Hkv) * D
    do = _load(do_ptr, offs_q, mask_m, D, BLOCK_D, UPCAST)
    lse = tl.load(lse_ptr + offs_r, mask=mask_m, other=0.0)[:, None]
    delta = tl.load(delta_ptr + offs_r, mask=mask_m, other=0.0)[:, None]

    if q_sink_ptr is not None:
        offs_s = tl.arange(0, BLOCK_S)
        behind = tl.load(position_ptr + batch) - (window - 1)
        mask_s = (offs_s < S) & (offs_s < behind + last_t)
        sinks = (batch * S * Hkv + head % Hkv) * D + offs_s.to(tl.int64) * step
        left = behind + rows // GROUP
        q_sink = _load(q_sink_ptr, offs_q, mask_m & (left > 0), D, BLOCK_D, UPCAST)
        k_sink = _load(k_sink_ptr, sinks, mask_s, D, BLOCK_D, UPCAST)
        v_sink = _load(v_sink_ptr, sinks, mask_s, D, BLOCK_D, UPCAST)
        left_band = (offs_s[None, :] < left[:, None]) & (offs_s < S)[None, :]
        p_sink, ds_sink = _slopes(q_sink, k_sink, do, v_sink, lse, delta, left_band, scale * _LOG2E)
        dq_sink = tl.dot(ds_sink.to(k_sink.dtype), k_sink, input_precision="ieee") * scale
        _store(dq_sink_ptr, offs_q, mask_m, dq_sink, D, BLOCK_D)
        dk_sink = tl.dot(tl.trans(ds_sink.to(q_sink.dtype)), q_sink, input_precision="ieee") * scale
        dv_sink = tl.dot(tl.trans(p_sink.to(do.dtype)), do, input_precision="ieee")
        offs_p = tl.program_id(0).to(tl.int64) * (2 * S * D) + offs_s * D
        _store(sink_parts_ptr, offs_p, offs_s < S, dk_sink, D, BLOCK_D)
        _store(sink_parts_ptr + S * D, offs_p, offs_s < S, dv_sink, D, BLOCK_D)

    q = _load(q_ptr, offs_q, mask_m, D, BLOCK_D, UPCAST)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    band = tl.minimum(window, C + T)
    first = tl.maximum(C + first_t - band + 1, _oldest_key(position_ptr, batch, C))
    end = C + last_t + 1
    before, within, tiles_n = _cover(first, end, C + last_t - band + 1, C + first_t + 1, BLOCK_N)
    for i in range(0, tiles_n - within):
        start = first + (i + tl.where(i < before, 0, within)) * BLOCK_N
        tile = start.to(tl.int64) * step + keys
        k = _load(k_ptr + tile, offs_n * step, offs_n < end - start, D, BLOCK_D, UPCAST)
        v = _load(v_ptr + tile, offs_n * step, offs_n < end - start, D, BLOCK_D, UPCAST)
        visible = _in_band(own[:, None] - start, offs_n[None, :], band)
        _, ds = _slopes(q, k, do, v, lse, delta, visible, scale * _LOG2E)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    for i in range(before, before + within):
        tile = (first + i * BLOCK_N).to(tl.int64) * step + keys
        k = _load(k_ptr + tile, offs_n * step, None, D, BLOCK_D, UPCAST)
        v = _load(v_ptr + tile, offs_n * step, None, D, BLOCK_D, UPCAST)
        _, ds = _slopes(q, k, do, v, lse, delta, None, scale * _LOG2E)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    _store(dq_ptr, offs_q, mask_m, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "C", "window"])
def _banded_attention_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dv_own_ptr,
    dk_ptr,
    dv_ptr,
    T,
    C,
    Hkv,
    window,
    scale,
    UPCAST: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one head, summed over the rows that see them; 0 for keys that none sees."""
    tiles = tl.cdiv(C + T, BLOCK_N)
    head = tl.program_id(0) // tiles
    batch = (head // Hkv).to(tl.int64)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    key = first_key + tl.arange(0, BLOCK_N)
    band = tl.minimum(window, C + T)
    mask_n = key < C + T
    seen = mask_n & (key >= tl.maximum(C - band + 1, _oldest_key(position_ptr, batch, C)))
    offs_k = (batch * (C + T) * Hkv + head % Hkv) * D + key.to(tl.int64) * (Hkv * D)
    k = _load(k_ptr, offs_k, seen, D, BLOCK_D, UPCAST)
    v = _load(v_ptr, offs_k, seen, D, BLOCK_D, UPCAST)
    base_q = ((batch * T * Hkv + head % Hkv) * GROUP) * D
    base_r = head.to(tl.int64) * T * GROUP
    offs_m = tl.arange(0, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)

    first = tl.maximum(first_key - C, 0) * GROUP
    end = tl.minimum(first_key + BLOCK_N - C + band - 1, T) * GROUP
    whole_first = tl.maximum(first_key + BLOCK_N - 1 - C, 0) * GROUP
    before, within, tiles_m = _cover(first, end, whole_first, (first_key - C + band) * GROUP, BLOCK_M)
    for i in range(0, tiles_m - within):
        rows = first + (i + tl.where(i < before, 0, within)) * BLOCK_M + offs_m
        mask_m = rows < end
        own = C + rows // GROUP
        offs_q = base_q + _row_offsets(rows, Hkv, D, GROUP)
        q = _load(q_ptr, offs_q, mask_m, D, BLOCK_D, UPCAST)
        do = _load(do_ptr, offs_q, mask_m, D, BLOCK_D, UPCAST)
        lse = tl.load(lse_ptr + base_r + rows, mask=mask_m, other=0.0)[None, :]
        delta = tl.load(delta_ptr + base_r + rows, mask=mask_m, other=0.0)[None, :]
        visible = _in_band(own[None, :], key[:, None], band)  # and rows past the end add nothing: theirs is all 0
        p, ds = _slopes(k, q, v, do, lse, delta, visible, scale * _LOG2E)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    for i in range(before, before + within):
        rows = first + i * BLOCK_M + offs_m
        offs_q = base_q + _row_offsets(rows, Hkv, D, GROUP)
        q = _load(q_ptr, offs_q, None, D, BLOCK_D, UPCAST)
        do = _load(do_ptr, offs_q, None, D, BLOCK_D, UPCAST)
        lse = tl.load(lse_ptr + base_r + rows)[None, :]
        delta = tl.load(delta_ptr + base_r + rows)[None, :]
        p, ds = _slopes(k, q, v, do, lse, delta, None, scale * _LOG2E)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

    # What a key that none sees was given in a tile that is not masked, is dropped
    dk = tl.where(seen[:, None], dk * scale, 0.0)
    dv = tl.where(seen[:, None], dv, 0.0)
    if dv_own_ptr is not None:
        offs_own = (batch * T * Hkv + head % Hkv) * D + (key - C).to(tl.int64) * (Hkv * D)
        dv += _load(dv_own_ptr, offs_own, mask_n & (key >= C), D, BLOCK_D, False)
    _store(dk_ptr, offs_k, mask_n, dk, D, BLOCK_D)
    _store(dv_ptr, offs_k, mask_n, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=["S", "parts"])
def _banded_attention_sink_kernel(
    sink_parts_ptr,
    dk_ptr,
    dv_ptr,
    S,
    Hkv,
    parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The sinks' dk and dv of one key head: the sum of its parts, in order."""
    head = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    part = sink_parts_ptr + head.to(tl.int64) * parts * (2 * S * D)
    dk = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for _ in range(parts):
        dk += _load(part, offs_s * D, offs_s < S, D, BLOCK_D, False)
        dv += _load(part + S * D, offs_s * D, offs_s < S, D, BLOCK_D, False)
        part += 2 * S * D
    offs = ((head // Hkv).to(tl.int64) * S * Hkv + head % Hkv) * D + offs_s.to(tl.int64) * (Hkv * D)
    _store(dk_ptr, offs, offs_s < S, dk, D, BLOCK_D)
    _store(dv_ptr, offs, offs_s < S, dv, D, BLOCK_D)
