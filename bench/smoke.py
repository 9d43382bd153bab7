"""Every kernel once against its reference, at the shape that real runs use, on few windows: in seconds.

    python -m bench.smoke [--out FILE]

On a GPU each kernel has a process of its own, all at once: they compile in parallel, and one that crashes or spoils its
context costs itself alone.
"""

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from bench.bench_kernels import DEVICE, ON_GPU, draw, error, first_case, outcome, shrunk
from bench.common import Rows, append_json, attempt, provenance
from slotfast.kernels import KernelSpec, specs

SOLVER_TOLERANCE = 1e-2  # of the loss: roundings choose the path, and without a ridge it goes on


@torch.no_grad()
def once(spec: KernelSpec) -> dict:
    """How far one case is off float64, and how far it may be; raises where it is further."""
    case = first_case(spec)
    started = time.perf_counter()
    kwargs = draw(spec, case, shrunk(spec, case, 1 << 19 if "solve" in spec.name else 1 << 22))
    wide = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, kwargs)
    exact, plain, got = (
        outcome(found) for found in (spec.reference(**wide), spec.reference(**kwargs), spec.fn(**kwargs))
    )
    off, allowed = error(got, exact), 2 * error(plain, exact) + 1e-5
    allowed = max(allowed, SOLVER_TOLERANCE) if "solve" in spec.name else allowed
    assert off <= allowed, f"{case.reason}: {off:.2g} off float64, allowed {allowed:.2g}"
    return {"case": case.reason, "off": off, "allowed": allowed, "seconds": time.perf_counter() - started}


def in_process(name: str, path: str | None) -> None:
    row = attempt({"kernel": name}, once, next(spec for spec in specs() if spec.name == name))
    if path:
        append_json(path, row)
    sys.exit(1 if "failed" in row else 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="where the rows go")
    args = parser.parse_args()
    rows = Rows(args.out, provenance(DEVICE))
    if not ON_GPU:
        for spec in specs():
            rows.take({"kernel": spec.name}, once, spec)
        return 1 if rows.failed else 0
    if args.out:
        Path(args.out).write_text(json.dumps(rows.about) + "\n")
    context = multiprocessing.get_context("spawn")
    running = {spec.name: context.Process(target=in_process, args=(spec.name, args.out)) for spec in specs()}
    for process in running.values():
        process.start()
    for name, process in running.items():
        process.join()
        if process.exitcode not in (0, 1) and args.out:
            append_json(args.out, {"kernel": name, "failed": f"exit code {process.exitcode}"})
    return 1 if any(process.exitcode for process in running.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
