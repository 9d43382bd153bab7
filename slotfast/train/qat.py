"""Late quantisation-aware training: the blocks' matrices are rounded to 6 bits in the forward pass."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import GPT, Linear

_LIMIT = 31  # of 6-bit codes


def matrices(model: GPT) -> list[Linear]:
    """The layers whose weights an artifact stores in 6 bits: all of the blocks'."""
    return [module for module in model.blocks.modules() if isinstance(module, Linear)]


def set_rounding(model: GPT, rounding: Callable[[Tensor], Tensor] | None) -> None:
    """Let every 6-bit matrix go through `rounding` on its way into the product, or none."""
    for layer in matrices(model):
        layer.rounding = rounding


def straight_through(weight: Tensor) -> Tensor:
    """Each row rounded to multiples of its largest magnitude / 31; the gradient passes as if it were not.

    Args:
        weight: float [N, K].

    Source: the late QAT of PR #1019 of openai/parameter-golf, which did not reach its weight banks.
    """
    scale = _scale(weight)
    return weight + ((weight / scale).round() * scale - weight).detach()


class SoftRound:
    """A smooth rounding that sharpens: alpha 0 leaves numbers as they are, infinity rounds.

    Source: Agustsson and Theis, "Universally quantized neural compression", 2020; PR #1179 of openai/parameter-golf.
    """

    FIRST, LAST, STEPS = 1.0, 16.0, 500

    def __init__(self, device: torch.device | str = "cpu"):
        # a tensor, not a number: a compiled forward would be compiled anew for every number
        self.alpha = torch.tensor(self.FIRST, device=device)

    def set_step(self, step: int) -> None:
        """Sharpness `step` steps after the rounding began."""
        self.alpha.fill_(self.FIRST + (self.LAST - self.FIRST) * min(step / self.STEPS, 1.0))

    def __call__(self, weight: Tensor) -> Tensor:
        """Rows of multiples of their largest magnitude / 31, softly; float [N, K]."""
        scale = _scale(weight)
        code = weight / scale
        floor = code.detach().floor()
        bent = torch.tanh(self.alpha * (code - floor - 0.5)) / torch.tanh(self.alpha / 2)
        return (floor + 0.5 + 0.5 * bent) * scale


def _scale(weight: Tensor) -> Tensor:
    return (weight.detach().abs().amax(dim=1, keepdim=True) / _LIMIT).clamp_min(torch.finfo(torch.float32).tiny)
