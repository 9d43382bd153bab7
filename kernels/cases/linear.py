"""Inputs and cases of the products with an epilogue."""

import torch

from ..spec import Case

_ROWS = 32 * 2048  # windows of 2048, of the contest's 11 x 512 model


def _drawn(generator, device, dtype, M, K, edit=None, **shapes):
    """x [M, K] and tensors of these shapes, plausible for a layer; `edit` names what is unusual about x."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    x = normal(M, K)
    if edit == "zero row":
        x[M // 2] = 0.0
    elif edit == "sizes":  # rows of sizes 1e-3 to 1e3
        x *= torch.logspace(-3, 3, M, device=x.device)[:, None]
    elif edit == "cancelling":  # columns that leave little of a large sum
        x[:, 1::2] = -x[:, : 2 * (K // 2) : 2] * (1 + 1e-3 * normal(M, K // 2))
    elif edit == "poor":  # spoils its row
        x[M // 2, K // 2] = torch.nan
    found = {"x": x, **{name: normal(*shape) for name, shape in shapes.items()}}
    if "weight" in found:
        found["weight"] *= K**-0.5
    if edit == "strided":
        found = {name: torch.stack((t, t), -1)[..., 0] for name, t in found.items()}
    return {name: t.to(device, dtype) for name, t in found.items()}


def _squares(x, parts):
    """Parts of each row's sum of squares, as the kernel before would have left them."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.stack([part.to(wide).square().sum(-1) for part in x.chunk(parts, -1)])


def squared_inputs(generator, device, dtype, *, M, N, K, parts=1, edit=None, **options):
    found = _drawn(generator, device, dtype, M, K, edit, weight=(N, K))
    return {**found, "squares": _squares(found["x"], parts), **options}


SQUARED_CASES = (
    Case("no rows", {"M": 0, "N": 16, "K": 16}),
    Case("one element", {"M": 1, "N": 1, "K": 1}),
    Case("primes", {"M": 7, "N": 37, "K": 29, "parts": 3, "norm": 0.5, "keep": True}),
    Case("above a tile", {"M": 65, "N": 65, "K": 33, "slope": 0.0}),
    Case("above a tile of bfloat16", {"M": 129, "N": 130, "K": 72, "parts": 2}, torch.bfloat16),
    Case("several steps, float16", {"M": 40, "N": 96, "K": 192, "keep": True}, torch.float16),
    Case("leading dimensions, strided", {"M": 12, "N": 24, "K": 32, "edit": "strided"}),
    Case("rows of sizes 1e-3 to 1e3", {"M": 20, "N": 24, "K": 48, "edit": "sizes", "keep": True}),
    Case("a row of zeros", {"M": 5, "N": 24, "K": 48, "edit": "zero row"}, torch.bfloat16),
    Case("sums that cancel", {"M": 20, "N": 24, "K": 64, "edit": "cancelling"}),
    Case("a NaN stays in its row", {"M": 6, "N": 20, "K": 24, "edit": "poor"}),
    Case("production", {"M": _ROWS, "N": 1536, "K": 512, "parts": 4}, torch.bfloat16, production=True),
    Case(
        "with what a backward needs", {"M": _ROWS, "N": 1536, "K": 512, "parts": 4, "keep": True}, torch.bfloat16, True
    ),
)


def residual_inputs(generator, device, dtype, *, M, N, K, edit=None):
    found = _drawn(generator, device, dtype, M, K, edit, weight=(N, K), stream=(M, N))
    scale = torch.randn(N, generator=generator, device=generator.device).to(device)
    return {"h": found["x"], "weight": found["weight"], "scale": scale, "x": found["stream"]}


RESIDUAL_CASES = (
    Case("no rows", {"M": 0, "N": 16, "K": 16}),
    Case("one element", {"M": 1, "N": 1, "K": 1}),
    Case("primes", {"M": 7, "N": 37, "K": 29}),
    Case("several parts", {"M": 65, "N": 130, "K": 33}),
    Case("several parts, bfloat16", {"M": 129, "N": 260, "K": 72}, torch.bfloat16),
    Case("several steps, float16", {"M": 40, "N": 48, "K": 192}, torch.float16),
    Case("strided", {"M": 12, "N": 24, "K": 32, "edit": "strided"}),
    Case("sums that cancel", {"M": 20, "N": 24, "K": 64, "edit": "cancelling"}),
    Case("a NaN stays in its row", {"M": 6, "N": 20, "K": 24, "edit": "poor"}),
    Case("production, attention", {"M": _ROWS, "N": 512, "K": 512}, torch.bfloat16, production=True),
    Case("production, MLP", {"M": _ROWS, "N": 512, "K": 1536}, torch.bfloat16, production=True),
)
