"""A model that reads a stream block by block and forwards every token once.

A token attends to itself, to the `window - 1` tokens before it and to the stream's first `sinks`, through keys and
values as they were when those were forwarded. Sliding windows forward every token seq_len / stride times instead.

Positions count along the stream. A sink that has left the window stands just before the window's oldest token, so that
no distance exceeds window + sinks. With the sinks' keys rotated once, at their places 0, 1, ... in the stream, that is
the same as a query rotated at min(position, window - 1 + sinks): distances are all that rotation shows.

Source: Transformer-XL (arXiv 1901.02860) for the memory, StreamingLLM (arXiv 2309.17453) for the sinks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, saved
from .model import GPT, GPTConfig, rotary_table, rotate, single

_LOOK_BACK = 2  # tokens that smear gate and bigram hash reach back together


class CachedForward:
    """A model that reads consecutive blocks of a stream, or of several side by side, and keeps what later tokens need.

    Under `torch.enable_grad` gradients reach the weights through the block that is read, not through earlier ones.

    Args:
        model: in evaluation mode.
        window: tokens that one attends to, itself among them, >= 1; the rotary base is that of this length.
        sinks: first tokens of the stream that stay visible, >= 0.
        batch: streams side by side.
        dtype: of the computation and of what is kept; the embedding's where None.

    Attributes:
        position: tokens read so far.
    """

    def __init__(self, model: GPT, window: int, sinks: int = 0, batch: int = 1, dtype: torch.dtype | None = None):
        embedding = model.tok_emb.weight
        self.model, self.window, self.sinks = model, window, sinks
        self.dtype = dtype or embedding.dtype
        self.position = 0
        self._tokens = torch.empty(batch, 0, dtype=torch.int64, device=embedding.device)
        # A layer that runs repeatedly reads another input each time, so each run has keys and values of its own.
        self._memory = [_Memory(window - 1, sinks) for _ in model.order]

    @property
    def reach(self) -> int:
        """How many earlier tokens a token's state can depend on, sinks apart."""
        return len(self._memory) * (self.window - 1) + _LOOK_BACK

    def __call__(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Read the next tokens.

        Args:
            tokens: int [batch, T] on the model's device.
            first: of the T tokens, the first whose state is wanted.

        Returns:
            [batch, T - first, width], normalised states before the output matrix.
        """
        known = torch.cat([self._tokens, tokens.to(torch.int64)], 1)
        length = tokens.size(1)
        position = torch.arange(self.position, self.position + length, device=known.device)
        # Only where a sink lies outside the last query's window
        sinks = self.sinks if self.position + length > self.window else 0
        attend = _StreamAttention(
            self.model.config,
            self.window,
            sinks,
            position,
            lambda run, k, v: self._memory[run].take(k, v, self.position),
        )
        states = self.model.states(known, attend, self.dtype, self._tokens.size(1), first)
        self._tokens = known[:, -_LOOK_BACK:]
        self.position += length
        return states

    @property
    def steady(self) -> bool:
        """Whether all that is kept has the shapes that it will have to the end, so that `step` can read on."""
        full = all(memory.full for memory in self._memory)
        return full and self._tokens.size(1) == _LOOK_BACK and self.position >= self.window

    def step(self, tokens: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """Read the next tokens, as a function of tensors alone, whose shapes never change.

        Args:
            tokens: int64 [batch, T].
            kept: what `kept` gives.

        Returns:
            States [batch, T, width], and what `go_on` takes.
        """
        known, length = torch.cat([kept[0], tokens], 1), tokens.size(1)
        position = kept[1] + torch.arange(length, device=tokens.device)
        each = 4 if self.sinks else 2  # of a run: keys, values, and those of the sinks
        kept_now: list[Tensor] = []

        def take(run: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            keys, values, *first = kept[2 + each * run :][:each]
            keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
            kept_now.extend(_alone(x[:, length:]) for x in (keys, values))
            return keys, values, *first

        attend = _StreamAttention(self.model.config, self.window, self.sinks, position, take)
        states = self.model.states(known, attend, self.dtype, _LOOK_BACK)
        return states, _alone(known[:, -_LOOK_BACK:]), kept[1] + length, *kept_now

    def kept(self) -> list[Tensor]:
        """What `step` reads on from, where the stream is steady: tokens, the position, and keys and values of all."""
        position = torch.full((1,), self.position, device=self._tokens.device)
        return [_alone(self._tokens), position, *(part for memory in self._memory for part in memory.kept())]

    def go_on(self, kept: Sequence[Tensor], count: int) -> None:
        """Take what `step` gave behind the states of `count` tokens."""
        self.position, self._tokens = self.position + count, kept[0]
        for run, memory in enumerate(self._memory):
            memory.replace(*kept[2 + 2 * run :][:2])

    def skip(self, position: int) -> None:
        """Skip to a later position, as if nothing before it but the sinks existed."""
        self.position, self._tokens = position, self._tokens[:, :0]
        for memory in self._memory:
            memory.forget()

    def state_dict(self) -> dict[str, Any]:
        """All that the next block depends on, apart from the model."""
        memory = [part.state_dict() for part in self._memory]
        return {"position": self.position, "tokens": self._tokens, "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        device = self._tokens.device
        self.position = saved.whole(state["position"], 0, 1 << 60)
        batch = self._tokens.size(0)
        self._tokens = saved.tensor(state["tokens"], torch.int64, batch, range(_LOOK_BACK + 1)).to(device)
        for memory, kept in zip(self._memory, state["memory"], strict=True):
            memory.load_state_dict(kept, self)


def _alone(x: Tensor) -> Tensor:
    """A copy that keeps nothing else in memory, and whose strides are those of its shape: one form for a compiler."""
    return x.clone(memory_format=torch.contiguous_format)


class _StreamAttention:
    """One block's attention; see `slotfast.model.Attend`.

    Args:
        config: of the model.
        window: of the stream.
        sinks: first tokens of the stream, where any of them lies outside a query's window; else 0.
        position: int64 [T], of the block's tokens.
        take: takes in keys and values of a run; gives those that its queries see, then those of the sinks, if any.
    """

    def __init__(
        self,
        config: GPTConfig,
        window: int,
        sinks: int,
        position: Tensor,
        take: Callable[[int, Tensor, Tensor], tuple[Tensor, ...]],
    ):
        self.window, self.sinks, self.position, self.take = window, sinks > 0, position[:1], take
        self.rope = rotary_table(window, config, position)
        self.angles = single(self.rope)
        if self.sinks:
            seen_from = position.clamp(max=window - 1 + sinks)
            self.sink_rope = rotary_table(window, config, seen_from)
            self.back_to_sinks = rotary_table(window, config, seen_from - position)  # from `rope` on

    def __call__(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        first = k.size(1) - q.size(1)
        of_sinks = rotate(q, *(table[first:] for table in self.sink_rope)) if self.sinks else None
        q = rotate(q, *(table[first:] for table in self.rope))
        return self._meet(run, q, rotate(k, *self.rope), v, exclude_own, of_sinks)

    def rotated(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool) -> Tensor:
        """See `slotfast.model.AttendRotated`."""
        first = k.size(1) - q.size(1)
        of_sinks = rotate(q, *(table[first:] for table in self.back_to_sinks)) if self.sinks else None
        return self._meet(run, q, k, v, exclude_own, of_sinks)

    def _meet(self, run: int, q: Tensor, k: Tensor, v: Tensor, exclude_own: bool, of_sinks: Tensor | None) -> Tensor:
        keys, values, *first_ones = self.take(run, k, v)
        sinks = None if of_sinks is None else (of_sinks, first_ones[0], first_ones[1])
        position = (self.position + k.size(1) - q.size(1)).expand(q.size(0))
        return ops.banded_attention(q, keys, values, self.window, position, sinks, exclude_own, True)


class _Memory:
    """Keys and values of one run of a layer: of the last `keep` tokens and of the stream's first `sinks`."""

    def __init__(self, keep: int, sinks: int):
        self.keep, self.sinks = keep, sinks
        self.recent = _Recent(keep), _Recent(keep)
        self.first: tuple[Tensor, Tensor] | None = None

    def take(self, k: Tensor, v: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take a block in; the keys and values that its queries see, then those of the sinks.

        Args:
            k, v: [batch, T, kv_heads, head_width], k rotated.
            position: of the first of them.
        """
        first = (k[:, :0], v[:, :0]) if self.first is None else self.first
        if position < self.sinks:
            missing = self.sinks - position
            first = torch.cat([first[0], k[:, :missing]], 1), torch.cat([first[1], v[:, :missing]], 1)
            self.first = first[0].detach().clone(), first[1].detach().clone()
        return self.recent[0].extend(k), self.recent[1].extend(v), *first

    @property
    def full(self) -> bool:
        first = 0 if self.first is None else self.first[0].size(1)
        return first == self.sinks and all(recent.full for recent in self.recent)

    def kept(self) -> list[Tensor]:
        """Keys and values of the last `keep` tokens, and of the first ones where there are sinks; all contiguous."""
        return [*(recent.alone() for recent in self.recent), *(self.first or ())]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Keep these of the last `keep` tokens from here on."""
        for recent, new in zip(self.recent, (keys, values), strict=True):
            recent.buffer, recent.end = new, self.keep

    def forget(self) -> None:
        self.recent = _Recent(self.keep), _Recent(self.keep)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": [recent.last() for recent in self.recent], "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any], of: "CachedForward") -> None:
        """Continue in a stream that is at its position already."""
        self.forget()
        batch, device, config = of._tokens.size(0), of._tokens.device, of.model.config
        heads = config.kv_heads, config.head_width
        keys, values = state["recent"]
        if keys is not None:
            keys = saved.tensor(keys, of.dtype, batch, range(self.keep + 1), *heads)
            for recent, kept in zip(self.recent, (keys, saved.alike(values, keys)), strict=True):
                recent.extend(kept.to(device))
        if first := min(self.sinks, of.position):
            keys, values = (saved.tensor(kept, of.dtype, batch, first, *heads) for kept in state["first"])
            self.first = keys.to(device), values.to(device)
        else:
            self.first = None


class _Recent:
    """The last `keep` places of a growing tensor, in a buffer with room to spare, so that a step copies little."""

    def __init__(self, keep: int):
        self.keep, self.end = keep, 0
        self.buffer: Tensor | None = None

    def last(self) -> Tensor | None:
        """What is kept, [batch, up to keep, ...]; None at the start."""
        return None if self.buffer is None else self.buffer[:, max(0, self.end - self.keep) : self.end]

    @property
    def full(self) -> bool:
        return self.buffer is not None and self.end >= self.keep

    def alone(self) -> Tensor:
        """What is kept, where that is all that can be, in a buffer without room."""
        if self.buffer is None:
            raise ValueError("nothing is kept")
        if self.buffer.size(1) > self.keep:
            self.buffer, self.end = _alone(self.buffer[:, self.end - self.keep : self.end]), self.keep
        return self.buffer

    def extend(self, new: Tensor) -> Tensor:
        """What was kept, then the new [batch, T, ...], which carries its gradient."""
        past, count = self.last(), new.size(1)
        if past is None:
            past = new[:, :0].detach()
        grown = torch.cat([past, new], 1) if new.requires_grad else None
        if self.buffer is None or self.end + count > self.buffer.size(1):
            room = self.keep + max(count, self.keep)
            self.buffer = new.new_empty(new.size(0), room, *new.shape[2:])
            self.buffer[:, : past.size(1)] = past
            self.end = past.size(1)
        begin, self.end = self.end, self.end + count
        self.buffer[:, begin : self.end] = new.detach()
        return self.buffer[:, begin - past.size(1) : self.end] if grown is None else grown
