"""The loop: a chunk is forwarded once, charged, and its loss learned from, before the next one is forwarded.

Keys and values that later chunks see are those of the forward that charged a chunk: stale, where the weights have moved
since. No gradient reaches them.

The host never waits for the device between chunks: what it decides follows from tokens, which it knows, and charges are
fetched together once a second. Losses that are no numbers are found then.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops, saved
from ..errors import InputError, first_line
from ..foreign.models import LanguageModel, cached_forward
from ..model import GPT, PackedLinear
from ..timing import Stopwatch
from .charged import Charged, Outbox, Read, catch_up, load_cached, on_device
from .lora import Learner, Lora, Weights, restore
from .row import Learning
from .top import OnTop

_MOST = 1 << 60  # that anything of a stream counts
_COUNTED = ("done", "since", "work", "tokens")  # since: where the rows on top began


class LearningLoop:
    """Charges a stream chunk by chunk, and learns from each chunk once it is charged; runs once.

    Args:
        model: ours, or somebody else's in a `LanguageModel`; in evaluation mode, left as it was.
        row: how to learn.
        window: tokens that one attends to, >= 1.
        sinks: first tokens of the stream that stay visible, >= 0.
        bos_id: the token that starts a document.
        dtype: of the forward; the embedding's where None.
        keep_logprobs: give the distributions too.
        on_top: rows that adapt what the chunks are charged with, fresh; they begin anew where learning does.
        unlearned: with a model that keeps nothing, also run the same forwards without learning: what a token sees there
            follows from the chunks, so that no other forward is the same.

    Attributes:
        seconds: of forwarding and learning, of the same forwards without learning, and of the rows on top.

    Raises:
        InputError: a chunk longer than the window, documents that nothing starts, weights that cannot learn.
    """

    def __init__(
        self,
        model: GPT | LanguageModel,
        row: Learning,
        window: int,
        sinks: int = 0,
        bos_id: int | None = None,
        dtype: torch.dtype | None = None,
        keep_logprobs: bool = False,
        on_top: OnTop | None = None,
        unlearned: bool = True,
    ):
        check(row, model, window, bos_id)
        self.model, self.row, self.sinks, self.bos_id, self.keep_logprobs = model, row, sinks, bos_id, keep_logprobs
        self.on_top = on_top
        self.unlearned = unlearned and isinstance(model, LanguageModel) and model.stream is None
        try:
            self._cached = cached_forward(model, window, sinks, dtype, row.chunk)
            self._learner = _learner(row, model)
        except InputError as error:
            raise InputError(f"preset {row.name!r}: {error}") from None
        self._optimizer = _optimizer(row, self._learner)
        self._watch, self._outbox = Stopwatch(next(model.parameters()).device), Outbox(at_once=keep_logprobs)
        self._work = self._tokens = self._forwarded = self._since = 0
        self._done: int | None = None  # predictions before this one are charged; None before any is

    @property
    def seconds(self) -> dict[str, float]:
        phases = ("learned", "on top", *(["unlearned"] if self.unlearned else []))
        return dict.fromkeys(phases, 0.0) | self._watch.seconds

    @property
    def forwards(self) -> float:
        """Passes through the model for each token: 1 forward, 1 back, 1 more where the matrices get gradients."""
        return self._work / max(1, self._tokens)

    def run(
        self,
        read: Read,
        predictions: int | range,
        on_charged: Callable[[Charged], None],
        on_chunk: Callable[[], None] | None = None,
    ) -> None:
        """Charge and learn what is not charged yet.

        Args:
            read: tokens [start, stop) of the stream, integers.
            predictions: tokens of the stream but the first; or those of a piece of it, which learns apart: what keys it
                needs of earlier tokens are made by the weights that it starts from.
            on_charged: called with each chunk in order, about once a second with those since the last time, and however
                the run ends with what it has charged. With distributions, called behind each chunk.
            on_chunk: called behind each chunk, where `state_dict` may be saved: what is charged has been learned from.

        Raises:
            InputError: losses that are no numbers; those before them are handed to `on_charged`.
        """
        self._on_charged = on_charged
        span = range(predictions) if isinstance(predictions, int) else predictions
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        try:
            if self._done is None:
                catch_up(self._cached, read, span.start, self.model)
                self._done = self._since = span.start
            while self._done < span.stop:
                tokens = np.asarray(read(self._done, min(self._done + self.row.chunk, span.stop) + 1))
                starts = np.flatnonzero(tokens == self.bos_id).tolist() if self.bos_id is not None else []
                self._done += self._chunk(self._done, on_device(tokens, self.model), starts, span.stop)
                if self._outbox.due:
                    self._hand_out()
                if on_chunk:
                    on_chunk()
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            self._hand_out()  # which raises at losses that are no numbers

    def state_dict(self) -> dict[str, Any]:
        """All that a loop with the same arguments needs to continue from here; what is charged is handed out first."""
        self._hand_out()
        return {
            **{name: getattr(self, f"_{name}") for name in _COUNTED},
            "seconds": self.seconds,
            "cached": self._cached.state_dict(),
            "learned": self._learner.values,
            "optimizer": self._optimizer.state_dict(),
            "on_top": self.on_top and self.on_top.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], read: Read) -> None:
        """Continue from what `state_dict` returned.

        Args:
            read: see `run`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, RuntimeError: the state belongs to another loop.
        """
        for name in _COUNTED:
            if name != "done" or state[name] is not None:
                saved.whole(state[name], 0, _MOST)
            setattr(self, f"_{name}", state[name])
        saved.whole(self._since, 0, self._done or 0)
        self._watch.go_on(saved.seconds(state["seconds"]))
        load_cached(self._cached, state["cached"])
        pairs = zip(state["learned"], self._learner.values, strict=True)
        restore(self._learner.values, [saved.alike(value, own) for value, own in pairs])
        self._optimizer.load_state_dict(dict(saved.optimizer(state["optimizer"], self._optimizer)))
        if self.on_top and self._done is not None:
            device = next(self.model.parameters()).device
            self.on_top.load_state_dict(state["on_top"], read(self._since + 1, self._done + 1), device)

    def _chunk(self, start: int, tokens: Tensor, starts: list[int], predictions: int) -> int:
        """Charge predictions of tokens [n + 1], and learn from them; how many: n, or fewer where a document ends.

        Args:
            starts: places 0..n of tokens that start a document.
            predictions: the stream's, or where its piece ends.
        """
        count = len(tokens) - 1
        if self.row.scope == "document":
            if starts[:1] == [0]:
                with self._watch("learned"):
                    self._begin_document(start)
            count = next((at for at in starts if at), count)
        cut = count < len(tokens) - 1
        again = cut or self.row.steps > 1
        before: dict[str, Any] = self._cached.state_dict() if again or self.unlearned else {}
        plain: Tensor | None = None
        if self.unlearned:
            with self._watch("unlearned"), torch.no_grad():
                plain = self.model.losses(self._cached(tokens[None, :-1]), tokens[None, 1:])[0, :count]
            self._cached.load_state_dict(before)
        with self._learner.attached():
            with self._watch("learned"):
                losses, logits = self._forward(tokens)
                rows = torch.log_softmax(logits.detach()[:count], -1) if self.keep_logprobs else None
            top: Tensor | None = None
            top_rows: list[Tensor] = []
            if self.on_top:
                with self._watch("on top"):
                    # All of the chunk, for the same reason as below; what it takes in after a BOS is forgotten there.
                    top, top_rows = self.on_top.charge(logits.detach(), tokens[1:], self.keep_logprobs)
                    top, top_rows = top[:, :count], [part[:count] for part in top_rows]
            self._outbox.put(Charged(start, losses.detach()[:count], plain, rows, top, top_rows))
            self._tokens += count
            with self._watch("learned"):
                if not cut and start + count < predictions and self.row.steps:  # else nothing that is learned is used
                    self._learn(losses, tokens, before)
                    if self.row.forget and any(starts):
                        self._learner.forget(self.row.forget)
                elif cut:
                    # Nothing before a BOS may depend on it, not even by the rounding of a shorter forward: what is
                    # charged comes from the whole chunk, and what is remembered ends where the document does.
                    self._cached.load_state_dict(before)
                    self._forward(tokens[: count + 1])
                    self._since = start + count
                    if self.on_top:
                        self.on_top.reset()
        return count

    def _begin_document(self, start: int) -> None:
        self._learner.forget()
        self._optimizer.state.clear()
        self._since = start
        if self.on_top:
            self.on_top.reset()

    def _learn(self, losses: Tensor, tokens: Tensor, before: Mapping[str, Any]) -> None:
        """Take steps on the losses of a chunk; keys and values stay as they were when it was charged."""
        if not losses.requires_grad:
            raise InputError(f"preset {self.row.name!r}: the model calls none of the layers that would learn")
        after = self._cached.state_dict() if self.row.steps > 1 else None
        for step in range(self.row.steps):
            if step:
                self._cached.load_state_dict(before)
                losses, _ = self._forward(tokens)
            self._go_back(losses.mean())
            self._work += self._forwarded * (2 if self.row.what == "all" else 1)
            if self.row.clip:
                nn.utils.clip_grad_norm_(self._learner.parameters, self.row.clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
        if after:
            self._cached.load_state_dict(after)

    def _go_back(self, loss: Tensor) -> None:
        try:
            loss.backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # whatever somebody else's code makes of a gradient
            if isinstance(self.model, GPT):
                raise
            raise InputError(
                f"preset {self.row.name!r}: --model: fails at the pass back: {first_line(error)}"
            ) from error

    @torch.enable_grad()
    def _forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [n] of the predictions of tokens [n + 1] with what has been learned; logits [n, V] where needed."""
        again = getattr(self._cached, "again", None)  # of a model that keeps nothing
        self._forwarded = len(tokens) - 1 + (again(len(tokens) - 1) if again else 0)
        self._work += self._forwarded
        hidden, targets = self._cached(tokens[None, :-1]), tokens[None, 1:]
        if not (self.keep_logprobs or self.on_top):
            return self._learner.losses(self.model, hidden, targets)[0], hidden.new_empty(0)
        logits = self._learner.head(self.model, hidden)
        return ops.cross_entropy(logits, targets)[0], logits[0]

    def _hand_out(self) -> None:
        for charged in self._outbox.fetch():
            broken = (~charged.nll.isfinite()).nonzero()
            if len(broken):
                at = int(broken[0])
                raise InputError(
                    f"preset {self.row.name!r}: a loss of {float(charged.nll[at])} for the token at position "
                    f"{charged.start + at + 1}: broken weights, or lr={self.row.lr:g} is too high for them"
                )
            self._on_charged(charged)


def check(row: Learning, model: nn.Module, window: int, bos_id: int | None) -> None:
    """Raise InputError where a row cannot learn with a model."""
    where = f"preset {row.name!r}: "
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError(f"{where}packed weights pass no gradients on; leave out --weights int6")
    if row.chunk > window:
        raise InputError(f"{where}chunk={row.chunk} is longer than the window of {window} tokens")
    if (row.scope == "document" or row.forget) and bos_id is None:
        key = "forget" if row.forget else "scope=document"
        raise InputError(f"{where}{key}: expected a token that starts a document")


def _learner(row: Learning, model: nn.Module) -> Learner:
    if row.what == "lora":
        return Lora(model, row.rank, row.projections, row.alpha)
    return Weights(model, row.what == "norms")


def _optimizer(row: Learning, learner: Learner) -> torch.optim.Optimizer:
    if row.optimizer == "sgd":
        return torch.optim.SGD(learner.parameters, row.lr, row.momentum, weight_decay=row.decay, fused=True)
    return torch.optim.AdamW(learner.parameters, row.lr, row.betas, row.eps, row.decay, fused=True)
