"""Microseconds that a GPU should take for each target of the performance plan, from static tables and the ledger.

    python -m bench.predict                          H100 and H200, beside the targets and what was measured
    python -m bench.predict --triton 3.6.0           from the static table of another version of Triton
    python -m bench.predict --committed              also writes bench/results/predicted/targets.json

Predictions, made so that a run on a GPU confirms or corrects a number that stands there before it; not timings. A
kernel's time is the largest of three: instructions over issue slots, bytes over bandwidth, and trips over the programs
that are resident, each as long as its latency and its own instructions one a clock. Where a trip's loads are issued a
trip ahead the two overlap. `GPUS` and `ASSUMED` are all constants, each with where it is from.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import RESULTS, commit
from bench.forward_ledger import committed
from bench.ledger import ELEMENTWISE, Counting, Ledger, Shape, ledger_of
from bench.static_report import KEYS, table_of
from bench.summary import rows_of, summary
from slotfast.kernels import decay_scan_ref, specs
from slotfast.model import GPTConfig
from slotfast.slot.repeats import CONTEXTS
from slotfast.slot.sorted_repeats import SortedRepeats

COMMITTED = RESULTS / "predicted" / "targets.json"


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says.

    Args:
        bandwidth: of memory, bytes a second.
        tensor: bfloat16 operations of the tensor cores a second, dense.
        processors: streaming multiprocessors.
        clock: Hz.
        l2: bytes.
        l1: bytes of L1 and shared memory together, of a multiprocessor.
    """

    bandwidth: float
    tensor: float = 989.4e12
    processors: int = 132
    clock: float = 1.83e9
    l2: float = 50e6
    l1: float = 256 * 1024


# NVIDIA H100 and H200 Tensor Core GPU data sheets (SXM): bandwidth, 989 TFLOP/s of dense bfloat16. H100 architecture
# white paper: 132 multiprocessors, 50 MB L2, 256 KB of L1 and shared memory and 4,096 dense operations a clock in each:
# with 989.4 TFLOP/s that is a clock of 1.83 GHz.
GPUS = {"H100": Gpu(3.35e12), "H200": Gpu(4.8e12)}
ISSUE = 4 * 32  # thread instructions a clock and multiprocessor: four schedulers, a warp each (CUDA programming guide)
ASSUMED = {
    "latency": (800, "cycles of a load from memory: the upper end of 400 to 800, CUDA C++ best practices guide"),
    "l2_bytes": (24, "bytes a clock and multiprocessor out of L2: as in kernels/solver; unmeasured"),
    "l1_bytes": (64, "bytes a clock out of a multiprocessor's L1: half a warp's load of 4 bytes a lane; an assumption"),
    "tensor_share": (0.6, "of the tensor cores' rate in products and attention: an assumption"),
    "copy_share": (0.9, "of the data sheet's bandwidth in elementwise passes: an assumption"),
    "launch": (2.0, "microseconds between dependent launches: an assumption"),
    "radix_passes": (8, "passes of a sort of 64-bit keys, a byte and a launch each: Onesweep, arXiv:2206.01784"),
    "dependent": (4, "clocks between dependent instructions of one warp: an assumption"),
}


def assumed(name: str) -> float:
    return ASSUMED[name][0]


@dataclass(frozen=True)
class Row:
    """A row of a static table, with what its launch is of.

    Args:
        per_element: instructions for each element.
        programs: resident on a multiprocessor.
        warps, elements: of a program, and elements of one of its trips.
        barriers: of a trip.
        ahead: whether a trip's loads are issued a trip before.
    """

    per_element: float
    programs: int
    warps: int
    elements: int
    barriers: int = 0
    ahead: bool = False


def read_table(version: str) -> dict[tuple, dict]:
    """The committed static table of a version of Triton, by kernel, case, function and types.

    Raises:
        ValueError: there is none, or it is of another form.
    """
    path = table_of(version)
    if not path.exists():
        raise ValueError(f"Triton {version}: no static table is committed for it")
    table = json.loads(path.read_text())
    return check_table(table)


def check_table(table: dict) -> dict[tuple, dict]:
    """Rows of a static table by their names; ValueError where it is of another target or lacks what is needed."""
    if table.get("target") != "sm_90":
        raise ValueError(f"static table: expected target sm_90, got {table.get('target')!r}")
    needed = {*KEYS, "per_element", "programs", "barriers", "registers", "shared"}
    for row in table["rows"]:
        if missing := needed - row.keys():
            raise ValueError(f"static table: a row lacks {', '.join(sorted(missing))}")
    return {tuple(row[key] for key in KEYS): row for row in table["rows"]}


def launch(table: dict[tuple, dict], kernel: str, case: str, types: str) -> tuple[Row, dict]:
    """A launch's row and its shape."""
    found = next((row for key, row in table.items() if (key[0], key[1], key[3]) == (kernel, case, types)), None)
    if found is None:
        raise ValueError(f"static table: no row {kernel} | {case} | {types}")
    spec = next(spec for spec in specs() if spec.name == kernel)
    shape = next(each for each in spec.cases if each.reason == case).shape
    # the launch's own: of its function and types, the first
    made = spec.compilations(**shape)
    pointers = [next(kind[1:] for kind in each.signature.values() if kind.startswith("*")) for each in made]
    of = next(m for m, p in zip(made, pointers, strict=True) if m.kernel.__name__ == found["function"] and p == types)
    row = Row(
        found["per_element"] or 0.0, found["programs"], of.num_warps, of.elements, found["barriers"],
        bool(of.constexprs.get("AHEAD")) or of.num_stages > 1,
    )  # fmt: skip
    return row, shape


def times(row: Row, elements: float, moved: float, gpu: Gpu) -> dict[str, float]:
    """Microseconds by issue slots, by bytes and by latencies, of so many elements and bytes."""
    issue = elements * row.per_element / (ISSUE * gpu.processors * gpu.clock)
    own = row.per_element * row.elements / (32 * row.warps)  # instructions of a warp in a trip
    waits = assumed("latency")
    trip = max(waits, own) if row.ahead else waits + own
    trips = elements / row.elements / (row.programs * gpu.processors)
    return {"issue": issue * 1e6, "bytes": moved / gpu.bandwidth * 1e6, "latency": trips * trip / gpu.clock * 1e6}


def slowest(found: dict[str, float]) -> dict:
    """The prediction: the largest of several times, and which it is."""
    bound = max(found, key=found.__getitem__)
    return {"us": round(found[bound], 4), "bound": bound, "all": {name: round(us, 4) for name, us in found.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# the targets


def solve(gpu: Gpu, itemsize: int, warps: int, programs: int, shared: int = 4096) -> dict:
    """P1: a window of 64 positions, V 1024, 25 iterations, 29 evaluations, as `kernels/solver` counts its SASS.

    With one program the parts that wait for barriers are added; with two, each has the other's to hide behind. A P that
    fits L1, which the pairs do not pass through, comes from L2 once; at worst, each time. Of a working set larger than
    L2, the share that does not fit comes from memory; at worst, all of it. `shared`: bytes of shared memory a program.
    """
    evaluations, directions, pairs = 29, 25, 11  # pairs: on average
    vector, p = 4 * 1024, 64 * 1024 * itemsize
    per_element = {2: 6.6, 4: 5.2}[itemsize]
    warp_instructions = evaluations * (per_element * 64 * 1024 / 32 + 500 * warps)
    warp_instructions += directions * (240 * pairs / 20 * 6 * 8 + 1100 * warps)
    issue = warp_instructions / 4
    serial = (evaluations * 500 + directions * 1100) * assumed("dependent") / programs
    fits_l1 = programs * (p + 6 * vector + shared) <= gpu.l1

    def cycles(reads_of_p: int) -> float:
        moved = reads_of_p * p + directions * 2 * pairs * 2 * vector
        through = max(moved / assumed("l2_bytes"), evaluations * p / assumed("l1_bytes"))
        return max(issue, through) + serial if programs == 1 else max(issue, through, serial)

    def us(cycles: float) -> float:
        return cycles / gpu.processors / gpu.clock * 1e6

    working = gpu.processors * programs * (p + (2 * 21 + 6) * vector)
    memory = (evaluations * p + directions * 2 * pairs * 2 * vector) / gpu.bandwidth * 1e6
    missing = max(0.0, 1 - gpu.l2 / working)
    likely, worst = us(cycles(1 if fits_l1 else evaluations)), us(cycles(evaluations))
    found = {"us": round(max(likely, missing * memory), 3), "worst_us": round(max(worst, memory * (missing > 0)), 3)}
    return found | {"working_set_mb": round(working / 1e6, 1), "fits_l2": not missing, "p_fits_l1": fits_l1}


def forward(ledger: Ledger, gpu: Gpu) -> float:
    """Microseconds of one forward: products and attention at a share of the tensor cores or of their bytes, the rest
    by its bytes; not less than its launches take. The forward alone: no adaptation, no input."""
    us = 0.0
    for group in ("products", "attention"):
        line = ledger.total([group])
        us += max(line.flops / (gpu.tensor * assumed("tensor_share")), line.bytes / gpu.bandwidth) * 1e6
    us += ledger.total(ELEMENTWISE).bytes / (gpu.bandwidth * assumed("copy_share")) * 1e6
    return max(us, assumed("launch") * sum(line.calls for line in ledger))


def losses(table: dict[tuple, dict], gpu: Gpu) -> dict:
    """32 windows of 2048, V 1024: losses straight from hidden states, and from logits in memory.

    Straight, two programs are resident and each hides its softmax behind the other's product; the operands of every
    tile of 128 x 128 come through L2. In memory: the library's product in bfloat16, then one pass of
    `bias_cross_entropy`. As written: the product, then what plain torch does to logits.
    """
    row, shape = launch(table, "linear_cross_entropy", "V 1024", "bf16")
    M, V, K = (shape[name] for name in "MVK")
    product = 2 * M * V * K / (gpu.tensor * assumed("tensor_share")) * 1e6
    moved = next(s for s in specs() if s.name == "linear_cross_entropy").bytes_moved(**shape, itemsize=2)
    found = times(row, M * V, moved, gpu) | {"product": product}
    found["l2"] = 2 * M * V * K * (1 / 128 + 1 / 128) / assumed("l2_bytes") / gpu.processors / gpu.clock * 1e6
    del found["latency"]  # steps of a product are loaded ahead
    eager = ledger_of(Shape(GPTConfig(vocab_size=V, width=K), windows=32, scored=2048)).total(["head and loss"])
    in_memory = product + assumed("launch") + 2 * M * V / (gpu.bandwidth * assumed("copy_share")) * 1e6
    written = product + eager.bytes / (gpu.bandwidth * assumed("copy_share")) * 1e6
    return slowest(found) | {
        "mb": round(moved / 1e6, 1),
        "in_memory_us": round(in_memory, 1),
        "in_memory_mb": round((moved + 4 * M * V) / 1e6, 1),
        "as_written_us": round(written, 1),
        "as_written_mb": round((moved + 2 * M * V + eager.bytes) / 1e6, 1),
    }


def repeats(tokens: int, decay: float = 0.9995) -> Ledger:
    """What `SortedRepeats` moves for a batch of tokens behind all earlier ones that still weigh anything."""
    with Counting(torch.nn.Identity()) as counting, torch.device("meta"):
        counter = SortedRepeats(decay, 0.5, 1)
        counter.recent = torch.zeros(1 << 16, dtype=torch.int64)
        counting.ledger.lines.clear()
        counter.take(torch.zeros(tokens, dtype=torch.int64))
    found = Ledger()
    for line in counting.ledger:
        if line.function == decay_scan_ref.__name__:
            continue
        passes = assumed("radix_passes") if line.operator == "sort" else 1
        read, written, calls = (passes * each for each in (line.read, line.written, line.calls))
        found.add(line.function, line.operator, read=read, written=written, flops=line.flops, calls=calls)
    n = tokens + len(counter.recent)
    half = 8 * (CONTEXTS[-1] + 1) * n
    found.add("SortedRepeats._take", "decay_scan", read=2 * half, written=half, flops=0, calls=2)
    return found


def predict(table: dict[tuple, dict], gpu: Gpu) -> dict[str, dict]:
    """A prediction for each target that has one, with the target beside it."""
    found: dict[str, dict] = {}
    for name, case in {"bfloat16, 8 warps, one program": (2, 8, 1), "float32, 8 warps, one program": (4, 8, 1),
                       "bfloat16, 4 warps, two programs": (2, 4, 2)}.items():  # fmt: skip
        found[f"P1 one-launch solve, {name}"] = {**solve(gpu, *case), "target": "<= 2 us a window"}
    for size, share in ((1024, 85), (4096, 90), (8192, 92)):
        row, shape = launch(table, "bias_cross_entropy_grad", f"V {size} bfloat16", "bf16")
        elements = shape["W"] * shape["T"] * shape["V"]
        moved = next(s for s in specs() if s.name == "bias_cross_entropy_grad").bytes_moved(**shape, itemsize=2)
        one = slowest(times(row, elements, moved, gpu))
        one |= {"share_of_bandwidth": round(one["all"]["bytes"] / one["us"], 3), "target": f">= {share}% of a copy"}
        found[f"P3 gradient, bf16 rows, V {size}"] = one
    for name, n in (("P5 int6 product, 4096^2, one row", 4096), ("P5 int6 product, 8192^2, one row", 8192)):
        row, _ = launch(table, "int6_matmul", "large, one row", "bf16")
        packed = slowest(times(row, n * n, 0.75 * n * n, gpu))
        library = 2 * n * n / gpu.bandwidth * 1e6
        ratio = (library + assumed("launch")) / (packed["us"] + assumed("launch"))
        found[name] = {**packed, "library_us": round(library, 3), "ratio": round(ratio, 2), "target": ">= 1.8x cuBLAS"}
    for name, case, n, k in (
        ("P6 int6 product, 512 x 1536, one row", "down projection, one row", 512, 1536),
        ("P6 int6 product, 512 x 1536, 64 rows", "down projection, 64 rows", 512, 1536),
    ):
        try:
            row, _ = launch(table, "int6_matmul", case, "bf16")
        except ValueError:  # there the library multiplies by dense weights
            found[name] = {"us": assumed("launch"), "ratio": 1.0, "target": ">= 0.95x cuBLAS"}
            continue
        # from L2, as the library's dense weights
        through = n * k / assumed("l2_bytes") / gpu.processors / gpu.clock * 1e6
        packed = slowest({**times(row, n * k, 0.0, gpu), "bytes": 0.75 * through})
        ratio = (2 * through + assumed("launch")) / (packed["us"] + assumed("launch"))
        found[name] = {**packed, "ratio": round(ratio, 2), "target": ">= 0.95x cuBLAS"}
    shapes = committed()
    windows, stream = shapes["contest, windows, 64 scored"], shapes["contest, stream"]
    for name, shape, units, target in (
        ("windows, 64 scored, on 8", windows, 969_057 / 8 / 32, "<= 60 s on 8 GPUs"),
        ("stream, on one", stream, 62.0e6 / 8192, "<= 60 s on one GPU, stretch 30"),
    ):
        for which, kernels in (("eager", False), ("fused", True)):
            ledger = ledger_of(shape, kernels)
            us = forward(ledger, gpu)
            found[f"P7 {name}, {which}"] = {"us": round(us, 1), "seconds": round(us * units / 1e6, 1), "target": target}
    name = "P7 losses of 32 windows of 2048, V 1024"
    found[name] = {**losses(table, gpu), "target": "no logits in memory, in less time than as written"}
    row, _ = launch(table, "rate_scan", "production", "fp64")
    window = max(row.per_element * assumed("dependent"), assumed("latency") / 8) / gpu.clock * 1e6  # eight loads ahead
    for blocks in (1, 8):  # of 8192 tokens, 128 windows, each: what an adaptation is given at once
        scan, ledger = blocks * 128 * window, repeats(blocks * 8192)
        moved = sum(line.bytes for line in ledger)
        sorting = max(moved / gpu.bandwidth * 1e6, sum(line.calls for line in ledger) * assumed("launch"))
        for which, kernels in (("eager", False), ("fused", True)):
            share = (scan + sorting) / (blocks * forward(ledger_of(stream, kernels, logits=True), gpu))
            found[f"P9 rate_scan and sorted repeats, {blocks * 8192} tokens a batch, {which} forward"] = {
                "us": round(scan + sorting, 1), "rate_scan_us": round(scan, 1), "sorted_repeats_us": round(sorting, 1),
                "share": round(share, 3), "target": "< 25% of the stream's forward",
            }  # fmt: skip
    return found


def measured(folder: Path = RESULTS) -> dict[str, list[str]]:
    """Lines of each GPU's committed results about targets, by its folder's name; none where there are none."""
    found = {}
    for each in sorted(folder.iterdir()):
        if each.is_dir() and any(rows_of(each / f"{name}.jsonl") for name in ("solve", "evaluate", "matmul")):
            found[each.name] = [line for line in summary(each) if line.startswith("P")]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--triton", default="3.9.0", help="version whose static table is read; default: 3.9.0")
    parser.add_argument("--committed", action="store_true")
    args = parser.parse_args()
    try:
        table = read_table(args.triton)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = {name: predict(table, gpu) for name, gpu in GPUS.items()}
    for name, targets in results.items():
        print(f"{name}, predicted")
        for target, one in targets.items():
            figures = ", ".join(f"{key} {value}" for key, value in one.items() if key not in ("all", "target"))
            print(f"  {target}: {figures}  (target {one['target']})")
    for name, lines in measured().items():
        print(f"{name}, measured", *lines, sep="\n  ")
    if args.committed:
        about = {
            "command": "python -m bench.predict --committed",
            "commit": commit(),
            "kind": "predicted, not measured",
        }
        constants = {name: {"value": value, "from": source} for name, (value, source) in ASSUMED.items()}
        gpus = {name: vars(gpu) for name, gpu in GPUS.items()}
        COMMITTED.write_text(
            json.dumps({**about, "triton": args.triton, "gpus": gpus, "assumed": constants, **results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
