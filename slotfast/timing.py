"""Seconds by phase, without making the host wait for a GPU."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

_PENDING = 4096  # pairs of events that may wait to be read


class Stopwatch:
    """Adds up the time of pieces of work.

    Args:
        device: that the work runs on; a GPU's time is taken by events on its stream.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Within, time counts for this phase."""
        if not self._on_gpu:
            since = time.perf_counter()
            yield
            self._add(phase, time.perf_counter() - since)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((phase, begin, end))
        if len(self._events) >= _PENDING:
            self._read()

    @property
    def seconds(self) -> dict[str, float]:
        """By phase; waits for the work to end."""
        self._read()
        return dict(self._seconds)

    def go_on(self, seconds: Mapping[str, float]) -> None:
        """Count from these on."""
        self._events.clear()
        self._seconds = dict(seconds)

    def _read(self) -> None:
        for phase, begin, end in self._events:
            end.synchronize()
            self._add(phase, begin.elapsed_time(end) / 1000)
        self._events.clear()

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
