"""Losses as registered operators, with shapes and gradients: of logits, and straight from hidden states; and logits.

`slotfast.ops` calls them. They go by the tensors' device; the plain torch behind the second on a CPU is for tracing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .kernels import bias_cross_entropy_ref, linear_cross_entropy_ref, linear_logits_ref
from .kernels._inputs import _scores_ref, _targets_ref
from .kernels.cross_entropy import _bias_cross_entropy_bwd, _bias_cross_entropy_fwd
from .kernels.linear._cross_entropy import _linear_cross_entropy_bwd, _linear_cross_entropy_fwd


@torch.library.custom_op("slotfast::bias_cross_entropy", mutates_args=(), device_types="cpu")
def bias_loss(
    logits: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, cap_after_bias: bool, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, and what the backward pass of the device needs."""
    options = {"softcap": softcap, "cap_after_bias": cap_after_bias, "ignore_index": ignore_index}
    nll, lse = bias_cross_entropy_ref(logits, targets, bias, **options)
    return nll, lse, lse.new_empty(0), lse.new_empty(0)


@bias_loss.register_kernel("cuda")
def _(logits, targets, bias, softcap, cap_after_bias, ignore_index):
    return _bias_cross_entropy_fwd(logits, targets, bias, (softcap, cap_after_bias, ignore_index))


@bias_loss.register_fake
def _(logits, targets, bias, softcap, cap_after_bias, ignore_index):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    saved = targets.shape if logits.device.type == "cuda" else (0,)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in (targets.shape, targets.shape, saved, saved))


@torch.library.custom_op("slotfast::bias_cross_entropy_backward", mutates_args=(), device_types="cpu")
def _bias_backward(
    dnll: Tensor,
    dlse: Tensor,
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    total: Tensor,
    softcap: float | None,
    cap_after_bias: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and bias; that of no bias is empty."""
    z = _scores_ref(logits, bias, softcap, cap_after_bias)
    used, bad, index = _targets_ref(targets, z.size(-1), ignore_index)
    dnll = dnll.masked_fill(~used, 0.0).masked_fill(bad, torch.nan)
    dz = torch.softmax(z.masked_fill(~used[..., None], 0.0), -1) * (dnll + dlse.masked_fill(~used, 0.0))[..., None]
    dz.scatter_add_(-1, index[..., None], -dnll[..., None])
    dlogits = dz
    if softcap is not None:
        capped = z if cap_after_bias else softcap * torch.tanh(logits.to(z.dtype) / softcap)
        dlogits = dz * (1 - (capped / softcap).square())
    if bias is None:
        return dlogits.to(logits.dtype), logits.new_empty(0)
    dbias = (dlogits if cap_after_bias else dz).sum(-2)
    return dlogits.to(logits.dtype), (dbias.sum(0) if bias.dim() == 1 else dbias).to(bias.dtype)


@_bias_backward.register_kernel("cuda")
def _(dnll, dlse, logits, targets, bias, shift, total, softcap, cap_after_bias, ignore_index):
    options = softcap, cap_after_bias, ignore_index
    dlogits, dbias = _bias_cross_entropy_bwd(logits, targets, bias, shift, total, dnll, dlse, options)
    return dlogits, logits.new_empty(0) if dbias is None else dbias


@_bias_backward.register_fake
def _(dnll, dlse, logits, targets, bias, shift, total, softcap, cap_after_bias, ignore_index):
    return logits.new_empty(logits.shape), logits.new_empty(0) if bias is None else torch.empty_like(bias)


def _bias_save(ctx, inputs, output):
    logits, targets, bias, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, bias, *output[2:])


def _bias_differentiate(ctx, dnll, dlse, dshift, dtotal):
    logits, targets, bias, shift, total = ctx.saved_tensors
    dlogits, dbias = _bias_backward(dnll, dlse, logits, targets, bias, shift, total, *ctx.options)
    return dlogits, None, None if bias is None else dbias, None, None, None


bias_loss.register_autograd(_bias_differentiate, setup_context=_bias_save)


@torch.library.custom_op("slotfast::linear_cross_entropy", mutates_args=(), device_types="cpu")
def linear_loss(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """nll, and what the backward pass of the device needs."""
    nll = linear_cross_entropy_ref(x, weight, targets, softcap=softcap, ignore_index=ignore_index)
    return nll, nll.new_empty(0), nll.new_empty(0)


@linear_loss.register_kernel("cuda")
def _launch(x, weight, targets, softcap, ignore_index):
    return _linear_cross_entropy_fwd(x, weight, targets, None, softcap, ignore_index)


@linear_loss.register_fake
def _(x, weight, targets, softcap, ignore_index):
    dtype = torch.promote_types(x.dtype, torch.float32)
    saved = (0,) if x.device.type == "cpu" else targets.shape
    return tuple(x.new_empty(shape, dtype=dtype) for shape in (targets.shape, saved, saved))


@torch.library.custom_op("slotfast::linear_cross_entropy_backward", mutates_args=(), device_types="cpu")
def _backward(
    dnll: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    shift: Tensor,
    total: Tensor,
    softcap: float | None,
    ignore_index: int,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; one that is not wanted is empty."""

    def forward(x, weight):
        return bias_cross_entropy_ref(F.linear(x, weight), targets, softcap=softcap, ignore_index=ignore_index)[0]

    dx, dweight = torch.func.vjp(forward, x, weight)[1](dnll)
    return dx.contiguous() if of_x else x.new_empty(0), dweight.contiguous() if of_weight else x.new_empty(0)


@_backward.register_kernel("cuda")
def _launch_backward(dnll, x, weight, targets, shift, total, softcap, ignore_index, of_x, of_weight):
    given = x, weight, targets, None, shift, total, dnll, softcap, ignore_index
    dx, dweight, _ = _linear_cross_entropy_bwd(*given, (of_x, of_weight, False))
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dweight is None else dweight


@_backward.register_fake
def _(dnll, x, weight, targets, shift, total, softcap, ignore_index, of_x, of_weight):
    return x.new_empty(x.shape if of_x else 0), weight.new_empty(weight.shape if of_weight else 0)


def _save(ctx, inputs, output):
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, targets, *output[1:])


def _differentiate(ctx, dnll, dshift, dtotal):
    wanted = ctx.needs_input_grad[:2]
    found = _backward(dnll, *ctx.saved_tensors, *ctx.options, *wanted)
    return *(each if needed else None for each, needed in zip(found, wanted, strict=True)), None, None, None


linear_loss.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op("slotfast::linear_logits", mutates_args=(), device_types="cpu")
def linear_logits(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped logits float32 (float64 for float64) [..., V] of states [..., K] and weight [V, K]; no gradients."""
    return linear_logits_ref(x, weight, softcap)


@linear_logits.register_kernel("cuda")
def _(x, weight, softcap):
    return kernels.linear_logits(x, weight, softcap)


@linear_logits.register_fake
def _(x, weight, softcap):
    return x.new_empty((*x.shape[:-1], len(weight)), dtype=torch.promote_types(x.dtype, torch.float32))
