"""Bits per byte of any torch language model, plain and adapted: the whole loop, to copy and to change.

`python -m examples.nanogpt` and `python -m examples.nanochat` run it on models of those two forms.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import slotfast


@torch.no_grad()
def losses(
    model: Callable[[Tensor], Tensor],
    tokens: Tensor,
    length: int,
    stride: int,
    preset: str = "causal",
    bos_id: int | None = None,
    batch: int = 8,
) -> tuple[Tensor, Tensor]:
    """Losses of tokens 1..N-1 in nats, plain and adapted, float64 [N - 1]; each is scored in one window.

    Args:
        model: int64 [W, length] to logits [W, length, V] at all positions.
        tokens: int64 [N]; N >= 2.
        length, stride: positions of a window, and those that are new in it.
        preset, bos_id: see `slotfast.adapt`.
        batch: windows of one forward.
    """
    count, state, plain, adapted = len(tokens) - 1, None, [], []
    windows = math.ceil(max(count - length, 0) / stride) + 1
    padded = torch.cat([tokens, tokens.new_zeros(length + stride)])  # the last window may be longer than what is left
    for first in range(0, windows, batch):
        starts = stride * torch.arange(first, min(first + batch, windows))
        places = starts[:, None] + torch.arange(length)
        context = (length - stride) * (starts > 0)  # positions that the windows before have scored
        scored = (count - starts).clamp(max=length)
        found = slotfast.adapt(
            model(padded[places]), padded[places + 1], context, scored, preset=preset, bos_id=bos_id, state=state
        )
        state = found.state
        plain.append(found.base_nll[~found.base_nll.isnan()])
        adapted.append(found.nll[~found.nll.isnan()])
    return torch.cat(plain).double(), torch.cat(adapted).double()


def bits_per_byte(nats: Tensor, token_bytes: Tensor, tokens: Tensor) -> float:
    """Of scored tokens, all but the first; token_bytes: int64 [V], the UTF-8 bytes of each token, 0 for controls."""
    return float(nats.sum()) / math.log(2) / int(token_bytes[tokens[1:]].sum())
