"""Timing, so that both sides of a ratio are timed alike.

A launch that takes a GPU less than 100 microseconds takes the host longer: such calls are timed as the replay of a CUDA
graph of 200 of them, whoever makes them. What takes longer is timed by events, the cache cleared before each call.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

SMALL_MS = 0.1
GRAPH_CALLS = 200


def spread(times_ms: list[float]) -> dict:
    """Median and range of repeated measurements."""
    return {
        "median_ms": statistics.median(times_ms),
        "least_ms": min(times_ms),
        "most_ms": max(times_ms),
        "repeats": len(times_ms),
    }


def measure(
    function: Callable[[], object],
    device: torch.device | str,
    *,
    repeats: int | None = None,
    seconds: float = 0.2,
    small: bool = False,
    calls: int = GRAPH_CALLS,
) -> list[float]:
    """Times of calls in milliseconds, after a warm-up: on the device on a GPU, on the wall clock elsewhere.

    Args:
        repeats: calls to time; None: as many as fill `seconds`, three at least.
        small: on a GPU, means over the calls of a graph. For every contender what `is_small` says of one of them.
        calls: of one graph; as many as there are inputs to take turns with, where they are to be cold.
    """
    if torch.device(device).type == "cuda":
        if small:
            return replayed(function, max(calls, GRAPH_CALLS), seconds)
        if repeats is None:
            from triton.testing import do_bench  # clears the L2 cache before each call

            return do_bench(function, warmup=int(250 * seconds), rep=int(1000 * seconds), return_mode="all")
        function()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in marks:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]
    function()
    times, begun = [], time.perf_counter()
    gc.collect()
    while len(times) < (repeats or 3) or (repeats is None and time.perf_counter() - begun < seconds):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return times


def is_small(function: Callable[[], object], device: torch.device | str) -> bool:
    """Whether a call takes the GPU less than SMALL_MS. Read off a graph: on the host's clock everything is slow.

    False on a CPU, and for what no graph can hold.
    """
    if torch.device(device).type != "cuda":
        return False
    try:
        return min(replayed(function, 3, 0.0)) < SMALL_MS
    except RuntimeError:  # it waits for the device, say
        torch.cuda.synchronize()
        return False


def replayed(function: Callable[[], object], calls: int, seconds: float) -> list[float]:
    """Milliseconds a call, of each of five or more replays of a graph of that many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes the libraries' handles, before the capture
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    graph.replay()
    while len(times) < 5 or sum(times) < 1000 * seconds:
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return [elapsed / calls for elapsed in times]


def elsewhere_seconds() -> float:
    """Processor seconds that others have used on this machine since it started; NaN where /proc does not tell."""
    try:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    except (OSError, ValueError):
        return float("nan")
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def wall_ms(function, device: torch.device | str) -> tuple:
    """Milliseconds on the host's clock until the device is done, and the result; for what waits for the device."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    result = function()
    wait()
    return 1000 * (time.perf_counter() - started), result
