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
from ..slot import Adapter, WindowBatch
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
    """

    position: np.ndarray
    token: np.ndarray
    n_bytes: np.ndarray
    nll: np.ndarray


def sliding_pass(
    model: nn.Module,
    stream: TokenStream,
    plan: Plan,
    adapters: Sequence[Adapter],
    byte_table: ByteTable,
    bos_id: int,
    *,
    batch_windows: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    backend: Backend = "auto",
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
        dtype, device: of the forward.
        rank, world: this process among all; adapters that carry state replay the windows before their first.
        backend: of the scoring.
        on_scored: called with every batch's tokens.
        on_windows: called with the number of windows that a batch finished.

    Raises:
        InputError: the model gives NaN or infinite losses.
    """
    owned = plan.owned(rank, world)
    burn_in = max((adapter.burn_in(plan.stride) for adapter in adapters), default=0)
    needed = min(
        (adapter.first_position(plan.seq_len, plan.stride) for adapter in adapters),
        default=plan.seq_len - plan.stride,
    )
    headless = int(len(stream) > 0 and int(stream.read(0, 1)[0]) != bos_id)  # text before the first BOS is a document
    result = Pass(Meter(["none", *(adapter.row.name for adapter in adapters)], stream.count(bos_id) + headless))
    clock = _Clock(result.seconds, device)
    document = None
    # A batch holds either windows that are replayed for the adapters' state, or windows that are scored.
    replayed = range(max(0, owned.start - burn_in), owned.start)
    for indices in (*_batches(replayed, batch_windows), *_batches(owned, batch_windows)):
        windows = [plan[index] for index in indices]
        cut = needed if indices.start else 0  # the stream's first window scores all of its positions
        tokens = _gather(stream, plan, windows, batch_windows)
        with torch.inference_mode():
            hidden = model.hidden(tokens[:, :-1].to(device), dtype)
            batch = WindowBatch(
                model.head(hidden[:, cut:]),
                tokens[:, 1 + cut :].to(device),
                _padded([window.context_end - cut for window in windows], batch_windows).to(device),
                _padded([window.scored_end - cut for window in windows], batch_windows).to(device),
                backend,
            )
            clock.lap("forward")
            if indices.start < owned.start:
                for adapter in adapters:
                    adapter.replay(batch)
                clock.lap("adapt")
                continue
            nll = [batch.nll()]
            clock.lap("score")
            nll += [adapter.step(batch) for adapter in adapters]
            clock.lap("adapt")
        position = torch.arange(batch.first_scored, batch.logits.size(1), device=device)
        scored = (position >= batch.context_end[:, None]) & (position < batch.scored_end[:, None])
        start = windows[0].start + windows[0].context_end
        new = _scored(stream, start, torch.stack([row[scored] for row in nll]), byte_table, result.meter.rows)
        if document is None:
            document = stream.count(bos_id, start + 1) - 1 + headless
        documents = document + np.cumsum(new.token == bos_id)
        document = int(documents[-1])
        result.meter.add(documents, new.n_bytes, new.nll)
        result.windows += len(windows)
        if on_scored:
            on_scored(new)
        if on_windows:
            on_windows(len(windows))
        clock.lap("score")
    return result


def _batches(windows: range, size: int) -> Iterator[range]:
    return (windows[i : i + size] for i in range(0, len(windows), size))


def _gather(stream: TokenStream, plan: Plan, windows: Sequence[Window], rows: int) -> torch.Tensor:
    """Tokens int64 [rows, seq_len + 1] of consecutive windows, zero behind the stream's end and in unused rows."""
    tokens = np.zeros((rows, plan.seq_len + 1), np.int64)
    first = windows[0].start
    span = stream.read(first, windows[-1].start + plan.seq_len + 1)
    for row, window in zip(tokens, windows, strict=False):
        piece = span[window.start - first :][: plan.seq_len + 1]
        row[: len(piece)] = piece
    return torch.from_numpy(tokens)


def _padded(ends: list[int], rows: int) -> torch.Tensor:
    return torch.tensor(ends + [0] * (rows - len(ends)), dtype=torch.int64)


def _scored(stream: TokenStream, start: int, nll: torch.Tensor, byte_table: ByteTable, rows: Sequence[str]) -> Scored:
    """The tokens behind predictions start, start + 1, ... with their losses [rows, n]; raises on NaN."""
    values = nll.cpu().numpy()
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise InputError(
            f"the model gives a loss of {values[row, column]} for the token at position {start + 1 + column}"
            f" (preset {rows[row]!r}): broken weights"
        )
    tokens = stream.read(start, start + values.shape[1] + 1)
    position = np.arange(start + 1, start + len(tokens))
    return Scored(position, tokens[1:], byte_table.count(tokens[1:], tokens[:-1]), values)


class _Clock:
    """Adds the time since the last lap to one of several sums."""

    def __init__(self, seconds: dict[str, float], device: torch.device | str):
        self.seconds, self.cuda = seconds, torch.device(device).type == "cuda"
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now
