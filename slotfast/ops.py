"""Torch operators over the kernels: one place that chooses between Triton and plain torch, and says so.

Backends: `triton` launches the kernel and fails where it cannot, `torch` runs the plain reference, `auto` is triton on
a GPU and torch elsewhere. Nothing falls back silently. The operators registered as `slotfast::*` are `auto`: they go by
the tensors' device, and have shapes and gradients, so that they trace under `torch.compile(fullgraph=True)`.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .banded import fused_banded_attention
from .errors import InputError
from .flash import flash_attention, torch_attention
from .fused import channel_mix, linear_heads, linear_residual, linear_squared
from .fused import without_own as fused_without_own
from .kernels import (
    PackedInt6,
    banded_attention_ref,
    bias_cross_entropy,
    bias_cross_entropy_ref,
    int6_matmul,
    int6_matmul_ref,
)
from .kernels.attention import _banded_attention_bwd, _banded_attention_fwd, _check_banded_attention
from .kernels.int6_product import _stays_in_l2
from .kernels.lbfgs import LARGEST_V
from .kernels.own import LARGEST_D, without_own_ref
from .kernels.solver import MOST_COLUMNS, MOST_PAIRS
from .losses import bias_loss, linear_logits, linear_loss

__all__ = [
    "Backend",
    "attention",
    "banded_attention",
    "channel_mix",
    "choose",
    "cross_entropy",
    "fuses",
    "fuses_output",
    "int6_linear",
    "keeps_dense",
    "launches_lbfgs",
    "linear_cross_entropy",
    "linear_heads",
    "linear_logits",
    "linear_residual",
    "linear_squared",
    "solves_in_one_launch",
    "uses_triton",
    "without_own",
]

Backend = Literal["auto", "triton", "torch"]


def uses_triton(backend: Backend, device: torch.device | str) -> bool:
    """Whether a backend launches kernels on a device.

    Raises:
        InputError: triton is asked for where there is no GPU.
    """
    on_gpu = torch.device(device).type == "cuda"
    if backend == "triton" and not on_gpu:
        raise InputError("--backend triton: needs a GPU, and this runs on the CPU")
    return on_gpu and backend != "torch"


def choose(backend: Backend, device: torch.device | str, kernel: Callable, reference: Callable) -> Callable:
    """The function that a backend calls on a device: a kernel, or its plain torch reference with the same signature."""
    return kernel if uses_triton(backend, device) else reference


def fuses(backend: Backend, x: Tensor, head_width: int) -> bool:
    """Whether the blocks of a transformer, with states x, are made of the fused operators.

    In float32 they are not: there a library's products may round inputs to TF32, and are faster.
    """
    return 2 <= head_width <= 128 and head_width.bit_count() == 1 and fuses_output(backend, x)


def fuses_output(backend: Backend, x: Tensor) -> bool:
    """Whether kernels make logits of states x, or losses without them; as blocks, not in float32."""
    return x.dtype in (torch.bfloat16, torch.float16) and uses_triton(backend, x.device)


def solves_in_one_launch(backend: Backend, logits: Tensor, phases: Sequence[tuple[int, int]]) -> bool:
    """Whether `slot_solve` runs the L-BFGS fits of windows; otherwise `slotfast.lbfgs` does."""
    short = len(phases) <= 4 and all(most <= 32767 and min(most - 1, history) <= MOST_PAIRS for most, history in phases)
    narrow = logits.dtype != torch.float64 and logits.shape[-1] <= MOST_COLUMNS
    return uses_triton(backend, logits.device) and narrow and short


def launches_lbfgs(backend: Backend, like: Tensor) -> bool:
    """Whether `slotfast.lbfgs` keeps the pairs of problems like [W, V] in the kernels' memory."""
    return uses_triton(backend, like.device) and like.dtype == torch.float32 and 1 <= like.shape[-1] <= LARGEST_V


# ---------------------------------------------------------------------------------------------------------------------
# cross-entropy


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    cap_after_bias: bool = False,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """Per-token cross-entropy of biased, soft-capped logits, with gradients to logits and bias.

    Args:
        logits: [W, T, V] float32, bfloat16, float16; float64 on the torch backend.
        targets: int [W, T].
        bias: [V] or [W, V], or None.
        softcap: c > 0 of c * tanh(logits / c), or None.
        cap_after_bias: the cap applies to logits + bias instead.
        ignore_index: target of positions that do not count.
        backend: triton, torch or auto.

    Returns:
        float32 (float64 for float64) [W, T], nats; 0 where ignored.
    """
    if backend == "auto":
        return bias_loss(logits, targets, bias, softcap, cap_after_bias, ignore_index)[0]
    options = {"softcap": softcap, "cap_after_bias": cap_after_bias, "ignore_index": ignore_index}
    function = choose(backend, logits.device, bias_cross_entropy, bias_cross_entropy_ref)
    return function(logits, targets, bias, **options)[0]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of each row's soft-capped logits x W^T, with gradients to both.

    Neither they nor their gradients are in memory where `fuses_output`.

    Args:
        x: [..., K] float32, bfloat16, float16; float64 on the torch backend.
        weight: [V, K] in x's dtype.
        targets: int [...].
        softcap: c > 0 of c * tanh(logits / c), or None.
        ignore_index: target of rows that do not count.
        backend: triton, torch or auto.

    Returns:
        float32 (float64 for float64) [...], nats; 0 where ignored.
    """
    if fuses_output(backend, x):
        return linear_loss(x, weight, targets, softcap, ignore_index)[0]
    logits = F.linear(x, weight)
    flat = logits.reshape(1, -1, len(weight)), targets.reshape(1, -1)
    return cross_entropy(*flat, softcap=softcap, ignore_index=ignore_index, backend=backend).view(targets.shape)


# ---------------------------------------------------------------------------------------------------------------------
# linear layers on packed weights


def keeps_dense(backend: Backend, device: torch.device | str, n_bytes: int) -> bool:
    """Whether layers on packed weights also keep dense ones, `n_bytes` in all: on a GPU in whose L2 cache they stay."""
    return uses_triton(backend, device) and _stays_in_l2(n_bytes, torch.device(device))


def int6_linear(x: Tensor, weight: PackedInt6, backend: Backend = "auto", dense: Tensor | None = None) -> Tensor:
    """x @ dequantize(weight)^T.

    Args:
        x: [..., K] float16, bfloat16 or float32; float64 on the torch backend.
        weight: packed [N, K].
        backend: triton, torch or auto.
        dense: [N, K] in x's dtype, the same weights, or None; for kernels.

    Returns:
        [..., N] in x's dtype. Gradients reach x only, and not through `auto`.
    """
    if backend == "auto":
        return _int6_linear(x, weight.low, weight.high, weight.scale, *weight.shape, dense)
    return choose(backend, x.device, int6_matmul, int6_matmul_ref)(x, weight, dense)


@torch.library.custom_op("slotfast::int6_linear", mutates_args=(), device_types="cpu")
def _int6_linear(x: Tensor, low: Tensor, high: Tensor, scale: Tensor, n: int, k: int, dense: Tensor | None) -> Tensor:
    return int6_matmul_ref(x, PackedInt6(low, high, scale, (n, k)), dense)


@_int6_linear.register_kernel("cuda")
def _(x, low, high, scale, n, k, dense):
    return int6_matmul(x, PackedInt6(low, high, scale, (n, k)), dense)


@_int6_linear.register_fake
def _(x, low, high, scale, n, k, dense):
    return x.new_empty(*x.shape[:-1], n)


# ---------------------------------------------------------------------------------------------------------------------
# attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last positions, grouped where there are fewer key heads than query heads.

    Args:
        q: [B, N, heads, width], of the last N of T positions.
        k, v: [B, T, kv_heads, width]; heads is a multiple of kv_heads.

    Returns:
        [B, N, heads, width]: FlashAttention's where the machine has one that works, else torch's own.
    """
    flash = flash_attention(q.device) if q.dtype in (torch.bfloat16, torch.float16) else None
    if flash is not None:
        return flash(q, k, v)
    return torch_attention(q, k, v)


def without_own(y: Tensor, v: Tensor) -> Tensor:
    """What each position attends to beyond itself: every head's output without its part along the position's own value.

    Args:
        y: [B, T, heads, width].
        v: [B, T, kv_heads, width]; heads is a multiple of kv_heads.

    Returns:
        [B, T, heads, width]. Source: XSA of PR #1019.
    """
    small = y.dtype in (torch.bfloat16, torch.float16) and y.size(-1) <= LARGEST_D
    return fused_without_own(y, v) if small and uses_triton("auto", y.device) else without_own_ref(y, v)


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    position: Tensor | None = None,
    sinks: tuple[Tensor, Tensor, Tensor] | None = None,
    exclude_own: bool = False,
    fixed_cache: bool = False,
) -> Tensor:
    """Causal attention in a band of `window` keys, behind a cache, with attention sinks; differentiable.

    Args:
        q: [B, T, heads, width].
        k, v: [B, C + T, kv_heads, width]; the first C are the cache, heads is a multiple of kv_heads.
        window: keys that a query sees, its own one included; >= 1.
        position: int64 [B], the first query's position in the stream; cache slots before the stream's start are not
            seen, whatever they hold. None: all keys exist.
        sinks: queries [B, T, heads, width] for, and keys and values [B, S, kv_heads, width] of, the stream's first S
            tokens, which a query sees once they have left its band. Needs `position`.
        exclude_own: drop the direction of a position's own value from every head (XSA).
        fixed_cache: nobody asks for gradients of the cache; they may be zeros.

    Returns:
        [B, T, heads, width] in q's dtype.
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _banded_on_cpu(q, k, v, window, position, sinks, exclude_own, fixed_cache)
    return _banded(q, k, v, position, *(sinks or (None, None, None)), window, exclude_own)[0]


def _banded_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    position: Tensor | None,
    sinks: tuple[Tensor, Tensor, Tensor] | None,
    exclude_own: bool,
    fixed_cache: bool = False,
) -> Tensor:
    past = k.size(1) - q.size(1)
    if position is not None and not bool((position >= past).all()):
        return banded_attention_ref(q, k, v, window, position, sinks, exclude_own)
    out = fused_banded_attention(q, k, v, window, position, sinks, fixed_cache)
    return without_own(out, v[:, past:]) if exclude_own else out


@torch.library.custom_op("slotfast::banded_attention", mutates_args=(), device_types="cpu")
def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    window: int,
    exclude_own: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The attention, and what the backward pass of the device needs."""
    sinks = None if q_sink is None or k_sink is None or v_sink is None else (q_sink, k_sink, v_sink)
    out = _banded_on_cpu(q, k, v, window, position, sinks, exclude_own).contiguous()
    return out, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)


@_banded.register_kernel("cuda")
def _(q, k, v, position, q_sink, k_sink, v_sink, window, exclude_own):
    sinks = None if q_sink is None else (q_sink, k_sink, v_sink)
    _check_banded_attention(q, k, v, window, position, sinks)
    return _banded_attention_fwd(q, k, v, position, q_sink, k_sink, v_sink, window, exclude_own)


@_banded.register_fake
def _(q, k, v, position, q_sink, k_sink, v_sink, window, exclude_own):
    rows = (q.size(0), k.size(2), q.size(1) * q.size(2) // k.size(2)) if q.device.type == "cuda" else (0,)
    shapes = rows, rows if exclude_own else (0,)
    return q.new_empty(q.shape), *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("slotfast::banded_attention_backward", mutates_args=(), device_types="cpu")
def _banded_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    along: Tensor,
    window: int,
    exclude_own: bool,
) -> list[Tensor]:
    """Gradients of q, k and v, and of the sinks' three where there are any."""

    def forward(q, k, v, *sinks):
        return banded_attention_ref(q, k, v, window, position, sinks or None, exclude_own)

    sinks = () if q_sink is None else (q_sink, k_sink, v_sink)
    pull_back = torch.func.vjp(forward, q, k, v, *sinks)[1]
    return [gradient.contiguous() for gradient in pull_back(dout)]


@_banded_backward.register_kernel("cuda")
def _(dout, *given):
    return [gradient for gradient in _banded_attention_bwd(dout, *given) if gradient is not None]


@_banded_backward.register_fake
def _(dout, q, k, v, position, q_sink, k_sink, v_sink, out, lse, along, window, exclude_own):
    return [x.new_empty(x.shape) for x in (q, k, v, q_sink, k_sink, v_sink) if x is not None]


def _banded_save(ctx, inputs, output):
    *tensors, window, exclude_own = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = window, exclude_own


def _banded_differentiate(ctx, dout, dlse, dalong):
    dq, dk, dv, *sinks = _banded_backward(dout, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, *(sinks or (None, None, None)), None, None


_banded.register_autograd(_banded_differentiate, setup_context=_banded_save)
