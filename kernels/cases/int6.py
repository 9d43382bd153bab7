"""Inputs and cases of `int6_matmul`."""

import torch

from ..int6 import _cdiv, pack_int6
from ..spec import Case


def inputs(generator, device, dtype, m, n, k, group=0, scale_dtype=torch.float16, lead=(), strided=False, spread=False):
    drawing = {"generator": generator, "device": generator.device}
    codes = torch.randint(-31, 32, (n, k), dtype=torch.int8, **drawing)
    scale = torch.rand((n, _cdiv(k, group)) if group else (n,), **drawing) * 0.05 + 0.001
    if strided:
        x = torch.randn(k, 2 * m, **drawing).to(dtype).to(device).t()[::2]
    else:
        x = torch.randn(*lead, m, k, **drawing).to(dtype).to(device)
    if spread:
        x *= torch.logspace(-3, 3, k, device=device).to(dtype)
    return {"x": x, "weight": pack_int6(codes.to(device), scale.to(scale_dtype).to(device))}


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    Case("no rows", {"m": 0, "n": 8, "k": 32}, _BF16),
    Case("one row", {"m": 1, "n": 64, "k": 256}, _BF16),
    Case("single weight", {"m": 1, "n": 1, "k": 1}),
    Case("two rows, primes", {"m": 2, "n": 67, "k": 131}, _BF16),
    Case("tile of rows", {"m": 16, "n": 65, "k": 384}, _FP16),
    Case("tile of rows and one", {"m": 17, "n": 63, "k": 127}, _BF16),
    Case("several tiles of rows", {"m": 70, "n": 33, "k": 129}, _FP16),
    Case("library product", {"m": 257, "n": 37, "k": 95}, _BF16),
    Case("groups of 32, ragged", {"m": 3, "n": 17, "k": 101, "group": 32}, _BF16),
    Case("groups of 64, float32 scales", {"m": 5, "n": 70, "k": 193, "group": 64, "scale_dtype": _FP32}, _FP16),
    Case("groups of 128, float32", {"m": 18, "n": 31, "k": 300, "group": 128}),
    Case("float32 primes", {"m": 7, "n": 41, "k": 157, "scale_dtype": _FP32}),
    Case("leading dimensions", {"m": 3, "n": 9, "k": 40, "lead": (2, 2)}, _FP16),
    Case("strided", {"m": 5, "n": 24, "k": 77, "strided": True}, _BF16),
    Case("columns of sizes 1e-3 to 1e3", {"m": 4, "n": 40, "k": 256, "spread": True}, _BF16),
    Case("split eight ways", {"m": 3, "n": 40, "k": 1000, "spread": True}, _BF16),
    Case("attention output, one row", {"m": 1, "n": 512, "k": 512}, _BF16, production=True),
    Case("attention output, 16 rows", {"m": 16, "n": 512, "k": 512}, _BF16, production=True),
    Case("keys and values", {"m": 16, "n": 256, "k": 512}, _BF16, production=True),
    Case("up projection, one row", {"m": 1, "n": 1536, "k": 512}, _BF16, production=True),
    Case("up projection, 64 rows", {"m": 64, "n": 2048, "k": 512}, _BF16, production=True),
    Case("up projection, 256 rows", {"m": 256, "n": 2048, "k": 512}, _BF16, production=True),
    Case("down projection, one row", {"m": 1, "n": 512, "k": 1536}, _BF16, production=True),
    Case("down projection, 64 rows", {"m": 64, "n": 512, "k": 1536}, _BF16, production=True),
    Case("down projection, groups", {"m": 16, "n": 512, "k": 1536, "group": 64}, _BF16, production=True),
    Case("down projection, full batch", {"m": 65536, "n": 512, "k": 1536}, _BF16, production=True),
    Case("large, one row", {"m": 1, "n": 4096, "k": 4096}, _BF16, production=True),
    Case("large, 16 rows", {"m": 16, "n": 4096, "k": 4096}, _BF16, production=True),
)
