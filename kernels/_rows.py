"""Rows of V logits in the registers of a program: tiles, scores, and the launches of the kernels that read logits."""

from typing import NamedTuple

import torch

from ._triton import _LOG2E, _launch, tl, triton
from .spec import Compilation

# Tiles


class _Tile(NamedTuple):
    """A tile holds (CHUNKS, ROWS, COLS) logits: CHUNKS * COLS columns of ROWS rows."""

    chunks: int
    rows: int
    cols: int
    num_warps: int
    part: int  # rows of a window that one program sums, a power of 2


def _config(T, V, itemsize):
    """Tile and warps, by shape alone: never by the number of windows.

    Triton hands out columns of 16 bytes a lane to as many warps as COLS has room for, then rows. So COLS says how many
    warps share a row, and what is left of the row, CHUNKS, stays within each thread: reductions over it are free.
    32 logits of a row in each thread: few enough for logits, bias and gradient sums to stay in registers.

    Compiled for sm_90 by Triton 3.9.0 (static counts, not timings; bf16 / fp32; nothing spills):

    | kernel                   | V    | registers | SASS instructions a logit, in the row loop | barriers a trip |
    |--------------------------|------|-----------|--------------------------------------------|-----------------|
    | value and bias gradient  | 1024 | 128 / 127 | 9.7 / 8.7                                  | 0               |
    |                          | 4096 | 128 / 126 | 10.3 / 9.2                                 | 4               |
    |                          | 8192 | 128 / 128 | 10.4 / 9.4                                 | 4               |
    | the same, logits capped  | 1024 | 166 / 156 | 28.8 / 27.8, three of them on the MUFU     | 0               |
    | forward                  | 1024 |  64 /  82 | 9.0 / 8.1                                  | 0               |
    | backward                 | 1024 |  96 / 124 | 10.3 / 8.7                                 | 0               |
    """
    block_v = max(triton.next_power_of_2(V), 8)
    per_warp = 32 * 32
    warps_per_row = min(max(block_v // per_warp, 1), 16)  # unmeasured
    num_warps = max(4, warps_per_row)  # unmeasured
    block_v = min(block_v, warps_per_row * per_warp)
    cols = min(block_v, warps_per_row * 32 * 16 // itemsize)
    rows = min(num_warps * per_warp // block_v, 64, max(triton.next_power_of_2(max(T, 1)), 4))
    part = min(max(triton.next_power_of_2(max(T, 1)), 4), 128)  # not less than rows; unmeasured
    return _Tile(block_v // cols, rows, cols, num_warps, part)


# Memory sees a tile as (CHUNKS * ROWS, COLS): Triton before 3.7.1 lays out a load of three dimensions in another order
# (all warps along CHUNKS, so that every row is spread over all of them: two to six times the instructions). A reshape
# between the two moves nothing.


@triton.jit
def _tile_rows(CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """Row of the tile that each of its two-dimensional form belongs to: (CHUNKS * ROWS,)."""
    return tl.arange(0, CHUNKS * ROWS) % ROWS


@triton.jit
def _tile_columns(CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Column of each element of the two-dimensional form: (CHUNKS * ROWS, COLS)."""
    return (tl.arange(0, CHUNKS * ROWS) // ROWS * COLS)[:, None] + tl.arange(0, COLS)[None, :]


@triton.jit
def _columns(CHUNKS: tl.constexpr, COLS: tl.constexpr):
    return tl.arange(0, CHUNKS)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]  # (CHUNKS, 1, COLS)


@triton.jit
def _repeat(x, CHUNKS: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS,) for the rows of the two-dimensional form: (CHUNKS * ROWS,)."""
    return tl.reshape(tl.broadcast_to(x[None, :], (CHUNKS, ROWS)), (CHUNKS * ROWS,))


@triton.jit
def _fold(x, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.reshape(x, (CHUNKS, ROWS, COLS))


@triton.jit
def _row_sum(x):
    """(CHUNKS, ROWS, COLS) -> (ROWS,)"""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def _row_max(x):
    return tl.max(tl.max(x, axis=0), axis=1)


@triton.jit
def _load_logits(
    ptr,
    first,
    column,
    used,
    V,
    stride_lt,
    stride_lv,
    EVEN_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Logits of ROWS rows from `first` on and CHUNKS * COLS columns from `column` on; rows not `used` are not read."""
    offs_t = first + _tile_rows(CHUNKS, ROWS)
    offs_v = column + _tile_columns(CHUNKS, ROWS, COLS)
    mask = _repeat(used, CHUNKS, ROWS)[:, None]
    mask = mask if EVEN_V else mask & (offs_v < V)
    ptrs = ptr + offs_t.to(tl.int64)[:, None] * stride_lt + offs_v.to(tl.int64) * stride_lv
    return _fold(tl.load(ptrs, mask=mask, other=0.0), CHUNKS, ROWS, COLS)


# Scores: what every kernel here does with a logit


@triton.jit
def _softcap(a, softcap):
    """softcap * tanh(a / softcap) to 2 ulp, whether or not a launch allows fusion.

    1 - 2 / (exp(2x) + 1) cancels near 0; there an odd polynomial, fitted by least squares, takes over.
    """
    inverse = 1.0 / softcap
    y = a * a * (inverse * inverse)
    q = tl.fma(y, -0.005893945302384097, 0.020794617709385475)
    q = tl.fma(q, y, -0.05378329300012262)
    q = tl.fma(q, y, 0.13331915298812771)
    q = tl.fma(q, y, -0.33333297510128557)
    far = softcap - 2.0 * softcap / (tl.exp2(a * (inverse * (2.0 * _LOG2E))) + 1.0)
    return tl.where(y < 0.36, tl.fma(a * y, q, a), far)


@triton.jit
def _scores(x, bias, softcap, CAP: tl.constexpr):
    z = x.to(tl.float32)
    if CAP == "logits":
        z = _softcap(z, softcap)
    if bias is not None:
        z += bias
    if CAP == "sum":
        z = _softcap(z, softcap)
    return z


@triton.jit
def _slope(z, softcap):
    """Derivative of softcap * tanh(a / softcap), from its value."""
    t = z * (1.0 / softcap)
    return 1.0 - t * t


@triton.jit
def _load_targets(targets_ptr, window, offs_t, T, V, ignore_index):
    """Targets that are safe to gather with; which positions count; which of those name no token of the vocabulary."""
    target = tl.load(targets_ptr + window * T + offs_t, mask=offs_t < T, other=ignore_index)
    used = target != ignore_index
    bad = used & ((target < 0) | (target >= V))
    return tl.where(used & (target >= 0) & (target < V), target, 0).to(tl.int32), used, bad


# Windows in parts, where T exceeds what one program sums


@triton.jit
def _sum_parts_kernel(
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

_OPTIONS = {"enable_fp_fusion": True}  # z * log2(e) - shift in one rounding


def _cap(softcap, cap_after_bias):
    """What is capped: the logits, their sum with the bias, or nothing."""
    return None if softcap is None else "sum" if cap_after_bias else "logits"


def _tile_arguments(tile, V):
    """What every launch over tiles takes, by name."""
    return {
        # No mask over columns; also asks for the divisibility that wide loads need.
        "EVEN_V": V % (tile.chunks * tile.cols) == 0,
        "CHUNKS": tile.chunks,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "num_warps": tile.num_warps,
        **_OPTIONS,
    }


def _score_arguments(logits, bias, options, tile):
    """What every launch over logits takes, by name; `options` are softcap, cap_after_bias, ignore_index."""
    _, T, V = logits.shape
    softcap, cap_after_bias, ignore_index = options
    return {
        "bias_ptr": bias,
        "T": T,
        "V": V,
        "stride_lw": logits.stride(0),
        "stride_lt": logits.stride(1),
        "stride_lv": logits.stride(2),
        "stride_bw": 0 if bias is None or bias.dim() == 1 else bias.stride(0),
        "softcap": 1.0 if softcap is None else float(softcap),  # not read where CAP is None; a launch needs a number
        "ignore_index": ignore_index,
        "CAP": _cap(softcap, cap_after_bias),
        **_tile_arguments(tile, V),
    }


def _empty_parts(logits):
    """Where the parts of each window's dbias go: [W, parts, V]."""
    W, T, V = logits.shape
    count = triton.cdiv(T, _config(T, V, logits.element_size()).part)
    return torch.empty((W, count, V), dtype=torch.float32, device=logits.device)


def _sum_parts(parts, T, nll=None, targets=None, weights=None, ignore_index=-100, loss=None, mean=False):
    W, count, V = parts.shape
    dbias = torch.empty((W, V), dtype=torch.float32, device=parts.device)
    _launch(
        _sum_parts_kernel,
        (W, triton.cdiv(V, 1024)),
        "bias_cross_entropy",
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


# Compilations of the specs

_TYPES = {
    "bias_ptr": "*fp32",
    "targets_ptr": "*i64",
    "T": "i32",
    "V": "i32:16",
    "stride_lw": "i32:16",
    "stride_lt": "i32:16",
    "stride_bw": "i32:16",
    "softcap": "fp32",
    "ignore_index": "i32",
    "parts": "i32",
}


def _tile_compilations(kernel, T, V, **given):
    """Launches on contiguous bfloat16 and float32, with a bias for each window; `given` are constants."""
    found = []
    pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    for narrow, itemsize in (("*bf16", 2), ("*fp32", 4)):
        tile = _config(T, V, itemsize)
        types = {**pointers, **_TYPES, **dict.fromkeys(("logits_ptr", "dlogits_ptr"), narrow)}
        fixed = {"CAP": None, "MEAN": True, "WHOLE": tile.part >= T, "PART": tile.part, "stride_lv": 1}
        fixed |= {**_tile_arguments(tile, V), **given}
        found.append(
            Compilation(
                kernel,
                signature={name: types[name] for name in kernel.arg_names if name in types and name not in fixed},
                constexprs={name: fixed[name] for name in kernel.arg_names if name in fixed},
                num_warps=tile.num_warps,
                elements=tile.chunks * tile.rows * tile.cols,
                options=_OPTIONS,
            )
        )
    return found
