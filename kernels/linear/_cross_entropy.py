"""Cross-entropy behind the product of the output matrix: a running softmax over its tiles, no logits in memory.

    z = cap(x W^T + b),  cap(a) = softcap * tanh(a / softcap),  nll = log sum_v exp(z_v) - z_target
    p = exp(z) / sum exp(z),  dz = dnll (p - [v = target]) (1 - (z / softcap)^2),  dx = dz W,  dW = dz^T x

| tensor  | shape    | type                       |
|---------|----------|----------------------------|
| x       | [..., K] | float32, bfloat16, float16 |
| W       | [V, K]   | that of x                  |
| b       | [V]      | floating                   |
| targets | [...]    | int64, int32               |
| nll     | [...]    | float32                    |

A program owns the rows of a tile and goes through the vocabulary: what it keeps of a row is the largest score, the sum
of exponentials below it, and the target's score. 2 M V K operations; M V logits stay in registers, 24 instructions for
each, the product's and the softcap's included (sm_90, K = 512, bfloat16). Products and sums of scores round apart
(`_OPTIONS` of `_product.py`), so that the largest less itself is 0 in both kernels. Rows are not split by vocabulary:
with few of them it would gain, but the forward before them takes a hundred times as long. Unmeasured, all of this.

The backward keeps two numbers a row. It makes the scores anew, some rows at a time: their gradient goes through memory,
and two products of the library turn it into dx and dW, whose parts are summed in order.

The softmax is that of Milakov and Gimelshein (arXiv:1805.02867); losses without logits are those of Cut
Cross-Entropy (arXiv:2411.09009).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .._inputs import _check_softcap, _contiguous
from .._rows import _load_targets
from .._triton import _LN2, _LOG2E, tl, triton
from ..cases.linear import CROSS_ENTROPY_CASES, cross_entropy_inputs
from ..cross_entropy import bias_cross_entropy_ref
from ..spec import KernelSpec
from ._logits import _cap, _score_tile
from ._product import _check, _compilation, _launch_tiles, _store

_PART_REF = 1 << 22  # logits that the reference has in memory
_PART = 1 << 24  # and gradients of logits that the backward has; 32 MiB of bfloat16 stay in an L2 cache


def linear_cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`linear_cross_entropy` in plain torch, some rows at a time; float64 states give float64 losses."""

    def losses(rows: Tensor, targets: Tensor) -> Tensor:
        options = {"softcap": softcap, "cap_after_bias": True, "ignore_index": ignore_index}
        return bias_cross_entropy_ref(F.linear(rows, weight)[None], targets[None], bias, **options)[0][0]

    count = max(1, _PART_REF // len(weight))
    parts = list(zip(x.reshape(-1, x.shape[-1]).split(count), targets.reshape(-1).split(count), strict=True))
    if torch.is_grad_enabled() and len(parts) > 1:
        found = [checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        found = [losses(*part) for part in parts]
    return torch.cat(found).view(targets.shape)


# Kernels


@triton.jit
def _linear_cross_entropy_fwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    targets_ptr,
    nll_ptr,
    shift_ptr,
    sum_ptr,
    M,
    softcap,
    ignore_index,
    K: tl.constexpr,
    N: tl.constexpr,
    CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """nll, and shift and sum for the backward, of BLOCK_M rows: p = exp2(z log2(e) - shift) / sum."""
    first = (tl.program_id(0) * BLOCK_M).to(tl.int64)
    left = M - tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    target, used, bad = _load_targets(targets_ptr + first, 0, offs_m, left, N, ignore_index)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    hit = tl.zeros((BLOCK_M,), tl.float32)  # score of the target
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        z = _score_tile(
            x_ptr + first * K, w_ptr, bias_ptr, left, columns, K, softcap, N, CAP, EVEN_K, UPCAST, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        # One of a row's terms is not 0: the sum is the score itself, which a sum over k of its own would round apart.
        hit += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
        if N % BLOCK_N != 0:
            z = tl.where((columns < N)[None, :], z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        # -inf - -inf: tokens that are banned so far must not become NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top * _LOG2E)
        e = tl.exp2(z * _LOG2E - shift[:, None])
        total = total * tl.exp2(tl.where(top == new_top, 0.0, top * _LOG2E - shift)) + tl.sum(e, axis=1)
        top = new_top
    shift = tl.where(top == float("-inf"), float("nan"), top * _LOG2E)
    nll = (tl.log2(total) - (hit * _LOG2E - shift)) * _LN2
    mask = offs_m < left
    tl.store(nll_ptr + first + offs_m, tl.where(used, tl.where(bad, float("nan"), nll), 0.0), mask=mask)
    if shift_ptr is not None:
        tl.store(shift_ptr + first + offs_m, shift, mask=mask)
        tl.store(sum_ptr + first + offs_m, total, mask=mask)


@triton.jit
def _linear_cross_entropy_bwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    targets_ptr,
    shift_ptr,
    sum_ptr,
    dnll_ptr,
    dlogits_ptr,
    M,
    softcap,
    ignore_index,
    K: tl.constexpr,
    N: tl.constexpr,
    CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the gradient of x W^T + b, from the forward's shift and sum."""
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # neighbours share rows of x
    first = (tl.program_id(0) // tiles * BLOCK_M).to(tl.int64)
    left = M - tl.program_id(0) // tiles * BLOCK_M
    columns = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    z = _score_tile(
        x_ptr + first * K, w_ptr, bias_ptr, left, columns, K, softcap, N, CAP, EVEN_K, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K
    )
    offs_m = tl.arange(0, BLOCK_M)
    target, used, bad = _load_targets(targets_ptr + first, 0, offs_m, left, N, ignore_index)
    dnll = tl.where(bad, float("nan"), tl.load(dnll_ptr + first + offs_m, mask=used, other=0.0))
    shift = tl.load(shift_ptr + first + offs_m, mask=used, other=0.0)
    slope = dnll * (1.0 / tl.load(sum_ptr + first + offs_m, mask=used, other=1.0))
    dz = tl.exp2(z * _LOG2E - shift[:, None]) * slope[:, None]
    dz -= tl.where(columns[None, :] == target[:, None], dnll[:, None], 0.0)
    if CAP:
        dz *= (softcap - z) * (softcap + z) * (1.0 / (softcap * softcap))  # 1 - (z / softcap)^2, exact near the cap
    _store(dlogits_ptr + first * N, columns, tl.where(used[:, None], dz, 0.0), left, N)


# Launches


def _most(dtype: torch.dtype) -> dict:
    """Options of the forward: 128 registers, so that the softmax of a program hides behind the product of another.

    That K is a constant, so that the steps of a product are one block of code, makes room for it.
    """
    return {"maxnreg": 128} if dtype != torch.float32 and not torch.version.hip else {}


def _linear_cross_entropy_fwd(x, weight, targets, bias, softcap, ignore_index, keep=True):
    """nll, and shift and sum for the backward, empty unless `keep`; each [...]."""
    x, weight, targets, bias = _contiguous(x, weight, targets, bias)
    nll = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    shift, total = (torch.empty(targets.shape if keep else 0, dtype=torch.float32, device=x.device) for _ in range(2))
    if targets.numel():
        _launch_tiles(
            _linear_cross_entropy_fwd_kernel,
            "linear_cross_entropy",
            x,
            len(weight),
            programs=1,  # of the columns: each goes through all of them
            w_ptr=weight,
            bias_ptr=bias,
            targets_ptr=targets,
            nll_ptr=nll,
            shift_ptr=shift if keep else None,
            sum_ptr=total if keep else None,
            ignore_index=ignore_index,
            **_cap(softcap),
            **_most(x.dtype),
        )
    return nll, shift, total


def _linear_cross_entropy_bwd(
    x, weight, targets, bias, shift, total, dnll, softcap, ignore_index, wanted=(True, True, True)
):
    """dx, dweight and dbias, None where not wanted or where there is no bias; from what the forward returned."""
    x, weight, targets, bias, dnll = _contiguous(x, weight, targets, bias, dnll)
    V, K = weight.shape
    rows, targets, shift, total, dnll = x.view(-1, K), *(t.view(-1) for t in (targets, shift, total, dnll))
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device) if wanted[0] else None
    dweight = torch.zeros((V, K), dtype=torch.float32, device=x.device) if wanted[1] else None
    dbias = torch.zeros(V, dtype=torch.float32, device=x.device) if wanted[2] and bias is not None else None
    count = max(1, _PART // V)  # of rows: two products a part fill a GPU long before its gradients fill the memory
    room = torch.empty((min(count, len(rows)), V), dtype=x.dtype, device=x.device)
    for first in range(0, len(rows), count):
        part = slice(first, first + count)
        dlogits = room[: len(rows[part])]
        _launch_tiles(
            _linear_cross_entropy_bwd_kernel,
            "linear_cross_entropy",
            rows[part],
            V,
            w_ptr=weight,
            bias_ptr=bias,
            targets_ptr=targets[part],
            shift_ptr=shift[part],
            sum_ptr=total[part],
            dnll_ptr=dnll[part],
            dlogits_ptr=dlogits,
            ignore_index=ignore_index,
            **_cap(softcap),
        )
        if dx is not None:
            torch.mm(dlogits, weight, out=dx[part])
        if dweight is not None:
            dweight += dlogits.mT @ rows[part]
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=torch.float32)
    return (
        None if dx is None else dx.view(x.shape),
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None else dbias.to(bias.dtype),
    )


# Public functions


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, bias, softcap, ignore_index):
        keep = any(ctx.needs_input_grad)
        nll, shift, total = _linear_cross_entropy_fwd(x, weight, targets, bias, softcap, ignore_index, keep)
        ctx.save_for_backward(x, weight, targets, bias, shift, total)
        ctx.options = softcap, ignore_index
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll):
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        dx, dweight, dbias = _linear_cross_entropy_bwd(*ctx.saved_tensors, dnll, *ctx.options, wanted)
        return dx, dweight, None, dbias, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of each row's soft-capped logits x W^T + bias, which are never in memory; with gradients.

    Args:
        x: [..., K] float32, bfloat16 or float16: hidden states.
        weight: [V, K] in x's dtype.
        targets: [...] int64 or int32 token ids, or `ignore_index`.
        bias: None or [V], floating; -inf bans a token.
        softcap: None, or c > 0: c * tanh(a / c) is applied to the logits, bias included.
        ignore_index: target of rows that do not count.

    Returns:
        [...] float32, nats. 0 where ignored; NaN where the target is outside [0, V), or the row's logits hold NaN, +inf
        or only -inf.

        Gradients reach x, weight and bias; of the two latter they are NaN where any row's is. Those of all logits are
        never in memory at once either.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding of it and 1e-6.
    Source: Cut Cross-Entropy, arXiv:2411.09009.
    """
    _check(x, {"weight": weight})
    if targets.shape != x.shape[:-1] or targets.dtype not in (torch.int64, torch.int32) or targets.device != x.device:
        raise ValueError(
            f"targets: expected int64 or int32 {list(x.shape[:-1])} on {x.device}, "
            f"got {targets.dtype} {list(targets.shape)} on {targets.device}"
        )
    V = len(weight)
    if bias is not None and (bias.shape != (V,) or not bias.is_floating_point() or bias.device != x.device):
        raise ValueError(f"bias: expected floating {[V]} on {x.device}, got {bias.dtype} {list(bias.shape)}")
    _check_softcap(softcap)
    return _LinearCrossEntropy.apply(x, weight, targets, bias, softcap, ignore_index)


# The contract


def _compilations(*, V, K, softcap=None, training=True, **_):
    """The forward, with what a training keeps for its backward, and that one's kernel; or as an evaluation has it."""
    given, wide = {"CAP": softcap is not None, "K": K}, ("nll_ptr", "shift_ptr", "sum_ptr", "dnll_ptr")
    absent = ("bias_ptr", *(() if training else ("shift_ptr", "sum_ptr")))
    kernels = (_linear_cross_entropy_fwd_kernel, *((_linear_cross_entropy_bwd_kernel,) if training else ()))
    found = [_compilation(kernel, V, K, wide=wide, absent=absent, given=given) for kernel in kernels]
    return [replace(found[0], options={**found[0].options, **_most(torch.bfloat16)}), *found[1:]]


SPEC = KernelSpec(
    name="linear_cross_entropy",
    fn=linear_cross_entropy,
    reference=linear_cross_entropy_ref,
    inputs=cross_entropy_inputs,
    cases=CROSS_ENTROPY_CASES,
    differentiable=("x", "weight", "bias"),
    compilations=_compilations,
    bytes_moved=lambda *, M, V, K, itemsize, **_: itemsize * (M * K + V * K) + 12 * M,
    flops=lambda *, M, V, K, **_: 2 * M * V * K,
)
