"""Bytes and operations of one forward of an evaluation, line by line: in plain torch, and with the kernels of a GPU.

    python -m bench.forward_ledger                       the contest's model, 32 windows of 2048, scored throughout
    python -m bench.forward_ledger --artifact FILE       the model of an artifact; "demo" is the one that is shipped
    python -m bench.forward_ledger --config FILE         a GPTConfig as JSON
    --windows N --length N --scored N                    windows, their positions, and how many of each are scored
    --stream --block N --sinks N                         one block of a stream behind a full cache, scored throughout
    --lines                                              every line, not only what each group comes to
    --all [--out FILE]                                   the four that are committed

Counted (`bench/ledger.py` says how), not measured: the model runs on tensors without data, "eager" as with
`--backend torch` and logits in memory, "fused" as on a GPU where no row adapts logits; `python -m bench.predict` makes
times of both. Elementwise is all that is neither an operand or result of a product nor attention's.
"""

import argparse
import json
import sys
from pathlib import Path

from bench.common import RESULTS, commit
from bench.ledger import ELEMENTWISE, GROUPS, Ledger, Shape, ledger_of
from slotfast import ops
from slotfast.artifact import load_artifact
from slotfast.model import GPTConfig

CONTEST = GPTConfig()  # 11 x 512, V 1024, windows of 2048: PR #1019's
DEMO = Path(ops.__file__).parent / "demo" / "demo.slotfast"
COMMITTED = RESULTS / "predicted" / "forward_ledger.json"


def summary(before: Ledger, after: Ledger) -> dict:
    """Gigabytes, teraflops and launches of each group, of all elementwise ones and of all."""
    kinds = {**{group: (group,) for group in GROUPS}, "elementwise": ELEMENTWISE, "all": tuple(GROUPS)}
    return {
        name: {
            which: {"gb": round(line.bytes / 1e9, 6), "tflop": round(line.flops / 1e12, 6), "launches": line.calls}
            for which, line in (("eager", before.total(groups)), ("fused", after.total(groups)))
        }
        for name, groups in kinds.items()
    }


def lines_of(ledger: Ledger) -> list[dict]:
    """Lines as they are committed, the largest first."""
    ordered = sorted(ledger, key=lambda line: -line.bytes)
    return [
        {"group": x.group, "function": x.function, "operator": x.operator, "calls": x.calls}
        | {"read_mb": round(x.read / 1e6, 3), "written_mb": round(x.written / 1e6, 3), "gflop": round(x.flops / 1e9, 3)}
        for x in ordered
    ]


def table(found: dict) -> str:
    """The groups of `summary`, a line each."""
    lines = [f"{'':18}" + "".join(f"{which + ' GB':>12}{'TFLOP':>8}{'launches':>10}" for which in ("eager", "fused"))]
    for name, both in found.items():
        cells = [f"{x['gb']:12.3f}{x['tflop']:8.3f}{x['launches']:10}" for x in both.values()]
        lines.append(f"{name:18}{''.join(cells)}")
    return "\n".join(lines)


def committed() -> dict[str, Shape]:
    """The forwards that result files are about: the contest's model as its windows, as the last 64 positions of them,
    and as a block of a stream; and the shipped model's windows."""
    ours = load_artifact(DEMO).config
    return {
        "contest, windows": Shape(CONTEST),
        "contest, windows, 64 scored": Shape(CONTEST, scored=64),
        "contest, stream": Shape(CONTEST, block=8192, sinks=4),
        "shipped model, windows": Shape(ours, length=ours.seq_len, scored=ours.seq_len),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.forward_ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--artifact", help='default: the contest\'s model; "demo": the shipped one')
    model.add_argument("--config", help="a GPTConfig as JSON")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, help="default: the model's")
    parser.add_argument("--scored", type=int, help="default: all")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--block", type=int, default=8192)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--out", help=f"with --all: default {COMMITTED.name} of bench/results/predicted")
    args = parser.parse_args()
    if args.all:
        shapes = committed()
    else:
        config = CONTEST
        if args.artifact:
            config = load_artifact(DEMO if args.artifact == "demo" else args.artifact).config
        elif args.config:
            config = GPTConfig.model_validate_json(Path(args.config).read_text())
        length = args.length or config.seq_len
        stream = {"block": args.block, "sinks": args.sinks} if args.stream else {}
        shapes = {"": Shape(config, args.windows, length, args.scored or length, **stream)}
        if not 1 <= (args.scored or length) <= length or args.windows < 1 or args.block < 1:
            parser.error("expected windows >= 1, block >= 1 and 1 <= scored <= length")
    results = {}
    for name, shape in shapes.items():
        before, after = ledger_of(shape), ledger_of(shape, kernels=True)
        found = summary(before, after)
        print(f"{name}\n{table(found)}")
        if args.lines:
            for title, ledger in (("eager", before), ("fused", after)):
                print(title, *lines_of(ledger), sep="\n  ")
        about = {"windows": shape.windows, "length": shape.length, "scored": shape.scored, "block": shape.block}
        about |= {"sinks": shape.sinks, "config": shape.config.model_dump(exclude_defaults=True)}
        results[name] = {"shape": about, "summary": found, "eager": lines_of(before), "fused": lines_of(after)}
    if args.all:
        write(Path(args.out) if args.out else COMMITTED, results)
    return 0


def write(path: Path, results: dict) -> None:
    """A file of ledgers, each of their lines one of the file's."""

    def rows(name: str, value) -> str:
        if name == "shape":
            return json.dumps(value)
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
        return "[\n" + ",\n".join("   " + json.dumps(line) for line in value) + "\n  ]"

    parts = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(key)}: {rows(key, value)}" for key, value in found.items())
        + "\n }"
        for name, found in results.items()
    ]
    about = {"command": "python -m bench.forward_ledger --all", "commit": commit(), "kind": "counted, not measured"}
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in about.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + head + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
