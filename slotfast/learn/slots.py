"""LoRA of documents side by side: factors of its own for each of them, in batched products, and their optimiser.

Every run of a layer has factors of its own, also where a layer runs repeatedly. Beside a block's projections they
read what these read; `attn` and `mlp` are branches beside the whole of attention and MLP, and read the block's normed
inputs: what PR #1530 and its successors call the adapters of O and MLP.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..model import GPT
from ..worker import upload
from .row import Learning

# Of every block; the factors of attn and mlp are branches beside the whole of them.
_PLACES = {
    "q": "attn.c_q",
    "k": "attn.c_k",
    "v": "attn.c_v",
    "o": "attn.proj",
    "up": "mlp.fc",
    "down": "mlp.proj",
    "attn": "attn",
    "mlp": "mlp",
}


class SlotLora:
    """Factors A [slots, rank, inputs] and B [slots, outputs, rank] of every place, a row of numbers for each slot.

    Args:
        model: its weights are left alone.
        row: rank, projections, alpha and optimiser.
        slots: documents side by side.

    Attributes:
        values: [slots, P], all factors of a slot; float32, or float64 for a model of float64.
    """

    def __init__(self, model: GPT, row: Learning, slots: int):
        like = model.tok_emb.weight
        self.row, self._scale = row, row.alpha / row.rank if row.alpha else 1.0
        places = [(run, name) for run in range(len(model.order)) for name in row.projections if name != "head"]
        places += [(0, "head")] if "head" in row.projections else []
        self._places: list[tuple[int, str]] = places
        dtype = torch.promote_types(like.dtype, torch.float32)  # a step is smaller than what bfloat16 can add
        spreads, self._sizes, self._shapes = [], [], []
        for run, name in places:
            n_out, n_in = _shape(model, model.order[run], name)
            self._shapes += [(row.rank, n_in), (n_out, row.rank)]
            self._sizes += [row.rank * n_in, n_out * row.rank]
            spread = torch.full((row.rank * n_in,), 1 / math.sqrt(n_in), dtype=dtype)
            spreads += [spread, torch.zeros(n_out * row.rank, dtype=dtype)]
        self._spread = torch.cat(spreads)
        self._drawn = int((self._spread > 0).sum())
        self._is_a = (self._spread > 0).to(like.device)
        self.values = torch.zeros(slots, len(self._spread), dtype=dtype, device=like.device)
        self._parameters = [nn.Parameter(value) for value in self.values]  # each a view of its row
        self._optimizer = _optimizer(row, self._parameters)
        self._factors: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._run = 0

    # -- what a slot starts from

    def draw(self, seed: int) -> Tensor:
        """A's numbers, uniform in +-1/sqrt(inputs), and zeros for B's: [P], the same on every device."""
        source, values = torch.Generator().manual_seed(seed), self._spread.clone()
        values[values > 0] *= torch.empty(self._drawn).uniform_(-1, 1, generator=source)
        return values.to(self.values.device)

    def put(self, slot: int, values: Tensor) -> None:
        """Give a slot its factors, [P]."""
        self.values[slot] = values

    def begin(self, slot: int) -> None:
        """A slot's next document: B is zero, A is left, and the optimiser remembers nothing."""
        self.values[slot] *= self._is_a
        for state in self._optimizer.state.get(self._parameters[slot], {}).values():
            if state is not None:
                state.zero_()

    def shrink(self, slot: int, steps: int) -> None:
        """What `steps` of the optimiser without a gradient leave of a slot."""
        if steps and self.row.decay:
            self.values[slot] *= (1 - self.row.lr * self.row.decay) ** steps

    def state_dict(self) -> dict[str, Any]:
        """Factors, and what the optimiser remembers."""
        return {"values": self.values, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.values.copy_(state["values"])
        self._optimizer.load_state_dict(state["optimizer"])

    # -- what a forward computes with

    @contextlib.contextmanager
    def hooked(self, model: GPT) -> Iterator[None]:
        """Within, the model's blocks add what `using` has put in place; nothing outside of `using`."""
        handles = []
        for block in model.blocks:
            handles.append(block.register_forward_pre_hook(self._note_run))
            for name in {name for _, name in self._places if name != "head"}:
                layer = block.get_submodule(_PLACES[name])
                handles.append(layer.register_forward_hook(self._adding(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def using(self, slots: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """Within, row i of a batch is computed with the factors of slot i; gives them as a leaf [len(slots), P]."""
        leaf = self._rows(slots).detach().requires_grad_()
        parts = leaf.to(dtype).split(self._sizes, 1)
        shaped = [part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True)]
        self._factors = dict(zip(self._places, zip(shaped[::2], shaped[1::2], strict=True), strict=True))
        try:
            yield leaf
        finally:
            self._factors = {}

    def head(self, model: GPT, hidden: Tensor) -> Tensor:
        """Soft-capped logits of hidden states [B, N, width]; the head's factors add to them before the soft cap."""
        factors = self._factors.get((0, "head"))
        if factors is None:
            return model.head(hidden)
        a, b = factors
        return model.head(hidden, torch.bmm(torch.bmm(hidden, a.mT), b.mT) * self._scale)

    def losses(self, model: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
        """Losses [B, N] of targets [B, N] under those logits, which need not be made."""
        if (0, "head") not in self._factors:
            return model.losses(hidden, targets)
        return ops.cross_entropy(self.head(model, hidden), targets)

    def step(self, slots: Sequence[int], gradient: Tensor) -> None:
        """One step of the optimiser on each of some slots, [len(slots), P], each with its own memory and count."""
        for slot, own in zip(slots, gradient, strict=True):
            if self.row.clip:
                own *= (self.row.clip / (own.norm() + 1e-6)).clamp(max=1)
            self._parameters[slot].grad = own
        self._optimizer.step()
        for slot in slots:
            self._parameters[slot].grad = None

    def _rows(self, slots: Sequence[int]) -> Tensor:
        first, last = slots[0], slots[-1]
        if list(slots) == list(range(first, last + 1)):
            return self.values[first : last + 1]
        return self.values[upload(torch.tensor(slots), self.values.device)]

    def _note_run(self, _block: nn.Module, args: tuple) -> None:
        self._run = args[4]

    def _adding(self, name: str):
        def add(_layer: nn.Module, args: tuple, y: Tensor) -> Tensor:
            factors = self._factors.get((self._run, name))
            if factors is None:
                return y
            a, b = factors
            x = args[0][:, args[0].size(1) - y.size(1) :]  # attention leaves leading positions out
            return y.baddbmm_(torch.bmm(x, a.mT), b.mT, alpha=self._scale)  # nothing else reads a product's output

        return add


def _shape(model: GPT, layer: int, name: str) -> tuple[int, int]:
    """Outputs and inputs of a place."""
    weight = model.tok_emb.weight
    if name == "head":
        return weight.size(0), weight.size(1)
    if name in ("attn", "mlp"):
        return model.config.width, model.config.width
    weight = model.blocks[layer].get_submodule(_PLACES[name]).get_parameter("weight")
    return weight.size(0), weight.size(1)


def _optimizer(row: Learning, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """One launch for all slots; those without a gradient are left out."""
    if row.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, row.lr, row.momentum, weight_decay=row.decay, fused=True)
        for parameter in parameters if row.momentum else ():
            # torch makes them at a first step, and its fused one wants all or none: slots begin to learn at any time
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return torch.optim.AdamW(parameters, row.lr, row.betas, row.eps, row.decay, fused=True)
