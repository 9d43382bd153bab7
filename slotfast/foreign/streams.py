"""Models of other projects that read a stream block by block, through a cache of transformers or in their own way.

Each is called as `slotfast.stream.CachedForward` is. Keys of such a model are rotated for good when they are made, and
its positions end somewhere, so a stream of transformers starts again from position 0 at fixed places of the text: there
the last `window - 1` tokens are forwarded once more, unscored.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

_PROBE_TOKENS = 24
_PROBE_WINDOW = 5
_FOREVER = 1 << 62


class TransformersStream:
    """A causal language model of `transformers` over consecutive blocks of one stream.

    Args:
        module: in evaluation mode, with `config`.
        states: the module, or the part of it, whose output begins with what is wanted: logits, or states.
        longest: how many positions the model has.
        window: tokens that one attends to, itself among them, >= 1.
        sinks: first tokens of the stream that stay visible, >= 0.

    Attributes:
        position: tokens read so far.
        reach: earlier tokens that have to be read, from wherever, for the state of one to be right, sinks apart.

    Raises:
        InputError: too few positions, or a model that does with a cache what it does not do without.
    """

    def __init__(self, module: nn.Module, states: nn.Module, longest: int, window: int, sinks: int = 0):
        if longest < max(2 * window, window + sinks + 1):
            raise InputError(
                f"--forward stream: windows of {window} tokens need {max(2 * window, window + sinks + 1)} positions, "
                f"the model has {longest}; use --seq-len {longest // 2} or --forward windows"
            )
        self.module, self.states, self.window, self.sinks = module, states, window, sinks
        self.device = next(module.parameters()).device
        # transformers renamed the argument in 2026
        accepted = inspect.signature(states.forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"
        self.period = longest - sinks - (window - 1)  # tokens from one start at position 0 to the next
        self.reach = self.period + window - 1
        self.position = 0
        self._first = self._recent = torch.empty(1, 0, dtype=torch.int64, device=self.device)
        self._forget()

    def __call__(self, tokens: Tensor, first: int = 0) -> Tensor:
        """States, or logits, from the block's position `first` on, of the next tokens, int64 [1, T]."""
        parts = []
        for piece in self._pieces(tokens):
            if self.position and self.position % self.period == 0:
                self._start_again()
            parts.append(self._read(piece, torch.arange(self.position, self.position + piece.size(1))))
            if self.position < self.sinks:
                self._first = torch.cat([self._first, piece], 1)[:, : self.sinks]
            recent = torch.cat([self._recent, piece], 1)
            self._recent = recent[:, max(0, recent.size(1) - (self.window - 1)) :]
            self.position += piece.size(1)
        return torch.cat(parts, 1)[:, first:]

    def skip(self, position: int) -> None:
        """Skip to a later position of the stream, as if nothing before it but the sinks existed."""
        self.position, self._recent = position, self._recent[:, :0]
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """All that the next block depends on, apart from the model."""
        kept = [(layer.keys, layer.values) for layer in self._cache.layers]
        names = ("position", "_first", "_recent", "_seen", "_next")
        return {"kept": kept, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._forget()
        for layer, (keys, values) in enumerate(state["kept"]):
            self._cache.update(keys.to(self.device), values.to(self.device), layer)
        for name in ("position", "_first", "_recent", "_seen", "_next"):
            value = state[name]
            setattr(self, name, value.to(self.device) if isinstance(value, Tensor) else value)

    def _pieces(self, tokens: Tensor) -> list[Tensor]:
        """The block, cut where the model starts again."""
        cut = self.period - self.position % self.period
        return [tokens[:, :cut], *tokens[:, cut:].split(self.period, 1)] if cut < tokens.size(1) else [tokens]

    def _forget(self) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()  # without the configuration it keeps everything; what is dropped is decided here
        self._seen = torch.empty(0, dtype=torch.int64, device=self.device)  # places in the stream of what it keeps
        self._next = 0  # the next token's position, as the model counts

    @torch.no_grad()
    def _start_again(self) -> None:
        begin = self.position - self._recent.size(1)
        sinks = self._first[:, : min(self.sinks, begin)]
        places = torch.cat([torch.arange(sinks.size(1)), torch.arange(begin, self.position)])
        self._forget()
        if len(places):
            self._read(torch.cat([sinks, self._recent], 1), places)

    def _read(self, tokens: Tensor, places: Tensor) -> Tensor:
        """States of tokens int64 [1, T] that stand at these places of the stream."""
        places = places.to(self.device)
        known = torch.cat([self._seen, places])
        position = torch.arange(self._next, self._next + len(places), device=self.device)[None]
        options = {"attention_mask": self._masks(places, known), "position_ids": position, "use_cache": True}
        states = self.states(tokens, **{self._cache_name: self._cache}, **options)[0]
        stays = (known < self.sinks) | (known > known[-1] - (self.window - 1))
        for layer in self._cache.layers:
            layer.keys, layer.values = (kept.detach()[:, :, stays] for kept in (layer.keys, layer.values))
        self._seen, self._next = known[stays], self._next + len(places)
        return states

    def _masks(self, queries: Tensor, keys: Tensor) -> Tensor | dict[str, Tensor]:
        """What each query sees, [1, 1, queries, keys]; by kind of layer, where a model has several."""
        config = self.module.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        narrow = getattr(config, "sliding_window", None)
        distance = queries[:, None] - keys
        full = (distance >= 0) & ((distance < self.window) | (keys < self.sinks))
        band = full if narrow is None else (distance >= 0) & (distance < min(narrow, self.window))
        mixed = {"full_attention": full, "sliding_attention": band}
        if len(kinds) > 1:
            return {kind: self._as_called(mixed[kind]) for kind in kinds}
        only_band = kinds == {"sliding_attention"} or (narrow is not None and not hasattr(config, "layer_types"))
        return self._as_called(band if only_band else full)

    def _as_called(self, visible: Tensor) -> Tensor:
        if self.module.config._attn_implementation == "sdpa":
            return visible[None, None]
        return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -1e9)[None, None]


class OwnStream:
    """A module with `stream(tokens, state) -> (states, state)`; the module decides what a token attends to.

    Args:
        stream: of the module; the first state is None.
        sinks: 0, as the module decides which tokens stay visible too.

    Attributes:
        position: tokens read so far.

    Raises:
        InputError: sinks.
    """

    sinks, reach = 0, _FOREVER

    def __init__(self, stream: Callable[[Tensor, Any], tuple[Tensor, Any]], sinks: int = 0):
        if sinks:
            raise InputError(f"sinks {sinks}: the model's own stream(tokens, state) decides what it keeps")
        self.stream, self.position, self._state = stream, 0, None

    def __call__(self, tokens: Tensor, first: int = 0) -> Tensor:
        """States, or logits, from the block's position `first` on, of the next tokens, int64 [1, T]."""
        states, state = self.stream(tokens, self._state)
        self._state = _detached(state) if states.requires_grad else state
        self.position += tokens.size(1)
        return states[:, first:]

    def state_dict(self) -> dict[str, Any]:
        """The module's state; raises InputError where it is not made of tensors, numbers, text and containers."""
        return {"position": self.position, "state": _plain(self._state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.position, self._state = state["position"], _plain(state["state"])


class WindowStream:
    """A module that remembers nothing: before each block the rest of its window is forwarded again.

    Args:
        states: tokens int64 [1, T] to states, or logits, [1, T, ...].
        window: tokens of one forward, >= 1; longer blocks are forwarded as they are.
        sinks: 0, as nothing is kept.
        block: tokens of a block; a shorter one, as at the text's end, sees no more of what came before it than a whole
            one does, or what it is charged would tell where the text ends.

    Attributes:
        position: tokens read so far.

    Raises:
        InputError: sinks.
    """

    def __init__(self, states: Callable[[Tensor], Tensor], window: int, sinks: int = 0, block: int = 0):
        if sinks:
            raise InputError(f"sinks {sinks}: the model has no keys that could stay")
        self.states, self.window, self.block, self.position = states, window, block, 0
        self.sinks, self.reach = 0, window
        self._recent: Tensor | None = None

    def __call__(self, tokens: Tensor, first: int = 0) -> Tensor:
        """States, or logits, from the block's position `first` on, of the next tokens, int64 [1, T]."""
        known = tokens if self._recent is None else torch.cat([self._recent, tokens], 1)
        self._recent, self.position = known[:, -self.window :], self.position + tokens.size(1)
        known = known[:, -tokens.size(1) - self._before(tokens.size(1)) :]
        return self.states(known)[:, known.size(1) - tokens.size(1) + first :]

    def _before(self, count: int) -> int:
        """Earlier tokens that a block of `count` sees, at most."""
        return max(0, self.window - max(count, self.block))

    def skip(self, position: int) -> None:
        """Go on at a later position of the stream, as if nothing before it existed."""
        self.position, self._recent = position, None

    def again(self, count: int) -> int:
        """Earlier tokens that are forwarded again before the next `count`."""
        return 0 if self._recent is None else min(self._recent.size(1), self._before(count))

    def state_dict(self) -> dict[str, Any]:
        """The tokens that are forwarded again."""
        return {"position": self.position, "recent": self._recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.position, self._recent = state["position"], state["recent"]


def transformers_stream(
    module: nn.Module, states: nn.Module, longest: int, window: int, sinks: int = 0
) -> TransformersStream:
    """A stream of a model, after a trial on a few tokens that its cache does what the whole text at once does.

    Args:
        module, states, longest, window, sinks: of `TransformersStream`.

    Raises:
        InputError: too few positions; no cache, or one that the model uses in another way.
    """
    make = functools.partial(TransformersStream, module, states)
    found = make(longest, window, sinks)
    tokens = (torch.arange(_PROBE_TOKENS)[None] % module.config.vocab_size).to(found.device)
    try:
        with torch.inference_mode():
            tokens = tokens[:, : longest // 2]
            ways = [
                (states(tokens, use_cache=False)[0], make(longest, tokens.size(1))),
                (make(longest, _PROBE_WINDOW)(tokens), make(longest, _PROBE_WINDOW)),
            ]
            holds = all(
                torch.allclose(torch.cat([cached(part) for part in tokens.split(7, 1)], 1), whole, 1e-3, 1e-3)
                for whole, cached in ways
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever somebody else's code raises
        holds = False
    if not holds:
        raise InputError(
            f"--forward stream: {type(module).__name__} does not read through a cache as it reads a whole text; use "
            "--forward windows"
        )
    return found


def _detached(state: Any) -> Any:
    """A state without its history: what is learned reaches no earlier block."""
    if isinstance(state, MutableMapping):
        again = copy.copy(state)  # a defaultdict is made of more than what it holds
        for key, value in state.items():
            again[key] = _detached(value)
        return again
    if isinstance(state, (list, tuple)):
        parts = map(_detached, state)
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state.detach() if isinstance(state, Tensor) else state


def _plain(state: Any) -> Any:
    """A copy, which a module that writes into its state does not reach."""
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    if type(state) in (list, tuple):  # nor a named one, which a file read without executing anything cannot hold
        return type(state)(map(_plain, state))
    if isinstance(state, Tensor):
        return state.clone()
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise InputError(
        f"the stream's state of --model holds {type(state).__name__}, of which no copy can be kept, for --resume or to "
        "go back to; expected tensors, numbers, text, None, and lists, tuples and dictionaries of them"
    )
