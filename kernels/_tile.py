"""Rows of V logits or probabilities in the registers of a program: launch parameters of the kernels that read them.

`bias_cross_entropy` and `p_form` hold a row in the same tile, so that one table says what the compiler makes of both.
"""

from typing import NamedTuple

from ._triton import triton
from .spec import Compilation


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
    | value and bias gradient  | 1024 | 127 / 124 | 12.6 / 11.5                                | 0               |
    |                          | 4096 | 127 / 128 | 12.3 / 10.9                                | 4               |
    |                          | 8192 | 127 / 124 | 12.4 / 11.2                                | 4               |
    | the same, softcap before | 1024 | 163 / 162 | 32.4 / 31.3, three of them on the MUFU     | 0               |
    | forward                  | 1024 |  56 /  76 | 9.2 / 8.1                                  | 0               |
    | backward                 | 1024 | 177 / 204 | 12.3 / 11.4                                | 0               |
    | P-form evaluation        | 1024 | 128 / 128 | 6.6 / 5.5                                  | 0               |
    """
    block_v = max(triton.next_power_of_2(V), 8)
    per_warp = 32 * 32
    warps_per_row = min(max(block_v // per_warp, 1), 16)  # unmeasured
    num_warps = max(4, warps_per_row)  # unmeasured
    block_v = min(block_v, warps_per_row * per_warp)
    cols = min(block_v, warps_per_row * 32 * 16 // itemsize)
    rows = min(num_warps * per_warp // block_v, 64, max(triton.next_power_of_2(max(T, 1)), 4))
    part = min(triton.next_power_of_2(max(T, 1)), 128)  # unmeasured
    return _Tile(block_v // cols, rows, cols, num_warps, part)


_OPTIONS = {"enable_fp_fusion": True}  # z * log2(e) - shift in one rounding


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
        types = {**pointers, **_TYPES, **dict.fromkeys(("logits_ptr", "dlogits_ptr", "probs_ptr"), narrow)}
        fixed = {"CAP": "none", "MEAN": True, "WHOLE": tile.part >= T, "PART": tile.part, "stride_lv": 1}
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
