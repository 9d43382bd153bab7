"""Causal attention at the 11 x 512 model's shape: ours, FlashAttention where there is one, and torch's own backends.

    python -m bench.bench_attention [--tiny] [--out FILE]

torch's are timed on grouped heads, and on keys and values repeated for every head, the copies included. What a backend
does not take is said, not an error.
"""

import argparse
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.bench_kernels import error
from bench.common import Rows, default_device, provenance
from bench.timing import is_small, measure
from slotfast.kernels import banded_attention

DEVICE = default_device()
BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def flash_attention(small: tuple) -> tuple[str, Callable] | None:
    """The first FlashAttention that computes, and its module's name; importing one proves nothing."""
    for name in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        try:
            function = importlib.import_module(name).flash_attn_func
            function(*small, causal=True)
            return name, function
        except (ImportError, AttributeError, RuntimeError, TypeError):
            continue
    return None


def by_torch(backend: SDPBackend, repeated: bool, q, k, v) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if repeated:
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeated).transpose(1, 2)


def contenders(inputs: tuple) -> dict[str, Callable]:
    """Functions of q [B, L, H, D], k and v [B, L, Hkv, D]; ours first."""
    found = {"ours": lambda q, k, v: banded_attention(q, k, v, q.size(1))}
    if flash := flash_attention(tuple(x[:1, :64] for x in inputs)):
        found[flash[0]] = lambda *qkv: (lambda out: out[0] if isinstance(out, tuple) else out)(
            flash[1](*qkv, causal=True)
        )
    for (name, backend), repeated in itertools.product(BACKENDS.items(), (False, True)):
        if hasattr(SDPBackend, backend):
            kind = "repeated" if repeated else "grouped"
            found[f"torch {name}, {kind}"] = partial(by_torch, getattr(SDPBackend, backend), repeated)
    return found


@torch.no_grad()
def timed(function: Callable, inputs: tuple, exact: torch.Tensor, small: bool) -> dict:
    try:
        off = error(function(*inputs)[:1], exact)
    except RuntimeError as refusal:
        return {"skipped": str(refusal)[:200]}
    assert off < 2e-2, f"{off:.2g} off float64: not timed"
    ms = statistics.median(measure(partial(function, *inputs), DEVICE, small=small))
    B, L, H, D = inputs[0].shape
    return {"ms": ms, "tflop_per_s": 2 * B * H * L * L * D / ms / 1e9, "off": off}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="only try the code: figures mean nothing")
    parser.add_argument("--out", help="where the rows go")
    args = parser.parse_args()
    B, L, H, Hkv, D = (1, 16, 2, 1, 16) if args.tiny else (32, 2048, 8, 4, 64)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    inputs = tuple(torch.randn(B, L, heads, D, device=DEVICE, dtype=dtype) for heads in (H, Hkv, Hkv))
    exact = by_torch(SDPBackend.MATH, True, *(x[:1].double() for x in inputs))
    rows, found = Rows(args.out, provenance(DEVICE)), contenders(inputs)
    small = is_small(partial(found["ours"], *inputs), DEVICE)
    for name, function in found.items():
        rows.take({"who": name}, timed, function, inputs, exact, small)
    return 1 if rows.failed else 0


if __name__ == "__main__":
    sys.exit(main())
