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


def heads_inputs(generator, device, dtype, *, B, T, K, H, SHARED, D, R, parts=1, value=False, edit=None, **options):
    widths = {"weight": ((H + 2 * SHARED) * D, K)} | ({"value": (B * T, SHARED * D)} if value else {})
    found = _drawn(generator, device, dtype, B * T, K, edit, **widths)
    angle = torch.outer(torch.arange(T, dtype=torch.float64) + 5, 100.0 ** -(torch.arange(R) / max(R, 1)))
    gain = 1.5 + 0.1 * torch.randn(H, generator=generator, device=generator.device)
    return {
        "x": found["x"].view(B, T, K),
        "weight": found["weight"],
        "squares": _squares(found["x"], parts).view(parts, B, T),
        "gain": gain.to(device),
        "cos": angle.cos().float().to(device),
        "sin": angle.sin().float().to(device),
        "width": D,
        "value": found["value"].view(B, T, -1) if value else None,
        **options,
    }


_GROUPED = {"B": 32, "T": 2048, "K": 512, "H": 8, "SHARED": 4, "D": 64, "R": 8}

HEADS_CASES = (
    Case("no rows", {"B": 0, "T": 4, "K": 16, "H": 1, "SHARED": 1, "D": 16, "R": 2}),
    Case("heads of two", {"B": 1, "T": 3, "K": 5, "H": 1, "SHARED": 1, "D": 2, "R": 1}),
    Case(
        "primes, groups of three, a value",
        {"B": 3, "T": 7, "K": 29, "H": 3, "SHARED": 1, "D": 8, "R": 3, "parts": 2, "value": True, "keep": True},
    ),
    Case("nothing turns", {"B": 2, "T": 5, "K": 24, "H": 2, "SHARED": 2, "D": 16, "R": 0, "norm": 0.5}),
    Case("all of it turns", {"B": 2, "T": 5, "K": 24, "H": 2, "SHARED": 1, "D": 16, "R": 8, "value": True}),
    Case(
        "several tiles, bfloat16",
        {"B": 2, "T": 67, "K": 72, "H": 4, "SHARED": 1, "D": 64, "R": 8, "value": True},
        torch.bfloat16,
    ),
    Case("a head in the middle of a tile", {"B": 1, "T": 40, "K": 48, "H": 5, "SHARED": 5, "D": 32, "R": 4}),
    Case(
        "several steps, float16",
        {"B": 2, "T": 9, "K": 192, "H": 2, "SHARED": 2, "D": 32, "R": 8, "keep": True},
        torch.float16,
    ),
    Case("rows of zeros", {"B": 1, "T": 5, "K": 32, "H": 2, "SHARED": 1, "D": 16, "R": 4, "edit": "zero row"}),
    Case("sums that cancel", {"B": 2, "T": 6, "K": 64, "H": 2, "SHARED": 1, "D": 16, "R": 4, "edit": "cancelling"}),
    Case("a NaN stays in its row", {"B": 2, "T": 3, "K": 24, "H": 2, "SHARED": 1, "D": 16, "R": 4, "edit": "poor"}),
    Case("production", _GROUPED, torch.bfloat16, production=True),
    Case("production, a value", {**_GROUPED, "value": True}, torch.bfloat16, production=True),
    Case("with what a backward needs", {**_GROUPED, "keep": True}, torch.bfloat16, production=True),
)


def cross_entropy_inputs(
    generator, device, dtype, *, M, V, K, bias=False, scale=1.0, edit=None, targets=None, leading=None, training=True,
    **options,
):  # fmt: skip
    """Logits of size `scale`; `targets` are given or drawn; `leading` dimensions in the place of M.

    `training` is for the compilations alone.
    """
    drawing = {"generator": generator, "device": generator.device}
    of_x = edit if edit in ("strided", "cancelling") else None
    found = _drawn(generator, device, torch.float32, M, K, of_x, weight=(V, K))
    found["weight"] *= scale
    drawn = torch.randint(V, (M,), **drawing) if targets is None else torch.tensor(targets).expand(M).clone()
    if bias:
        found["bias"] = torch.randn(V, **drawing)
    if edit == "some ignored":
        drawn[torch.rand(M, **drawing) < 0.4] = options.get("ignore_index", -100)
    elif edit == "all ignored":
        drawn[:] = -100
        found["x"][0] = torch.nan
    elif edit == "poor rows":  # each spoils its own loss alone
        drawn[0], drawn[1] = V, -1
        found["x"][2, K // 2], found["x"][3, K // 2] = torch.nan, torch.inf
        drawn[4] = -100
    elif edit == "banned":  # half of the vocabulary, whole tiles among it
        found["bias"] = torch.randn(V, **drawing)
        found["bias"][: V // 2] = -torch.inf
        drawn = drawn.clamp(min=V // 2)
    elif edit == "int32":
        drawn = drawn.int()
    shape = leading or (M,)
    found = {"x": found["x"].unflatten(0, shape) if leading else found["x"], "weight": found["weight"]} | {
        name: found[name] for name in ("bias",) if name in found
    }
    found = {name: tensor.to(device, dtype) for name, tensor in found.items()}
    return {**found, "targets": drawn.view(shape).to(device), **options}


CROSS_ENTROPY_CASES = (
    Case("no rows", {"M": 0, "V": 16, "K": 16}),
    Case("one element", {"M": 1, "V": 1, "K": 1}),
    Case("primes", {"M": 7, "V": 37, "K": 29, "bias": True}),
    Case("above a tile of rows", {"M": 65, "V": 48, "K": 33, "softcap": 3.0}),
    Case("several tiles of the vocabulary", {"M": 20, "V": 300, "K": 24, "softcap": 30.0, "scale": 20.0}),
    Case(
        "targets at the borders of tiles", {"M": 8, "V": 257, "K": 16, "targets": [0, 127, 128, 129, 255, 256, 1, 254]}
    ),
    Case("several tiles, bfloat16", {"M": 130, "V": 260, "K": 72, "softcap": 30.0}, torch.bfloat16),
    Case("several steps, float16", {"M": 40, "V": 48, "K": 192, "bias": True}, torch.float16),
    Case("leading dimensions, int32", {"M": 12, "V": 24, "K": 32, "leading": (3, 4), "edit": "int32"}),
    Case("strided", {"M": 12, "V": 24, "K": 32, "edit": "strided"}),
    Case("sums that cancel", {"M": 20, "V": 24, "K": 64, "edit": "cancelling"}),
    Case("logits of 1e4", {"M": 20, "V": 200, "K": 24, "scale": 1e4}),
    Case("logits of 1e3, capped", {"M": 20, "V": 200, "K": 24, "scale": 1e3, "softcap": 30.0}),
    Case("banned tokens", {"M": 9, "V": 300, "K": 16, "edit": "banned"}),
    Case("some ignored", {"M": 19, "V": 33, "K": 16, "edit": "some ignored", "softcap": 2.0}),
    Case("another ignore index", {"M": 19, "V": 33, "K": 16, "edit": "some ignored", "ignore_index": 5}),
    Case("all ignored", {"M": 5, "V": 33, "K": 16, "edit": "all ignored"}),
    Case("rows that are NaN", {"M": 9, "V": 33, "K": 16, "edit": "poor rows"}),
    Case("V 1024", {"M": _ROWS, "V": 1024, "K": 512, "softcap": 30.0, "training": False}, torch.bfloat16, True),
    Case("V 1024, training", {"M": _ROWS, "V": 1024, "K": 512, "softcap": 30.0}, torch.bfloat16, production=True),
    Case("V 4096", {"M": _ROWS, "V": 4096, "K": 512, "softcap": 30.0}, torch.bfloat16, production=True),
    Case("V 8192", {"M": _ROWS, "V": 8192, "K": 512, "softcap": 30.0}, torch.bfloat16, production=True),
)


def logits_inputs(generator, device, dtype, *, M, V, K, scale=1.0, edit=None, **options):
    """`scale` of the logits."""
    found = _drawn(generator, device, dtype, M, K, edit, weight=(V, K))
    return {"x": found["x"], "weight": found["weight"] * scale, **options}


LOGITS_CASES = (
    Case("no rows", {"M": 0, "V": 16, "K": 16}),
    Case("one element", {"M": 1, "V": 1, "K": 1}),
    Case("primes, capped", {"M": 7, "V": 37, "K": 29, "softcap": 3.0}),
    Case("above a tile", {"M": 65, "V": 130, "K": 33}),
    Case("several tiles, bfloat16", {"M": 130, "V": 260, "K": 72, "softcap": 30.0}, torch.bfloat16),
    Case("several steps, float16", {"M": 40, "V": 48, "K": 192, "softcap": 30.0}, torch.float16),
    Case("strided", {"M": 12, "V": 24, "K": 32, "edit": "strided"}),
    Case("sums that cancel", {"M": 20, "V": 24, "K": 64, "edit": "cancelling"}),
    Case("logits of 1e3, capped", {"M": 20, "V": 24, "K": 48, "scale": 1e3, "softcap": 30.0}),
    Case("a NaN stays in its row", {"M": 6, "V": 20, "K": 24, "softcap": 30.0, "edit": "poor"}),
    Case("production", {"M": _ROWS // 8, "V": 1024, "K": 512, "softcap": 30.0}, torch.bfloat16, production=True),
    Case("production, V 8192", {"M": _ROWS // 8, "V": 8192, "K": 512, "softcap": 30.0}, torch.bfloat16, True),
)
