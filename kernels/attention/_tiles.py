"""Launch parameters, and what the kernels share: which tiles a band covers, and rows of a tile in memory.

A group's heads are rows of one tile: row r of a key head is query r // GROUP of its head r % GROUP, so that keys are
read once for all heads that share them, and their gradients are summed within a program.
"""

from typing import NamedTuple

import torch

from .._triton import tl, triton


class _Launch(NamedTuple):
    BLOCK_M: int  # rows: queries of a group
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int


def _config(which: str, rows: int, D: int, dtype: torch.dtype) -> _Launch:
    """How to launch "forward", "dq", "dkv", "prepare" or "sink"; by rows T * group, width and type, never by B.

    Every figure is unmeasured: no GPU has run it. They are the largest tiles, of those tried, that Triton 3.9.0
    compiles for sm_90 without spills: forward 162 registers, dq 160, dkv 164; at D = 128 223, 244 and 246. float32 at
    D = 128 spills whatever the tile.
    """
    wide = D > 64
    if which in ("prepare", "sink"):
        return _Launch(32, 0, 4, 2)  # unmeasured
    if dtype == torch.float32:  # no tensor cores: multiply-adds, operands in registers
        launch = _Launch(32, 32, 4, 1)  # unmeasured
    elif which == "forward":
        launch = _Launch(128, 64, 8, 2 if wide else 3)  # unmeasured
    elif which == "dq":
        launch = _Launch(64, 32, 4, 2) if wide else _Launch(64, 64, 4, 3)  # unmeasured
    else:
        launch = _Launch(32, 128, 8, 2) if wide else _Launch(32, 64, 4, 3)  # unmeasured
    if which != "dkv" and rows <= 16:  # sampling: one token a call
        launch = launch._replace(BLOCK_M=16)
    return launch


_OPTIONS = {"enable_fp_fusion": True}  # score * scale - max in one rounding


def _constants(launch: _Launch, H: int, Hkv: int, D: int, S: int, dtype: torch.dtype, upcast: bool) -> dict:
    """Constants and options of a launch, by name, for whichever kernel takes them."""
    return {
        **launch._asdict(),
        "BLOCK_S": max(triton.next_power_of_2(S), 16),
        "BLOCK_D": max(triton.next_power_of_2(D), 16),  # 16: the least that a tensor core multiplies
        "D": D,
        "GROUP": H // Hkv,
        "UPCAST": upcast or dtype == torch.float32,
        **_OPTIONS,
    }


def _arguments(kernel, which: str, q: torch.Tensor, k: torch.Tensor, window: int, k_sink: torch.Tensor | None) -> dict:
    """What a launch of `kernel` takes but for pointers, by name."""
    (_, T, H, D), Hkv = q.shape, k.shape[2]
    S = 0 if k_sink is None else k_sink.shape[1]
    # Off the GPU this is Triton's interpreter, which does arithmetic on bf16 bits as if they were integers.
    launch = _config(which, T * H // Hkv, D, q.dtype)
    constants = _constants(launch, H, Hkv, D, S, q.dtype, not q.is_cuda)
    sizes = {"T": T, "C": k.shape[1] - T, "S": S, "Hkv": Hkv, "window": window, "scale": D**-0.5}
    options = ("num_warps", "num_stages", *_OPTIONS)
    return {name: x for name, x in (sizes | constants).items() if name in kernel.arg_names or name in options}


@triton.jit
def _cover(first, last, whole_first, whole_last, BLOCK: tl.constexpr):
    """Tiles of BLOCK from `first` on that cover [first, last): how many before, and how many within, the part
    [whole_first, whole_last) where nothing is masked; and how many there are."""
    total = tl.cdiv(tl.maximum(last - first, 0), BLOCK)
    before = tl.minimum(tl.cdiv(tl.maximum(whole_first - first, 0), BLOCK), total)
    within = tl.maximum(tl.minimum(whole_last, last) - (first + before * BLOCK), 0) // BLOCK
    return before, within, total


@triton.jit
def _in_band(own, key, band):
    """own - band < key <= own, by one comparison: a difference below 0 is a large unsigned number.

    Not own - key: Triton 3.6 makes bits of a mask of such differences, packs them before a product and unpacks them
    after it, which takes a seventh more instructions in the forward.
    """
    return (own + (-key)).to(tl.uint32) < band.to(tl.uint32)


@triton.jit
def _oldest_key(position_ptr, batch, C):
    """The first key that exists: slots of the cache before the stream's start hold none."""
    if position_ptr is None:
        return 0
    else:
        return tl.maximum(C - tl.load(position_ptr + batch), 0).to(tl.int32)


@triton.jit
def _row_offsets(rows, Hkv, D: tl.constexpr, GROUP: tl.constexpr):
    """Offsets of rows (M,) of one key head in [T, Hkv * GROUP, D], from that head's first: int64."""
    return (rows // GROUP).to(tl.int64) * (Hkv * (GROUP * D)) + rows % GROUP * D


@triton.jit
def _load(ptr, offs, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of D elements at `offs` (M,): (M, BLOCK_D), 0 where `mask` (M,) is false and beyond D."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + offs[:, None] + offs_d
    if D == BLOCK_D:
        x = tl.load(ptrs) if mask is None else tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        x = tl.load(ptrs, mask=offs_d < D if mask is None else mask[:, None] & (offs_d < D), other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store(ptr, offs, mask, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes rows x (M, BLOCK_D) at `offs` (M,) where `mask` (M,) is true."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptr + offs[:, None] + offs_d, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < D))


@triton.jit
def _own_direction(v_ptr, offs, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Values at `offs` (M,) over their length: (M, BLOCK_D); and 1 / length (M,). Lengths are 1e-12 at least."""
    v = _load(v_ptr, offs, mask, D, BLOCK_D, True)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), 1e-12)
    return v * inverse[:, None], inverse
