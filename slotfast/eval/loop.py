"""One sliding-window pass: every token scored once, plain and adapted, out of the same forward."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..data import ByteTable, TokenStream
from ..errors import InputError
from ..ops import Backend
from ..score import Meter
from ..slot import Adapter, Adjusted, WindowBatch, first_position
from ..ttt import ScoreFirst
from ..windows import Plan, Window


@dataclass
class Pass:
    """What one sliding-window pass measured.

    Args:
        meter: sums by document; row 0 is the unadapted model, then one row for each adapter.
        windows: scored on this rank.
        seconds: by phase.
    """

    meter: Meter
    windows: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "adapt": 0.0, "score": 0.0})


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


def sliding_pass(
    model: nn.Module,
    stream: TokenStream,
    plan: Plan,
    adapters: Sequence[Adapter],
    byte_table: ByteTable,
    bos_id: int,
    *,
    batch_windows: int,
    adapt_windows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    backend: Backend = "auto",
    training: ScoreFirst | None = None,
    keep_logprobs: bool = False,
    on_scored: Callable[[Scored], None] | None = None,
    on_windows: Callable[[int], None] | None = None,
) -> Pass:
    """Score every token of a rank's windows once, with and without each adaptation, from one forward pass.

    Args:
        model: has `hidden(tokens, dtype)` and `head(hidden)`; on `device`.
        stream: all tokens; position 0 is scored by nobody.
        plan: windows over the stream.
        adapters: fresh, in the order of the result's rows 1, 2, ...
        byte_table: bytes of each token.
        bos_id: the token that starts a document.
        batch_windows: windows of one forward; short batches are padded to it, so that shapes never change.
        adapt_windows: windows that are adapted at once, a multiple of batch_windows, which is the default.
        dtype, device: of the forward.
        rank, world: this process among all; adapters that carry state replay the windows before their first.
        backend: of the scoring.
        training: trains the model on what has been scored, chunk by chunk; the model is changed.
        keep_logprobs: give on_scored the distributions too.
        on_scored: called with newly scored tokens.
        on_windows: called with the number of windows that a forward finished.

    Raises:
        InputError: the model gives NaN or infinite losses.
    """
    headless = int(len(stream) > 0 and int(stream.read(0, 1)[0]) != bos_id)  # text before the first BOS is a document
    result = Pass(Meter(["none", *(adapter.row.name for adapter in adapters)], stream.count(bos_id) + headless))
    clock = _Clock(result.seconds, device)
    forward = _Forward(model, stream, plan, adapters, batch_windows, dtype, device, backend)
    adapt_windows = adapt_windows or batch_windows
    why = "broken weights" if training is None else "broken weights, or --ttt-lr is too high for them"

    def pieces(windows: range) -> Iterator[range]:
        # all positions of the stream's first window are scored: it would make a large group's tensors long
        first = windows[:batch_windows] if windows.start == 0 else windows[:0]
        rest = windows[len(first) :]
        return filter(len, (first, *(rest[i : i + adapt_windows] for i in range(0, len(rest), adapt_windows))))

    def replay(windows: range) -> None:
        for piece in pieces(windows):
            batch = forward(piece)
            clock.lap("forward")
            for adapter in adapters:
                adapter.replay(batch)
            clock.lap("adapt")

    def score(windows: range) -> None:
        document = None
        for piece in pieces(windows):
            batch = forward(piece, on_windows)
            clock.lap("forward")
            scores, logprobs = [], []
            for adapter in (None, *adapters):
                adjusted = adapter.step(batch, keep_logprobs) if adapter else Adjusted(batch)
                scores.append(adjusted.nll())
                if keep_logprobs:
                    logprobs.append(adjusted.logprobs())
                clock.lap("adapt" if adapter else "score")
            start = plan[piece.start].start + plan[piece.start].context_end
            kept = torch.stack(logprobs) if logprobs else None
            new = _scored(stream, start, torch.stack(scores), kept, byte_table, result.meter.rows, why)
            if document is None:
                document = stream.count(bos_id, start + 1) - 1 + headless
            documents = document + np.cumsum(new.token == bos_id)
            document = int(documents[-1])
            result.meter.add(documents, new.n_bytes, new.nll)
            result.windows += len(piece)
            if on_scored:
                on_scored(new)
            clock.lap("score")

    with torch.no_grad():
        if training is None:
            owned = plan.owned(rank, world)
            burn_in = max((adapter.burn_in(plan.stride) for adapter in adapters), default=0)
            replay(range(max(0, owned.start - burn_in), owned.start))
            score(owned)
        else:
            for chunk, windows in enumerate(training.chunks(plan)):
                score(windows[rank * len(windows) // world : (rank + 1) * len(windows) // world])
                training.train(model, stream, plan, chunk, rank=rank, world=world, dtype=dtype, device=device)
                clock.lap("train")
    return result


class _Forward:
    """The model over consecutive windows: from their numbers to a batch that holds what the adapters need."""

    def __init__(
        self,
        model: nn.Module,
        stream: TokenStream,
        plan: Plan,
        adapters: Sequence[Adapter],
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: Backend,
    ):
        self.model, self.stream, self.plan, self.rows = model, stream, plan, rows
        self.dtype, self.device, self.backend = dtype, device, backend
        self.keep_hidden = any(adapter.row.needs_hidden for adapter in adapters)
        self.first_needed = min(
            (first_position(adapter.row, plan.seq_len, plan.stride) for adapter in adapters),
            default=plan.seq_len - plan.stride,
        )

    def __call__(self, indices: range, on_windows: Callable[[int], None] | None = None) -> WindowBatch:
        cut = self.first_needed if indices.start else 0  # the stream's first window scores all of its positions
        parts: list[tuple[torch.Tensor, ...]] = []
        for first in range(0, len(indices), self.rows):
            windows = [self.plan[index] for index in indices[first : first + self.rows]]
            tokens = _gather(self.stream, self.plan, windows, self.rows)
            hidden = self.model.hidden(tokens[:, :-1].to(self.device), self.dtype)[:, cut:]
            ends = [[end - cut for end in (w.context_end, w.scored_end)] for w in windows]
            ends = torch.tensor(ends + [[0, 0]] * (self.rows - len(ends)), dtype=torch.int64)
            kept = (hidden,) if self.keep_hidden else ()
            parts.append((self.model.head(hidden), *(t.to(self.device) for t in (tokens[:, 1 + cut :], ends)), *kept))
            if on_windows:
                on_windows(len(windows))
        columns = parts[0] if len(parts) == 1 else [torch.cat(column) for column in zip(*parts, strict=True)]
        logits, targets, ends, *hidden = columns
        return WindowBatch(logits, targets, ends[:, 0], ends[:, 1], self.backend, *hidden, head=self.model.head)


def _gather(stream: TokenStream, plan: Plan, windows: Sequence[Window], rows: int) -> torch.Tensor:
    """Tokens int64 [rows, seq_len + 1] of consecutive windows, zero behind the stream's end and in unused rows."""
    tokens = np.zeros((rows, plan.seq_len + 1), np.int64)
    first = windows[0].start
    span = stream.read(first, windows[-1].start + plan.seq_len + 1)
    for row, window in zip(tokens, windows, strict=False):
        piece = span[window.start - first :][: plan.seq_len + 1]
        row[: len(piece)] = piece
    return torch.from_numpy(tokens)


def _scored(
    stream: TokenStream,
    start: int,
    nll: torch.Tensor,
    logprobs: torch.Tensor | None,
    byte_table: ByteTable,
    rows: Sequence[str],
    why: str,
) -> Scored:
    """The tokens behind predictions start, start + 1, ... with their losses [rows, n]; raises on NaN."""
    values = nll.cpu().numpy()
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"the model gives a loss of {values[row, column]} for the token at position {start + 1 + column}"
            f" (preset {rows[row]!r}): {why}"
        )
    tokens = stream.read(start, start + values.shape[1] + 1)
    position = np.arange(start + 1, start + len(tokens))
    return Scored(position, tokens[1:], byte_table.count(tokens[1:], tokens[:-1]), values, logprobs)


class _Clock:
    """Adds the time since the last lap to one of several sums."""

    def __init__(self, seconds: dict[str, float], device: torch.device | str):
        self.seconds, self.cuda = seconds, torch.device(device).type == "cuda"
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now
