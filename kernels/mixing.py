"""A weighted sum of up to three tensors, with weights per channel, and the sum of squares of each of its rows.

    y = w_0 x + w_1 x0 + w_2 skip,    squares = sum over channels of y^2

| tensor          | shape         | type                       |
|-----------------|---------------|----------------------------|
| x, x0, skip, y  | [..., N]      | float32, bfloat16, float16 |
| weights         | [2 or 3, N]   | float32                    |
| squares         | [...]         | float32, of y as stored    |

How a block of parameter-golf PR #1019 begins: the residual stream joined by the skip of an earlier block, mixed with
the embedding, then normalised; `squares` is what the linear layer behind it normalises with. Each tensor goes through
memory once, 8 bytes an element at bfloat16 with three of them read, and takes 8 operations: bound by memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import _launch, tl, triton
from .cases.mixing import CASES, inputs
from .spec import Compilation, KernelSpec


def channel_mix_ref(x: Tensor, x0: Tensor, skip: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`channel_mix` in plain torch, any floating dtype."""
    weights = weights.to(x.dtype)
    y = weights[0] * x + weights[1] * x0
    y = y if skip is None else y + weights[2] * skip
    return y, y.to(torch.promote_types(y.dtype, torch.float32)).square().sum(-1)


LARGEST_N = 16384
_OPTIONS = {"enable_fp_fusion": False}  # a square and the sum of it round apart, so that lanes that both hold it agree


class _Tile(NamedTuple):
    ROWS: int  # that a program takes, one after the other, with the weights in registers
    COLS: int
    num_warps: int


def _config(N: int) -> _Tile:
    """16 channels a lane: a row of 512 is one warp's, and its sum needs no shared memory."""
    columns = triton.next_power_of_2(N)
    return _Tile(16, columns, max(columns // 512, 1))  # unmeasured


@triton.jit
def _channel_mix_kernel(
    x_ptr, x0_ptr, skip_ptr, weights_ptr, y_ptr, squares_ptr, M, N: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    columns = tl.arange(0, COLS)
    mask = columns < N
    weight = tl.load(weights_ptr + columns, mask=mask, other=0.0)
    weight0 = tl.load(weights_ptr + N + columns, mask=mask, other=0.0)
    weight_skip = None
    if skip_ptr is not None:
        weight_skip = tl.load(weights_ptr + 2 * N + columns, mask=mask, other=0.0)
    first = tl.program_id(0) * ROWS
    offs = first.to(tl.int64) * N + columns
    for row in range(first, min(first + ROWS, M)):
        y = weight * tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y += weight0 * tl.load(x0_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if skip_ptr is not None:
            y += weight_skip * tl.load(skip_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs, y, mask=mask)
        y = y.to(tl.float32)  # as it is stored: what is normalised next
        tl.store(squares_ptr + row, tl.sum(y * y, axis=0))
        offs += N


def channel_mix(x: Tensor, x0: Tensor, skip: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A weighted sum of two or three tensors by channel.

    Args:
        x, x0: [..., N] float32, bfloat16 or float16, N <= 16384.
        skip: as these, or None.
        weights: float32 [2, N], or [3, N] with a skip.

    Returns:
        The sum [..., N] in x's dtype, and the sum of squares of each row, float32 [...].

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding of it and 1e-6.
    Source: parameter-golf PR #1019.
    """
    if (
        not x.dim()
        or not 1 <= x.shape[-1] <= LARGEST_N
        or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"x: expected float32, bfloat16 or float16 [..., N], N <= {LARGEST_N}, got {x.dtype} {list(x.shape)}"
        )
    for name, tensor in {"x0": x0, "skip": skip}.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name}: expected {x.dtype} {list(x.shape)}, got {tensor.dtype} {list(tensor.shape)}")
    N = x.shape[-1]
    M, shape = x.numel() // N, (2 + (skip is not None), N)
    if weights.shape != shape or weights.dtype != torch.float32 or weights.device != x.device:
        raise ValueError(f"weights: expected float32 {list(shape)}, got {weights.dtype} {list(weights.shape)}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    squares = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if M:
        tile = _config(N)
        _launch(
            _channel_mix_kernel,
            (triton.cdiv(M, tile.ROWS),),
            "channel_mix",
            x_ptr=x.contiguous(),
            x0_ptr=x0.contiguous(),
            skip_ptr=None if skip is None else skip.contiguous(),
            weights_ptr=weights.contiguous(),
            y_ptr=y,
            squares_ptr=squares,
            M=M,
            N=N,
            **tile._asdict(),
            **_OPTIONS,
        )
    return y, squares


# The contract


def _compilations(*, N, skip=True, **_):
    tile = _config(N)
    fixed = {"N": N, "ROWS": tile.ROWS, "COLS": tile.COLS} | ({} if skip else {"skip_ptr": None})
    types = dict.fromkeys(("weights_ptr", "squares_ptr"), "*fp32") | {"M": "i32:16"}
    return [
        Compilation(
            _channel_mix_kernel,
            signature={n: types.get(n, "*bf16") for n in _channel_mix_kernel.arg_names if n not in fixed},
            constexprs=fixed,
            num_warps=tile.num_warps,
            elements=tile.COLS,
            options=_OPTIONS,
        )
    ]


SPEC = KernelSpec(
    name="channel_mix",
    fn=channel_mix,
    reference=channel_mix_ref,
    inputs=inputs,
    cases=CASES,
    compilations=_compilations,
    bytes_moved=lambda *, M, N, skip=True, itemsize, **_: M * N * itemsize * (3 + skip) + 4 * (M + 3 * N),
    flops=lambda *, M, N, skip=True, **_: M * N * (5 + 2 * skip),
)
