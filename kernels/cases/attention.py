"""Inputs and cases of `banded_attention`."""

import torch

from ..spec import Case


def inputs(
    generator, device, dtype, *, T, C, window, B=1, H=1, Hkv=1, D=16, S=0, position=None, exclude_own=False, edit=None
):
    """NaN stands in every slot of the cache before the stream's start, and in every sink that no query sees."""

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=generator.device).to(dtype)

    found = {"q": normal(B, T, H, D), "k": normal(B, C + T, Hkv, D), "v": normal(B, C + T, Hkv, D)}
    if S:
        found |= {"q_sink": normal(B, T, H, D), "k_sink": normal(B, S, Hkv, D), "v_sink": normal(B, S, Hkv, D)}
    for b, first in enumerate(position or ()):
        start, seen = max(C - first, 0), min(max(first + T - window, 0), S)
        found["k"][b, :start] = found["v"][b, :start] = torch.nan
        if S:
            found["k_sink"][b, seen:] = found["v_sink"][b, seen:] = torch.nan
    if edit == "strided":
        found = {name: torch.stack((x, x), -1)[..., 0] for name, x in found.items()}
    elif edit == "beside":  # as one product gives them
        found["q"] = torch.cat([found["q"], found["q"][:, :, :1]], 2)[:, :, :-1]
    elif edit == "large":  # one key takes all
        found["q"] *= 5
    elif edit == "no own value":
        found["v"][:, C:] = 0
    found = {name: x.to(device) for name, x in found.items()}
    if position is not None:
        found["position"] = torch.tensor(position, device=device)
    return {**found, "window": window, "exclude_own": exclude_own}


_BF16, _FP16 = torch.bfloat16, torch.float16
_SINKS = {"H": 2, "Hkv": 1, "S": 3, "exclude_own": True}
CASES = (
    Case("no query", {"T": 0, "C": 3, "window": 4, "S": 2, "position": [3]}),
    Case("one query, no cache", {"T": 1, "C": 0, "window": 1}),
    Case("one query behind a cache", {"T": 1, "C": 70, "window": 71, "H": 2, "position": [70]}),
    Case("window of one", {"T": 5, "C": 3, "window": 1, "exclude_own": True}),
    Case("window larger than all", {"T": 7, "C": 3, "window": 2**31 - 1, "B": 2}),
    Case("no position", {"T": 37, "C": 70, "window": 64, "H": 2, "Hkv": 2}),
    Case("BLOCK - 1", {"T": 31, "C": 0, "window": 31, "H": 2, "Hkv": 2}),
    Case("BLOCK + 1, groups of three", {"T": 33, "C": 33, "window": 33, "H": 3, "exclude_own": True}),
    Case("cache longer than the window", {"T": 3, "C": 67, "window": 30, "position": [50]}),
    Case("cache partly filled", {"T": 20, "C": 39, "window": 40, "B": 3, "position": [0, 11, 39], **_SINKS}),
    Case("sinks partly in the band", {"T": 25, "C": 20, "window": 21, "B": 2, "position": [1, 19], **_SINKS}),
    Case("sinks far behind", {"T": 2, "C": 5, "window": 6, "B": 2, "position": [10**12, 9], **_SINKS}),
    Case("many sinks", {"T": 5, "C": 9, "window": 10, "S": 50, "position": [60]}),
    Case("width 64", {"T": 9, "C": 5, "window": 7, "D": 64, "position": [6], "S": 1}),
    Case("width 80", {"T": 9, "C": 5, "window": 7, "D": 80, "exclude_own": True}),
    Case("width 128", {"T": 6, "C": 5, "window": 7, "D": 128, "S": 2, "position": [9]}),
    Case("width 8", {"T": 6, "C": 5, "window": 7, "D": 8, "S": 2, "position": [9], "exclude_own": True}),
    Case("bfloat16, tiles within the band", {"T": 70, "C": 140, "window": 141, "position": [200], **_SINKS}, _BF16),
    Case("float16", {"T": 20, "C": 70, "window": 71, "D": 32, "position": [70], **_SINKS}, _FP16),
    Case(
        "strided",
        {"T": 5, "C": 3, "window": 4, "B": 2, "H": 4, "Hkv": 2, "S": 2, "position": [9, 4], "edit": "strided"},
    ),
    Case(
        "queries beside keys and values",
        {"T": 20, "C": 9, "window": 10, "B": 2, "H": 4, "Hkv": 2, "S": 2, "position": [9, 30], "edit": "beside"},
    ),
    Case("one key takes all", {"T": 8, "C": 8, "window": 6, "S": 2, "position": [9], "edit": "large"}),
    Case("own value zero", {"T": 33, "C": 32, "window": 3, "exclude_own": True, "edit": "no own value"}),
    Case(
        "production",
        {"T": 4096, "C": 2047, "window": 2048, "H": 8, "Hkv": 4, "D": 64, "S": 4, "position": [10**7]},
        _BF16,
        production=True,
    ),
    Case(
        "production, own value left out",
        {"T": 4096, "C": 2047, "window": 2048, "H": 8, "Hkv": 4, "D": 64, "position": [10**7], "exclude_own": True},
        _BF16,
        production=True,
    ),
    Case(
        "production, width 128",
        {"T": 4096, "C": 2047, "window": 2048, "H": 8, "Hkv": 8, "D": 128, "S": 4, "position": [10**7]},
        _BF16,
        production=True,
    ),
    Case(
        "production, one token",
        {"T": 1, "C": 2047, "window": 2048, "B": 8, "H": 8, "Hkv": 4, "D": 64, "S": 4, "position": [10**7] * 8},
        _BF16,
        production=True,
    ),
)
