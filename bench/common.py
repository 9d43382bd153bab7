"""What all benches share: timing, the machine's name, versions, result files."""

import gc
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the CPU's model and the cores that this process may use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def folder_of(device: torch.device | str) -> Path:
    """Where this machine's committed results are: bench/results/<its name>."""
    kept = "".join(c if c.isalnum() else " " for c in device_name(device).replace("(R)", ""))
    return RESULTS / "-".join(kept.lower().split())


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checkout's commit, "+" behind it where tracked files differ from it; "unknown" outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no")) if head else "unknown"


def _command() -> str:
    """This process's, less where its result goes."""
    arguments = sys.argv[1:]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *arguments])


def provenance(device: torch.device | str, command: str | None = None) -> dict:
    """What a figure is worth nothing without."""
    names = ("torch", "triton", "numpy", "pytest-benchmark", "liger-kernel", "flash-attn")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {name: version for name, version in versions.items() if version},
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command or _command(),
    }


def need(name: str) -> ModuleType:
    """A module of the extra `bench`; where it is not installed, one line, and exit code 2."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"error: this bench needs {name}: pip install '.[bench]'", file=sys.stderr)
        sys.exit(2)


def write_json(path: str | Path | None, found: dict) -> None:
    """Write a result; nowhere, where no path is given."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def spread(times_ms: list[float]) -> dict:
    """Median and range of repeated measurements."""
    return {
        "median_ms": statistics.median(times_ms),
        "least_ms": min(times_ms),
        "most_ms": max(times_ms),
        "repeats": len(times_ms),
    }


def measure(function, device: torch.device | str, *, repeats: int | None = None, seconds: float = 0.2) -> list[float]:
    """Times of calls in milliseconds, after a warm-up: between events on a GPU, on the wall clock elsewhere.

    Args:
        repeats: calls to time; None: as many as fill `seconds`, three at least.
    """
    if torch.device(device).type == "cuda":
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
