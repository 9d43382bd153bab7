"""Cross-entropy of many biases on the same logits: softmax once, then two passes of multiplications for each bias.

With P = softmax(z), z the (soft-capped) logits of a window, and u = exp(bias - shift), shift = max(bias):

    s_t = sum_v P_tv u_v                        exp(lse_t(z + bias) - lse_t(z) - shift)
    loss = sum_t weight_t (log s_t + shift - bias[y_t]) / sum_t weight_t
    dbias = u * (P^T (weight / s)) / sum_t weight_t - counts / sum_t weight_t

The loss is relative to that of bias 0, which is `base_loss`: a difference is small, so float32 resolves it finely. V
exponentials an evaluation, not T V. `sum_t weight_t bias[y_t] = counts . bias`: targets are needed only once.

| tensor    | shape     | type                                                                  |
|-----------|-----------|-----------------------------------------------------------------------|
| probs     | [W, T, V] | float32 or bfloat16; P, and 0 at positions that do not count          |
| weights   | [W, T]    | float32; 0 at positions that do not count, NaN at bad targets         |
| counts    | [W, V]    | float32; the weights of each target, added                            |
| total     | [W]       | float32; sum of weights                                               |
| base_loss | [W]       | float32; weighted sum of the NLLs without bias                        |
| bias      | [W, V]    | float32, finite                                                       |

An evaluation reads P once and writes V floats a window: W T V itemsize + 12 W V bytes, 4 W T V flops. Order of sums,
positions that do not count, bad targets and NaN rows: as in `bias_cross_entropy_grad`. The bias must not be
so uneven that exp(bias - max) leaves no probability in float32: a spread below 80 is safe.

Source: the partition function of an exponential family tilted by `bias`; own derivation.
"""

from typing import NamedTuple

import torch

from ._inputs import _check_windows, _contiguous, _draw, _scores_ref, _targets_ref
from ._tile import _OPTIONS, _config, _tile_arguments, _tile_compilations
from ._triton import _LN2, _LOG2E, tl, triton
from .bias_cross_entropy import (
    _bias_cross_entropy_bwd_kernel,
    _bias_cross_entropy_fwd,
    _fill_gradients,
    bias_cross_entropy_ref,
)
from .spec import Case, Compilation, KernelSpec


class PForm(NamedTuple):
    """What evaluations need of W windows; see the table above."""

    probs: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    total: torch.Tensor
    base_loss: torch.Tensor


# References: plain torch, and the path that CPUs take


def _counted_weights_ref(targets, weights, vocabulary, ignore_index, dtype):
    """Weights with 0 where nothing counts and NaN at bad targets; safe indices; the weights that counts may add."""
    weights = torch.ones(targets.shape, device=targets.device, dtype=dtype) if weights is None else weights.to(dtype)
    used, bad, index = _targets_ref(targets.masked_fill(weights == 0, ignore_index), vocabulary, ignore_index)
    weights = weights.masked_fill(~used, 0.0)
    return used, index, weights.masked_fill(bad, torch.nan), weights.masked_fill(bad, 0.0)


def target_counts_ref(targets, vocabulary, weights=None, *, ignore_index=-100):
    """`target_counts` in plain torch; float64 weights give float64 counts."""
    dtype = torch.float32 if weights is None else weights.dtype
    _, index, _, weights = _counted_weights_ref(targets, weights, vocabulary, ignore_index, dtype)
    return weights.new_zeros((targets.shape[0], vocabulary)).scatter_add_(1, index, weights)


@torch.no_grad()
def p_form_prepare_ref(logits, targets, weights=None, *, softcap=None, ignore_index=-100, probs_dtype=None):
    """`p_form_prepare` in plain torch; float64 logits give float64 results."""
    dtype, V = torch.promote_types(logits.dtype, torch.float32), logits.shape[-1]
    used, index, weights, added = _counted_weights_ref(targets, weights, V, ignore_index, dtype)
    targets = targets.masked_fill(~used, ignore_index)
    nll, _ = bias_cross_entropy_ref(logits, targets, softcap=softcap, ignore_index=ignore_index)
    z = _scores_ref(logits, None, softcap, False)
    probs = torch.softmax(z.masked_fill(~used[..., None], 0.0), -1)
    probs = probs.masked_fill_(~used[..., None], 0.0).to(probs_dtype or dtype)
    counts = added.new_zeros((logits.shape[0], V)).scatter_add_(1, index, added)
    total = weights.double().sum(-1)
    return PForm(probs, weights, counts, total.to(dtype), (weights * nll).double().sum(-1).to(dtype))


def _aligned(tensor):
    """Where BLAS cuts a product, and so how it rounds, depends on alignment: torch allocates at multiples of 64."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


@torch.no_grad()
def p_form_evaluate_ref(form, bias, *, reduction="mean"):
    """`p_form_evaluate` in plain torch; float64 tensors give float64 results."""
    probs, weights, counts, total, _ = form
    shift = bias.amax(-1, keepdim=True)
    u = torch.exp(bias - shift)
    # Window by window: a batched product rounds differently in another batch, a matrix times a vector does not.
    s = torch.empty_like(weights)
    ratio_sums = torch.empty_like(bias)
    for window, wide in enumerate(probs):
        wide = _aligned(wide.to(bias.dtype))
        s[window] = torch.mv(wide, _aligned(u[window])).masked_fill_(weights[window] == 0, 1.0)
        ratio_sums[window] = torch.mv(wide.T, weights[window] / s[window])
    loss = (weights * s.log()).double().sum(-1) + total.double() * shift[:, 0] - (counts * bias).double().sum(-1)
    dbias = u * ratio_sums - counts
    if reduction == "mean":
        scale = torch.where(total == 0, 0.0, 1 / total.double())
        loss, dbias = loss * scale, dbias * scale[:, None].to(bias.dtype)
    return loss.to(bias.dtype), dbias


# Kernels


@triton.jit
def _target_counts_kernel(
    targets_ptr,
    weights_ptr,
    nll_ptr,
    counts_ptr,
    weights_out_ptr,
    total_ptr,
    base_loss_ptr,
    T,
    V,
    ignore_index,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """counts of one window and block of tokens; with nll, also the weights that count, their sum and the base loss."""
    window = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    counts = tl.zeros((BLOCK_V,), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float64)
    base_loss = tl.zeros((BLOCK_T,), tl.float64)
    for first in range(0, T, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        row = window * T + offs_t
        target = tl.load(targets_ptr + row, mask=offs_t < T, other=ignore_index)
        used = target != ignore_index
        w = used.to(tl.float32)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + row, mask=used, other=0.0)
            used &= w != 0
        hit = used[:, None] & (offs_v[None, :] == target[:, None])  # (BLOCK_T, BLOCK_V)
        counts += tl.sum(tl.where(hit, w[:, None], 0.0), axis=0)
        if nll_ptr is not None:
            w = tl.where(used & ((target < 0) | (target >= V)), float("nan"), w)
            total += w.to(tl.float64)
            nll = tl.load(nll_ptr + row, mask=used, other=0.0)
            base_loss += tl.where(used, w.to(tl.float64) * nll.to(tl.float64), 0.0)
            if tl.program_id(1) == 0:
                tl.store(weights_out_ptr + row, w, mask=offs_t < T)
    tl.store(counts_ptr + window * V + offs_v, counts, mask=offs_v < V)
    if (nll_ptr is not None) and (tl.program_id(1) == 0):
        tl.store(total_ptr + window, tl.sum(total, axis=0).to(tl.float32))
        tl.store(base_loss_ptr + window, tl.sum(base_loss, axis=0).to(tl.float32))


@triton.jit
def _finish(loss, dbias, bias, counts, shift, total, MEAN: tl.constexpr):
    """From sum_t weight log s and u * P^T (weight / s) to the results; dbias, bias, counts are (CHUNKS, COLS)."""
    bias = tl.where(bias == float("-inf"), 0.0, bias)  # columns beyond V
    dot = tl.sum(tl.sum(counts * bias, axis=0).to(tl.float64), axis=0)
    loss += total.to(tl.float64) * shift.to(tl.float64) - dot
    dbias -= counts
    if MEAN:
        scale = tl.where(total == 0, 0.0, 1.0 / total.to(tl.float64))
        loss *= scale
        dbias *= scale.to(tl.float32)
    return loss.to(tl.float32), dbias


@triton.jit
def _p_form_evaluate_kernel(
    probs_ptr,
    weights_ptr,
    counts_ptr,
    total_ptr,
    bias_ptr,
    log_s_ptr,
    loss_ptr,
    dbias_ptr,
    T,
    V,
    MEAN: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN_V: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """PART rows of a window, each probability read once. WHOLE: they are the window; otherwise, sums go to scratch."""
    parts = tl.cdiv(T, PART)
    window = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    offs_v = tl.arange(0, CHUNKS)[:, None, None] * COLS + tl.arange(0, COLS)[None, None, :]
    bias = tl.load(bias_ptr + window * V + offs_v, mask=offs_v < V, other=float("-inf"))
    shift = tl.max(tl.reshape(bias, (CHUNKS * COLS,)), axis=0)
    u = tl.exp2((bias - shift) * _LOG2E)  # (CHUNKS, 1, COLS)
    acc = tl.zeros((CHUNKS, ROWS, COLS), tl.float32)
    loss = tl.zeros((ROWS,), tl.float64)
    for first in range(part * PART, min(part * PART + PART, T), ROWS):
        offs_t = first + tl.arange(0, ROWS)
        row = window * T + offs_t
        w = tl.load(weights_ptr + row, mask=offs_t < T, other=0.0)
        used = w != 0
        mask = used[None, :, None] if EVEN_V else used[None, :, None] & (offs_v < V)
        probs = tl.load(probs_ptr + row[None, :, None] * V + offs_v, mask=mask, other=0.0).to(tl.float32)
        s = tl.sum(tl.sum(probs * u, axis=0), axis=1)
        s = tl.where(used, s, 1.0)
        acc += probs * (w / s)[None, :, None]
        log_s = tl.log2(s) * _LN2
        if WHOLE:
            loss += w.to(tl.float64) * log_s.to(tl.float64)
        else:
            tl.store(log_s_ptr + row, log_s, mask=offs_t < T)
    offs_v = tl.arange(0, CHUNKS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    mask_v = offs_v < V
    bias = tl.load(bias_ptr + window * V + offs_v, mask=mask_v, other=float("-inf"))
    dbias = tl.sum(acc, axis=1) * tl.exp2((bias - shift) * _LOG2E)  # (CHUNKS, COLS)
    if WHOLE:
        counts = tl.load(counts_ptr + window * V + offs_v, mask=mask_v, other=0.0)
        total = tl.load(total_ptr + window)
        window_loss, dbias = _finish(tl.sum(loss, axis=0), dbias, bias, counts, shift, total, MEAN)
        tl.store(loss_ptr + window, window_loss)
    tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * V + offs_v, dbias, mask=mask_v)


@triton.jit
def _p_form_sum_kernel(
    parts_ptr,
    log_s_ptr,
    weights_ptr,
    counts_ptr,
    total_ptr,
    bias_ptr,
    loss_ptr,
    dbias_ptr,
    T,
    V,
    parts,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One window: its parts [W, parts, V] added in order, then what `_finish` does. V <= BLOCK_V."""
    window = tl.program_id(0).to(tl.int64)
    loss = tl.zeros((BLOCK_T,), tl.float64)
    for first in range(0, T, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        w = tl.load(weights_ptr + window * T + offs_t, mask=offs_t < T, other=0.0)
        log_s = tl.load(log_s_ptr + window * T + offs_t, mask=offs_t < T, other=0.0)
        loss += w.to(tl.float64) * log_s.to(tl.float64)
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    mask_v = offs_v < V
    dbias = tl.zeros((1, BLOCK_V), tl.float32)
    for part in range(0, parts):
        dbias += tl.load(parts_ptr + (window * parts + part) * V + offs_v, mask=mask_v, other=0.0)
    bias = tl.load(bias_ptr + window * V + offs_v, mask=mask_v, other=float("-inf"))
    counts = tl.load(counts_ptr + window * V + offs_v, mask=mask_v, other=0.0)
    shift = tl.max(tl.max(bias, axis=0), axis=0)
    total = tl.load(total_ptr + window)
    window_loss, dbias = _finish(tl.sum(loss, axis=0), dbias, bias, counts, shift, total, MEAN)
    tl.store(loss_ptr + window, window_loss)
    tl.store(dbias_ptr + window * V + offs_v, dbias, mask=mask_v)


# Launches


def _launch_counts(targets, weights, V, ignore_index, nll=None, weights_out=None, total=None, base_loss=None):
    W, T = targets.shape
    targets, weights = _contiguous(targets, weights)
    counts = torch.empty((W, V), dtype=torch.float32, device=targets.device)
    if W:
        with torch.cuda.device_of(targets):
            _target_counts_kernel[(W, triton.cdiv(V, 512))](
                targets, weights, nll, counts, weights_out, total, base_loss, T, V, ignore_index,
                BLOCK_T=16, BLOCK_V=512, num_warps=4, **_OPTIONS,
            )  # unmeasured  # fmt: skip
    return counts


def target_counts(targets, vocabulary, weights=None, *, ignore_index=-100):
    """How often each token is the target in each window, weighted: C of the rate model, deterministic on a GPU too.

    Args:
        targets: [W, T] int64 or int32 token ids, or `ignore_index`. Ids outside [0, vocabulary) are not counted.
        vocabulary: V >= 1.
        weights: None for 1, or [W, T] float32.
        ignore_index: target of positions that do not count.

    Returns:
        [W, V] float32; 0 where there are no positions.

    Raises:
        ValueError: a shape or type is not as above.

    Tolerance: 2x the error of plain torch against float64, plus one float32 rounding and 1e-6.
    Source: own.
    """
    if targets.dim() != 2 or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: expected int64 or int32 [W, T], got {targets.dtype} {list(targets.shape)}")
    if vocabulary < 1:
        raise ValueError(f"vocabulary: expected at least 1, got {vocabulary}")
    if weights is not None and (weights.shape != targets.shape or weights.dtype != torch.float32):
        raise ValueError(f"weights: expected float32 {list(targets.shape)}, got {weights.dtype} {list(weights.shape)}")
    return _launch_counts(targets, weights, vocabulary, ignore_index)


@torch.no_grad()
def p_form_prepare(logits, targets, weights=None, *, softcap=None, ignore_index=-100, probs_dtype=None):
    """Softmax and target counts of each window, for `p_form_evaluate`.

    Args:
        logits: [W, T, V] float32, bfloat16 or float16, any strides, V >= 1. Never written.
        targets: [W, T] int64 or int32 token ids, or `ignore_index`.
        weights: None for 1, or [W, T] float32 >= 0 (unchecked). Positions of weight 0 are not read.
        softcap: None, or c > 0: c * tanh(logits / c) takes the logits' place. A bias is added after it.
        ignore_index: target of positions that do not count. They are not read.
        probs_dtype: None for float32; bfloat16 halves the traffic and costs up to 1e-5 of the loss.

    Returns:
        A `PForm`; `base_loss` is a weighted sum, not a mean.

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one rounding and 1e-6.
    Source: own.
    """
    _check_windows(logits, targets, weights, softcap)
    probs_dtype = probs_dtype or torch.float32
    if probs_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"probs_dtype: expected float32 or bfloat16, got {probs_dtype}")
    W, T, V = logits.shape
    probs = torch.empty((W, T, V), dtype=probs_dtype, device=logits.device)
    weights_out = torch.empty((W, T), dtype=torch.float32, device=logits.device)
    total, base_loss = (torch.empty((W,), dtype=torch.float32, device=logits.device) for _ in range(2))
    used = targets if weights is None else targets.masked_fill(weights == 0, ignore_index)
    options = softcap, False, ignore_index
    nll, _, shift, row_sum = _bias_cross_entropy_fwd(logits, used, None, options)
    _fill_gradients(logits, used, None, shift, row_sum, options, dlogits=probs)
    counts = _launch_counts(targets, weights, V, ignore_index, nll, weights_out, total, base_loss)
    return PForm(probs, weights_out, counts, total, base_loss)


@torch.no_grad()
def p_form_evaluate(form, bias, *, reduction="mean"):
    """What a bias changes in the weighted mean cross-entropy of each window, and its gradient.

    Args:
        form: from `p_form_prepare`; V at most 16384.
        bias: [W, V] float32, finite, contiguous.
        reduction: "mean" divides by the window's sum of weights, "sum" does not.

    Returns:
        loss: [W] float32, nats, relative to bias 0. The loss itself: plus `form.base_loss` (for means, over total).
        dbias: [W, V] float32.

        Both are 0 for a window where no position counts, and NaN for one with a bad target or a NaN row that counts.

    Raises:
        ValueError: a shape or type is not as above.

    Tolerance: 2x the error of plain torch in the same dtype, against float64, plus one float32 rounding and 1e-6.
    Source: own.
    """
    probs, weights, counts, total, _ = form
    W, T, V = probs.shape
    if bias.shape != (W, V) or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise ValueError(f"bias: expected contiguous float32 {[W, V]}, got {bias.dtype} {list(bias.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction: expected "mean" or "sum", got {reduction!r}')
    tile = _config(T, V, probs.element_size())
    if tile.chunks * tile.cols < V:
        raise ValueError(f"form: V is at most {tile.chunks * tile.cols}, got {V}; `bias_cross_entropy_grad` takes any")
    loss = torch.empty((W,), dtype=torch.float32, device=bias.device)
    if not (W and T):
        return loss.zero_(), torch.zeros_like(bias)
    count = triton.cdiv(T, tile.part)
    whole, mean = count == 1, reduction == "mean"
    parts = torch.empty((W, count, V), dtype=torch.float32, device=bias.device)
    log_s = None if whole else torch.empty((W, T), dtype=torch.float32, device=bias.device)
    probs, weights, counts, total = _contiguous(probs, weights, counts, total)
    with torch.cuda.device_of(bias):
        _p_form_evaluate_kernel[(W * count,)](
            probs, weights, counts, total, bias, log_s, loss, parts, T, V,
            MEAN=mean, WHOLE=whole, PART=tile.part, **_tile_arguments(tile, V),
        )  # fmt: skip
        if whole:
            return loss, parts.squeeze(1)
        dbias = torch.empty_like(bias)
        _p_form_sum_kernel[(W,)](
            parts, log_s, weights, counts, total, bias, loss, dbias, T, V, count,
            MEAN=mean, BLOCK_T=128, BLOCK_V=max(triton.next_power_of_2(V), 8), num_warps=8, **_OPTIONS,
        )  # unmeasured  # fmt: skip
    return loss, dbias


# The contract


def _evaluate_inputs(generator, device, dtype, *, W, T, V, reduction="mean", spread=1.0, **rest):
    """`dtype` is that of the probabilities."""
    form = p_form_prepare_ref(
        **_draw(generator, torch.device("cpu"), torch.float32, W=W, T=T, V=V, **rest),
        probs_dtype=dtype if dtype == torch.bfloat16 else None,
    )
    bias = spread * torch.randn(W, V, generator=generator)
    return {"form": PForm(*(t.to(device) for t in form)), "bias": bias.to(device), "reduction": reduction}


def _counts_inputs(generator, device, dtype, *, W, T, V, **rest):
    kwargs = _draw(generator, device, dtype, W=W, T=T, V=V, **rest)
    del kwargs["logits"]
    return {"vocabulary": V, **kwargs}


_CASES = (
    Case("one element", {"W": 1, "T": 1, "V": 1}),
    Case("no windows", {"W": 0, "T": 4, "V": 16}),
    Case("no positions", {"W": 2, "T": 0, "V": 16}),
    Case("primes", {"W": 3, "T": 7, "V": 61}),
    Case("a tile", {"W": 2, "T": 4, "V": 1024}, torch.bfloat16),
    Case("above a tile", {"W": 1, "T": 5, "V": 1025}),
    Case("weights", {"W": 3, "T": 9, "V": 33, "weights": True}),
    Case("some ignored", {"W": 3, "T": 9, "V": 33, "weights": True, "edit": "some ignored"}, torch.bfloat16),
    Case("all ignored", {"W": 2, "T": 5, "V": 33, "edit": "all ignored"}),
    Case("two parts", {"W": 3, "T": 131, "V": 24, "weights": True}),
    Case("production bfloat16", {"W": 8192, "T": 64, "V": 1024}, torch.bfloat16, production=True),
    Case("production float32", {"W": 8192, "T": 64, "V": 1024}, torch.float32, production=True),
    Case("production V 8192", {"W": 1024, "T": 64, "V": 8192}, torch.bfloat16, production=True),
)
_PREPARE_CASES = (
    *_CASES,
    Case("capped", {"W": 2, "T": 5, "V": 48, "softcap": 3.0}),
    Case("rows that are NaN", {"W": 4, "T": 6, "V": 33, "weights": True, "edit": "poor rows"}),
    Case("rounded to bfloat16", {"W": 2, "T": 5, "V": 48, "probs_dtype": torch.bfloat16}),
    Case("large vocabulary", {"W": 1, "T": 2, "V": 20011}),
)
_EVALUATE_CASES = (
    *_CASES,
    Case("rows that are NaN", {"W": 4, "T": 6, "V": 33, "weights": True, "edit": "poor rows"}),
    Case("sums", {"W": 3, "T": 9, "V": 33, "weights": True, "reduction": "sum"}),
    Case("uneven bias", {"W": 3, "T": 9, "V": 33, "spread": 20.0}),
)


def _evaluate_compilations(*, W, T, V, **_):
    return _tile_compilations(_p_form_evaluate_kernel, T, V, log_s_ptr=None)


def _prepare_compilations(*, W, T, V, softcap=None, **_):
    """The pass that writes P; the forward's is that of `bias_cross_entropy`."""
    without = dict.fromkeys(("bias_ptr", "dnll_ptr", "dlse_ptr", "dbias_ptr"))
    cap = "none" if softcap is None else "before"
    return _tile_compilations(_bias_cross_entropy_bwd_kernel, T, V, CAP=cap, **without)


def _counts_compilations(*, W, T, V, **_):
    types = {"targets_ptr": "*i64", "weights_ptr": "*fp32", "counts_ptr": "*fp32"}
    types |= {"T": "i32", "V": "i32:16", "ignore_index": "i32"}
    fixed = dict.fromkeys(("nll_ptr", "weights_out_ptr", "total_ptr", "base_loss_ptr"))
    fixed |= {"BLOCK_T": 16, "BLOCK_V": 512}
    return [Compilation(_target_counts_kernel, types, fixed, num_warps=4, elements=16 * 512, options=_OPTIONS)]


SPECS = (
    KernelSpec(
        name="p_form_prepare",
        fn=p_form_prepare,
        reference=p_form_prepare_ref,
        inputs=_draw,
        cases=_PREPARE_CASES,
        compilations=_prepare_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * (itemsize + 4) + 12) + 4 * W * V,
        flops=lambda *, W, T, V, **_: 6 * W * T * V,
    ),
    KernelSpec(
        name="p_form_evaluate",
        fn=p_form_evaluate,
        reference=p_form_evaluate_ref,
        inputs=_evaluate_inputs,
        cases=_EVALUATE_CASES,
        compilations=_evaluate_compilations,
        bytes_moved=lambda *, W, T, V, itemsize, **_: W * T * (V * itemsize + 4) + 12 * W * V,
        flops=lambda *, W, T, V, **_: 4 * W * T * V,
    ),
    KernelSpec(
        name="target_counts",
        fn=target_counts,
        reference=target_counts_ref,
        inputs=_counts_inputs,
        cases=_CASES,
        compilations=_counts_compilations,
        bytes_moved=lambda *, W, T, V, **_: 8 * W * T + 4 * W * V,
        flops=lambda *, W, T, V, **_: W * T,
    ),
)
