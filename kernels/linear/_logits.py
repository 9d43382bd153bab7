"""The output matrix's product with the soft cap behind it: logits in float32, for whoever needs more than their losses.

    z = cap(x W^T),  cap(a) = softcap * tanh(a / softcap)

The library's product rounds narrow logits, and torch then reads and writes them four times: cast, divided, tanh, times.
With M = 8192, V = 1024, K = 512 that is 285 MB; here it is the 34 MB that are asked for. By arithmetic, unmeasured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._inputs import _check_softcap
from .._rows import _softcap
from .._triton import _LOG2E, tl, triton
from ..cases.linear import LOGITS_CASES, logits_inputs
from ..spec import KernelSpec
from ._product import _check, _compilation, _launch_tiles, _product, _store


def linear_logits_ref(x: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """`linear_logits` in plain torch; float64 states give float64 logits."""
    z = F.linear(x, weight)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@triton.jit
def _score_tile(
    x_ptr,
    w_ptr,
    bias_ptr,
    left,
    columns,
    K,
    softcap,
    N: tl.constexpr,
    CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """cap(x W[columns]^T + b[columns]) of some rows: (BLOCK_M, BLOCK_N) float32, as `_product` has x W[columns]^T."""
    z = _product(x_ptr, w_ptr, left, columns, K, N, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if CAP:
        if x_ptr.dtype.element_ty == tl.float32:
            z = _softcap(z, softcap)
        else:  # to 2e-7 of the cap, not of z: less than a narrow state has lost, in a third of the instructions
            d = tl.exp2(z * (2.0 * _LOG2E / softcap)) + 1.0
            z = softcap - 2.0 * softcap * tl.rsqrt(d * d)
    return z


@triton.jit
def _linear_logits_kernel(
    x_ptr,
    w_ptr,
    z_ptr,
    M,
    K,
    softcap,
    N: tl.constexpr,
    CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # neighbours share rows of x
    first = (tl.program_id(0) // tiles * BLOCK_M).to(tl.int64)
    left = M - tl.program_id(0) // tiles * BLOCK_M
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    z = _score_tile(
        x_ptr + first * K, w_ptr, None, left, columns, K, softcap, N, CAP, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
    )
    _store(z_ptr + first * N, columns, z, left, N)


def _cap(softcap: float | None) -> dict:
    """What launches take of a cap; its number is not read where there is none, but a launch needs one."""
    return {"softcap": 1.0 if softcap is None else float(softcap), "CAP": softcap is not None}


def linear_logits(x: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    """Soft-capped logits x W^T in float32, in the product's pass; without gradients.

    Args:
        x: [..., K] float32, bfloat16 or float16: hidden states.
        weight: [V, K] in x's dtype.
        softcap: None, or c > 0: c * tanh(a / c) is applied.

    Returns:
        float32 [..., V].

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one float32 rounding and 1e-6.
    Source: parameter-golf PR #1019.
    """
    _check(x, {"weight": weight})
    _check_softcap(softcap)
    z = torch.empty((*x.shape[:-1], len(weight)), dtype=torch.float32, device=x.device)
    _launch_tiles(
        _linear_logits_kernel,
        "linear_logits",
        x.contiguous(),
        len(weight),
        w_ptr=weight.contiguous(),
        z_ptr=z,
        **_cap(softcap),
    )
    return z


def _compilations(*, V, K, softcap=None, **_):
    return [_compilation(_linear_logits_kernel, V, K, wide=("z_ptr",), given={"CAP": softcap is not None})]


SPEC = KernelSpec(
    name="linear_logits",
    fn=linear_logits,
    reference=linear_logits_ref,
    inputs=logits_inputs,
    cases=LOGITS_CASES,
    compilations=_compilations,
    bytes_moved=lambda *, M, V, K, itemsize, **_: itemsize * (M * K + V * K) + 4 * M * V,
    flops=lambda *, M, V, K, **_: 2 * M * V * K,
)
