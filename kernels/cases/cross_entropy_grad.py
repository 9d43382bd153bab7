"""Cases of `bias_cross_entropy_grad`: those of the losses a token, and weights."""

import torch

from ..spec import Case
from . import cross_entropy

CASES = (
    *cross_entropy.CASES,
    Case("weights", {"W": 3, "T": 9, "V": 33, "weights": True}),
    Case("sums", {"W": 3, "T": 9, "V": 33, "weights": True, "reduction": "sum"}),
    Case("sums without bias", {"W": 2, "T": 9, "V": 33, "bias": None, "reduction": "sum"}, torch.bfloat16),
    Case("weights and ignored, two parts", {"W": 3, "T": 130, "V": 16, "weights": True, "edit": "some ignored"}),
    Case(
        "several tiles of rows",
        {"W": 2, "T": 23, "V": 1024, "weights": True, "edit": "some ignored"},
        torch.bfloat16,
    ),
    Case("weights, rows that are NaN", {"W": 4, "T": 6, "V": 33, "weights": True, "edit": "poor rows"}),
    Case("weights, large vocabulary", {"W": 3, "T": 3, "V": 16400, "weights": True, "softcap": 9.0}),
)
