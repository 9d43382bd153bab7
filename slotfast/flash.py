"""FlashAttention where the machine has one that works, and torch's own attention.

Call `flash_attention` once before a model is compiled: a compiler must not trace the probe.
"""

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order in which they are tried; each has flash_attn_func(q, k, v, causal=...) on [B, T, heads, width].
MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last positions by torch; shapes as in `slotfast.ops.attention`."""
    n, length, group = q.size(1), k.size(1), q.size(2) // k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None
    if n < length:  # torch's own causal mask is that of the first positions
        mask = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    causal = mask is None  # a plain bool, traced or not
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=group > 1)
    return y.transpose(1, 2)


# By type of device. A dictionary, not a cache decorator: a compiler that traces a call reads it, whereas it would look
# through the decorator and trace the probe.
_FOUND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | None] = {"cpu": None}


def flash_attention(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The first FlashAttention that computes a tiny grouped, causal bfloat16 case rightly on a device, or None.

    An importable library proves nothing: it may lack kernels for this GPU, or be another one of the same name.
    """
    if device.type not in _FOUND:
        _FOUND[device.type] = probe_flash_attention(device)
    return _FOUND[device.type]


def probe_flash_attention(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Call each library on a tiny input and compare with torch."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 32, heads, 64, generator=generator).to(device, torch.bfloat16).contiguous()
        for heads in (4, 2, 2)
    )
    expected = torch_attention(q, k, v).float()
    for name in MODULES:
        try:
            candidate = functools.partial(_call_flash, importlib.import_module(name).flash_attn_func)
            if (candidate(q, k, v).float() - expected).abs().max() < 0.05:
                return candidate
        except Exception:  # whatever goes wrong in somebody else's library, it cannot be used here
            continue
    return None


def _call_flash(function: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = function(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp as well
