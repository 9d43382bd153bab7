"""A model that reads a stream block by block and forwards every token once.

A token attends to itself, to the `window - 1` tokens before it and to the stream's first `sinks`, through keys and
values as they were when those were forwarded. Sliding windows forward every token seq_len / stride times instead.

Positions count along the stream. A sink that has left the window stands just before the window's oldest token, so that
no distance exceeds window + sinks. With the sinks' keys rotated once, at their places 0, 1, ... in the stream, that is
the same as a query rotated at min(position, window - 1 + sinks): distances are all that rotation shows.

Source: Transformer-XL (arXiv 1901.02860) for the memory, StreamingLLM (arXiv 2309.17453) for the sinks.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops
from .model import GPT, rotary_table, rotate, single

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
        attend = _StreamAttention(self, tokens.size(1))
        states = self.model.states(known, attend, self.dtype, self._tokens.size(1), first)
        self._tokens = known[:, -_LOOK_BACK:]
        self.position += tokens.size(1)
        return states

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
        self.position, self._tokens = state["position"], state["tokens"].to(device)
        for memory, saved in zip(self._memory, state["memory"], strict=True):
            memory.load_state_dict(saved, device)


class _StreamAttention:
    """One block's attention; see `slotfast.model.Attend`."""

    def __init__(self, stream: CachedForward, length: int):
        self.stream = stream
        device = stream._tokens.device
        position = torch.arange(stream.position, stream.position + length, device=device)
        config, window = stream.model.config, stream.window
        self.rope = rotary_table(window, config, position)
        self.angles = single(self.rope)
        # Only where a sink lies outside the last query's window
        self.sinks = stream.sinks > 0 and stream.position + length > window
        if self.sinks:
            seen_from = position.clamp(max=window - 1 + stream.sinks)
            self.sink_rope = rotary_table(window, config, seen_from)
            self.back_to_sinks = rotary_table(window, config, seen_from - position)  # from `rope` on
        self.position = position[:1].expand(stream._tokens.size(0))

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
        keys, values, *first_ones = self.stream._memory[run].take(k, v, self.stream.position)
        sinks = None if of_sinks is None else (of_sinks, first_ones[0], first_ones[1])
        position = self.position + k.size(1) - q.size(1)
        return ops.banded_attention(q, keys, values, self.stream.window, position, sinks, exclude_own)


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

    def forget(self) -> None:
        self.recent = _Recent(self.keep), _Recent(self.keep)

    def state_dict(self) -> dict[str, Any]:
        return {"recent": [recent.last() for recent in self.recent], "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.forget()
        for recent, saved in zip(self.recent, state["recent"], strict=True):
            if saved is not None:
                recent.extend(saved.to(device))
        self.first = state["first"] and tuple(x.to(device) for x in state["first"])


class _Recent:
    """The last `keep` places of a growing tensor, in a buffer with room to spare, so that a step copies little."""

    def __init__(self, keep: int):
        self.keep, self.end = keep, 0
        self.buffer: Tensor | None = None

    def last(self) -> Tensor | None:
        """What is kept, [batch, up to keep, ...]; None at the start."""
        return None if self.buffer is None else self.buffer[:, max(0, self.end - self.keep) : self.end]

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
