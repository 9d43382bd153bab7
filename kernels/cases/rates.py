"""Inputs and cases of `rate_scan`."""

import torch

from ..spec import Case


def inputs(generator, device, dtype, *, W, V, edit=None):
    def uniform(*shape):
        return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)

    found = {
        "left": 0.97 + 0.03 * uniform(W),
        "new_counts": (3 * uniform(W, V)).floor(),
        "new_expected": uniform(W, V),
        "k": 0.2 + uniform(V),
        "counts": 50 * uniform(V),
        "expected": 50 * uniform(V),
    }
    if edit == "documents":  # most is forgotten, now and then
        found["left"][::3] *= 0.1
    elif edit == "nothing yet":
        found["counts"].zero_()
        found["expected"].zero_()
    elif edit == "poor":
        found["new_counts"][W // 2, 0] = torch.nan
    elif edit == "strided":
        found = {name: torch.stack((x, x), -1)[..., 0] for name, x in found.items()}
    return {name: x.to(device) for name, x in found.items()}


CASES = (
    Case("no window", {"W": 0, "V": 8}),
    Case("one token, one window", {"W": 1, "V": 1}),
    Case("BLOCK - 1", {"W": 5, "V": 31}),
    Case("BLOCK + 1", {"W": 5, "V": 33, "edit": "documents"}),
    Case("prime", {"W": 7, "V": 509, "edit": "nothing yet"}),
    Case("a NaN stays in its column", {"W": 6, "V": 40, "edit": "poor"}),
    Case("strided", {"W": 3, "V": 40, "edit": "strided"}),
    Case("the contest's smallest vocabulary", {"W": 3, "V": 1024}),
    Case("production", {"W": 1024, "V": 1024}, production=True),
    Case("production, V 8192", {"W": 256, "V": 8192}, production=True),
)
