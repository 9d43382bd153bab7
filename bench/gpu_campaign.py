"""Everything that wants a GPU, in one command of under nine minutes; needs no network.

    python -m bench.gpu_campaign [--out FOLDER] [--seconds 530] [--only PHASE ...] [--dry-run]

Checks the kernels on the device, once more under compute-sanitizer, measures the roofs, times the targets, sweeps
launch parameters. Each phase is a process of its own with a time limit of its own: what fails, or hangs, or loses the
device's context, costs its phase and no other. Logs and JSON go to the folder ($OUT if that is set); a short table
comes last. What slotfast requires must be installed; compute-sanitizer and FlashAttention are used where they are.
`--dry-run` goes through all of it without a GPU, interpreted, at tiny sizes: its figures mean nothing.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.common import ROOT, default_device, provenance, write_json

PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
REQUIRED = ["torch", "triton", "pytest", "pytest_benchmark", "pydantic", "sentencepiece", "brotli", "zstandard"]
BENCH = [*PYTEST, "bench/bench_kernels.py"]


@dataclass(frozen=True)
class Phase:
    """One process.

    Args:
        limit_s: it is stopped after that long.
        command: to run in the checkout.
        tiny: what --dry-run runs in its place.
        environment: on top of this process's.
        needs: a program without which the phase is skipped.
    """

    name: str
    limit_s: float
    command: list[str]
    tiny: list[str]
    environment: dict[str, str] | None = None
    needs: str | None = None


def phases(out: Path) -> list[Phase]:
    def module(name, *arguments):
        return [sys.executable, "-m", f"bench.{name}", *arguments]

    def kernels(name, limit_s, wanted):
        record = ["--record", str(out / f"{name}.jsonl"), "--benchmark-disable-gc"]
        return Phase(name, limit_s, [*BENCH, "-k", wanted, *record], [*BENCH, "-k", "target_counts and 8192", *record])

    def target(name, limit_s):
        command = module("targets", name, "--out", str(out / f"{name}.json"))
        return Phase(name, limit_s, command, [*command, "--tiny"])

    def sanitized(tool, limit_s):
        # Small cases, and no caching allocator: with it, a write past a tensor stays inside its pool.
        checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, "tests/test_kernels.py"]
        few = [*PYTEST, "tests/test_kernels.py", "-k", "test_outputs and target_counts-primes"]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Phase(
            tool, limit_s, [*checked, "-k", "test_outputs and primes"], few, environment, needs="compute-sanitizer"
        )

    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py") if _is_of_kernels(path))
    workers = ["-n", "12"] if _has("xdist") else []
    primes = ["tests/test_kernels.py", "-k", "primes and target_counts"]
    sweep = module("sweep", "--out", str(out / "sweep.json"), "--seconds")
    return [
        Phase(
            "roofs",
            30,
            module("roofs", "--out", str(out / "roofs.json")),
            module("roofs", "--tiny", "--out", str(out / "roofs.json")),
        ),
        Phase("tests", 130, [*PYTEST, *workers, *files], [*PYTEST, *primes]),
        target("solve", 60),
        kernels("cross-entropy", 90, "bias_cross_entropy_grad"),
        target("matmul", 90),
        target("evaluate", 50),
        Phase("sweep", 130, [*sweep, "115"], [*sweep, "60", "--jobs", "1", "--most", "1"]),
        sanitized("memcheck", 50),
        sanitized("racecheck", 50),
        kernels("other kernels", 50, "not bias_cross_entropy and not int6"),
        Phase("attention", 20, [*PYTEST, "bench/bench_attention.py"], [*PYTEST, "bench/bench_attention.py"]),
    ]


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _is_of_kernels(path: Path) -> bool:
    """Tests that want a device: what compiles ahead of time, or needs the network or a tokenizer, is not for here."""
    others = ("test_static_report", "test_kernels_folder", "test_packaging")
    return ("slotfast.kernels" in path.read_text() or path.stem == "test_repeats") and path.stem not in others


def run(phase: Phase, out: Path, dry: bool, left_s: float) -> dict:
    """Runs a phase, its output to a log; says how it went."""
    if phase.needs and not shutil.which(phase.needs) and not dry:
        return {"phase": phase.name, "went": f"SKIPPED: no {phase.needs} here", "seconds": 0.0, "tail": []}
    limit_s = min(phase.limit_s, left_s)
    if limit_s < 5:
        return {"phase": phase.name, "went": "SKIPPED: no time left", "seconds": 0.0, "tail": []}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(phase.environment or {})}
    environment |= {"TRITON_INTERPRET": "1"} if dry else {}
    log, started = out / f"{phase.name}.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            phase.tiny if dry else phase.command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            went = "ok" if code == 0 else f"FAILED, exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            went = f"STOPPED after {limit_s:.0f} s; what it had measured is kept"
    lines = log.read_text(errors="replace").replace(str(ROOT), ".").splitlines()
    return {"phase": phase.name, "went": went, "seconds": round(time.monotonic() - started, 1), "tail": lines[-12:]}


def _read(path: Path):
    if not path.exists():
        return None
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def summary(out: Path) -> list[str]:
    """The table: a line a target, from whatever files there are."""
    lines = []
    if found := _read(out / "roofs.json"):
        rates = ", ".join(f"{name} {found[name]['tflop_per_s']:.1f} TFLOP/s" for name in found if "matmul" in name)
        lines.append(f"roofs     copy {found['copy']['gb_per_s']:.0f} GB/s, {rates}")
    if found := _read(out / "solve.json"):
        for row in found["one launch"]:
            got = row.get("skipped") or f"{row['us_a_window']:.2f} us a window, {row['ratio']:.0f}x at {row['windows']}"
            lines.append(f"P1        {got} (target 1000x)")
        torch_ratios = ", ".join(f"{name} {found[name]['ratio']:.1f}x" for name in ("shared", "windows"))
        lines.append(f"          slotfast.lbfgs in torch: {torch_ratios}")
    by_case: dict[str, dict] = {}
    for row in (_read(out / "cross-entropy.jsonl") or []) + (_read(out / "other kernels.jsonl") or []):
        case, _, who = row["name"].removeprefix("test_time[").removesuffix("]").rpartition("-")
        by_case.setdefault(case, {})[who] = row
    for case, rows in by_case.items():
        if ours := rows.pop("ours", None):
            ratios = ", ".join(f"{row['device_ms'] / ours['device_ms']:.2f}x {who}" for who, row in rows.items())
            lines.append(f"P3 P4     {case}: {ours['percent_of_roof']:.0f}% of the copy roof; {ratios}")
    rows = (_read(out / "matmul.json") or {"rows": []})["rows"]
    for of, name in (("large", "P5 (1.8x)"), ("model", "P6 (.95x)")):
        chosen = [row for row in rows if row.get("of") == of]
        if chosen:
            worst = min(chosen, key=lambda row: max(row["ratio"].values()))
            best, packed = max(worst["ratio"].values()), worst["ratio"]["int6"]
            shape = f"M {worst['m']}, N {worst['n']}, K {worst['k']}"
            lines.append(f"{name} least of {len(chosen)} shapes {best:.2f}x, packed alone {packed:.2f}x, at {shape}")
    if found := _read(out / "evaluate.json"):
        if "skipped" in found:
            lines.append(f"P7 P9     {found['skipped']}")
        else:
            speed, projected = found["windows_per_second"]["none"], found["projected_seconds_8gpu"]["causal"]
            lines.append(f"P7        {speed:.0f} windows/s; with causal {projected:.0f} s projected (target 60)")
            lines.append(f"P9        causal costs {100 * found['causal_costs']:.1f}% (target 5%)")
    if found := _read(out / "sweep.json"):
        for row in found["rows"]:
            if row["gain"] > 1.03 + row["noise"]:
                case = f"{row['kernel']}, {row['case']}"
                lines.append(f"sweep     {case}: {row['gain']:.2f}x by {row['best']} (now {row['current']})")
        lines.append(f"sweep     {len(found['rows'])} cases timed, {len(found['not_reached'])} not reached")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "campaign")))
    parser.add_argument("--seconds", type=float, default=530, help="for everything together")
    parser.add_argument("--only", nargs="+", metavar="PHASE")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if default_device().type != "cuda" and not args.dry_run:
        parser.error("torch sees no GPU here; --dry-run tries the plumbing")
    if missing := [name for name in REQUIRED if not _has(name)]:
        parser.error(f"cannot import {', '.join(missing)}: pip install them, from wheels where there is no network")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan = phases(out)
    if unknown := set(args.only or []) - {phase.name for phase in plan}:
        parser.error(f"--only {' '.join(unknown)}: expected of {', '.join(phase.name for phase in plan)}")
    started, done = time.monotonic(), []
    for phase in plan:
        if args.only and phase.name not in args.only:
            continue
        row = run(phase, out, args.dry_run, args.seconds - (time.monotonic() - started))
        done.append(row)
        write_json(out / "campaign.json", {**provenance(default_device()), "dry_run": args.dry_run, "phases": done})
        print(f"{row['phase']:14} {row['seconds']:6.1f} s  {row['went']}", flush=True)
        if row["went"].startswith("FAILED"):
            print(*(f"    {line[:160]}" for line in row["tail"]), sep="\n", flush=True)
    print("DRY RUN: no figure below means anything" if args.dry_run else "", *summary(out), sep="\n")
    return int(any(row["went"].startswith(("FAILED", "STOPPED")) for row in done))


if __name__ == "__main__":
    sys.exit(main())
