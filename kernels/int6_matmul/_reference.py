"""The executable specification in plain torch, on any device; it checks its arguments as a launch does."""

import torch
import torch.nn.functional as F

from ._packing import PackedInt6, _check_weight, _describe, _group, unpack_int6

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
