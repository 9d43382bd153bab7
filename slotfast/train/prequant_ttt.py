"""Test-time training of the weights, after the training and before quantisation, on a stream that the user names.

Where the stream is the text that the model is then scored on, the score is not honest, whatever is frozen afterwards:
the weights have seen the answers. `slotfast.overlap` finds such streams, the command refuses them, and an artifact says
what it was adapted to.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..compiled import Compiled
from ..data import TokenStream
from ..model import GPT
from ..optim import average_gradients
from ..worker import ALONE, Worker


@dataclass(frozen=True)
class Recipe:
    """How weights are adapted, with AdamW.

    Args:
        epochs: over the whole stream.
        frozen_blocks: first blocks that stay as they are, their matrices too.
        first_rate: share of the rate that block 0 gets; it grows linearly to 1 at the last block.
        rate: of everything else; a cosine takes it to a tenth, epoch by epoch.
        batch_windows: of a rank's step.
    """

    epochs: int
    frozen_blocks: int = 0
    first_rate: float = 1.0
    rate: float = 5e-4
    batch_windows: int = 32


# Entries of openai/parameter-golf. Both meant whole blocks but reached only their control scalars, as the matrices lay
# in banks outside the blocks; here the matrices are frozen and slowed with their blocks.
RECIPES = {
    "pr1306": Recipe(epochs=6, frozen_blocks=2),
    "pr1351": Recipe(epochs=10, first_rate=0.3),
}


def adapt(
    model: GPT,
    stream: TokenStream,
    recipe: Recipe,
    seq_len: int,
    worker: Worker = ALONE,
    forward: Compiled | None = None,
    log: Callable[[str], None] = print,
) -> None:
    """Train a model in place on windows of a stream, in their order.

    Args:
        model: on the worker's device.
        stream: at least seq_len + 1 tokens; what is left and fills no window is not used.
        recipe: what to do.
        seq_len: of a window.
        worker: this process; each step's windows are shared out.
        forward: the model compiled, where it is.
        log: prints a line an epoch.
    """
    device, world = worker.device, worker.world
    groups = parameter_groups(model, recipe)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, recipe.rate, weight_decay=0.0)
    starts = range(0, len(stream) - seq_len, seq_len)
    for epoch in range(recipe.epochs):
        factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        total = torch.zeros((), device=device)
        for together in _split(starts, recipe.batch_windows * world):
            mine = together[worker.rank :: world]
            for parameter in parameters:  # a rank without a window still takes part in the mean
                parameter.grad = torch.zeros_like(parameter)
            if len(mine):
                batch = _windows(stream, mine, seq_len).to(device)
                loss = (forward or model)(batch[:, :-1], batch[:, 1:], worker.dtype)
                loss = loss * (len(mine) * world / len(together))
                loss.backward()
                total += loss.detach() * len(together) / world
            if world > 1:
                average_gradients(parameters, dist.group.WORLD)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if world > 1:
            dist.all_reduce(total)
        log(f"ttt epoch:{epoch + 1}/{recipe.epochs} loss:{float(total) / len(starts):.4f} lr_scale:{factor:.3f}")
    model.zero_grad(set_to_none=True)


def parameter_groups(model: GPT, recipe: Recipe) -> list[dict]:
    """AdamW's groups: one for each block that moves, and one for everything outside the blocks."""
    last = max(model.config.layers - 1, 1)
    groups = []
    for number, block in enumerate(model.blocks):
        if number >= recipe.frozen_blocks:
            rate = recipe.rate * (recipe.first_rate + (1 - recipe.first_rate) * number / last)
            groups.append({"params": list(block.parameters()), "rate": rate})
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("blocks.")]
    return [*groups, {"params": others, "rate": recipe.rate}]


def _split(starts: range, size: int) -> Iterator[range]:
    return (starts[i : i + size] for i in range(0, len(starts), size))


def _windows(stream: TokenStream, starts: range, seq_len: int) -> Tensor:
    return torch.from_numpy(np.stack([stream.read(start, start + seq_len + 1) for start in starts]))
