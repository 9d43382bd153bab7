"""Text sampled from the model itself, one position a step on the cached forward of `slotfast.stream`.

PR #1019 of openai/parameter-golf calibrates its quantisation on 64 windows of 2,048 tokens sampled this way, which
needs no training data; it has no cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import InputError
from .model import GPT
from .stream import CachedForward


@torch.no_grad()
def sample(
    model: GPT,
    windows: int,
    length: int,
    *,
    temperature: float = 0.8,
    seed: int = 1337,
    batch: int = 8,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Windows of tokens drawn from the model, each after a start token that is drawn uniformly.

    Args:
        model: in evaluation mode.
        windows: how many in all.
        length: tokens of each.
        temperature: of the draws; positive.
        seed: of the generator; the same seed on the same device draws the same tokens.
        batch: windows that are sampled at a time.
        dtype: of the computation; the embedding's where None.

    Yields:
        int64 [up to `batch`, length], on the model's device.

    Raises:
        InputError: temperature is not positive, the model's logits are NaN.

    Source: the calibration of PR #1019.
    """
    if not temperature > 0:
        raise InputError(f"temperature {temperature}: expected a positive number")
    device = model.tok_emb.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for first in range(0, windows, batch):
        rows = min(batch, windows - first)
        cached = CachedForward(model, length, batch=rows, dtype=dtype)
        drawn = [torch.randint(model.config.vocab_size, (rows,), generator=generator, device=device)]
        while len(drawn) < length:
            shares = (model.head(cached(drawn[-1][:, None])[:, 0]) / temperature).softmax(-1)
            if not shares.isfinite().all():
                raise InputError(f"sampling: the model's logits at position {len(drawn) - 1} are NaN or infinite")
            drawn.append(torch.multinomial(shares, 1, generator=generator)[:, 0])
        yield torch.stack(drawn, 1)
