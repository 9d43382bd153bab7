"""`lora-1855` against the published loop's arithmetic: the same model, the same documents, one process. Target P13.

    python -m bench.bench_lora [--lengths 840 900] [--slots 2] [--part 2] [--rounds 3] [--tiny] [--out FILE]

The model has #1855's shape (11 blocks that run 17 times) and random weights, the documents random tokens: neither
changes what is computed. Width, heads, MLP, vocabulary and rank are those of #1855 divided by `--part`, so that each
keeps its share of the work; 1 is #1855 itself, and takes about four times as long as 2. Documents are as long as the
contest's are on average, and about as long as each other, as in its groups, which are sorted. Phases, which cost both
the same, are left out. Contenders take turns after a warm-up; what counts is the ratio of medians. The ledger takes
apart what ours leaves out, by putting it back, one after the other: temporaries of passes back; the last layer's
queries, attention output and MLP for the whole window; head and loss for the whole window. What is left of the
difference are documents that have ended, the pass back of last chunks, and the optimiser's launches.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from bench import published_lora
from bench.common import default_device, folder_of, provenance, write_json
from bench.timing import elsewhere_seconds, spread, wall_ms
from slotfast import ops
from slotfast.learn import DocumentLoop, Learning, parse_row
from slotfast.model import GPT, GPTConfig

TARGET = 1.2
BOS = 1
CONTEST = {
    "vocab_size": 8192,
    "seq_len": 2048,
    "layers": 11,
    "width": 512,
    "heads": 8,
    "kv_heads": 4,
    "mlp_width": 2048,
    "loops": 2,
    "loop_start": 3,
    "loop_end": 5,
    "bigram_buckets": 0,
    "value_width": 0,
    "skip_gates": True,
    "bos_id": BOS,
}
DIVIDED = ("vocab_size", "width", "heads", "kv_heads", "mlp_width")
TINY = CONTEST | {"vocab_size": 512, "layers": 3, "width": 64, "heads": 2, "kv_heads": 1, "mlp_width": 256}
TINY |= {"loops": 1, "loop_start": 1, "loop_end": 1, "seq_len": 256}


class WholeLastLayer(DocumentLoop):
    """Ours, with the last layer for every position of the window."""

    def _losses(self, model, batch, *options, **more):
        batch.rows, batch.first = batch.rows + batch.first, 0
        return super()._losses(model, batch, *options, **more)


class WholeHead(DocumentLoop):
    """Ours, with the last layer, the head and the loss for every position of the window."""

    def _losses(self, model, batch, slots, learned, keep=True):
        states = model.states(batch.inputs, batch.attend(model, slots, None, False), self.dtype)
        logits = self.lora.head(model, states)
        rows = batch.rows + batch.first
        targets = batch.inputs.roll(-1, 1).scatter(1, rows[..., 0], batch.targets)
        return torch.take_along_dim(ops.cross_entropy(logits, targets), rows[..., 0], 1), logits


def inputs(sizes: dict, lengths: list[int], device: torch.device) -> tuple[GPT, Tensor]:
    """A model with random weights, and random documents of these lengths."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    parts = [torch.randint(2, sizes["vocab_size"], (length,)) for length in lengths]
    for part in parts:
        part[0] = BOS
    return model.to(device).requires_grad_(False), torch.cat(parts)


def contenders(model: GPT, tokens: Tensor, row: Learning) -> dict[str, Callable[[], Tensor]]:
    """Each gives the losses of tokens 1, 2, ..."""
    ids, window = tokens.numpy(), model.config.seq_len

    def run(kind: type[DocumentLoop], plain: bool = True) -> Tensor:
        if plain:  # autograd's own passes back
            with mock.patch("slotfast.model.layers.goes_back", lambda x: False):
                return run(kind, False)
        charged = []
        loop = kind(model, row, window, BOS, unlearned=False)
        loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, charged.append)
        return torch.cat([part.nll for part in sorted(charged, key=lambda part: part.start)])

    return {
        "published": lambda: published_lora.run(model, tokens, row, window, BOS, published_lora.drawing(model, row)),
        "ours": functools.partial(run, DocumentLoop, False),
        "plain passes back": functools.partial(run, DocumentLoop),
        "whole last layer": functools.partial(run, WholeLastLayer),
        "whole head": functools.partial(run, WholeHead),
    }


def compare(model: GPT, tokens: Tensor, row: Learning, rounds: int) -> dict:
    """All contenders in turns: seconds, the ratio, and the ledger in shares of the published loop's time."""
    runs, device = contenders(model, tokens, row), model.tok_emb.weight.device
    times, losses = {who: [] for who in runs}, {}
    for run in contenders(model, tokens[:200], row).values():  # warms up
        run()
    begun, elsewhere = time.perf_counter(), elsewhere_seconds()
    for _ in range(rounds):
        for who, run in runs.items():
            elapsed, losses[who] = wall_ms(run, device)
            times[who].append(elapsed)
    elsewhere = (elsewhere_seconds() - elsewhere) / (time.perf_counter() - begun)
    median = {who: statistics.median(values) for who, values in times.items()}
    whole = median["published"]
    ledger = {
        "passes back with fewer temporaries": (median["plain passes back"] - median["ours"]) / whole,
        "last layer for the chunk's rows": (median["whole last layer"] - median["plain passes back"]) / whole,
        "head and loss for the chunk's rows": (median["whole head"] - median["whole last layer"]) / whole,
        "ended documents, last chunks' pass back, launches": (whole - median["whole head"]) / whole,
        "what is left": median["ours"] / whole,
    }
    means = {who: nll.double().mean().item() for who, nll in losses.items()}
    # float32: AdamW with beta1 = 0 takes a sign of the last bit; the tests compare in float64
    assert max(means.values()) - min(means.values()) < 1e-3, means
    return {
        "ratio": whole / median["ours"],
        "ratio_by_round": [a / b for a, b in zip(times["published"], times["ours"], strict=True)],
        "ledger": ledger,
        "contenders": {who: spread(values) for who, values in times.items()},
        "mean_nll": means,
        "cores_busy_elsewhere": round(elsewhere, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[840, 900], help="of the documents")
    parser.add_argument("--slots", type=int, default=2, help="documents side by side")
    parser.add_argument("--part", type=int, choices=(1, 2, 4), default=2, help="1: #1855's width; 2: half of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model: to see that it runs")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out", help="where the JSON goes; default: this device's folder of bench/results")
    args = parser.parse_args()
    sizes = TINY if args.tiny else CONTEST | {name: CONTEST[name] // args.part for name in DIVIDED}
    model, tokens = inputs(sizes, args.lengths, args.device)
    rank, alpha = 80 // args.part, 144 // args.part
    row = parse_row(f"lora-1855:phases=0,slots={args.slots},rank={rank},alpha={alpha}")
    about = {"lengths": args.lengths, "slots": args.slots, "width": sizes["width"], "rank": rank, "tiny": args.tiny}
    found = provenance(args.device) | about
    found |= compare(model, tokens, row, args.rounds)
    write_json(
        args.out or folder_of(args.device) / f"lora{'-tiny' * args.tiny}{'-whole' * (args.part == 1)}.json", found
    )
    print(json.dumps(found, indent=1))
    print(f"{found['ratio']:.2f} times as fast as the published loop; target {TARGET}")


if __name__ == "__main__":
    main()
