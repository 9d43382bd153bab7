"""The README's picture: bits per byte and seconds of one evaluation, as published and in our ways.

    python -m bench.picture [RESULT.json] [--out docs/pictures/evaluation.svg]   # draws a committed result
    python -m bench.picture --measure                                           # measures it anew, some minutes

All ways score the shipped model on its default text, every token once, in one process. "published loop" forwards whole
windows, with losses at all their positions, and fits one bias to a batch of 32 (PR #1350, `bench.published_loop`): its
score is a leak. Windows and the stream are those of slotfast eval, learning is `slotfast.learn`. Seconds are those of
scoring: reading the model and the text is left out.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bench import published_loop
from bench.common import ROOT, folder_of, provenance, write_json
from bench.timing import elsewhere_seconds
from slotfast.eval import SlidingPass, Streaming
from slotfast.eval.inputs import Inputs, Sources, read_inputs
from slotfast.learn import learn
from slotfast.slot import Adapter, Calibration, parse_preset
from slotfast.windows import Plan

STRIDE, BATCH, BLOCK_TOKENS = 64, 32, 1024
LEARNING = ("learn", "learn:what=all,optimizer=sgd,lr=0.05")
RESULT = ROOT / "bench" / "results" / "amd-epyc-1-threads" / "evaluation.json"
PICTURE = ROOT / "docs" / "pictures" / "evaluation.svg"


def published(inputs: Inputs, plan: Plan) -> dict:
    """The published loop: whole windows, losses everywhere, one bias for a batch, warm-started."""
    model, nats, delta, begin = inputs.artifact.model(), 0.0, None, time.perf_counter()
    length = plan.seq_len
    for first in range(0, len(plan), BATCH):
        windows = [plan[index] for index in range(first, min(first + BATCH, len(plan)))]
        rows = [inputs.stream.read(window.start, window.start + length + 1) for window in windows]
        tokens = torch.from_numpy(np.stack([np.pad(row, (0, length + 1 - len(row))) for row in rows]))
        with torch.no_grad():
            logits = model.head(model.hidden(tokens[:, :-1], torch.float32))
        mask = torch.zeros(len(windows), length)
        for row, window in enumerate(windows):
            mask[row, length - 2 * STRIDE : window.context_end] = 1
        if mask.any():
            delta = published_loop.solve_shared(logits, tokens[:, 1:], mask, delta)
        moved = logits if delta is None else logits + delta
        nll = F.cross_entropy(moved.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(windows), length)
        nats += sum(float(nll[row, w.context_end : w.scored_end].double().sum()) for row, w in enumerate(windows))
    return {"nats": nats, "seconds": time.perf_counter() - begin}


def ways(inputs: Inputs) -> Iterator[tuple[str, bool, dict]]:
    """Name, whether its score is honest, nats and seconds."""
    plan = Plan(len(inputs.stream) - 1, inputs.artifact.config.seq_len, STRIDE)
    calibration = Calibration.stored(inputs.artifact.unigram, inputs.artifact.metadata)
    yield "published loop", False, published(inputs, plan)
    for name, streaming in (("windows", None), ("stream", Streaming(0, BLOCK_TOKENS))):
        adapter = Adapter(parse_preset("causal"), calibration, inputs.tokenizer.bos_id)
        done = SlidingPass(
            inputs.artifact.model(), inputs.text, plan, [adapter], batch_windows=BATCH, streaming=streaming
        ).run()
        plain = done.seconds["forward"] + done.seconds["score"]
        yield name, True, {"nats": done.meter.score(0).nats, "seconds": plain}
        yield f"{name}, causal", True, {"nats": done.meter.score(1).nats, "seconds": plain + done.row_seconds[1]}
    tokens = torch.from_numpy(inputs.stream.read(0, len(inputs.stream)))
    for row in LEARNING:
        found = learn(inputs.artifact.model(), tokens, row)
        yield f"stream, {row}", True, {"nats": float(found.nll.double().sum()), "seconds": found.seconds["learned"]}


def measure() -> dict:
    """All ways, one after the other."""
    inputs = read_inputs(Sources())
    tokens = inputs.stream.read(0, len(inputs.stream))
    n_bytes = int(inputs.tokenizer.byte_table.count(tokens[1:], tokens[:-1]).sum())
    begun, elsewhere, rows = time.perf_counter(), elsewhere_seconds(), {}
    for name, honest, found in ways(inputs):
        bpb = found["nats"] / math.log(2) / n_bytes
        rows[name] = {"bpb": bpb, "seconds": round(found["seconds"], 3), "honest": honest}
        print(f"{name:<48} {bpb:.4f} bpb {found['seconds']:8.2f} s", flush=True)
    busy = (elsewhere_seconds() - elsewhere) / (time.perf_counter() - begun)
    about = {"text": inputs.source, "sha256": inputs.stream.sha256(), "tokens": len(tokens) - 1, "bytes": n_bytes}
    return {**provenance("cpu", "python -m bench.picture --measure"), "cores_busy_elsewhere": round(busy, 2)} | {
        "text": about,
        "ways": rows,
    }


_STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1b1f24; }
  .head { font-weight: 600; } .said { font-size: 12px; fill: #68717a; } .leak { fill: #a8420a; }
  .grid { stroke: #d8dce1; } .bar, .dot { fill: #0072b2; } .bar.out, .dot.out { fill: none; stroke: #d55e00;
  stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e8ec; } .said { fill: #939ca5; } .leak { fill: #ff9a5c; } .grid { stroke: #343a41; }
    .bar, .dot { fill: #56b4e9; } .bar.out, .dot.out { fill: none; stroke: #f0853a; }
  }"""
_NAMES = {
    "published loop": "published loop, PR #1350",
    "stream, learn": "stream, learn (LoRA)",
    "stream, learn:what=all,optimizer=sgd,lr=0.05": "stream, learn (all weights)",
}
_LEFT, _BARS, _DOTS, _END, _ROW, _TOP = 190, 290, 580, 800, 26, 56


def draw(found: dict) -> str:
    """Seconds as bars beside bits per byte as dots, a line for each way, as SVG that follows light and dark."""
    rows, bottom = found["ways"], _TOP + _ROW * len(found["ways"])
    longest = max(row["seconds"] for row in rows.values())
    low = math.floor(10 * min(row["bpb"] for row in rows.values()) - 0.5) / 10
    high = math.ceil(10 * max(row["bpb"] for row in rows.values()) + 0.5) / 10

    def place(bpb: float) -> float:
        return _DOTS + (_END - _DOTS) * (bpb - low) / (high - low)

    lines = [
        f'<text class="head" x="{_LEFT}" y="22">seconds to score</text>',
        f'<text class="head" x="{_DOTS}" y="22">bits per byte: left is better</text>',
    ]
    for tick in range(round(10 * low), round(10 * high) + 1):
        x = place(tick / 10)
        lines.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 12}" x2="{x:.1f}" y2="{bottom}"/>')
        lines.append(f'<text class="said" x="{x:.1f}" y="{_TOP - 17}" text-anchor="middle">{tick / 10:.1f}</text>')
    for number, (name, row) in enumerate(rows.items()):
        y, out = _TOP + _ROW * number, "" if row["honest"] else " out"
        width = max(1.5, _BARS * row["seconds"] / longest)
        lines += [
            f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{_NAMES.get(name, name)}</text>',
            f'<rect class="bar{out}" x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="14"/>',
            f'<text x="{_LEFT + width + 6:.1f}" y="{y + 13}">{row["seconds"]:.3g} s</text>',
            f'<circle class="dot{out}" cx="{place(row["bpb"]):.1f}" cy="{y + 9}" r="5.5"/>',
            f'<text x="{place(row["bpb"]) + 10:.1f}" y="{y + 13}">{row["bpb"]:.4f}</text>',
        ]
        if out:
            lines.append(f'<text class="leak" x="{place(row["bpb"]) + 62:.1f}" y="{y + 13}">a leak</text>')
    text = found["text"]
    device = found["device"].replace(" 1 threads", " one thread")
    said = f"The shipped model on {text['tokens']:,} tokens, stride {STRIDE}; {device}"
    lines.append(f'<text class="said" x="{_LEFT}" y="{bottom + 20}">{said}</text>')
    body = "\n".join(lines)
    about = 'role="img" aria-label="Seconds and bits per byte of one evaluation, in several ways"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_END + 70} {bottom + 32}" {about}>'
    return f"{head}\n<style>{_STYLE}\n</style>\n{body}\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    parser.add_argument("--measure", action="store_true", help="measure, and write this device's evaluation.json")
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    if args.measure:
        args.result = folder_of("cpu") / "evaluation.json"
        write_json(args.result, measure())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(draw(json.loads(args.result.read_text())), "utf-8")


if __name__ == "__main__":
    main()
