"""Launch parameters and kernels: the product, the sum of its splits along K, and dequantising."""

from typing import NamedTuple

import torch

from .._triton import tl, triton
from ._packing import GROUPS, _cdiv

# Launch parameters


class _Launch(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int
    num_warps: int
    num_stages: int


def _config(m: int, n: int, k: int, group: int, dtype: torch.dtype, cached: bool = False) -> _Launch | None:
    """How to launch the fused kernel, or None where the library's product with dequantised weights is the choice.

    Every figure below is unmeasured: no GPU has run it. Where a choice rests on a compilation, the comment gives what
    that showed: sm_90, bf16, Triton 3.9.0, instructions of the whole hot loop per weight, nothing spilled; printed by
    `python -m bench.static_report --kernel int6_matmul` in slotfast's repository.
    """
    if m > (64 if cached else 256):  # unmeasured
        return None
    if dtype == torch.float32:
        # No tensor cores: multiply-adds, operands in registers. unmeasured
        block_m, block_n, block_k, num_warps, num_stages = 16, 32, 32, 4, 2
    else:
        # 64 rows of weights are the least that a Hopper warpgroup multiplies.
        block_m, block_n, num_warps = (16 if m <= 16 else 32 if m <= 32 else 64), 64, 4
        # 16 x 64 x 256: 3.9 instructions a weight, 170 registers. With BLOCK_K 128: 4.7 and 64, so more programs at a
        # time and finer splits, for the matrices that are too small to fill the machine. unmeasured
        block_k, num_stages = (256, 3) if m <= 16 and k >= 2048 else (128, 4)
    if group in GROUPS:
        block_k = min(block_k, group)  # so that a tile has one scale a row
    # Split K until there are two programs for each of 132 multiprocessors, while every one has a tile to do. unmeasured
    tiles = _cdiv(m, block_m) * _cdiv(n, block_n)
    split_k = max(1, min(8, 264 // tiles, _cdiv(k, block_k)))
    return _Launch(block_m, block_n, block_k, split_k, num_warps, num_stages)


# Kernels

# The masks of the unpacking are arguments of the kernels, not constants. As constants, ptxas reloads one for every use
# (a LOP3 takes a single immediate) and LLVM rewrites the bit-select into two operations: 4.5 instead of 3.9
# instructions a weight in the whole hot loop (sm_90, bf16, 64 x 256 tile, Triton 3.9.0).
_MASKS = {"nibbles": 0x0F0F0F0F, "sextets": 0x003F003F}


@triton.jit
def _unpack(low_0, low_1, high, nibbles, sextets, IS_BF16: tl.constexpr, OUT_T: tl.constexpr):
    """Words of R runs -> their 16 R codes in [-32, 31], in OUT_T. All words (BLOCK_N, R) int32."""
    # In each byte: bits 0-3 from one plane, 4-5 from the other, 6-7 junk. a ^ ((a ^ b) & mask) is b where mask is set.
    a = high << 4
    u0 = a ^ ((a ^ low_0) & nibbles)
    a = high << 2
    u1 = a ^ ((a ^ (low_0 >> 4)) & nibbles)
    u2 = high ^ ((high ^ low_1) & nibbles)
    a = high >> 2
    u3 = a ^ ((a ^ (low_1 >> 4)) & nibbles)
    # join appends the fastest dimension: i as (2, 2), then even or odd bytes, then the halves of a word.
    u = tl.join(tl.join(u0, u2), tl.join(u1, u3))
    u = tl.join(u, u >> 8)
    u = (u & sextets) | (0x43004300 if IS_BF16 else 0x64006400)
    u = tl.join(u.to(tl.int16), (u >> 16).to(tl.int16))
    u = u.reshape(high.shape[0], high.shape[1] * 16)
    if IS_BF16:
        return u.to(tl.bfloat16, bitcast=True).to(OUT_T) - (128 + 32)
    else:
        return u.to(tl.float16, bitcast=True).to(OUT_T) - (1024 + 32)


@triton.jit
def _load_words(low_rows, high_rows, first_run, n_runs, RUNS: tl.constexpr, MASKED: tl.constexpr):
    """The three words of each of RUNS runs, for rows given as pointers (BLOCK_N, 1)."""
    runs = first_run + tl.arange(0, RUNS)[None, :]
    low_ptrs = low_rows + (runs // 8 * 16 + runs % 8)
    if MASKED:
        mask = runs < n_runs
        low_0 = tl.load(low_ptrs, mask=mask, other=0)
        low_1 = tl.load(low_ptrs + 8, mask=mask, other=0)
        high = tl.load(high_rows + runs, mask=mask, other=0)
    else:
        low_0 = tl.load(low_ptrs)
        low_1 = tl.load(low_ptrs + 8)
        high = tl.load(high_rows + runs)
    return low_0, low_1, high  # (BLOCK_N, RUNS) each


@triton.jit
def _int6_matmul_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    K,
    n_blocks,
    n_groups,
    stride_xm,
    stride_xk,
    nibbles,
    sextets,
    GROUP: tl.constexpr,  # 0: one scale a row
    TAIL: tl.constexpr,  # K is not a multiple of BLOCK_K
    UPCAST: tl.constexpr,  # multiply in fp32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """out[s] = (every SPLIT_K-th tile of K, from tile s on, of x @ W^T), as [SPLIT_K, M, N]."""
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    mask_m = offs_m < M
    X_T: tl.constexpr = x_ptr.dtype.element_ty
    DOT_T: tl.constexpr = tl.float32 if UPCAST else X_T

    # Rows past the end repeat the last one: loads need no mask, and the store drops them.
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    low_rows = low_ptr + rows[:, None] * (n_blocks * 16)  # strides as multiples of 16 words: seen to be aligned
    high_rows = high_ptr + rows[:, None] * (n_blocks * 8)
    x_rows = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm

    # W is the left operand: its rows fill the long side of the tensor-core tile, however few rows x has.
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(pid_k * BLOCK_K, K, SPLIT_K * BLOCK_K):
        low_0, low_1, high = _load_words(low_rows, high_rows, k // 16, n_blocks * 8, BLOCK_K // 16, TAIL)
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = mask_m[None, :] & (offs_k < K)[:, None] if TAIL else mask_m[None, :]
        x = tl.load(x_rows + offs_k.to(tl.int64)[:, None] * stride_xk, mask=mask, other=0.0)  # (BLOCK_K, BLOCK_M)
        w = _unpack(low_0, low_1, high, nibbles, sextets, X_T == tl.bfloat16, DOT_T)  # (BLOCK_N, BLOCK_K)
        if GROUP:
            scale = tl.load(scale_ptr + rows * n_groups + k // GROUP).to(tl.float32)
            acc += tl.dot(w, x.to(DOT_T), input_precision="ieee") * scale[:, None]
        else:
            acc = tl.dot(w, x.to(DOT_T), acc, input_precision="ieee")
    if GROUP == 0:
        acc *= tl.load(scale_ptr + rows).to(tl.float32)[:, None]

    out_rows = out_ptr + (pid_k.to(tl.int64) * M + offs_m)[None, :] * N
    tl.store(out_rows + offs_n[:, None], acc.to(out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_m[None, :])


@triton.jit
def _sum_splits_kernel(partial_ptr, out_ptr, numel, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of SPLIT_K partial results, always in the same order."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    partial_ptrs = partial_ptr + offs
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.static_range(SPLIT_K):
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        partial_ptrs += numel
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_int6_kernel(
    low_ptr,
    high_ptr,
    scale_ptr,
    out_ptr,
    N,
    K,
    n_blocks,
    n_groups,
    nibbles,
    sextets,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = W, [N, K]."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_n, N - 1)
    low_rows = low_ptr + rows[:, None] * (n_blocks * 16)
    high_rows = high_ptr + rows[:, None] * (n_blocks * 8)
    first_run = tl.program_id(1) * (BLOCK_K // 16)
    low_0, low_1, high = _load_words(low_rows, high_rows, first_run, n_blocks * 8, BLOCK_K // 16, True)
    w = _unpack(low_0, low_1, high, nibbles, sextets, False, tl.float32)  # (BLOCK_N, BLOCK_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    if GROUP:
        scale = tl.load(scale_ptr + rows[:, None] * n_groups + (offs_k // GROUP)[None, :], mask=mask, other=0.0)
    else:
        scale = tl.load(scale_ptr + rows)[:, None]
    w = w * scale.to(tl.float32)
    tl.store(out_ptr + offs_n[:, None] * K + offs_k[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)
