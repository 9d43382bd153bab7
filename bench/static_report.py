"""What the compiler makes of every kernel at the shapes that real runs use; needs no GPU, and times nothing.

    python -m bench.static_report            compiles everything and prints a table
    python -m bench.static_report --check    also holds it to the committed table of this version of Triton
    python -m bench.static_report --update   also rewrites that table
    --quick                                  one production shape of each kernel, for one other target in turn
    --kernel NAME                            that spec alone

Figures are those of sm_90; sm_80, sm_100 and gfx942 are only compiled. A committed table is valid for one version of
Triton: with a version that has none, the comparison is skipped, and says so; spills that no table knows of fail with
any. Another version than the installed one: `python -m bench.compiles --triton 3.6.0 --check`.

    regs      registers a thread          stack, local  spilled bytes a thread, 0 unless a kernel's spec accepts some
    shared    bytes a program             programs      resident at a time on a multiprocessor
    code      bytes                       instr/elem    instructions of the hot loop, for each element that it handles
    barriers  in the hot loop             matrix        tensor-core instructions

The hot loop is the longest of the most deeply nested ones.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from slotfast.kernels import specs

from .compile import SHARED_LIMIT, TARGETS, compile_for, figures

TABLES = Path(__file__).resolve().parent / "results" / "static"
KEYS = ("kernel", "case", "function", "types")
# A figure may grow to factor * committed + slack; "programs" and "matrix" may not fall below committed / factor.
TOLERANCE = {
    "registers": (1.0, 8),
    "shared": (1.0, 1024),
    "code": (1.1, 256),
    "per_element": (1.03, 0.02),
    "barriers": (1.0, 0),
}
AT_LEAST = {"programs": 1.34, "matrix": 2.0}


def work(quick: bool = False, kernel: str | None = None) -> list[tuple]:
    """(spec's name, case's reason, index) of every different launch behind production shapes."""
    found = []
    for spec in specs():
        if kernel not in (None, spec.name):
            continue
        seen = []
        for case in [case for case in spec.cases if case.production][: 1 if quick else None]:
            for index, compilation in enumerate(spec.compilations(**case.shape)):
                if compilation not in seen:
                    seen.append(compilation)
                    found.append((spec.name, case.reason, index))
    return found


def one(name: str, reason: str, index: int, others: tuple[str, ...]) -> dict:
    """Row of the table, compiled for `others` as well; raises what the compiler raises, for any target."""
    spec = next(spec for spec in specs() if spec.name == name)
    case = next(case for case in spec.cases if case.reason == reason)
    compilation = spec.compilations(**case.shape)[index]
    started = time.perf_counter()
    compiled = compile_for(compilation)
    seconds = time.perf_counter() - started
    found = figures(compilation, compiled)
    del found["opcodes"]
    for target in others:
        shared = compile_for(compilation, target).metadata.shared
        if shared > SHARED_LIMIT[target]:
            raise ValueError(f"{name}, {reason}: {shared} bytes of shared memory on {target}")
    pointers = [kind[1:] for kind in compilation.signature.values() if kind.startswith("*")]
    key = {"kernel": name, "case": reason, "function": compilation.kernel.__name__, "types": pointers[0]}
    return {**key, **found, "accepted_spill": compilation.spill_bytes, "compile_s": round(seconds, 2)}


def table_of(version: str) -> Path:
    """Where the table of a version of Triton is committed."""
    return TABLES / f"sm_90-triton-{version}.json"


def label(row: dict) -> str:
    return " | ".join(str(row[key]) for key in KEYS)


def spills(rows: list[dict], committed: list[dict] = ()) -> list[str]:
    """Launches that spill more than their spec accepts, and more than the committed table of this version knows of."""
    known = {label(row): max(row["stack"], row["local"]) for row in committed}
    return [
        f"{label(row)}: {max(row['stack'], row['local'])} bytes spilled"
        for row in rows
        if max(row["stack"], row["local"]) > max(row["accepted_spill"], known.get(label(row), 0))
    ]


def compare(rows: list[dict], committed: list[dict], whole: bool) -> list[str]:
    """What is worse than committed, or has no counterpart; `whole` when rows should be all of them."""
    before, problems = {label(row): row for row in committed}, []
    for row in rows:
        old = before.pop(label(row), None)
        if old is None:
            problems.append(f"{label(row)}: not in the committed table")
            continue
        for name, (factor, slack) in TOLERANCE.items():
            if (row[name] or 0) > factor * (old[name] or 0) + slack or (row[name] is None) != (old[name] is None):
                problems.append(f"{label(row)}: {name} {row[name]}, committed {old[name]}")
        for name, factor in AT_LEAST.items():
            if row[name] < old[name] / factor:
                problems.append(f"{label(row)}: {name} {row[name]}, committed {old[name]}")
    return problems + [f"{name}: committed, but there is no such launch any more" for name in before if whole]


def table(rows: list[dict]) -> str:
    heads = ["kernel", "case", "function", "types", "regs", "stack", "local", "shared", "programs", "code"]
    heads += ["instr/elem", "barriers", "matrix", "compile s"]
    columns = [*KEYS, "registers", "stack", "local", "shared", "programs", "code", "per_element", "barriers"]
    columns += ["matrix", "compile_s"]
    lines = [heads, *([f"{'-' if row[c] is None else row[c]}" for c in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    sides = [str.ljust] * len(KEYS) + [str.rjust] * (len(heads) - len(KEYS))
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)) for line in lines
    )


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m bench.static_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kernel")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--json", help="also write the rows here")
    args = parser.parse_args()
    if args.update and args.quick:
        parser.error("--update wants every shape: leave out --quick")
    if not args.check:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # so that "compile s" is one
    names = [spec.name for spec in specs()]
    if args.kernel not in (None, *names):
        parser.error(f"--kernel {args.kernel}: expected one of {', '.join(names)}")

    items = work(args.quick, args.kernel)
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        others = sorted(TARGETS.keys() - {"sm_90"})
        asked = [(*item, (others[at % 3],) if args.quick else tuple(others)) for at, item in enumerate(items)]
        rows = [future.result() for future in [pool.submit(one, *each) for each in asked]]
    same = Counter()
    for row in rows:  # launches that differ in a flag alone are numbered
        same[label(row)] += 1
        row["compile_s"] = None if args.check else row["compile_s"]  # it may come from Triton's cache
        row["types"] += f" #{same[label(row)]}" if same[label(row)] > 1 else ""
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps({"triton": triton.__version__, "rows": rows}))
    path = table_of(triton.__version__)
    committed = json.loads(path.read_text())["rows"] if path.exists() else None
    problems = spills(rows, committed or ())
    if args.update:
        kept = [row for row in committed or () if args.kernel and row["kernel"] != args.kernel]
        new = [{name: value for name, value in row.items() if name != "compile_s"} for row in rows]
        lines = ",\n".join("  " + json.dumps(row) for row in sorted(kept + new, key=label))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"triton": "{triton.__version__}", "target": "sm_90", "rows": [\n{lines}\n]}}\n')
    elif args.check and committed is None:
        known = ", ".join(
            sorted(each.stem.removeprefix("sm_90-triton-") for each in TABLES.glob("sm_90-triton-*.json"))
        )
        print(f"SKIPPED: figures are committed for Triton {known}, this is {triton.__version__}")
    elif args.check:
        problems += compare(rows, committed, whole=not (args.quick or args.kernel))
    if problems:
        print(f"{len(problems)} problems; after a change that is meant, --update:", *problems, sep="\n  ")
    elif args.check:
        print(
            f"{len(rows)} launches: no spills but known ones" + ", none worse than committed" * (committed is not None)
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
