"""Matrix product with 6-bit weights: y = x @ W^T, W[n, k] = scale[n, k // group] * q[n, k], q an integer in [-32, 31].

Forward, with u = q + 32 in [0, 63] as it is stored:

    y[m, n] = sum over groups g of  scale[n, g] * sum over k in g of  x[m, k] * (u[n, k] - 32)

The inner sum is a tensor-core product: q is exact in bf16 and fp16, sums are fp32, and scales touch sums, not weights.
So a weight is never rounded, where torch with a dequantised matrix rounds each. Backward: dx = dy @ W; W gets no
gradient.

    x      [..., K]         fp16, bf16 or fp32 (fp32 products are IEEE: exact, but not fast), any strides
    low    [N, Kp / 2]      uint8, bits 0-3 of u;  Kp is K rounded up to a multiple of 128, padding is q = 0
    high   [N, Kp / 4]      uint8, bits 4-5 of u
    scale  [N] or [N, G]    fp16, bf16 or fp32; G = ceil(K / group), group 32, 64 or 128
    y      [..., N]         x's dtype

Bytes: 0.75 N Kp + scales + x + y (bf16 weights: 2 N K). Flops: 2 M N K.

Layout. A row is a sequence of blocks of 128 weights: 64 bytes of `low`, 32 bytes of `high`. A block is 8 runs of 16
weights. Run j owns three 32-bit words: word j of `high`, words j and 8 + j of `low`.

    low    | run 0 | run 1 | ... | run 7 | run 0 | run 1 | ... | run 7 |   64 bytes, a cell is one word
             weights 0-7 of each run       weights 8-15 of each run
    high   | run 0 | run 1 | ... | run 7 |                                 32 bytes
             weights 0-15 of each run

Inside a run, weight 4 i + r (i, r in 0..3) lives in byte 0, 2, 1, 3 of its words for r = 0, 1, 2, 3:

    bit of the byte        7   6   5   4   3   2   1   0
    byte of low word 0   | weight 4 + r  |     weight r   |
    byte of low word 1   | weight 12 + r |  weight 8 + r  |
    byte of high         | 12 + r| 8 + r | 4 + r |   r    |

Why so: a shift and a bit-select put the 6-bit codes of four weights into the four bytes of one word. Its even bytes
(r = 0, 1) and, shifted by 8, its odd bytes (r = 2, 3) are two 16-bit lanes each, in the order of K. With the bits of
2^7 (bf16) or 2^10 (fp16) above u, a lane reads as 2^7 + u or 2^10 + u: masking converts, and one packed subtraction
yields two q.

Source: the exponent trick is that of Kim et al., "Who Says Elephants Can't Run", 2022 (arXiv 2211.10017); the layout
is our own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._triton import tl, triton
from .spec import Case, Compilation, KernelSpec

BLOCK = 128  # weights in a block of the layout
GROUPS = (32, 64, 128)
_BYTE_OF = [0, 2, 1, 3]  # byte of weight 4 i + r, for r = 0..3; its own inverse
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class PackedInt6(NamedTuple):
    """6-bit weights of a linear layer, laid out as this module's docstring says.

    Args:
        low: [N, Kp / 2] uint8, contiguous.
        high: [N, Kp / 4] uint8, contiguous.
        scale: [N], or [N, ceil(K / group)] with group 32, 64 or 128; floating point, contiguous.
        shape: (N, K).
    """

    low: torch.Tensor
    high: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _group(scale: torch.Tensor, k: int) -> int:
    """Weights of a row that share a scale: K for per-row scales, else the group that the number of scales tells."""
    if scale.dim() == 1 or scale.shape[1] == 1:
        return max(k, 1)
    # From K = 65 on, the three groups give different numbers of scales; up to there, a tie means equal results.
    return next((group for group in GROUPS if _cdiv(k, group) == scale.shape[1]), 0)


def _check_scale(scale: torch.Tensor, n: int, k: int, device: torch.device) -> None:
    if not isinstance(scale, torch.Tensor) or not scale.dtype.is_floating_point or scale.device != device:
        raise ValueError(f"scale: expected a floating-point tensor on {device}, got {_describe(scale)}")
    if scale.dim() not in (1, 2) or scale.shape[0] != n or _group(scale, k) == 0:
        counts = sorted({1, *(_cdiv(k, group) for group in GROUPS)})
        raise ValueError(f"scale: expected shape [{n}] or [{n}, G] with G in {counts}, got {_describe(scale)}")


def _check_weight(weight: PackedInt6) -> None:
    if not isinstance(weight, PackedInt6):
        raise ValueError(f"weight: expected a PackedInt6, got {type(weight).__name__}")
    n, k = weight.shape
    for name, plane, width in (("low", weight.low, BLOCK // 2), ("high", weight.high, BLOCK // 4)):
        shape = (n, _cdiv(k, BLOCK) * width)
        if plane.dtype != torch.uint8 or plane.shape != shape or not plane.is_contiguous():
            raise ValueError(f"weight.{name}: expected contiguous uint8 {list(shape)}, got {_describe(plane)}")
        if plane.device != weight.low.device:
            raise ValueError(f"weight.{name}: expected a tensor on {weight.low.device}, got {_describe(plane)}")
    _check_scale(weight.scale, n, k, weight.low.device)


def _check(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_weight(weight)
    n, k = weight.shape
    if not isinstance(x, torch.Tensor) or x.dtype not in dtypes or x.device != weight.low.device:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"x: expected {names} on {weight.low.device}, got {_describe(x)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected shape [..., {k}], got {_describe(x)}")
    if dense is not None and (dense.shape != (n, k) or dense.dtype != x.dtype or dense.device != x.device):
        raise ValueError(f"dense: expected {x.dtype} [{n}, {k}] on {x.device}, got {_describe(dense)}")


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    layout = "" if value.is_contiguous() else " (not contiguous)"
    return f"{value.dtype} {list(value.shape)}{layout} on {value.device}"


# Packing, in plain torch: it happens once, when weights are loaded


def pack_int6(codes: torch.Tensor, scale: torch.Tensor) -> PackedInt6:
    """Packs 6-bit weights into a 4-bit and a 2-bit plane.

    Args:
        codes: [N, K] int8 in [-32, 31]. Checked on the CPU; elsewhere, where looking would wait for the device, values
            are taken modulo 64.
        scale: [N] (per row) or [N, ceil(K / group)] with group 32, 64 or 128; kept in its dtype.
    Returns:
        The packed weights: 6 bits a weight, rows padded to a multiple of 128.
    Raises:
        ValueError: wrong dtype, shape, device or, on the CPU, value.
    """
    if not isinstance(codes, torch.Tensor) or codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"codes: expected int8 [N, K], got {_describe(codes)}")
    if codes.device.type == "cpu" and codes.numel():
        least, most = codes.aminmax()
        if least < -32 or most > 31:
            raise ValueError(f"codes: expected values in [-32, 31], got {least} to {most}")
    n, k = codes.shape
    _check_scale(scale, n, k, codes.device)
    blocks = _cdiv(k, BLOCK)
    u = F.pad(codes, (0, -k % BLOCK)) + 32
    u = (u.view(torch.uint8) & 63).view(n, blocks, 8, 4, 4)[..., _BYTE_OF]  # block, run, i, byte
    low = (u[..., 0::2, :] & 15) | (u[..., 1::2, :] & 15) << 4  # block, run, word, byte
    high = u >> 4
    high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    low = low.transpose(2, 3).reshape(n, blocks * BLOCK // 2)
    return PackedInt6(low, high.reshape(n, blocks * BLOCK // 4), scale.contiguous(), (n, k))


def unpack_int6(weight: PackedInt6) -> torch.Tensor:
    """The codes that `pack_int6` was given: [N, K] int8."""
    _check_weight(weight)
    n, k = weight.shape
    blocks = _cdiv(k, BLOCK)
    low = weight.low.view(n, blocks, 2, 8, 4).transpose(2, 3)  # block, run, word, byte
    low = torch.stack([low & 15, low >> 4], dim=-2).view(n, blocks, 8, 4, 4)  # block, run, i, byte
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=weight.high.device)[:, None]
    high = (weight.high.view(n, blocks, 8, 1, 4) >> shifts) & 3
    u = (low | high << 4)[..., _BYTE_OF]
    return (u.view(torch.int8) - 32).reshape(n, blocks * BLOCK)[:, :k].contiguous()


# References: plain torch, any device


def dequantize_int6_ref(weight: PackedInt6, dtype: torch.dtype) -> torch.Tensor:
    """W as [N, K] in `dtype`: the product in float32 (float64 if asked for that), rounded once."""
    codes, scale = unpack_int6(weight), weight.scale
    wide = torch.promote_types(dtype, torch.float32)
    if scale.dim() == 2:
        scale = scale.repeat_interleave(_group(scale, codes.shape[1]), dim=1)[:, : codes.shape[1]]
    return (codes.to(wide) * (scale if scale.dim() == 2 else scale[:, None]).to(wide)).to(dtype)


def int6_matmul_ref(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None = None) -> torch.Tensor:
    """`int6_matmul` in plain torch, for float64 too. `dense` is only a cache, so it is checked and not used."""
    _check(x, weight, dense, (*_DTYPES, torch.float64))
    return F.linear(x, dequantize_int6_ref(weight, x.dtype))


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
        w = _unpack(low_0, low_1, high, nibbles, sextets, X_T.is_bf16(), DOT_T)  # (BLOCK_N, BLOCK_K)
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


# Launchers


def _weight_arguments(weight: PackedInt6) -> dict:
    n, k = weight.shape
    group = _group(weight.scale, k)
    return {
        # Rows are multiples of 32 bytes, so the planes can be read as words.
        "low_ptr": weight.low.view(torch.int32),
        "high_ptr": weight.high.view(torch.int32),
        "scale_ptr": weight.scale,
        "N": n,
        "K": k,
        "n_blocks": _cdiv(k, BLOCK),
        "n_groups": _cdiv(k, group),
        "GROUP": group if group < k else 0,
        **_MASKS,
    }


def _dequantize_int6(weight: PackedInt6, dtype: torch.dtype) -> torch.Tensor:
    n, k = weight.shape
    out = torch.empty((n, k), dtype=dtype, device=weight.low.device)
    if out.numel():
        grid = (triton.cdiv(n, 16), triton.cdiv(k, BLOCK))
        _dequantize_int6_kernel[grid](
            out_ptr=out,
            BLOCK_N=16,
            BLOCK_K=BLOCK,
            num_warps=4,  # unmeasured
            enable_fp_fusion=False,
            **_weight_arguments(weight),
        )
    return out


def _int6_matmul_fwd(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    rows = x.reshape(-1, k) if k else x.new_empty(x.shape[:-1].numel(), 0)
    m = rows.shape[0]
    if m == 0 or n == 0 or k == 0:
        return x.new_zeros(*x.shape[:-1], n)
    group = _group(weight.scale, k)
    launch = _config(m, n, k, group, x.dtype, cached=dense is not None)
    if launch is None:
        return F.linear(x, _dequantize_int6(weight, x.dtype) if dense is None else dense)

    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    split_k = launch.SPLIT_K
    out = y if split_k == 1 else torch.empty((split_k, m, n), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n, launch.BLOCK_N), triton.cdiv(m, launch.BLOCK_M), split_k)
    _int6_matmul_kernel[grid](
        x_ptr=rows,
        out_ptr=out,
        M=m,
        stride_xm=rows.stride(0),
        stride_xk=rows.stride(1),
        TAIL=k % launch.BLOCK_K != 0,
        # Off the GPU this is Triton's interpreter, which does arithmetic on bf16 bits as if they were integers.
        UPCAST=x.dtype == torch.float32 or not x.is_cuda,
        enable_fp_fusion=True,
        **launch._asdict(),
        **_weight_arguments(weight),
    )
    if split_k > 1:
        _sum_splits_kernel[(triton.cdiv(m * n, 512),)](
            out, y, m * n, SPLIT_K=split_k, BLOCK=512, num_warps=4, enable_fp_fusion=False
        )
    return y.view(*x.shape[:-1], n)


class _Int6Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high, scale, shape, dense):
        ctx.save_for_backward(low, high, scale, dense)
        ctx.shape = shape
        return _int6_matmul_fwd(x, PackedInt6(low, high, scale, shape), dense)

    @staticmethod
    def backward(ctx, dy):
        low, high, scale, dense = ctx.saved_tensors
        if dense is None:
            dense = _dequantize_int6(PackedInt6(low, high, scale, ctx.shape), dy.dtype)
        return dy @ dense, None, None, None, None, None


# Public functions


def dequantize_int6(weight: PackedInt6, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Dequantises packed weights in one pass over them.

    Args:
        weight: from `pack_int6`.
        dtype: float16, bfloat16 or float32.
    Returns:
        [N, K]; bit-equal to `dequantize_int6_ref`.
    Raises:
        ValueError: malformed weight, other dtype. ImportError: no triton.
    """
    _check_weight(weight)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {dtype}")
    return _dequantize_int6(weight, dtype)


def int6_matmul(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies by 6-bit weights: x @ W^T.

    Which of three ways runs is decided by the number of rows M of x: split along K (few), fused (some), or the
    library's product with dequantised weights (many). A result is bit-identical on rerun; for another M it may be
    rounded differently. Gradients reach x only.

    Args:
        x: [..., K] float16, bfloat16 or float32, any strides. NaN and infinite entries spoil their own rows only.
        weight: from `pack_int6`, with scales as they are there.
        dense: [N, K] in x's dtype, `dequantize_int6(weight, x.dtype)` kept by the caller. Saves dequantising at large M
            for 2.7 times the memory; the result's meaning does not change.
    Returns:
        [..., N] in x's dtype, summed in float32.
    Raises:
        ValueError: wrong dtype, shape, device or strides. ImportError: no triton.
    Tolerance:
        At most twice the error of torch with the dequantised matrix in the same dtype, against float64.
    """
    _check(x, weight, dense, _DTYPES)
    if x.requires_grad and torch.is_grad_enabled():
        return _Int6Matmul.apply(x, *weight, dense)
    return _int6_matmul_fwd(x, weight, dense)


# Contract


def _inputs(
    generator, device, dtype, m, n, k, group=0, scale_dtype=torch.float16, lead=(), strided=False, spread=False
):
    codes = torch.randint(-31, 32, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand((n, _cdiv(k, group)) if group else (n,), generator=generator) * 0.05 + 0.001
    if strided:
        x = torch.randn(k, 2 * m, generator=generator).to(dtype).to(device).t()[::2]
    else:
        x = torch.randn(*lead, m, k, generator=generator).to(dtype).to(device)
    if spread:
        x *= torch.logspace(-3, 3, k).to(dtype).to(device)
    return {"x": x, "weight": pack_int6(codes.to(device), scale.to(scale_dtype).to(device))}


def _compilations(m, n, k, group=0, scale_dtype=torch.float16, dtype=torch.bfloat16, **_):
    integers = {"M": m, "N": n, "K": k, "n_blocks": _cdiv(k, BLOCK), "n_groups": _cdiv(k, group or k), "stride_xm": k}
    integers |= _MASKS
    pointer = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    pointers = {"x_ptr": pointer[dtype], "low_ptr": "*i32", "high_ptr": "*i32", "out_ptr": pointer[dtype]}
    pointers["scale_ptr"] = pointer[scale_dtype]
    group = group if group < k else 0

    def compilation(kernel, constexprs, num_warps, num_stages, elements, fusion, **types):
        # As a launch does: 1 becomes a constant, multiples of 16 are marked.
        names = kernel.arg_names
        constexprs = {**constexprs, **{name: 1 for name in names if integers.get(name) == 1}}
        known = {name: "i32:16" if value % 16 == 0 else "i32" for name, value in integers.items()} | pointers | types
        signature = {name: "constexpr" if name in constexprs else known[name] for name in names}
        options = {"enable_fp_fusion": fusion}
        return Compilation(kernel, signature, constexprs, num_warps, num_stages, elements, options)

    launch = _config(m, n, k, group or k, dtype)
    if launch is None:
        constexprs = {"GROUP": group, "BLOCK_N": 16, "BLOCK_K": BLOCK}
        return [compilation(_dequantize_int6_kernel, constexprs, 4, 3, 0, False)]
    tiles = {name: value for name, value in launch._asdict().items() if name.isupper()}
    constexprs = {
        "GROUP": group,
        "TAIL": k % launch.BLOCK_K != 0,
        "UPCAST": dtype == torch.float32,
        "stride_xk": 1,
        **tiles,
    }
    elements = launch.BLOCK_N * launch.BLOCK_K
    out = pointer[dtype] if launch.SPLIT_K == 1 else "*fp32"
    found = [
        compilation(_int6_matmul_kernel, constexprs, launch.num_warps, launch.num_stages, elements, True, out_ptr=out)
    ]
    if launch.SPLIT_K > 1:
        integers["numel"] = m * n
        constexprs = {"SPLIT_K": launch.SPLIT_K, "BLOCK": 512}
        found.append(compilation(_sum_splits_kernel, constexprs, 4, 3, 0, False, partial_ptr="*fp32"))
    return found


def _bytes_moved(m, n, k, itemsize, group=0, scale_dtype=torch.float16, **_):
    weights = n * _cdiv(k, BLOCK) * BLOCK * 3 // 4 + n * _cdiv(k, group or k) * scale_dtype.itemsize
    return weights + (m * k + m * n) * itemsize


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

SPEC = KernelSpec(
    name="int6_matmul",
    fn=int6_matmul,
    reference=int6_matmul_ref,
    inputs=_inputs,
    cases=(
        Case("no rows", {"m": 0, "n": 8, "k": 32}, _BF16),
        Case("one row", {"m": 1, "n": 64, "k": 256}, _BF16),
        Case("single weight", {"m": 1, "n": 1, "k": 1}),
        Case("two rows, primes", {"m": 2, "n": 67, "k": 131}, _BF16),
        Case("tile of rows", {"m": 16, "n": 65, "k": 384}, _FP16),
        Case("tile of rows and one", {"m": 17, "n": 63, "k": 127}, _BF16),
        Case("several tiles of rows", {"m": 70, "n": 33, "k": 129}, _FP16),
        Case("library product", {"m": 257, "n": 37, "k": 95}, _BF16),
        Case("groups of 32, ragged", {"m": 3, "n": 17, "k": 101, "group": 32}, _BF16),
        Case("groups of 64, float32 scales", {"m": 5, "n": 70, "k": 193, "group": 64, "scale_dtype": _FP32}, _FP16),
        Case("groups of 128, float32", {"m": 18, "n": 31, "k": 300, "group": 128}),
        Case("float32 primes", {"m": 7, "n": 41, "k": 157, "scale_dtype": _FP32}),
        Case("leading dimensions", {"m": 3, "n": 9, "k": 40, "lead": (2, 2)}, _FP16),
        Case("strided", {"m": 5, "n": 24, "k": 77, "strided": True}, _BF16),
        Case("columns of sizes 1e-3 to 1e3", {"m": 4, "n": 40, "k": 256, "spread": True}, _BF16),
        Case("attention output, one row", {"m": 1, "n": 512, "k": 512}, _BF16, production=True),
        Case("attention output, 16 rows", {"m": 16, "n": 512, "k": 512}, _BF16, production=True),
        Case("keys and values", {"m": 16, "n": 256, "k": 512}, _BF16, production=True),
        Case("up projection, one row", {"m": 1, "n": 1536, "k": 512}, _BF16, production=True),
        Case("up projection, 64 rows", {"m": 64, "n": 2048, "k": 512}, _BF16, production=True),
        Case("up projection, 256 rows", {"m": 256, "n": 2048, "k": 512}, _BF16, production=True),
        Case("down projection, one row", {"m": 1, "n": 512, "k": 1536}, _BF16, production=True),
        Case("down projection, 64 rows", {"m": 64, "n": 512, "k": 1536}, _BF16, production=True),
        Case("down projection, groups", {"m": 16, "n": 512, "k": 1536, "group": 64}, _BF16, production=True),
        Case("down projection, full batch", {"m": 65536, "n": 512, "k": 1536}, _BF16, production=True),
        Case("large, one row", {"m": 1, "n": 4096, "k": 4096}, _BF16, production=True),
        Case("large, 16 rows", {"m": 16, "n": 4096, "k": 4096}, _BF16, production=True),
    ),
    differentiable=("x",),
    compilations=_compilations,
    bytes_moved=_bytes_moved,
    flops=lambda m, n, k, **_: 2 * m * n * k,
)
