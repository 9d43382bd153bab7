"""One pass over a stream's windows: every token scored once, plain and adapted, out of the same forward."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from ..compiled import Compiled
from ..data import Text
from ..errors import InputError
from ..model import CausalModel
from ..saved import whole
from ..score import Meter
from ..slot import Adapter, Adjusted
from ..ttt import ScoreFirst
from ..windows import Plan
from ..worker import ALONE, Worker
from .forward import Forward, StreamForward, Streaming, WindowForward

PIECES = 200


@dataclass(frozen=True)
class Scored:
    """Newly scored tokens, in stream order.

    Args:
        position: int64 [n], of each token in the stream.
        token: int64 [n].
        n_bytes: int64 [n].
        nll: float [rows, n], nats.
        logprobs: float [rows, n, V], the distributions that nll was taken from; None unless asked for.
    """

    position: np.ndarray
    token: np.ndarray
    n_bytes: np.ndarray
    nll: np.ndarray
    logprobs: torch.Tensor | None = None


class SlidingPass:
    """One pass over a rank's windows: every token scored once, with and without each adaptation, from one forward.

    Args:
        model: has `hidden(tokens, dtype)` and `head(hidden)`; on the worker's device.
        text: what is scored; the token at position 0 is not, as nothing predicts it.
        plan: windows over the stream.
        adapters: fresh, in the order of the result's rows 1, 2, ...; row 0 is the unadapted model.
        streaming: every token is forwarded once; None: every window is forwarded for itself.
        batch_windows: windows of one forward; short batches are padded to it, so that shapes never change. In a stream,
            windows of one batch.
        adapt_windows: windows that are adapted at once, a multiple of batch_windows, which is the default.
        worker: this process; adapters that carry state replay the windows before its first.
        training: trains the model on what has been scored, chunk by chunk; the model is changed. Needs windows: blocks
            of a stream are forwarded ahead of what is scored.
        keep_logprobs: give `on_scored` the distributions too.

    Attributes:
        meter: sums by document.
        along: sums by piece of the stream, `PIECES` of equal length.
        windows: scored on this rank.
        chunks: scored and trained on, by all ranks.
        seconds: by phase.
        row_seconds: of each row's adaptation; 0 of the unadapted model.
    """

    def __init__(
        self,
        model: CausalModel,
        text: Text,
        plan: Plan,
        adapters: Sequence[Adapter],
        *,
        batch_windows: int,
        adapt_windows: int | None = None,
        streaming: Streaming | None = None,
        worker: Worker = ALONE,
        training: ScoreFirst | None = None,
        keep_logprobs: bool = False,
    ):
        self.model, self.text, self.plan, self.adapters = model, text, plan, adapters
        self.batch_windows, self.adapt_windows = batch_windows, adapt_windows or batch_windows
        self.worker, self.training, self.keep_logprobs = worker, training, keep_logprobs
        rows = ["none", *(adapter.row.name for adapter in adapters)]
        self.meter = Meter(rows, text.documents)
        self.along = Meter(rows, PIECES)
        self.windows = self.chunks = 0
        self.seconds = {"forward": 0.0, "adapt": 0.0, "score": 0.0}
        self.row_seconds = [0.0] * len(rows)
        # Trained together, every rank has a share of each chunk
        self._owned = plan.owned(worker.rank, worker.world) if training is None else range(len(plan))
        burn_in = max((adapter.burn_in(plan.stride) for adapter in adapters), default=0)
        self._first = max(0, self._owned.start - burn_in)  # what the adapters carry begins with this window
        common = (model, text.stream, plan, adapters, worker)
        self._forward: Forward = (
            StreamForward(*common, self._first, streaming, keep_logprobs)
            if streaming
            else WindowForward(*common, batch_windows, keep_logprobs)
        )
        self._done: int | None = None  # windows before this one are scored; None before any is

    @property
    def compiled(self) -> Compiled:
        """The forward of a whole batch or block, as it ran."""
        return self._forward.compiled

    @torch.no_grad()
    def run(
        self,
        on_scored: Callable[[Scored], None] | None = None,
        on_windows: Callable[[int], None] | None = None,
        on_piece: Callable[[], None] | None = None,
    ) -> Self:
        """Score what is not scored yet.

        Args:
            on_scored: called with newly scored tokens.
            on_windows: called with the number of windows that a forward finished.
            on_piece: called where `state_dict` may be saved: the sums hold just what `on_scored` was given. With
                training on several ranks that is behind each chunk, where all of them call it.

        Returns:
            This pass, done.

        Raises:
            InputError: the model gives NaN or infinite losses.
        """
        clock = _Clock(self.seconds, self.worker.on_gpu)
        if self.training is None:
            if self._done is None:
                self._replay(range(self._first, self._owned.start), clock)
            self._score(self._owned, clock, on_scored, on_windows, on_piece)
            return self
        rank, world = self.worker.rank, self.worker.world
        for windows in self.training.chunks(self.plan)[self.chunks :]:
            mine = windows[rank * len(windows) // world : (rank + 1) * len(windows) // world]
            self._score(mine, clock, on_scored, on_windows, on_piece if world == 1 else None)
            self.training.train(self.model, self.text.stream, self.plan, self.chunks, self.worker)
            self.chunks += 1
            clock.lap("train")
            if world > 1 and on_piece:
                on_piece()
                clock.lap("save")
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that a pass with the same arguments needs to continue from here."""
        return {
            "done": self._done,
            "windows": self.windows,
            "chunks": self.chunks,
            "seconds": dict(self.seconds),
            "row_seconds": list(self.row_seconds),
            "meter": self.meter.state_dict(),
            "along": self.along.state_dict(),
            "forward": self._forward.state_dict(),
            "adapters": [adapter.state_dict() for adapter in self.adapters],
            "training": self.training.state_dict(self.model) if self.training else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, RuntimeError: the state belongs to another pass.
        """
        owned, done = self._owned, state["done"]
        if done is not None and not owned.start < done <= owned.stop:
            raise ValueError(f"{done} windows are done: expected more than {owned.start}, at most {owned.stop}")
        self._done, self.windows = done, state["windows"]
        self.chunks = whole(state["chunks"], 0, len(self.training.chunks(self.plan)) if self.training else 0)
        self.seconds.update(state["seconds"])
        self.row_seconds = list(state["row_seconds"])
        self.meter.load_state_dict(state["meter"])
        self.along.load_state_dict(state["along"])
        self._forward.load_state_dict(state["forward"])
        if self.training:
            self.training.load_state_dict(state["training"], self.model)
        if done is None:  # this rank has had no window yet
            return
        begin, end = self.plan[self._first], self.plan[done - 1]
        past = self.text.stream.read(begin.start + begin.context_end + 1, end.start + end.scored_end + 1)
        for adapter, saved in zip(self.adapters, state["adapters"], strict=True):
            adapter.load_state_dict(saved, past, self.worker.device)

    def _pieces(self, windows: range) -> Iterator[range]:
        # the stream's first window scores all of its positions, which would make the tensors of a large group long
        first = windows[: self.batch_windows] if windows.start == 0 else windows[:0]
        rest, step = windows[len(first) :], self.adapt_windows
        return filter(len, (first, *(rest[i : i + step] for i in range(0, len(rest), step))))

    def _replay(self, windows: range, clock: "_Clock") -> None:
        for piece in self._pieces(windows):
            batch = self._forward(piece)
            clock.lap("forward")
            for row, adapter in enumerate(self.adapters, 1):
                adapter.replay(batch)
                self.row_seconds[row] += clock.lap("adapt")

    def _score(
        self,
        windows: range,
        clock: "_Clock",
        on_scored: Callable[[Scored], None] | None,
        on_windows: Callable[[int], None] | None,
        on_piece: Callable[[], None] | None,
    ) -> None:
        document = None
        for piece in self._pieces(windows):
            if self._done is not None and piece.start < self._done:
                continue
            batch = self._forward(piece, on_windows)
            clock.lap("forward")
            scores, logprobs = [], []
            for row, adapter in enumerate((None, *self.adapters)):
                adjusted = adapter.step(batch, self.keep_logprobs) if adapter else Adjusted(batch)
                scores.append(adjusted.nll())
                if self.keep_logprobs:
                    logprobs.append(adjusted.logprobs())
                spent = clock.lap("adapt" if adapter else "score")
                self.row_seconds[row] += spent if adapter else 0.0
            start = self.plan[piece.start].start + self.plan[piece.start].context_end
            new = self._scored(start, torch.stack(scores), torch.stack(logprobs) if logprobs else None)
            if document is None:
                document = self.text.documents_before(start + 1) - 1
            documents = document + np.cumsum(new.token == self.text.bos_id)
            document = int(documents[-1])
            self.meter.add(documents, new.n_bytes, new.nll)
            self.along.add(new.position * PIECES // len(self.text.stream), new.n_bytes, new.nll)
            self.windows += len(piece)
            self._done = piece.stop
            if on_scored:
                on_scored(new)
            clock.lap("score")
            if on_piece:
                on_piece()
                clock.lap("save")

    def _scored(self, start: int, nll: torch.Tensor, logprobs: torch.Tensor | None) -> Scored:
        """The tokens that predictions start, start + 1, ... are of, with their losses [rows, n]; raises on NaN."""
        values = nll.cpu().numpy()
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            why = "broken weights" if self.training is None else "broken weights, or lr is too high for them"
            raise InputError(
                f"the model gives a loss of {values[row, column]} for the token at position {start + 1 + column}"
                f" (preset {self.meter.rows[row]!r}): {why}"
            )
        tokens = self.text.stream.read(start, start + values.shape[1] + 1)
        position = np.arange(start + 1, start + len(tokens))
        return Scored(position, tokens[1:], self.text.bytes_of(tokens), values, logprobs)


class _Clock:
    """Adds the time since the last lap to one of several sums."""

    def __init__(self, seconds: dict[str, float], on_gpu: bool):
        self.seconds, self.on_gpu = seconds, on_gpu
        self.last = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Seconds since the last lap, which count towards a phase."""
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        spent, self.last = now - self.last, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        return spent
