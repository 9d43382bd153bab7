"""Muon for matrices: momentum, orthogonalised."""

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """An approximation of the nearest (semi-)orthogonal matrix, by a quintic Newton-Schulz iteration.

    Args:
        matrix: float [..., N, K]; leading dimensions are a batch.
        steps: iterations; 5 bring singular values into about 0.7..1.2.

    Returns:
        Same shape and dtype.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; for matrices only, equal shapes in one batch.

    Args:
        params: float [N, K] parameters.
        lr: step size; the update is scaled by sqrt(max(1, N / K)).
        momentum: 0..1.
        weight_decay: decoupled.
        dtype: of the iteration; bfloat16 where the machine is fast at it.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype})

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                steps = orthogonalize(torch.stack(updates).to(group["dtype"])).float()
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(step, alpha=-scale)
