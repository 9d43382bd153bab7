"""Everything that wants a GPU, in three calls of under nine minutes each; needs no network.

    python -m bench.gpu_campaign [figures | checks | compiled] [--out FOLDER] [--only PHASE ...] [--dry-run]

figures   every kernel once; then what is worth most first: the roofs, the solve, the evaluation, cross-entropy, 6-bit
          products, attention, the other kernels
checks    the tests on the device, the kernels under compute-sanitizer, bits of full launches, launch parameters
compiled  the forward as it is, by torch.compile, and as CUDA graphs

Each phase is a process of its own with a time limit of its own: what fails, or hangs, or loses the device's context,
costs its phase and no other; a call's limits add up to less than nine minutes. Figures and test outcomes are written as
they come. The folder ($OUT if that is set) gets two files a call: CALL.tar.gz with every log and figure, written anew
after each phase and every few seconds of one, and CALL.txt, a short table. SLOTFAST_COMMIT names the commit where git
cannot. What slotfast requires must be importable (docs/benchmarks.md says how without a network); compute-sanitizer,
FlashAttention and Liger are used where they are. `--dry-run` goes through a call without a GPU, interpreted, at tiny
sizes: its figures mean nothing.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import ROOT, default_device, provenance, write_json
from bench.summary import summary

CALL_S = 530  # of the ten minutes that hosts give a command
START_S, KILL_S, REFRESH_S = 15, 3, 10
REQUIRED = [
    "torch",
    "triton",
    "numpy",
    "pytest",
    "pytest_benchmark",
    "pydantic",
    "sentencepiece",
    "brotli",
    "zstandard",
]
# What compiles ahead of time, interprets in a process of its own, or installs: not for a GPU host.
ELSEWHERE = {"test_bundle", "test_kernels_folder", "test_packaging", "test_static_report"}


@dataclass(frozen=True)
class Phase:
    """One process.

    Args:
        limit_s: it is stopped after that long.
        command: Python's arguments, in the checkout; `{out}` stands for the folder of logs and figures.
        tiny: what --dry-run runs in its place.
        environment: on top of this process's.
        under: a program, with arguments, that Python runs under; without it the phase is skipped.
    """

    name: str
    limit_s: float
    command: list[str]
    tiny: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    under: list[str] = field(default_factory=list)


def plan() -> dict[str, list[Phase]]:
    """The phases of each call."""
    pytest = ["-m", "pytest", "-v", "-rfEs", "-p", "no:cacheprovider", "--continue-on-collection-errors"]

    def module(name, limit_s, command, *tiny):
        command = ["-m", *command, "--out", f"{{out}}/{name}.jsonl"]
        return Phase(name, limit_s, command, [*command, *tiny])

    def kernels(name, limit_s, wanted):
        record = ["bench/bench_kernels.py", "--record", f"{{out}}/{name}.jsonl", "--benchmark-disable-gc", "-k"]
        return Phase(
            name, limit_s, [*pytest, *record, wanted], [*pytest, *record, "target_counts or rate_scan-production-ours"]
        )

    def sanitized(tool, limit_s):
        # Small cases, and no caching allocator: with it, a write past a tensor stays inside its pool.
        few = [*pytest, "tests/test_kernels.py", "-k", "test_outputs and primes"]
        under = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Phase(
            tool,
            limit_s,
            few,
            [*pytest, "tests/test_kernels.py", "-k", "test_outputs and rate_scan-prime"],
            environment,
            under,
        )

    tiny_sweep = ("--kernel", "rate_scan", "--jobs", "1", "--most", "2")
    workers = ["-n", "14"] if _has("xdist") else []
    return {
        "figures": [
            module("smoke", 30, ["bench.smoke"]),
            module("roofs", 20, ["bench.roofs"], "--tiny"),
            module("solve", 75, ["bench.targets", "solve"], "--tiny"),
            module("evaluate", 95, ["bench.targets", "evaluate"], "--tiny"),
            kernels("cross-entropy", 90, "bias_cross_entropy_grad"),
            module("matmul", 80, ["bench.targets", "matmul"], "--tiny"),
            module("attention", 40, ["bench.bench_attention"], "--tiny"),
            kernels("other-kernels", 50, "not bias_cross_entropy_grad and not int6 and not slot_solve and not compile"),
        ],
        "checks": [
            Phase(
                "tests",
                230,
                [*pytest, *workers, *test_files()],
                [*pytest, "tests/test_kernels.py", "-k", "rate_scan and prime"],
            ),
            sanitized("memcheck", 60),
            sanitized("racecheck", 50),
            module("bitwise", 30, ["bench.bitwise"]),
            module("sweep", 115, ["bench.sweep", "--seconds", "100"], *tiny_sweep),
        ],
        "compiled": [
            module(f"compiled-{way}", 240, ["bench.bench_compile", way], "--tiny") for way in ("windows", "stream")
        ],
    }


def test_files() -> list[str]:
    """Tests to run on the device, those of kernels first."""
    found = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.stem not in ELSEWHERE]
    found.sort(key=lambda path: "slotfast.kernels" not in path.read_text())
    return [str(path.relative_to(ROOT)) for path in found]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def environment_of(phase: Phase, dry: bool) -> dict[str, str]:
    """This process's, with the checkout before whatever stands in PYTHONPATH."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    found = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **phase.environment}
    return found | {"TRITON_INTERPRET": "1"} if dry else found


def run(phase: Phase, folder: Path, dry: bool, refresh: Callable[[], None]) -> dict:
    """Runs a phase, its output to a log in the folder; says how it went.

    Args:
        refresh: called every few seconds.
    """
    if phase.under and not shutil.which(phase.under[0]) and not dry:
        return {"phase": phase.name, "went": f"SKIPPED: no {phase.under[0]} here", "seconds": 0.0, "tail": []}
    arguments = [argument.replace("{out}", str(folder)) for argument in (phase.tiny if dry else phase.command)]
    command = [*([] if dry else phase.under), sys.executable, *arguments]
    log, started = folder / f"{phase.name}.log", time.monotonic()
    with log.open("w") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        environment = environment_of(phase, dry)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, process_group=0, **pipes)
        try:
            went = _watch(process, started + phase.limit_s, refresh)
        finally:
            _end(process)
    lines = log.read_text(errors="replace").replace(str(ROOT), ".").splitlines()
    return {"phase": phase.name, "went": went, "seconds": round(time.monotonic() - started, 1), "tail": lines[-12:]}


def _watch(process: subprocess.Popen, deadline: float, refresh: Callable[[], None]) -> str:
    while (left := deadline - time.monotonic()) > 0:
        try:
            code = process.wait(min(left, REFRESH_S))
            return "ok" if code == 0 else f"FAILED, exit code {code}"
        except subprocess.TimeoutExpired:
            refresh()
    return "STOPPED at its limit; what it had measured is kept"


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its workers; does not wait for one that hangs in the driver."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(KILL_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def pack(folder: Path, archive: Path) -> None:
    """The folder as one archive: the old one stays until the new one is whole."""
    part = archive.with_name(f"{archive.name}.part")
    try:
        with tarfile.open(part, "w:gz") as tar:
            tar.add(folder, arcname=archive.name.removesuffix(".tar.gz"))
        part.replace(archive)
    except OSError as error:  # a full disk, say: the phases go on
        print(f"{archive}: {error}", flush=True)


def campaign(call: str, phases: list[Phase], out: Path, dry: bool, about: dict) -> int:
    """Runs the phases; exit code 1 if one did not go well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the phase is ended too
    out.mkdir(parents=True, exist_ok=True)
    done: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="campaign-") as temporary:
        folder = Path(temporary)

        def refresh() -> list[str]:
            write_json(folder / "campaign.json", {**about, "call": call, "dry_run": dry, "phases": done})
            lines = ["DRY RUN: no figure means anything"] * dry
            lines += [f"{row['phase']:14} {row['seconds']:6.1f} s  {row['went']}" for row in done] + summary(folder)
            pack(folder, out / f"{call}.tar.gz")
            (out / f"{call}.txt").write_text("\n".join(lines) + "\n")
            return lines

        for phase in phases:
            row = run(phase, folder, dry, refresh)
            done.append(row)
            print(f"{row['phase']:14} {row['seconds']:6.1f} s  {row['went']}", flush=True)
            if row["went"].startswith("FAILED"):
                print(*(f"    {line[:160]}" for line in row["tail"]), sep="\n", flush=True)
            lines = refresh()
        print("", *lines, sep="\n")
    return int(any(row["went"].startswith(("FAILED", "STOPPED")) for row in done))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    calls = plan()
    parser.add_argument("call", nargs="?", choices=calls, default="figures")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "campaign")))
    parser.add_argument("--only", nargs="+", metavar="PHASE")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if missing := [name for name in REQUIRED if not _has(name)]:
        parser.error(f"cannot import {', '.join(missing)}: pip install them, from wheels where there is no network")
    if default_device().type != "cuda" and not args.dry_run:
        parser.error("torch sees no GPU here; --dry-run tries the plumbing")
    phases = calls[args.call]
    if unknown := set(args.only or []) - {phase.name for phase in phases}:
        parser.error(f"--only {' '.join(unknown)}: expected of {', '.join(phase.name for phase in phases)}")
    wanted = [phase for phase in phases if not args.only or phase.name in args.only]
    return campaign(args.call, wanted, args.out.resolve(), args.dry_run, provenance(default_device()))


if __name__ == "__main__":
    sys.exit(main())
