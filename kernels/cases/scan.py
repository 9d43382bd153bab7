"""Inputs and cases of `decay_scan`."""

import torch

from ..spec import Case


def inputs(generator, device, dtype, *, A, n, edit=None):
    def uniform(*shape):
        return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)

    left = 0.9995 + 0.0005 * uniform(A, n)
    left[uniform(A, n) < 0.05] = 0.0  # another thing begins
    if edit == "all one thing":
        left = 0.9995 ** (1 + (9 * uniform(A, n)).floor())
    elif edit == "undecayed":
        left = torch.ones(A, n, dtype=torch.float64)
    elif edit == "all new":
        left.zero_()
    elif edit == "poor":
        left[:, n // 2] = torch.nan
    elif edit == "strided":
        left = torch.stack((left, left), -1)[..., 0]
    return {"left": left.to(device)}


CASES = (
    Case("no element", {"A": 3, "n": 0}),
    Case("no row", {"A": 0, "n": 5}),
    Case("one element", {"A": 1, "n": 1}),
    Case("primes", {"A": 3, "n": 31, "edit": "all one thing"}),
    Case("above a small block", {"A": 2, "n": 33}),
    Case("undecayed", {"A": 1, "n": 257, "edit": "undecayed"}),
    Case("all new", {"A": 1, "n": 40, "edit": "all new"}),
    Case("NaN spreads to all behind it", {"A": 2, "n": 64, "edit": "poor"}),
    Case("strided", {"A": 2, "n": 100, "edit": "strided"}),
    Case("two blocks and one", {"A": 1, "n": 4097, "edit": "all one thing"}),
    Case("production", {"A": 9, "n": 73728}, production=True),
)
