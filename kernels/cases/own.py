"""Inputs and cases of `without_own`."""

import torch

from ..spec import Case


def inputs(generator, device, dtype, *, B, T, H, SHARED, D, edit=None):
    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    y, v = normal(B, T, H, D), normal(B, T, SHARED, D)
    if edit == "nothing but its own":
        y = v.repeat_interleave(H // SHARED, 2) * normal(B, T, H, 1)
    elif edit == "no value":
        v[:, ::2] = 0.0
    elif edit == "tiny and huge":
        v *= 10.0 ** (torch.arange(T) % 9 - 4)[:, None, None]
    elif edit == "poor":  # spoils its position's heads
        v[:, T // 2, 0, D // 2] = torch.nan
    y, v = y.to(device, dtype), v.to(device, dtype)
    if edit == "beside queries and keys":
        v = torch.cat([y, v, v], 2)[:, :, H + SHARED :]
    elif edit == "strided":
        y, v = (torch.stack((x, x), -1)[..., 0] for x in (y, v))
    elif edit == "the last positions":
        v = torch.cat([v, v], 1)[:, T:]
    return {"y": y, "v": v}


_SMALL = {"B": 2, "T": 5, "H": 4, "SHARED": 2, "D": 8}

CASES = (
    Case("no rows", {**_SMALL, "B": 0}),
    Case("one element", {"B": 1, "T": 1, "H": 1, "SHARED": 1, "D": 1}),
    Case("primes, groups of three", {"B": 1, "T": 7, "H": 3, "SHARED": 1, "D": 13}),
    Case("beside queries and keys", {**_SMALL, "edit": "beside queries and keys"}),
    Case("the last positions", {**_SMALL, "edit": "the last positions"}),
    Case("strided", {**_SMALL, "edit": "strided"}),
    Case("several programs, bfloat16", {"B": 2, "T": 40, "H": 2, "SHARED": 1, "D": 64}, torch.bfloat16),
    Case("float16", {**_SMALL, "D": 32}, torch.float16),
    Case("nothing but its own", {**_SMALL, "edit": "nothing but its own"}),
    Case("no value", {**_SMALL, "edit": "no value"}),
    Case("tiny and huge values", {**_SMALL, "T": 9, "edit": "tiny and huge"}),
    Case("a NaN stays in its heads", {**_SMALL, "edit": "poor"}),
    Case("the widest head", {"B": 1, "T": 3, "H": 2, "SHARED": 1, "D": 256}),
    Case("production", {"B": 32, "T": 2048, "H": 8, "SHARED": 4, "D": 64}, torch.bfloat16, production=True),
)
