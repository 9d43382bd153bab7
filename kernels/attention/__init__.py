"""Banded causal attention of a stream: each query sees itself, the `window - 1` keys before it, and the sinks.

Query t of T stands behind C cached keys, so its own key is j = C + t. With the stream position P of the first query,

    visible(t, j)     C + t - window < j <= C + t,  and  j >= C - P    (before that, the cache holds nothing)
    visible(t, s)     s < P + t - (window - 1)      (sink s, the s-th token of the stream, is behind the band)
    score(t, j) = q_t . k_j / sqrt(D),   score(t, s) = q_sink_t . k_sink_s / sqrt(D)
    o_t = sum of softmax(scores of t over both)  times  v_j, v_sink_s
    y_t = o_t,  or with `exclude_own`  o_t - (o_t . n) n,  n = v_(C+t) / max(|v_(C+t)|, 1e-12)

| tensor         | shape            | type                                         |
|----------------|------------------|----------------------------------------------|
| q, q_sink, y   | [B, T, H, D]     | float32, bfloat16, float16                   |
| k, v           | [B, C+T, Hkv, D] | the same; H is a multiple of Hkv             |
| k_sink, v_sink | [B, S, Hkv, D]   | the same                                     |
| position       | [B]              | int64                                        |

Gradients, with p the softmax, g = dy - (dy . n) n (dy without `exclude_own`) and delta_t = g_t . o_t:

    ds_tj = p_tj (g_t . v_j - delta_t),   dq_t = sum_j ds_tj k_j / sqrt(D),   dk_j = sum_t ds_tj q_t / sqrt(D)
    dv_j = sum_t p_tj g_t,   and for the own value through n, with m = -(dy . n) o - (o . n) dy
    dv_(C+t) += sum over the group's heads of (m - (m . n) n) / |v_(C+t)|

About 4 D flops for each visible pair and head forward, 14 D backward (two kernels that each compute the scores anew);
q, k, v and y once through memory, and 4 bytes a row for the log-sum. Bound by the tensor cores in blocks of 64 queries
and more, by the cache's bytes when a token is sampled.

What cannot be seen is not read, so a slot of the cache before the stream's start may hold NaN, as may a sink that no
query of the call sees. A NaN that some query sees spoils the queries near it. Sums are in the order of the keys, or of
the rows, whatever a launch holds: a sequence's bits are the same in any batch, and on rerun.

Source: the online softmax of Milakov and Gimelshein (arXiv:1805.02867) and FlashAttention-2 (arXiv:2307.08691);
attention sinks of arXiv:2309.17453; XSA (`exclude_own`) of parameter-golf PR #1019.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._triton import _launch, triton
from ..cases.attention import CASES, inputs
from ..spec import KernelSpec
from ._backward import (
    _banded_attention_dkv_kernel,
    _banded_attention_dq_kernel,
    _banded_attention_prepare_kernel,
    _banded_attention_sink_kernel,
)
from ._contract import _apart, _bytes_moved, _compilations, _flops
from ._forward import _banded_attention_fwd_kernel
from ._reference import Sinks, banded_attention_ref
from ._tiles import _arguments

__all__ = ["banded_attention", "banded_attention_ref"]

LARGEST_D, LARGEST_S = 128, 64

# Launches


def _check_banded_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, position: Tensor | None, sinks: Sinks | None
) -> None:
    if (
        q.dim() != 4
        or not 1 <= q.shape[3] <= LARGEST_D
        or q.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        raise ValueError(
            f"q: expected float32, bfloat16 or float16 [B, T, H, D], D <= {LARGEST_D}, got {q.dtype} {list(q.shape)}"
        )
    B, T, H, D = q.shape
    if k.dim() != 4 or k.shape[1] < T or k.shape[2] < 1 or H % k.shape[2]:
        raise ValueError(f"k: expected [B, C + T, Hkv, D] with T = {T} and Hkv a divisor of {H}, got {list(k.shape)}")
    shapes = {"k": (k, (B, k.shape[1], k.shape[2], D)), "v": (v, k.shape)}
    if sinks is not None:
        if position is None:
            raise ValueError("position: sinks need the stream position of each sequence's first query, got None")
        S = sinks[1].shape[1] if sinks[1].dim() == 4 else 0
        if not 1 <= S <= LARGEST_S:
            raise ValueError(f"k_sink: expected [B, S, Hkv, D] with 1 <= S <= {LARGEST_S}, got {list(sinks[1].shape)}")
        sink_shape = (B, S, k.shape[2], D)
        shapes |= {"q_sink": (sinks[0], q.shape), "k_sink": (sinks[1], sink_shape), "v_sink": (sinks[2], sink_shape)}
    for name, (x, shape) in shapes.items():
        if x.shape != shape or x.dtype != q.dtype or x.device != q.device:
            got = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise ValueError(f"{name}: expected {q.dtype} {list(shape)} on {q.device}, got {got}")
    if position is not None and (
        position.shape != (B,) or position.dtype != torch.int64 or position.device != q.device
    ):
        got = f"{position.dtype} {list(position.shape)} on {position.device}"
        raise ValueError(f"position: expected int64 {[B]} on {q.device}, got {got}")
    if not 1 <= window < 2**31:
        raise ValueError(f"window: expected 1 <= window < 2**31, got {window}")


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _banded_attention_fwd(q, k, v, position, q_sink, k_sink, v_sink, window, exclude_own):
    """y, log-sums of the scores (base 2), and o . n, empty where there is no n; both float32 [B, Hkv, T * group]."""
    B, T, H, _ = q.shape
    Hkv = k.shape[2]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((B, Hkv, T * H // Hkv), dtype=torch.float32, device=q.device)
    along = torch.empty_like(lse) if exclude_own else lse.new_empty(0)
    if y.numel():
        if q.stride()[2:] != (q.shape[3], 1) or q.stride(0) != T * q.stride(
            1
        ):  # a slice of q, k and v is taken as it is
            q = q.contiguous()
        k, v, position, q_sink, k_sink, v_sink = _contiguous(k, v, position, q_sink, k_sink, v_sink)
        kernel = _banded_attention_fwd_kernel
        common = _arguments(kernel, "forward", q, k, window, k_sink)
        with torch.cuda.device_of(q):
            _launch(
                kernel,
                (B * Hkv * triton.cdiv(lse.shape[2], common["BLOCK_M"]),),
                "banded_attention",
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                position_ptr=position,
                q_sink_ptr=q_sink,
                k_sink_ptr=k_sink,
                v_sink_ptr=v_sink,
                y_ptr=y,
                lse_ptr=lse,
                along_ptr=along if exclude_own else None,
                stride_q=q.stride(1),
                EXCLUDE_OWN=exclude_own,
                **common,
            )
    return y, lse, along


def _banded_attention_bwd(
    dy, q, k, v, position, q_sink, k_sink, v_sink, y, lse, along, window, exclude_own
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, q_sink, k_sink and v_sink, None where there are no sinks."""
    given = q, k, v, q_sink, k_sink, v_sink
    if not y.numel():
        return tuple(None if x is None else torch.zeros_like(x) for x in given)
    q, k, v, position, q_sink, k_sink, v_sink, dy = _contiguous(q, k, v, position, q_sink, k_sink, v_sink, dy)
    dq, dk, dv, dq_sink, dk_sink, dv_sink = (
        None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given
    )
    B, T, _, D = q.shape
    Hkv, delta = k.shape[2], torch.empty_like(lse)
    do, dv_own = dy, None
    if exclude_own:
        do, dv_own = torch.empty_like(dy), torch.empty((B, T, Hkv, D), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        kernel = _banded_attention_prepare_kernel
        common = _arguments(kernel, "prepare", q, k, window, k_sink)
        _launch(
            kernel,
            (B * Hkv * triton.cdiv(T, common["BLOCK_M"]),),
            "banded_attention",
            v_ptr=v,
            y_ptr=y,
            dy_ptr=dy,
            along_ptr=along if exclude_own else None,
            do_ptr=do if exclude_own else None,
            delta_ptr=delta,
            dv_own_ptr=dv_own,
            EXCLUDE_OWN=exclude_own,
            **common,
        )
        kernel = _banded_attention_dkv_kernel
        common = _arguments(kernel, "dkv", q, k, window, k_sink)
        _launch(
            kernel,
            (B * Hkv * triton.cdiv(k.shape[1], common["BLOCK_N"]),),
            "banded_attention",
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            position_ptr=position,
            do_ptr=do,
            lse_ptr=lse,
            delta_ptr=delta,
            dv_own_ptr=dv_own,
            dk_ptr=dk,
            dv_ptr=dv,
            **common,
        )
        kernel = _banded_attention_dq_kernel
        common = _arguments(kernel, "dq", q, k, window, k_sink)
        tiles = triton.cdiv(lse.shape[2], common["BLOCK_M"])
        sink_parts = None
        if k_sink is not None:
            sink_parts = torch.empty((B * Hkv, tiles, 2, k_sink.shape[1], D), dtype=torch.float32, device=q.device)
        _launch(
            kernel,
            (B * Hkv * tiles,),
            "banded_attention",
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            position_ptr=position,
            q_sink_ptr=q_sink,
            k_sink_ptr=k_sink,
            v_sink_ptr=v_sink,
            do_ptr=do,
            lse_ptr=lse,
            delta_ptr=delta,
            dq_ptr=dq,
            dq_sink_ptr=dq_sink,
            sink_parts_ptr=sink_parts,
            **common,
        )
        if k_sink is not None:
            kernel = _banded_attention_sink_kernel
            common = _arguments(kernel, "sink", q, k, window, k_sink)
            _launch(
                kernel,
                (B * Hkv,),
                "banded_attention",
                sink_parts_ptr=sink_parts,
                dk_ptr=dk_sink,
                dv_ptr=dv_sink,
                parts=tiles,
                **common,
            )
    return dq, dk, dv, dq_sink, dk_sink, dv_sink


# The public function


class _BandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, position, q_sink, k_sink, v_sink, window, exclude_own):
        given = q, k, v, position, q_sink, k_sink, v_sink
        y, lse, along = _banded_attention_fwd(*given, window, exclude_own)
        ctx.save_for_backward(*given, y, lse, along)
        ctx.options = window, exclude_own
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dq, dk, dv, *sinks = _banded_attention_bwd(dy, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, None, *sinks, None, None


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    position: Tensor | None = None,
    sinks: Sinks | None = None,
    exclude_own: bool = False,
) -> Tensor:
    """Causal attention in a band, behind a cache, with grouped heads, attention sinks and XSA; differentiable.

    Args:
        q: [B, T, H, D] float32, bfloat16 or float16, D <= 128; a slice of queries, keys and values side by side is not
            copied. Nothing given is written to.
        k, v: [B, C + T, Hkv, D] in q's dtype, the first C of them the cache, C >= 0; H is a multiple of Hkv.
        window: keys that a query sees, its own one included; 1 <= window < 2**31.
        position: int64 [B], stream position of each sequence's first query, >= 0 (unchecked); keys before the stream's
            start, j < C - position, are not seen and may hold anything. None: all C keys exist.
        sinks: None, or q_sink [B, T, H, D], k_sink and v_sink [B, S, Hkv, D] in q's dtype, S <= 64: the stream's first
            S tokens. Query t sees sink s once it has left the band, s < position + t - (window - 1), and meets it
            as q_sink. Needs `position`.
        exclude_own: drop from every head the direction of the query's own value.

    Returns:
        [B, T, H, D] in q's dtype; sums are float32. Gradients reach q, k, v and the sinks' three.

    Raises:
        ValueError: a shape, type or device is not as above. ImportError: no triton.

    Tolerance: 2x the error of plain torch in the same dtype, which computes in float32, against float64, plus one
    rounding of the dtype and 1e-6.
    Source: FlashAttention-2, arXiv:2307.08691; attention sinks, arXiv:2309.17453; XSA, parameter-golf PR #1019.
    """
    _check_banded_attention(q, k, v, window, position, sinks)
    return _BandedAttention.apply(q, k, v, position, *(sinks or (None, None, None)), window, exclude_own)


# The contract

SPEC = KernelSpec(
    name="banded_attention",
    fn=_apart(banded_attention),
    reference=_apart(banded_attention_ref),
    inputs=inputs,
    cases=CASES,
    differentiable=("q", "k", "v", "q_sink", "k_sink", "v_sink"),
    compilations=_compilations,
    bytes_moved=_bytes_moved,
    flops=_flops,
)
