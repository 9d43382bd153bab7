"""FlashAttention against torch's scaled_dot_product_attention at the 11 x 512 model's shape; on a GPU that has it."""

import importlib

import torch
import torch.nn.functional as F

from bench.bench_kernels import error
from bench.common import default_device, need

pytest = need("pytest")

B, L, HEADS, KV_HEADS, D = 32, 2048, 8, 4, 64


def flash_attention():
    """The first FlashAttention that computes, and its module's name; importing one proves nothing."""
    small = [torch.randn(1, 64, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    for name in ("flash_attn_interface", "flash_attn.cute", "flash_attn"):
        try:
            function = importlib.import_module(name).flash_attn_func
            function(*small, causal=True)
            return name, function
        except (ImportError, AttributeError, RuntimeError, TypeError):
            continue
    return None, None


@pytest.mark.parametrize("who", ["flash", "sdpa"])
def test_attention(who, benchmark):
    if default_device().type != "cuda":
        pytest.skip("needs a GPU")
    name, flash = flash_attention()
    if flash is None:
        pytest.skip("no FlashAttention can be imported and called here")
    q, k, v = (
        torch.randn(B, L, heads, D, device="cuda", dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )

    def by_flash():
        out = flash(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    def by_sdpa():
        wide = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).transpose(1, 2)

    assert error(by_flash(), by_sdpa()) < 2e-2

    def call_and_wait():
        (by_flash if who == "flash" else by_sdpa)()
        torch.cuda.synchronize()

    benchmark.extra_info.update(module=name, flops=2 * B * HEADS * L * L * D)
    benchmark.pedantic(call_and_wait, rounds=50, warmup_rounds=3)
