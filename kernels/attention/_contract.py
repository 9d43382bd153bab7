"""What the spec says: the launches behind production shapes, bytes and flops."""

import torch

from ..spec import Compilation
from ._backward import (
    _banded_attention_dkv_kernel,
    _banded_attention_dq_kernel,
    _banded_attention_prepare_kernel,
    _banded_attention_sink_kernel,
)
from ._forward import _banded_attention_fwd_kernel
from ._tiles import _OPTIONS, _config, _constants


def _apart(function):
    """`function` with the sinks' three tensors as arguments of their own: checks differentiate by name."""

    def banded_attention(
        q, k, v, window, position=None, q_sink=None, k_sink=None, v_sink=None, exclude_own=False
    ) -> torch.Tensor:
        sinks = None if q_sink is None else (q_sink, k_sink, v_sink)
        return function(q, k, v, window, position, sinks, exclude_own)

    banded_attention.__name__ = function.__name__
    return banded_attention


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_WIDE = ("lse_ptr", "along_ptr", "delta_ptr", "dv_own_ptr", "sink_parts_ptr")


def _compilations(*, T, H, Hkv, D, S=0, position=None, exclude_own=False, dtype=torch.bfloat16, **_):
    found = []
    for kernel, which in (
        (_banded_attention_fwd_kernel, "forward"),
        (_banded_attention_prepare_kernel, "prepare"),
        (_banded_attention_dkv_kernel, "dkv"),
        (_banded_attention_dq_kernel, "dq"),
        (_banded_attention_sink_kernel, "sink"),
    ):
        if which == "sink" and not S:
            continue
        names = kernel.arg_names
        launch = _config(which, T * H // Hkv, D, dtype)
        constants = _constants(launch, H, Hkv, D, S, dtype, upcast=False) | {"EXCLUDE_OWN": exclude_own}
        fixed = {name: constants[name] for name in names if name in constants}
        if position is None:
            fixed |= {name: None for name in names if name == "position_ptr"}
        if not S:
            fixed |= {name: None for name in names if "sink" in name}
        if not exclude_own:
            own = ("along_ptr", "dv_own_ptr") + ("do_ptr",) * (which == "prepare")
            fixed |= {name: None for name in names if name in own}
        if Hkv == 1:
            fixed["Hkv"] = 1
        types = {name: "*fp32" if name in _WIDE else _TYPES[dtype] for name in names if name.endswith("_ptr")}
        types |= {"position_ptr": "*i64", "scale": "fp32", "Hkv": "i32:16" if Hkv % 16 == 0 else "i32"}
        types |= {"stride_q": "i32:16" if H * D % 16 == 0 else "i32"}
        found.append(
            Compilation(
                kernel,
                signature={name: types.get(name, "i32") for name in names if name not in fixed},
                constexprs=fixed,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
                elements=launch.BLOCK_M * launch.BLOCK_N,
                options=_OPTIONS,
            )
        )
    return found


def _pairs(*, T, C, window, S=0, **_):
    """Query-key pairs of one head of one sequence, for a cache that is full."""
    band = min(window, C + T)
    growing = min(max(band - C, 0), T)  # queries that see the stream's start
    return growing * C + growing * (growing + 1) // 2 + (T - growing) * band + T * S


def _flops(*, B=1, H=1, D=16, **sizes):
    return 4 * B * H * D * _pairs(**sizes)


def _bytes_moved(*, T, C, B=1, H=1, Hkv=1, D=16, S=0, itemsize, **_):
    return B * (D * itemsize * (2 * T * H + 2 * (C + T + S) * Hkv + bool(S) * T * H) + 4 * T * H)
