"""6-bit weights: their layout, packing and unpacking in plain torch (once, when weights are loaded), dequantising.

A row is a sequence of blocks of 128 weights: 64 bytes of `low`, 32 bytes of `high`. A block is 8 runs of 16 weights.
Run j owns three 32-bit words: word j of `high`, words j and 8 + j of `low`.

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
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._triton import _launch, tl, triton

BLOCK = 128  # weights in a block of the layout
GROUPS = (32, 64, 128)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BYTE_OF = [0, 2, 1, 3]  # byte of weight 4 i + r, for r = 0..3; its own inverse


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


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    layout = "" if value.is_contiguous() else " (not contiguous)"
    return f"{value.dtype} {list(value.shape)}{layout} on {value.device}"


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


def dequantize_int6_ref(weight: PackedInt6, dtype: torch.dtype) -> torch.Tensor:
    """W as [N, K] in `dtype`: the product in float32 (float64 if asked for that), rounded once."""
    codes, scale = unpack_int6(weight), weight.scale
    wide = torch.promote_types(dtype, torch.float32)
    if scale.dim() == 2:
        scale = scale.repeat_interleave(_group(scale, codes.shape[1]), dim=1)[:, : codes.shape[1]]
    return (codes.to(wide) * (scale if scale.dim() == 2 else scale[:, None]).to(wide)).to(dtype)


# Kernel

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


# Launch


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
        _launch(
            _dequantize_int6_kernel,
            grid,
            "dequantize_int6",
            out_ptr=out,
            BLOCK_N=16,
            BLOCK_K=BLOCK,
            num_warps=4,  # unmeasured
            enable_fp_fusion=False,
            **_weight_arguments(weight),
        )
    return out


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
