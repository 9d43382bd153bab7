"""The layout of 6-bit weights; packing and unpacking in plain torch, as they happen once, when weights are loaded.

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

BLOCK = 128  # weights in a block of the layout
GROUPS = (32, 64, 128)
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
