"""Logit bias + softcap + cross-entropy: per-token NLL, logit gradient, and per-window loss with its bias gradient.

For a window w with logits x [T, V], bias b [V] and targets y [T], and cap(a) = softcap * tanh(a / softcap):

    z = x + b,  cap(x) + b,  or  cap(x + b)          scores
    lse_t = log sum_v exp z_tv,  nll_t = lse_t - z_t,y
    p_t = exp(z_t - lse_t)
    d nll_t / dz_tv = p_tv - [v = y_t],              times 1 - (z / softcap)^2 where the cap came last
    loss = sum_t weight_t nll_t / sum_t weight_t,    dbias_v = the same mean of d nll_t / db_v

`bias_cross_entropy` (`_tokens.py`) gives nll and lse and propagates gradients to logits and bias: training and scoring.
`bias_cross_entropy_grad` (`_windows.py`) gives loss and dbias in one pass over the logits, for an optimiser that asks
for both.

| tensor  | shape           | type                                     |
|---------|-----------------|------------------------------------------|
| logits  | [W, T, V]       | float32, bfloat16, float16; any strides  |
| bias    | [V] or [W, V]   | floating                                 |
| targets | [W, T]          | int64, int32                             |
| weights | [W, T]          | float32, >= 0                            |
| nll, lse| [W, T]          | float32                                  |
| loss    | [W]             | float32, summed in float64               |
| dbias   | [W, V]          | float32                                  |

Value and bias gradient read each logit once and write V floats a window: W T V itemsize + 4 W V bytes, about
8 W T V flops and W T V exponentials (a softcap doubles these and adds as many divisions): bound by memory.

Positions that are ignored, or weigh 0, are not read: whatever their logits, they give 0 everywhere. A window of such
positions alone has loss 0 and gradient 0. A target outside [0, V) that is not `ignore_index`, or a row with NaN,
+inf or only -inf, makes that row NaN, and loss and gradient of its window if it weighs anything there; nothing else.

Rows never meet except in the sums of their own window, whose order is fixed by T and V: a window's bits are the same
alone, in any batch, in any order. The softmax is that of Milakov and Gimelshein (arXiv:1805.02867) where a row
exceeds one tile; the bias is the logit-space form of SLOT (arXiv:2505.12392; parameter-golf PR #1350).
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable

from .._inputs import _check_windows, _contiguous, _draw
from .._tile import _OPTIONS, _config
from .._triton import triton
from ..spec import KernelSpec
from ._contract import _CASES, _GRAD_CASES, _compilations, _grad_compilations
from ._reference import bias_cross_entropy_grad_ref, bias_cross_entropy_ref
from ._scores import _score_arguments
from ._tokens import _bias_cross_entropy_bwd_kernel, _bias_cross_entropy_fwd_kernel
from ._windows import _bias_cross_entropy_grad_kernel, _bias_cross_entropy_sum_kernel

__all__ = [
    "bias_cross_entropy",
    "bias_cross_entropy_grad",
    "bias_cross_entropy_grad_ref",
    "bias_cross_entropy_ref",
]

# Launches


def _check(logits, targets, bias, weights, softcap, reduction="mean"):
    _check_windows(logits, targets, weights, softcap, bias=bias)
    W, _, V = logits.shape
    if bias is not None and (bias.shape not in ((V,), (W, V)) or not bias.is_floating_point()):
        raise ValueError(f"bias: expected floating {[V]} or {[W, V]}, got {bias.dtype} {list(bias.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: expected "mean" or "sum", got {reduction!r}')


def _bias_cross_entropy_fwd(logits, targets, bias, options):
    """nll, lse, shift, sum; each [W, T]. `options` are softcap, cap_after_bias, ignore_index."""
    W, T, V = logits.shape
    targets, bias = _contiguous(targets, bias)
    nll, lse, shift, total = (torch.empty((W, T), dtype=torch.float32, device=logits.device) for _ in range(4))
    if W and T:
        tile = _config(T, V, logits.element_size())
        with torch.cuda.device_of(logits):
            _bias_cross_entropy_fwd_kernel[(W * triton.cdiv(T, tile.rows),)](
                logits_ptr=logits,
                targets_ptr=targets,
                nll_ptr=nll,
                lse_ptr=lse,
                shift_ptr=shift,
                sum_ptr=total,
                **_score_arguments(logits, bias, options, tile),
            )
    return nll, lse, shift, total


def _fill_gradients(
    logits, targets, bias, shift, total, options, *, dnll=None, dlse=None, dlogits=None, dbias_parts=None
):
    """Fills dlogits and dbias_parts [W, parts, V], whichever is given. Without dnll: dlogits = softmax."""
    W, T, V = logits.shape
    if not (W and T):
        return
    targets, bias, dnll, dlse = _contiguous(targets, bias, dnll, dlse)
    tile = _config(T, V, logits.element_size())
    grid = (W * triton.cdiv(T, tile.part), triton.cdiv(V, tile.chunks * tile.cols))
    with torch.cuda.device_of(logits):
        _bias_cross_entropy_bwd_kernel[grid](
            logits_ptr=logits,
            targets_ptr=targets,
            shift_ptr=shift,
            sum_ptr=total,
            dnll_ptr=dnll,
            dlse_ptr=dlse,
            dlogits_ptr=dlogits,
            dbias_ptr=dbias_parts,
            PART=tile.part,
            **_score_arguments(logits, bias, options, tile),
        )


def _empty_parts(logits):
    """Where the parts of each window's dbias go: [W, parts, V]."""
    W, T, V = logits.shape
    count = triton.cdiv(T, _config(T, V, logits.element_size()).part)
    return torch.empty((W, count, V), dtype=torch.float32, device=logits.device)


def _sum_parts(parts, T, nll=None, targets=None, weights=None, ignore_index=-100, loss=None, mean=False):
    W, count, V = parts.shape
    dbias = torch.empty((W, V), dtype=torch.float32, device=parts.device)
    with torch.cuda.device_of(parts):
        _bias_cross_entropy_sum_kernel[(W, triton.cdiv(V, 1024))](
            parts_ptr=parts,
            nll_ptr=nll,
            targets_ptr=targets,
            weights_ptr=weights,
            loss_ptr=loss,
            dbias_ptr=dbias,
            T=T,
            V=V,
            ignore_index=ignore_index,
            MEAN=mean,
            parts=count,
            BLOCK_T=128,
            BLOCK_V=1024,
            num_warps=4,
            **_OPTIONS,
        )
    return dbias


def _bias_cross_entropy_bwd(
    logits, targets, bias, shift, total, dnll, dlse, options, *, wants_dlogits=True, wants_dbias=True
):
    """dlogits and dbias, None where not wanted or where there is no bias; from what the forward returned."""
    W, T, V = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if wants_dlogits else None
    parts = _empty_parts(logits) if wants_dbias and bias is not None else None
    gradients = {"dnll": dnll, "dlse": dlse, "dlogits": dlogits, "dbias_parts": parts}
    _fill_gradients(logits, targets, bias, shift, total, options, **gradients)
    if parts is None:
        return dlogits, None
    dbias = _sum_parts(parts, T) if W and T else parts.new_zeros((W, V))
    return dlogits, (dbias.sum(0) if bias.dim() == 1 else dbias).to(bias.dtype)


# Public functions


class _BiasCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, bias, softcap, cap_after_bias, ignore_index):
        options = softcap, cap_after_bias, ignore_index
        nll, lse, shift, total = _bias_cross_entropy_fwd(logits, targets, bias, options)
        ctx.save_for_backward(logits, targets, bias, shift, total)
        ctx.options = options
        return nll, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll, dlse):
        wanted = {"wants_dlogits": ctx.needs_input_grad[0], "wants_dbias": ctx.needs_input_grad[2]}
        dlogits, dbias = _bias_cross_entropy_bwd(*ctx.saved_tensors, dnll, dlse, ctx.options, **wanted)
        return dlogits, None, dbias, None, None, None


def bias_cross_entropy(logits, targets, bias=None, *, softcap=None, cap_after_bias=False, ignore_index=-100):
    """Cross-entropy of biased, soft-capped logits, for each token, with gradients to logits and bias.

    Args:
        logits: [W, T, V] float32, bfloat16 or float16, any strides, V >= 1. Never written.
        targets: [W, T] int64 or int32 token ids, or `ignore_index`.
        bias: None, [V] or [W, V], floating; -inf bans a token.
        softcap: None, or c > 0: c * tanh(a / c) is applied to the logits.
        cap_after_bias: the softcap applies to logits + bias instead.
        ignore_index: target of positions that do not count. They are not read.

    Returns:
        nll: [W, T] float32, nats. 0 where ignored; NaN where the target is outside [0, V), or the row holds NaN, +inf
            or only -inf.
        lse: [W, T] float32, log of the sum of exp of the row's scores. 0 where ignored; NaN as nll, targets apart.

        The gradient of a NaN row is NaN, so that of the whole bias of its window is too. A bias [V] sums its gradient
        over the windows, in an order that depends on how many there are.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one float32 rounding and 1e-6.
    Source: SLOT, arXiv:2505.12392, in its logit-space form (parameter-golf PR #1350).
    """
    _check(logits, targets, bias, None, softcap)
    return _BiasCrossEntropy.apply(logits, targets, bias, softcap, cap_after_bias, ignore_index)


@torch.no_grad()
def bias_cross_entropy_grad(
    logits, targets, bias=None, weights=None, *, softcap=None, cap_after_bias=False, ignore_index=-100, reduction="mean"
):
    """Weighted mean cross-entropy of each window and its gradient with respect to the window's bias, in one pass.

    With `reduction="sum"` and no bias, dbias is E - C: what the softmax expects of each token at the weighted positions
    minus what came. So E = dbias + `target_counts(targets, V, weights)`.

    Args:
        logits: [W, T, V] float32, bfloat16 or float16, any strides, V >= 1. Never written.
        targets: [W, T] int64 or int32 token ids, or `ignore_index`.
        bias: None for 0, [V] or [W, V], floating; -inf bans a token.
        weights: None for 1, or [W, T] float32 >= 0 (unchecked). Positions of weight 0 are not read.
        softcap: None, or c > 0: c * tanh(a / c) is applied to the logits.
        cap_after_bias: the softcap applies to logits + bias instead.
        ignore_index: target of positions that do not count. They are not read.
        reduction: "mean" divides by the window's sum of weights of positions that count, "sum" does not.

    Returns:
        loss: [W] float32, nats, summed in float64. 0 where no position counts.
        dbias: [W, V] float32, for a bias [V] too: each window's own gradient. 0 where no position counts.

        Both are NaN for a window with a counting position whose target is outside [0, V), or whose row holds NaN, +inf
        or only -inf.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one float32 rounding and 1e-6.
    Source: as `bias_cross_entropy`; the gradient in closed form.
    """
    _check(logits, targets, bias, weights, softcap, reduction)
    W, T, V = logits.shape
    loss = torch.empty((W,), dtype=torch.float32, device=logits.device)
    if not (W and T):
        return loss.zero_(), torch.zeros((W, V), dtype=torch.float32, device=logits.device)
    tile = _config(T, V, logits.element_size())
    targets, bias, weights = _contiguous(targets, bias, weights)
    options = softcap, cap_after_bias, ignore_index
    mean = reduction == "mean"
    parts = _empty_parts(logits)
    if tile.chunks * tile.cols < V:  # a row exceeds the registers: read it twice
        if weights is not None:
            targets = targets.masked_fill(weights == 0, ignore_index)
        nll, _, shift, total = _bias_cross_entropy_fwd(logits, targets, bias, options)
        dnll = torch.ones_like(nll) if weights is None else weights
        _fill_gradients(logits, targets, bias, shift, total, options, dnll=dnll, dbias_parts=parts)
        return loss, _sum_parts(parts, T, nll, targets, weights, ignore_index, loss, mean)
    whole = tile.part >= T
    hits = torch.empty((W, T), dtype=torch.float32, device=logits.device)
    nll = None if whole else torch.empty_like(hits)
    with torch.cuda.device_of(logits):
        _bias_cross_entropy_grad_kernel[(W * parts.shape[1],)](
            logits_ptr=logits,
            targets_ptr=targets,
            weights_ptr=weights,
            nll_ptr=nll,
            hits_ptr=hits,
            loss_ptr=loss,
            dbias_ptr=parts,
            MEAN=mean,
            WHOLE=whole,
            PART=tile.part,
            **_score_arguments(logits, bias, options, tile),
        )
    if whole:
        return loss, parts.squeeze(1)
    return loss, _sum_parts(parts, T, nll, targets, weights, ignore_index, loss, mean)


# The contract

SPECS = (
    KernelSpec(
        name="bias_cross_entropy",
        fn=bias_cross_entropy,
        reference=bias_cross_entropy_ref,
        inputs=partial(_draw, bias="windows"),
        cases=_CASES,
        differentiable=("logits", "bias"),
        compilations=_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 8 + 16) + 4 * W * V,
        flops=lambda *, W, T, V, **_: 6 * W * T * V,
    ),
    KernelSpec(
        name="bias_cross_entropy_grad",
        fn=bias_cross_entropy_grad,
        reference=bias_cross_entropy_grad_ref,
        inputs=partial(_draw, bias="windows"),
        cases=_GRAD_CASES,
        compilations=_grad_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 8) + W * (8 * V + 4),
        flops=lambda *, W, T, V, **_: 8 * W * T * V,
    ),
)
