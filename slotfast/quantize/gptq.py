"""GPTQ: columns are rounded one after another, and later columns make up for the errors of earlier ones.

A layer's output error over calibration inputs X is tr(E H E^T), with E the error of the weights and H = X^T X. Rows are
independent. Once column j is rounded, the best correction of the columns after it is -(w_j - q_j) / [H^-1]_jj *
[H^-1]_j, with H of the columns from j on; divided by its first element, row j of U is that row of H^-1, where H^-1 =
U^T U with U upper triangular. With e_j = (w_j - q_j) / U_jj, w_j as corrected so far, E = e U and so tr(E H E^T) =
|e|^2: the search for the best scale gets the error that it minimises at no cost.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", arXiv 2210.17323; clipping as in PR #1019 of
openai/parameter-golf.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from .matrix import SDCLIP_K, Clip, QuantizedMatrix, clip_scales

Choose = Literal["output", "weights"]


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    clip: Clip = "percentile",
    choose: Choose = "output",
    damping: float = 0.01,
    block: int = 128,
    sdclip_k: Mapping[int, float] = SDCLIP_K,
) -> QuantizedMatrix:
    """Round a matrix to `bits` bits so that the layer's outputs on the calibration inputs change least.

    Args:
        weight: float [N, K], finite.
        hessian: float [K, K], X^T X of the inputs X [tokens, K], up to a factor; symmetric, any rank.
        bits: 6 or 8.
        clip, sdclip_k: as in `clip_scales`.
        choose: how one of several scales is chosen. output: for each row, by its output error. weights: for the whole
            matrix, by the squared error of the weights, as PR #1019 has it; GPTQ raises that error on purpose, so it
            tells little about the outputs.
        damping: share of the mean diagonal that is added to the diagonal; positive.
        block: columns that are corrected one by one; all later ones get their corrections in one product.

    Returns:
        Codes and scales on the weight's device. Columns that no input reaches become 0.

    Raises:
        InputError: NaN or infinite values, or too little damping for a Hessian without full rank.
    """
    if choose not in ("output", "weights"):
        raise InputError(f"choose {choose!r}: expected output or weights")
    weight, hessian = weight.detach().double(), hessian.double()
    if not (weight.isfinite().all() and hessian.isfinite().all()):
        raise InputError("a matrix or its calibration inputs hold NaN or infinite values")
    limit = 2 ** (bits - 1) - 1
    weight = weight.masked_fill(hessian.diagonal() == 0, 0.0)
    scales = clip_scales(weight, bits, clip, sdclip_k)  # (candidates, N)
    # Columns with the largest inputs come first, while most others are left to make up for them.
    order = hessian.diagonal().argsort(descending=True, stable=True)
    corrections = _corrections(hessian, order, damping)
    columns = weight.T[order].repeat(1, len(scales))  # (K, candidates * N): every candidate in one sweep
    codes, error = _round_columns(columns, scales.flatten(), corrections, limit, block)
    codes, error = codes.view(-1, *scales.shape), error.view(scales.shape)  # (K, candidates, N), (candidates, N)
    if choose == "weights":
        weight_error = (codes * scales.double() - weight.T[order][:, None]).square().sum((0, 2))
        best = weight_error.argmin().expand(len(weight))
    else:
        best = error.argmin(0)
    row = torch.arange(len(weight), device=weight.device)
    chosen = torch.empty_like(codes[:, 0])
    chosen[order] = codes[:, best, row]
    return QuantizedMatrix(chosen.T.contiguous(), scales[best, row], bits)


def _corrections(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """U of the module's docstring for columns in the given order, float64 [K, K]."""
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else diagonal.new_ones(())
    # A column that no input reaches is made independent of the others.
    damped = hessian + torch.diag(torch.where(live, damping * mean, mean))
    factor, failed = torch.linalg.cholesky_ex(damped[order][:, order])
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if failed:
        raise InputError(f"damping {damping:g}: too little to invert a Hessian of {len(order)} columns")
    return factor


def _round_columns(
    columns: Tensor, scale: Tensor, corrections: Tensor, limit: int, block: int
) -> tuple[Tensor, Tensor]:
    """Codes int8 [K, N] and output error float64 [N] of columns float64 [K, N], which are overwritten."""
    scale = scale.double()
    codes = torch.empty_like(columns, dtype=torch.int8)
    error = torch.zeros_like(scale)
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            rounded = (columns[j] / scale).round().clamp(-limit, limit)
            codes[j] = rounded
            errors[j - start] = (columns[j] - rounded * scale) / corrections[j, j]
            columns[j + 1 : stop].addr_(corrections[j, j + 1 : stop], errors[j - start], alpha=-1)
        columns[stop:].addmm_(corrections[start:stop, stop:].T, errors, alpha=-1)
        error += errors.square().sum(0)
    return codes, error
