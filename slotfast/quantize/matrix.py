"""Rounding weights to a few bits with one scale a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError

Clip = Literal["percentile", "sdclip"]
# Shares of a row's magnitudes that its scale may cover; the scale with the least error is kept.
_CLIP_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
# Standard deviations that the largest code stands for, by bits. Source: PR #1394.
SDCLIP_K = {6: 12.85, 8: 20.0}


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


def clip_scales(
    weight: Tensor, bits: int, clip: Clip = "percentile", sdclip_k: Mapping[int, float] = SDCLIP_K
) -> Tensor:
    """Candidates for the scale of each row, already rounded as they are stored, so that codes fit the stored scale.

    Args:
        weight: float [N, K], finite.
        bits: 6 or 8.
        clip: percentile: the largest code stands for a high percentile of the row's magnitudes, five are tried;
            sdclip: for a multiple of the row's standard deviation, which fixes the codes' entropy.
        sdclip_k: that multiple, by bits; positive.

    Returns:
        float16 [candidates, N], positive.

    Raises:
        InputError: an unknown clip, or no positive multiple for these bits.

    Source: percentiles PR #1019, standard deviations PR #1394.
    """
    limit = 2 ** (bits - 1) - 1
    if clip == "percentile":
        shares = torch.tensor(_CLIP_PERCENTILES, dtype=weight.dtype, device=weight.device)
        reach = weight.abs().quantile(shares, dim=1)
    elif clip == "sdclip":
        if not sdclip_k.get(bits, 0) > 0:
            raise InputError(f"sdclip_k {dict(sdclip_k)}: expected a positive number for {bits} bits")
        # correction=0: even a row of one weight has a deviation
        reach = sdclip_k[bits] * weight.std(1, correction=0)[None]
    else:
        raise InputError(f"clip {clip!r}: expected percentile or sdclip")
    return (reach / limit).clamp(2**-24, 65504).half()  # float16's range; a row below it is almost zero


def quantize_rows(
    weight: Tensor, bits: int, clip: Clip = "percentile", sdclip_k: Mapping[int, float] = SDCLIP_K
) -> QuantizedMatrix:
    """Round a matrix to `bits` bits, each weight to the nearest code, each row with the scale that errs least.

    Args:
        weight: float [N, K], finite.
        bits: 6 or 8.
        clip, sdclip_k: as in `clip_scales`.

    Source: the percentile search of PR #1019, here decided row by row.
    """
    weight = weight.detach().float()
    limit = 2 ** (bits - 1) - 1
    best_error = weight.new_full((weight.size(0),), torch.inf)
    best_scale = best_error.new_ones(weight.size(0), dtype=torch.float16)
    for scale in clip_scales(weight, bits, clip, sdclip_k):
        error = (_round(weight, scale, limit) * scale.float()[:, None] - weight).square().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return QuantizedMatrix(_round(weight, best_scale, limit).to(torch.int8), best_scale, bits)


def _round(weight: Tensor, scale: Tensor, limit: int) -> Tensor:
    return (weight / scale.float()[:, None]).round().clamp(-limit, limit)
