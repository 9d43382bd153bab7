"""Inputs and cases of `channel_mix`."""

import torch

from ..spec import Case


def inputs(generator, device, dtype, *, M, N, skip=True, edit=None):
    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    x, x0, weights = normal(M, N), normal(M, N), normal(2 + skip, N)
    if edit == "cancelling":
        x0, weights[1] = x * (1 + 1e-3 * normal(M, N)), -weights[0]
    elif edit == "poor":  # spoils its row
        x[M // 2, N // 2] = torch.nan
    found = {"x": x, "x0": x0, "skip": normal(M, N) if skip else None}
    if edit == "strided":
        found = {name: torch.stack((t, t), -1)[..., 0] for name, t in found.items()}
    found = {name: None if t is None else t.to(device, dtype) for name, t in found.items()}
    return {**found, "weights": weights.to(device)}


CASES = (
    Case("no rows", {"M": 0, "N": 16}),
    Case("one element", {"M": 1, "N": 1}),
    Case("primes, no skip", {"M": 7, "N": 37, "skip": False}),
    Case("above a tile", {"M": 2, "N": 2053}),
    Case("several programs, bfloat16", {"M": 70, "N": 64}, torch.bfloat16),
    Case("float16", {"M": 5, "N": 48}, torch.float16),
    Case("strided", {"M": 6, "N": 24, "edit": "strided"}),
    Case("sums that cancel", {"M": 6, "N": 24, "skip": False, "edit": "cancelling"}),
    Case("a NaN stays in its row", {"M": 6, "N": 20, "edit": "poor"}),
    Case("production", {"M": 32 * 2048, "N": 512}, torch.bfloat16, production=True),
    Case("without a skip", {"M": 32 * 2048, "N": 512, "skip": False}, torch.bfloat16, production=True),
)
