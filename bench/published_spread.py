"""Preset `pr1350` against the published loop on real text: is it inside the loop's own spread?

    python -m bench.published_spread [--text FILE] [--batches 16] [--seeds 8] [--out FILE]

A fit without a ridge, warm-started from the batch before, is chaotic: rounding grows some hundredfold a batch. So the
loop itself is run again with every logit that it fits to moved to one of its float32 neighbours, once for each seed;
what it then scores is the spread that "the same system" can mean. `inside` is about its range, `from_the_loop` about
how far from the loop without noise `pr1350` and the noisy ones end. All contenders see the same forward pass, fit to
the same positions, carry their own warm start over the batches and score the same tokens; the loop is given the 64
focal positions alone, as the others have no weight in its loss.
"""

import argparse
import json
import statistics

import torch
from torch import Tensor

from bench import published_loop as published
from bench.common import provenance, write_json
from slotfast.command.run import run_command
from slotfast.eval import SlidingPass
from slotfast.eval.inputs import Sources, read_inputs
from slotfast.slot import Adapter, WindowBatch, parse_preset
from slotfast.windows import Plan

STRIDE = 64


class PublishedLoop(Adapter):
    """The published loop as an adapter.

    Args:
        seed: of the noise on the logits that it fits to; None for none.
    """

    def __init__(self, seed: int | None = None):
        name = "loop" if seed is None else f"loop, noise {seed}"
        super().__init__(parse_preset("pr1350").model_copy(update={"name": name}))
        self.delta, self.noise = None, None if seed is None else torch.Generator().manual_seed(seed)

    def bias(self, batch: WindowBatch) -> Tensor | None:
        with torch.inference_mode(False):  # autograd: on copies, as inference tensors have none
            logits, targets, mask = (tensor.clone() for tensor in batch.visible(self.row))
            if not bool(mask.any()):
                return None
            if self.noise is not None:
                up = torch.rand(logits.shape, generator=self.noise) < 0.5
                logits = torch.nextafter(logits, torch.where(up, torch.inf, -torch.inf))
            self.delta = published.solve_shared(logits, targets, mask, self.delta)
        return self.delta.expand(len(batch.targets), -1)


def compare(text: str | None, batches: int, seeds: int) -> dict:
    """Bits per byte of plain windows, `pr1350`, the loop, and the loop under noise."""
    windows = batches * published.WINDOWS
    inputs = read_inputs(Sources(text=text, max_tokens=published.LENGTH + windows * STRIDE))
    length = inputs.artifact.config.seq_len
    plan = Plan(min(len(inputs.stream) - 1, length + (windows - 1) * STRIDE), length, STRIDE)
    adapters = [Adapter(parse_preset("pr1350")), PublishedLoop(), *map(PublishedLoop, range(seeds))]
    done = SlidingPass(
        inputs.artifact.model(),
        inputs.text,
        plan,
        adapters,
        batch_windows=published.WINDOWS,
    ).run()
    plain, ours, loop, *noisy = (done.meter.score(row).bpb for row in range(len(adapters) + 1))
    loops, moved = [loop, *noisy], [abs(bpb - loop) for bpb in noisy]
    deviation = statistics.stdev(loops)  # 0 where too little text was scored for rounding to grow
    return {
        "text": inputs.source,
        "windows": done.windows,
        "seq_len": length,
        "bpb": {"none": plain, "pr1350": ours, "loop": loop, "loop with noise": noisy},
        "spread": {"least": min(loops), "most": max(loops), "deviation": deviation},
        "inside": min(loops) <= ours <= max(loops),
        "from_the_loop": {"pr1350": abs(ours - loop), "noise_least": min(moved), "noise_most": max(moved)},
        "deviations_from_mean": (ours - statistics.mean(loops)) / deviation if deviation else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.published_spread",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", help=".txt or .jsonl, also compressed; default: the shipped model's test text")
    parser.add_argument("--batches", type=int, default=16, help="of 32 windows")
    parser.add_argument("--seeds", type=int, default=8, help="runs of the loop under noise, at least 2")
    parser.add_argument("--out", help="where the JSON goes")
    args = parser.parse_args()
    if args.batches < 1 or args.seeds < 2:
        parser.error(f"--batches, --seeds: expected at least 1 and 2, got {args.batches} and {args.seeds}")
    found = {**provenance("cpu"), **compare(args.text, args.batches, args.seeds)}
    if args.out:
        write_json(args.out, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
