"""What there is to beat: the adaptation loop of parameter-golf PR #1350, re-created from its description.

A batch of 32 consecutive windows of 2048 tokens, stride 64. The float32 logits of all their positions are in memory.
One bias [1, 1, V] for the batch is fitted by torch.optim.LBFGS through autograd: cross-entropy of every position, of
which a mask keeps 64 a window (the last 128 minus the 64 about to be scored); 25 iterations, history 20, strong Wolfe,
starting from the batch before; then clamped to [-5, 5]. `solve_each` is the same fit for each window alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOWS, LENGTH, VOCABULARY = 32, 2048, 1024
FOCAL = slice(1920, 1984)  # positions [seq - focal, seq - stride)
ITERATIONS, HISTORY, CLAMP = 25, 20, 5.0


def solve_shared(logits: Tensor, targets: Tensor, mask: Tensor, start: Tensor | None = None) -> Tensor:
    """One bias for all the windows.

    Args:
        logits: float32 [W, L, V].
        targets: int64 [W, L].
        mask: float32 [W, L], 1 at the positions that the loss is about.
        start: [V], the result of the batch before, or None for 0.
    Returns:
        [V], clamped.
    """
    V = logits.size(-1)
    delta = torch.zeros(1, 1, V, device=logits.device) if start is None else start.detach().clone().view(1, 1, V)
    delta.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [delta],
        lr=1.0,
        max_iter=ITERATIONS,
        history_size=HISTORY,
        tolerance_grad=1e-7,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )
    total = mask.sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = F.cross_entropy((logits + delta).reshape(-1, V), targets.reshape(-1), reduction="none")
        loss = (nll.view(mask.shape) * mask).sum() / total
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return delta.detach().view(V).clamp(-CLAMP, CLAMP)


def solve_each(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """A bias for each window alone: as many solves as windows. Returns [W, V]."""
    windows = zip(logits, targets, mask, strict=True)
    return torch.stack([solve_shared(z[None], y[None], m[None]) for z, y, m in windows])
