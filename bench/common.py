"""What all benches share: the machine's name, versions, result files."""

import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
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
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit that SLOTFAST_COMMIT names, for copies of a checkout; else the checkout's, "+" behind it where tracked
    files differ from it; "unknown" where neither can be known."""
    if named := os.environ.get("SLOTFAST_COMMIT"):
        return named
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
    names = ("torch", "triton", "numpy", "pytest-benchmark", "liger-kernel", "flash-attn", "transformers")
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


class Rows:
    """Figures as JSON lines, each in the file as soon as it exists; what fails costs its own row and no other.

    Args:
        path: the file, which the first row makes anew; None keeps none.
        about: the file's first line: `provenance`.
    """

    def __init__(self, path: str | Path | None, about: dict):
        self.path, self.about, self.rows, self.failed = path and Path(path), about, [], 0

    def take(self, what: dict, figures: Callable[..., dict], *arguments, **options) -> dict:
        """Appends and returns `attempt` of the same arguments."""
        row = attempt(what, figures, *arguments, **options)
        self.failed += "failed" in row
        if self.path and not self.rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")
            append_json(self.path, self.about)
        self.rows.append(row)
        if self.path:
            append_json(self.path, row)
        return row


def attempt(what: dict, figures: Callable[..., dict], *arguments, **options) -> dict:
    """`what` with the figures of a call, or with why there are none under "failed"; printed too."""
    try:
        row = what | figures(*arguments, **options)
    except Exception as error:
        row = what | {"failed": f"{type(error).__name__}: {error}"[:500]}
    print(", ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)
    return row


def _short(value) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_short(each)}" for name, each in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def append_json(path: str | Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
