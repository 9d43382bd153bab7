"""Inputs and cases of both solvers."""

import torch

from ..spec import Case
from .windows import draw


def inputs(generator, device, dtype, *, W, T, V, start=False, prior=False, **rest):
    kwargs = draw(generator, device, dtype, W=W, T=T, V=V, scale=1.5, **rest)
    for name, wanted in (("start", start), ("prior", prior)):
        if wanted:
            kwargs[name] = 0.3 * torch.randn(W, V, generator=generator, device=generator.device).to(device)
    return kwargs


# Few iterations, far from the optimum: there every line search has one outcome, in float32 and in float64.
_FEW = {"ridge": 1.0, "phases": ((3, 2),)}
CASES = (
    Case("one element", {"W": 1, "T": 1, "V": 1, **_FEW}),
    Case("no windows", {"W": 0, "T": 4, "V": 16, **_FEW}),
    Case("no positions", {"W": 2, "T": 0, "V": 16, "start": True, "clamp": 0.2, **_FEW}),
    Case("primes, more windows than programs", {"W": 5, "T": 7, "V": 61, **_FEW}),
    Case("no iterations", {"W": 2, "T": 7, "V": 61, "start": True, "clamp": 0.2, "phases": ((0, 1),)}),
    Case("a tile", {"W": 1, "T": 9, "V": 1024, **_FEW}),
    Case("above a tile", {"W": 1, "T": 3, "V": 1025, **_FEW}),
    Case("float16", {"W": 2, "T": 5, "V": 64, **_FEW}, torch.float16),
    Case("weights", {"W": 3, "T": 9, "V": 33, "weights": True, **_FEW}),
    Case("some ignored", {"W": 3, "T": 9, "V": 33, "edit": "some ignored", **_FEW}),
    Case("rows that are NaN", {"W": 4, "T": 6, "V": 33, "weights": True, "edit": "poor rows", "start": True, **_FEW}),
    Case("banned tokens", {"W": 2, "T": 4, "V": 64, "edit": "banned", **_FEW}),
    Case("strided", {"W": 3, "T": 5, "V": 37, "edit": "strided", **_FEW}),
    Case("start, prior and clamp", {"W": 3, "T": 9, "V": 40, "start": True, "prior": True, "clamp": 0.4, **_FEW}),
    Case("two phases", {"W": 2, "T": 9, "V": 40, "ridge": 1.0, "phases": ((2, 1), (3, 5))}),
    Case("production", {"W": 8192, "T": 64, "V": 1024, "phases": ((25, 20),)}, torch.bfloat16, production=True),
)


def _mm_case(case):
    shape = {name: value for name, value in case.shape.items() if name != "phases"}
    if not case.production:
        shape["iterations"] = sum(most for most, _ in case.shape["phases"])
    if case.reason == "no iterations" or case.production:
        shape["ridge"] = 3.0
    return Case(case.reason, shape, case.dtype, case.production)


MM_CASES = tuple(_mm_case(case) for case in CASES)
