"""Rounding weights to a few bits with one scale a row."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Shares of a row's magnitudes that its scale may cover; the one with the least squared error is kept.
_CLIP_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


@dataclass(frozen=True)
class QuantizedMatrix:
    """Integer codes and a scale for each row.

    Args:
        codes: int8 [N, K], in +-(2^(bits - 1) - 1).
        scale: float16 [N].
        bits: 6 or 8.
    """

    codes: Tensor
    scale: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        return self.codes.float() * self.scale.float()[:, None]


def quantize_rows(weight: Tensor, bits: int) -> QuantizedMatrix:
    """Round a matrix to `bits` bits, choosing each row's clipping range by the error it leaves.

    Args:
        weight: float [N, K], finite.
        bits: 6 or 8.

    Source: the percentile search of PR #1019, here decided row by row.
    """
    weight = weight.detach().float()
    limit = 2 ** (bits - 1) - 1
    best_error = torch.full((weight.size(0),), torch.inf)
    best_scale = torch.ones(weight.size(0), dtype=torch.float16)
    magnitude = weight.abs()
    for percentile in _CLIP_PERCENTILES:
        # float16's range; a row below it is all but zero
        scale = (magnitude.quantile(percentile, dim=1) / limit).clamp(2**-24, 65504).half()
        error = (_round(weight, scale, limit) * scale.float()[:, None] - weight).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return QuantizedMatrix(_round(weight, best_scale, limit).to(torch.int8), best_scale, bits)


def _round(weight: Tensor, scale: Tensor, limit: int) -> Tensor:
    return (weight / scale.float()[:, None]).round().clamp(-limit, limit)
