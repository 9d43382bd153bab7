"""What a model is asked for, ours or another project's."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class CausalModel(Protocol):
    """A `torch.nn.Module` whose forward is taken apart: hidden states, and their logits."""

    def hidden(
        self, tokens: Tensor, dtype: torch.dtype | None = None, first: int = 0, length: int | None = None
    ) -> Tensor:
        """States [B, T - first, width] of tokens int [B, T]; see `GPT.hidden`."""
        ...

    def head(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., V] of states [..., width]; see `GPT.head`."""
        ...

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Losses [...] of targets [...] under states [..., width]; see `GPT.losses`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
