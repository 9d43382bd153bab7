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

Bytes: 0.75 N Kp + scales + x + y (bf16 weights: 2 N K). Flops: 2 M N K. How the planes are laid out, and why:
`_packing.py`.

Source: the exponent trick is that of Kim et al., "Who Says Elephants Can't Run", 2022 (arXiv 2211.10017); the layout
is our own.
"""

import torch
import torch.nn.functional as F

from .._triton import triton
from ..spec import KernelSpec
from ._contract import _CASES, _bytes_moved, _compilations, _inputs
from ._kernels import _MASKS, _config, _dequantize_int6_kernel, _int6_matmul_kernel, _sum_splits_kernel
from ._packing import BLOCK, GROUPS, PackedInt6, _cdiv, _check_weight, _group, pack_int6, unpack_int6
from ._reference import _DTYPES, _check, dequantize_int6_ref, int6_matmul_ref

__all__ = [
    "BLOCK",
    "GROUPS",
    "PackedInt6",
    "dequantize_int6",
    "dequantize_int6_ref",
    "int6_matmul",
    "int6_matmul_ref",
    "pack_int6",
    "unpack_int6",
]

# Launches


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


# The contract

SPEC = KernelSpec(
    name="int6_matmul",
    fn=int6_matmul,
    reference=int6_matmul_ref,
    inputs=_inputs,
    cases=_CASES,
    differentiable=("x",),
    compilations=_compilations,
    bytes_moved=_bytes_moved,
    flops=lambda m, n, k, **_: 2 * m * n * k,
)
