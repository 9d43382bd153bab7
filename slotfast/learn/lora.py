"""What learns: LoRA's factors beside a model's projections, its gains, or all of its weights.

Source: LoRA (arXiv 2106.09685): y + (x A^T) B^T, A uniform in +-1/sqrt(inputs), B zero, so that nothing changes yet.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from ..model import GPT, CausalModel
from ..model.lean import LowRank
from .layers import is_linear, linear_layers, widths


class Learner(Protocol):
    """The part of a model that learns."""

    parameters: list[nn.Parameter]

    @property
    def values(self) -> list[Tensor]:
        """What has been learned: where it is kept."""
        ...

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model computes with what has been learned; afterwards it is what it was."""
        ...

    def head(self, model: CausalModel, hidden: Tensor) -> Tensor:
        """Logits of hidden states, soft-capped where the model does."""
        ...

    def losses(self, model: CausalModel, hidden: Tensor, targets: Tensor) -> Tensor:
        """Losses [...] of targets [...] under those logits, which need not be made."""
        ...

    def forget(self, share: float = 1.0) -> None:
        """Go this share of the way back to where learning began, in 0..1."""


class Lora:
    """Two factors beside each of the chosen projections.

    Args:
        model: its weights are left alone.
        rank: of the product, >= 1.
        projections: some of `PROJECTIONS`.
        alpha: the product counts alpha / rank times; None: once.

    Raises:
        InputError: see `linear_layers`.
    """

    def __init__(self, model: nn.Module, rank: int, projections: Sequence[str], alpha: float | None = None):
        self._scale = 1.0 if alpha is None else alpha / rank
        source = torch.Generator().manual_seed(0)
        self._layers: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._head: tuple[Tensor, Tensor] | None = None
        self.parameters: list[nn.Parameter] = []

        def factors(n_out: int, n_in: int, like: Tensor) -> tuple[Tensor, Tensor]:
            dtype = torch.promote_types(like.dtype, torch.float32)  # a step is smaller than what bfloat16 can add
            drawn = torch.empty(rank, n_in).uniform_(-1, 1, generator=source) / math.sqrt(n_in)
            a, b = (nn.Parameter(x.to(like.device, dtype)) for x in (drawn, torch.zeros(n_out, rank)))
            self.parameters += [a, b]
            return a, b

        for layer in linear_layers(model, projections):
            self._layers.append((layer, *factors(*widths(layer), layer.get_parameter("weight"))))
        if isinstance(model, GPT) and "head" in projections:
            vocabulary, width = model.tok_emb.weight.shape
            self._head = factors(vocabulary, width, model.tok_emb.weight)
        self._start = [parameter.detach().clone() for parameter in self.parameters]

    @property
    def values(self) -> list[Tensor]:
        """See `Learner`."""
        return [parameter.data for parameter in self.parameters]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """See `Learner`."""
        with contextlib.ExitStack() as stack:
            for layer, a, b in self._layers:

                def add(_layer: nn.Module, args: tuple, named: dict, y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
                    x = (*args, *named.values())[0]
                    if x.dtype != y.dtype or x.dim() < 2:  # under autocast; of a vector, a condition say
                        return y + self._product(x, a, b)
                    return LowRank.apply(y, x, a.to(x.dtype), b.to(x.dtype), self._scale)

                stack.enter_context(_removed(layer.register_forward_hook(add, with_kwargs=True)))
            yield

    def head(self, model: CausalModel, hidden: Tensor) -> Tensor:
        """See `Learner`; the factors of our models' output matrix add to its logits before the soft cap."""
        return model.head(hidden, None if self._head is None else self._product(hidden, *self._head))

    def losses(self, model: CausalModel, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Learner`."""
        if self._head is None:
            return model.losses(hidden, targets)
        return ops.cross_entropy(self.head(model, hidden), targets)

    def forget(self, share: float = 1.0) -> None:
        """See `Learner`."""
        forget(self.parameters, self._start, share)

    def _product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        product = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return product if self._scale == 1 else self._scale * product


class Weights:
    """A model's own weights: the model has the learned ones while they are attached, and otherwise its own.

    Args:
        model: where the weights are.
        gains_only: only those of neither a linear layer nor a table.

    Raises:
        InputError: a model that has none.
    """

    def __init__(self, model: nn.Module, gains_only: bool = False):
        matrices = [x for x in model.modules() if is_linear(x) or isinstance(x, nn.Embedding)]
        held = {id(module.weight) for module in matrices} if gains_only else set()
        self.parameters = [parameter for parameter in model.parameters() if id(parameter) not in held]
        if not self.parameters:
            missing = "parameters besides those of linear layers and tables" if held else "parameters"
            raise InputError(f"what={'norms' if gains_only else 'all'}: the model has no {missing}")
        self._start = [parameter.data for parameter in self.parameters]
        self._learned = [value.clone() for value in self._start]

    @property
    def values(self) -> list[Tensor]:
        """See `Learner`."""
        return self._learned

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """See `Learner`."""
        gradients = [parameter.grad for parameter in self.parameters]  # of a training that is under way
        try:
            self._put(self._learned, [None] * len(gradients), True)
            yield
        finally:
            try:
                self._put(self._start, gradients, False)
            except KeyboardInterrupt:  # within it: the model must keep none of what was learned
                self._put(self._start, gradients, False)
                raise

    def _put(self, values: Sequence[Tensor], gradients: Sequence[Tensor | None], learns: bool) -> None:
        for parameter, value, gradient in zip(self.parameters, values, gradients, strict=True):
            parameter.data, parameter.grad = value, gradient
            parameter.requires_grad_(learns)

    def head(self, model: CausalModel, hidden: Tensor) -> Tensor:
        """See `Learner`."""
        return model.head(hidden)

    def losses(self, model: CausalModel, hidden: Tensor, targets: Tensor) -> Tensor:
        """See `Learner`."""
        return model.losses(hidden, targets)

    def forget(self, share: float = 1.0) -> None:
        """See `Learner`."""
        forget(self._learned, self._start, share)


@torch.no_grad()
def forget(parameters: Sequence[Tensor], start: Sequence[Tensor], share: float) -> None:
    if share == 1:
        return restore(parameters, start)
    for parameter, value in zip(parameters, start, strict=True):
        parameter.lerp_(value, share)


@torch.no_grad()
def restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@contextlib.contextmanager
def _removed(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
