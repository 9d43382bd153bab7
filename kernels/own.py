"""What each position attends to beyond itself: heads of attention without their part along the position's own value.

    u = v / max(|v|, 1e-12),    x_h = y_h - (y_h . u) u    for the query heads h that share a key head's value v

| tensor | shape          | type                                        |
|--------|----------------|---------------------------------------------|
| y, x   | [B, T, H, D]   | float32, bfloat16, float16                  |
| v      | [B, T, Hkv, D] | as y; H is a multiple of Hkv, D at most 256 |

XSA of parameter-golf PR #1019, behind a library's attention; `banded_attention` does it itself. y and v are read once
and x is written once, 5 bytes an element of y in bfloat16 with two heads to a value: bound by memory. In plain torch
that is seven passes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._triton import _launch, tl, triton
from .cases.own import CASES, inputs
from .spec import Compilation, KernelSpec

LARGEST_D = 256
_SMALLEST = tl.constexpr(1e-12)  # torch.nn.functional.normalize's
_OPTIONS = {"enable_fp_fusion": False}  # a product and the sum of it round apart, so that lanes that both hold it agree


def without_own_ref(y: Tensor, v: Tensor) -> Tensor:
    """`without_own` in plain torch, any floating dtype."""
    own = F.normalize(v, dim=-1)[:, :, :, None, :]  # (B, T, Hkv, 1, D)
    grouped = y.reshape(*v.shape[:3], y.size(2) // v.size(2), v.size(-1))
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).reshape(y.shape)


class _Tile(NamedTuple):
    ROWS: int  # values of a program
    COLS: int
    num_warps: int


def _config(D: int) -> _Tile:
    """16 elements a thread."""
    columns = triton.next_power_of_2(D)
    return _Tile(max(1, 2048 // columns), columns, 4)  # unmeasured


@triton.jit
def _without_own_kernel(
    y_ptr,
    v_ptr,
    x_ptr,
    M,
    stride_v,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Values `ROWS` at a time, M in all: `SHARED` of a position, `stride_v` elements from those of the next."""
    offs_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    mask = (offs_r < M)[:, None] & (columns < D)[None, :]
    first = offs_r // SHARED * stride_v + offs_r % SHARED * D
    v = tl.load(v_ptr + first[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)  # (ROWS, COLS)
    length = tl.sqrt(tl.sum(v * v, axis=1))
    own = v / tl.where(length < _SMALLEST, _SMALLEST, length)[:, None]  # a NaN stays one
    for head in tl.static_range(GROUP):
        offs = (offs_r * GROUP + head)[:, None] * D + columns[None, :]
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = y - tl.sum(y * own, axis=1)[:, None] * own
        tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=mask)


def without_own(y: Tensor, v: Tensor) -> Tensor:
    """Heads of attention without their part along each position's own value.

    Args:
        y: [B, T, H, D] float32, bfloat16 or float16, D <= 256.
        v: [B, T, Hkv, D] in y's dtype; H is a multiple of Hkv. A slice of queries, keys and values side by side is not
            copied.

    Returns:
        [B, T, H, D] in y's dtype.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding of it and 1e-6.
    Source: XSA of parameter-golf PR #1019.
    """
    if y.ndim != 4 or y.dtype not in (torch.float32, torch.bfloat16, torch.float16) or y.size(-1) > LARGEST_D:
        raise ValueError(
            f"y: expected float32, bfloat16 or float16 [B, T, H, D <= {LARGEST_D}], got {y.dtype} {list(y.shape)}"
        )
    B, T, H, D = y.shape
    if (
        v.ndim != 4
        or (v.size(0), v.size(1), v.size(3)) != (B, T, D)
        or v.dtype != y.dtype
        or v.device != y.device
        or not v.size(2)
        or H % v.size(2)
    ):
        raise ValueError(
            f"v: expected {y.dtype} [{B}, {T}, a divisor of {H}, {D}] on {y.device}, got {v.dtype} {list(v.shape)} "
            f"on {v.device}"
        )
    x = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    shared = v.size(2)
    if x.numel():
        if v.stride()[2:] != (D, 1) or v.stride(0) != T * v.stride(1):
            v = v.contiguous()
        tile, values = _config(D), B * T * shared
        _launch(
            _without_own_kernel,
            (triton.cdiv(values, tile.ROWS),),
            "without_own",
            y_ptr=y.contiguous(),
            v_ptr=v,
            x_ptr=x,
            M=values,
            stride_v=v.stride(1),
            SHARED=shared,
            GROUP=H // shared,
            D=D,
            **tile._asdict(),
            **_OPTIONS,
        )
    return x


# The contract


def _compilations(*, H, SHARED, D, **_):
    tile = _config(D)
    fixed = {"SHARED": SHARED, "GROUP": H // SHARED, "D": D, "ROWS": tile.ROWS, "COLS": tile.COLS}
    names = [name for name in _without_own_kernel.arg_names if name not in fixed]
    return [
        Compilation(
            _without_own_kernel,
            signature={name: "*bf16" if name.endswith("_ptr") else "i32:16" for name in names},
            constexprs=fixed,
            num_warps=tile.num_warps,
            options=_OPTIONS,
        )
    ]


SPEC = KernelSpec(
    name="without_own",
    fn=without_own,
    reference=without_own_ref,
    inputs=inputs,
    cases=CASES,
    compilations=_compilations,
    bytes_moved=lambda *, B, T, H, SHARED, D, itemsize, **_: itemsize * B * T * D * (2 * H + SHARED),
    flops=lambda *, B, T, H, SHARED, D, **_: B * T * D * (4 * H + 3 * SHARED),
)
