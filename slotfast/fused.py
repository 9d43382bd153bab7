"""The fused pieces of a transformer's block as torch operators: kernels forward, torch's own operators backward.

They launch kernels wherever they are called: `slotfast.ops.fuses` says where a block is made of them. What a backward
pass needs beyond the inputs is the product before its epilogue, which the forward keeps where a gradient is asked for;
no product is computed twice. The sums of squares that pass between pieces carry no gradient: each piece differentiates
its own normalisation.
"""

import torch
from torch import Tensor

from .kernels import channel_mix as mix_kernel
from .kernels import linear_heads as heads_kernel
from .kernels import linear_residual as residual_kernel
from .kernels import linear_squared as squared_kernel
from .kernels import without_own as own_kernel
from .kernels.linear import EPS, turned
from .kernels.linear._product import _normed_ref


def _keeps(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


# ---------------------------------------------------------------------------------------------------------------------
# mixing


def channel_mix(x: Tensor, x0: Tensor, skip: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """A weighted sum of two or three tensors by channel: how a block begins.

    Args:
        x, x0: [..., N] bfloat16, float16 or float32.
        skip: as these, or None.
        weights: [2, N], or [3, N] with a skip.

    Returns:
        The sum [..., N] in x's dtype, and the parts of each row's sum of squares, float32 [1, ...].
    """
    y, squares = _mix(x, x0, skip, weights.float())
    return y, squares[None]


@torch.library.custom_op("slotfast::channel_mix", mutates_args=())
def _mix(x: Tensor, x0: Tensor, skip: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    return mix_kernel(x, x0, skip, weights)


@_mix.register_fake
def _(x, x0, skip, weights):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _mix_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _mix_differentiate(ctx, dy, _):
    *given, weights = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    pairs = list(zip(given, weights, strict=False))  # a weight for each tensor that there is
    gradients = [weight.to(dy.dtype) * dy if need else None for need, (_, weight) in zip(wanted, pairs, strict=False)]
    gradients += [None] * (3 - len(gradients))
    dweights = None
    if wanted[3]:
        dweights = torch.stack([(_rows(dy) * _rows(x)).sum(0, dtype=torch.float32) for x, _ in pairs])
    return *gradients, dweights


_mix.register_autograd(_mix_differentiate, setup_context=_mix_save)


# ---------------------------------------------------------------------------------------------------------------------
# products of a normalised input


def _through_product(ctx, du: Tensor, x: Tensor, weight: Tensor, squares: Tensor, norm: float):
    """Gradients of x and weight from that of u = (x * norm / rms(x)) W^T; None where not wanted."""
    dx = dweight = None
    if ctx.needs_input_grad[1]:
        dweight = _rows(du).T @ _rows(_normed_ref(x, squares, norm))  # as the product read it
    if ctx.needs_input_grad[0]:
        dx = _through_norm(du @ weight, x, squares.sum(0) / x.size(-1), norm)
    return dx, dweight


def _through_norm(dn: Tensor, x: Tensor, mean_square: Tensor, norm: float | Tensor) -> Tensor:
    """Gradient of x from that of n = x * norm / rms(x) over the last dimension."""
    inverse = torch.rsqrt(mean_square + EPS)[..., None]
    unit = x.to(torch.promote_types(x.dtype, torch.float32)) * inverse
    return (norm * inverse * (dn - unit * (dn * unit).mean(-1, keepdim=True))).to(x.dtype)


def linear_squared(x: Tensor, weight: Tensor, squares: Tensor, norm: float, slope: float) -> Tensor:
    """leaky_relu((x * norm / rms(x)) W^T)^2: the MLP's first half.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        weight: [N, K] in x's dtype.
        squares: float32 [parts, ...], parts of each row's sum of squares.
        norm: factor of the normalised rows.
        slope: of the leaky ReLU.

    Returns:
        [..., N] in x's dtype.
    """
    return _squared(x, weight, squares, norm, slope, _keeps(x, weight))[0]


@torch.library.custom_op("slotfast::linear_squared", mutates_args=())
def _squared(
    x: Tensor, weight: Tensor, squares: Tensor, norm: float, slope: float, keep: bool
) -> tuple[Tensor, Tensor]:
    return squared_kernel(x, weight, squares, norm, slope, keep)


@_squared.register_fake
def _(x, weight, squares, norm, slope, keep):
    y = x.new_empty(*x.shape[:-1], weight.size(0))
    return y, torch.empty_like(y) if keep else x.new_empty(0)


def _squared_save(ctx, inputs, output):
    x, weight, squares, ctx.norm, ctx.slope, _ = inputs
    ctx.save_for_backward(x, weight, squares, output[1])


def _squared_differentiate(ctx, dy, _):
    x, weight, squares, u = ctx.saved_tensors
    du = 2 * dy * torch.where(u > 0, u, ctx.slope**2 * u)
    return *_through_product(ctx, du, x, weight, squares, ctx.norm), None, None, None, None


_squared.register_autograd(_squared_differentiate, setup_context=_squared_save)


def linear_heads(
    x: Tensor,
    weight: Tensor,
    squares: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    width: int,
    value: Tensor | None,
    norm: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x * norm / rms(x): queries and keys normalised by head and rotated, queries scaled.

    Args:
        x: [B, T, K] bfloat16, float16 or float32.
        weight: [(heads + 2 kv_heads) width, K] in x's dtype: of queries, keys and values.
        squares: float32 [parts, B, T], parts of each row's sum of squares.
        gain: [heads], of the queries.
        cos, sin: float32 [T, R], of each position's angles.
        width: of a head, a power of 2 up to 128.
        value: [B, T, kv_heads width] in x's dtype, added to the values; or None.
        norm: factor of the normalised rows.

    Returns:
        [B, T, heads, width], and twice [B, T, kv_heads, width]: views of one tensor.
    """
    keep = _keeps(x, weight, gain, value)
    y, _ = _heads(x, weight, squares, gain.float(), cos, sin, width, value, norm, keep)
    shared = (y.size(-2) - len(gain)) // 2
    return y.split((len(gain), shared, shared), -2)


@torch.library.custom_op("slotfast::linear_heads", mutates_args=())
def _heads(
    x: Tensor,
    weight: Tensor,
    squares: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    width: int,
    value: Tensor | None,
    norm: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return heads_kernel(x, weight, squares, gain, cos, sin, width, value, norm, keep)


@_heads.register_fake
def _(x, weight, squares, gain, cos, sin, width, value, norm, keep):
    y = x.new_empty(*x.shape[:-1], weight.size(0) // width, width)
    return y, x.new_empty(*x.shape[:-1], weight.size(0)) if keep else x.new_empty(0)


def _heads_save(ctx, inputs, output):
    x, weight, squares, gain, cos, sin, ctx.width, _, ctx.norm, _ = inputs
    ctx.save_for_backward(x, weight, squares, gain, cos, sin, output[1])


def _heads_differentiate(ctx, dy, _):
    x, weight, squares, gain, cos, sin, u = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    shared = (dy.size(-2) - len(gain)) // 2
    dturned, dv = dy.split((len(gain) + shared, shared), -2)
    dscaled = turned(dturned.to(wide), cos[:, None], -sin[:, None])
    before = u.unflatten(-1, (-1, ctx.width))[..., : len(gain) + shared, :].to(wide)
    mean_square = before.square().mean(-1)
    unit = before * torch.rsqrt(mean_square + EPS)[..., None]
    dgain = (dscaled * unit)[..., : len(gain), :].sum((0, 1, 3))
    scales = torch.cat([gain, gain.new_ones(shared)])[:, None]
    du = torch.cat([_through_norm(dscaled * scales, before, mean_square, 1.0).to(x.dtype), dv], -2).flatten(-2)
    through = _through_product(ctx, du, x, weight, squares, ctx.norm)
    dvalue = dv.flatten(-2) if ctx.needs_input_grad[7] else None
    return *through, None, dgain, None, None, None, dvalue, None, None


_heads.register_autograd(_heads_differentiate, setup_context=_heads_save)


# ---------------------------------------------------------------------------------------------------------------------
# products that end in the residual stream


def linear_residual(h: Tensor, weight: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x + scale * (h W^T), and what the next normalisation needs.

    Args:
        h: [..., K] bfloat16, float16 or float32.
        weight: [N, K] in h's dtype.
        scale: [N], of each channel.
        x: [..., N] in h's dtype.

    Returns:
        [..., N] in h's dtype, and the parts of each row's sum of squares, float32 [ceil(N / 128), ...].
    """
    return _residual(h, weight, scale.float(), x)


@torch.library.custom_op("slotfast::linear_residual", mutates_args=())
def _residual(h: Tensor, weight: Tensor, scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return residual_kernel(h, weight, scale, x)


@_residual.register_fake
def _(h, weight, scale, x):
    return x.new_empty(x.shape), x.new_empty(-(-x.size(-1) // 128), *x.shape[:-1], dtype=torch.float32)


def _residual_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _residual_differentiate(ctx, dy, _):
    h, weight, scale = ctx.saved_tensors
    needs_h, needs_weight, needs_scale, _ = ctx.needs_input_grad
    dh = dweight = dscale = None
    if needs_h:
        dh = (dy * scale.to(dy.dtype)) @ weight
    if needs_weight or needs_scale:
        unscaled = (_rows(dy).T @ _rows(h)).float()  # of W where scale is 1; the scale's own is its product with W
        dweight = (scale[:, None] * unscaled).to(weight.dtype)
        dscale = (unscaled * weight).sum(1)
    return dh, dweight, dscale, dy


_residual.register_autograd(_residual_differentiate, setup_context=_residual_save)


# ---------------------------------------------------------------------------------------------------------------------
# behind attention


@torch.library.custom_op("slotfast::without_own", mutates_args=())
def without_own(y: Tensor, v: Tensor) -> Tensor:
    """Heads of attention without their part along each position's own value.

    Args:
        y: [B, T, heads, width] bfloat16, float16 or float32.
        v: [B, T, kv_heads, width] in y's dtype.

    Returns:
        [B, T, heads, width] in y's dtype.
    """
    return own_kernel(y, v)


@without_own.register_fake
def _(y, v):
    return y.new_empty(y.shape)


def _own_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _own_differentiate(ctx, dx):
    y, v = ctx.saved_tensors
    length = v.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    own = (v / length)[:, :, :, None]  # (B, T, kv_heads, 1, width)
    dx, y = (x.unflatten(2, (v.size(2), -1)) for x in (dx, y))
    along = (dx * own).sum(-1, keepdim=True)
    down = -(dx * (y * own).sum(-1, keepdim=True) + y * along).sum(3)
    own = own[:, :, :, 0]
    dv = (down - own * (down * own).sum(-1, keepdim=True)) / length
    return (dx - along * own[:, :, :, None]).flatten(2, 3), dv


without_own.register_autograd(_own_differentiate, setup_context=_own_save)
