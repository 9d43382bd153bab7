"""Cases of `bias_cross_entropy`."""

import torch

from ..spec import Case

CASES = (
    Case("one element", {"W": 1, "T": 1, "V": 1}),
    Case("two tokens", {"W": 2, "T": 3, "V": 2}),
    Case("no windows", {"W": 0, "T": 4, "V": 16}),
    Case("no positions", {"W": 2, "T": 0, "V": 16}),
    Case("primes", {"W": 3, "T": 7, "V": 61}),
    Case("below a tile", {"W": 2, "T": 3, "V": 127}, torch.bfloat16),
    Case("a tile", {"W": 2, "T": 4, "V": 1024}),
    Case("above a tile", {"W": 1, "T": 5, "V": 1025}, torch.bfloat16),
    Case("no bias", {"W": 2, "T": 5, "V": 64, "bias": None}),
    Case("shared bias", {"W": 3, "T": 5, "V": 64, "bias": "shared"}),
    Case("float16", {"W": 2, "T": 5, "V": 64}, torch.float16),
    Case("capped before the bias", {"W": 2, "T": 5, "V": 48, "softcap": 3.0}),
    Case("capped after the bias", {"W": 2, "T": 5, "V": 48, "softcap": 3.0, "cap_after_bias": True}),
    Case("capped without bias", {"W": 2, "T": 5, "V": 48, "softcap": 30.0, "bias": None}, torch.bfloat16),
    Case("strided", {"W": 3, "T": 5, "V": 37, "edit": "strided"}),
    Case("slice of a wider vocabulary", {"W": 2, "T": 5, "V": 40, "edit": "narrow"}, torch.bfloat16),
    Case("some ignored", {"W": 3, "T": 9, "V": 33, "edit": "some ignored"}),
    Case("another ignore index", {"W": 2, "T": 9, "V": 33, "edit": "some ignored", "ignore_index": 5}),
    Case("all ignored", {"W": 2, "T": 5, "V": 33, "edit": "all ignored"}),
    Case("rows that are NaN", {"W": 3, "T": 6, "V": 33, "edit": "poor rows"}),
    Case("banned tokens", {"W": 2, "T": 4, "V": 64, "edit": "banned"}),
    Case("logits of 1e4", {"W": 2, "T": 6, "V": 96, "scale": 1e4}),
    Case("two parts", {"W": 2, "T": 131, "V": 24}),
    Case("large vocabulary", {"W": 1, "T": 2, "V": 16411}),
    Case("large vocabulary, banned tokens", {"W": 1, "T": 2, "V": 40000, "edit": "banned"}, torch.bfloat16),
    *(
        Case(f"V {V} {str(dtype)[6:]}", {"W": 2**29 // (64 * V), "T": 64, "V": V}, dtype, production=True)
        for V in (1024, 4096, 8192)
        for dtype in (torch.bfloat16, torch.float32)
    ),
)
