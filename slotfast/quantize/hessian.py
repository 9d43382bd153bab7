"""Second moments of the inputs of a model's matrices, collected while it reads calibration tokens."""

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..model import GPT

# Activations of at most so many tokens are held at a time, however large a batch is.
_TOKENS_AT_ONCE = 1 << 14


@torch.no_grad()
def collect_hessians(
    model: GPT, calibration: Iterable[Tensor], dtype: torch.dtype | None = None, deadline: float | None = None
) -> tuple[dict[str, Tensor], int]:
    """Mean of x x^T over the inputs x of every linear layer and of the output matrix.

    Args:
        model: in evaluation mode.
        calibration: batches of token windows, int [B, T]; taken one by one, so they may be sampled while they are read.
        dtype: of the forward pass; the embedding's where None. Products are float32, their sums float64.
        deadline: of time.perf_counter(), seconds; a batch that would end after it, at the pace of the slowest before,
            is not taken. The first one always is.

    Returns:
        float64 [K, K] by parameter name, the output matrix' under the tied embedding's name where it has none of its
        own; layers that read the same input share a tensor. And the number of tokens read.

    Raises:
        InputError: no tokens, tokens outside the vocabulary, or a layer's input is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    readers: dict[str, list[str]] = {}

    def add(name: str, inputs: Tensor) -> None:
        inputs = inputs.detach().reshape(-1, inputs.size(-1)).float()
        if name not in sums:
            sums[name] = inputs.new_zeros(inputs.size(1), inputs.size(1), dtype=torch.float64)
        sums[name] += inputs.T @ inputs

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            # Queries, keys and values have the same input.
            first = name.replace(".c_k", ".c_q").replace(".c_v", ".c_q")
            readers.setdefault(first, []).append(name)
    output = "tok_emb" if model.lm_head is None else "lm_head"
    tokens = 0
    for part in _parts(calibration, model, deadline):
        # Only here: between batches the model may be busy sampling the next one.
        hooks = [
            model.get_submodule(first).register_forward_pre_hook(lambda _, inputs, first=first: add(first, *inputs))
            for first in readers
        ]
        try:
            add(output, model.hidden(part, dtype))
        finally:
            for hook in hooks:
                hook.remove()
        tokens += part.numel()
    readers[output] = [output]
    if not tokens:
        raise InputError("calibration: no tokens")
    hessians: dict[str, Tensor] = {}
    for first, total in sums.items():
        if not total.isfinite().all():
            raise InputError(f"calibration: the input of {first} is NaN or infinite")
        hessians |= dict.fromkeys((f"{name}.weight" for name in readers[first]), total / tokens)
    return hessians, tokens


def _parts(calibration: Iterable[Tensor], model: GPT, deadline: float | None) -> Iterable[Tensor]:
    """Windows of a size that fits, on the model's device, until there are no more or the time is up."""
    batches, slowest = iter(calibration), 0.0
    device = model.tok_emb.weight.device
    while True:
        started = time.perf_counter()
        if slowest and deadline is not None and started + slowest > deadline:
            return
        batch = next(batches, None)
        if batch is None:
            return
        if batch.ndim != 2 or batch.is_floating_point():
            raise InputError(f"calibration: a batch is {batch.dtype} {list(batch.shape)}, expected integers [B, T]")
        if batch.numel():
            if not 0 <= int(batch.min()) <= int(batch.max()) < model.config.vocab_size:
                raise InputError(f"calibration: token ids outside 0..{model.config.vocab_size - 1}")
            yield from batch.to(device, torch.int64).split(max(1, _TOKENS_AT_ONCE // batch.size(1)))
        if device.type == "cuda":  # launches return at once; the clock must see the work itself
            torch.cuda.synchronize(device)
        slowest = max(slowest, time.perf_counter() - started)
