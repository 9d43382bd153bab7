"""The model's forward in three ways: the published loop's, windows, and the stream. Target P10.

    python -m bench.bench_forward [--rounds 3] [--out FILE]

"published" is how the published loops do it: every window whole, logits and losses at all of its positions, of which
the last `stride` are kept. "windows" is `--forward windows`: the last layer and the output matrix for scored positions
only. "stream" is `--forward stream`: every token once. All three take turns in one process over the same tokens;
milliseconds are for each scored token, losses included, adaptation none.

The ceiling is the ratio of floating-point operations of "published" and "stream", counted from the model's shape:
products with weights, and of queries with as many keys as they see. It is the ratio that a machine would reach if all
operations cost the same.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import default_device, folder_of, provenance, write_json
from bench.timing import spread, wall_ms
from slotfast.data import TokenStream
from slotfast.eval.forward import Forward, StreamForward, Streaming, WindowForward, block_that_fits, windows_that_fit
from slotfast.eval.inputs import Sources, read_inputs
from slotfast.model import GPT, GPTConfig
from slotfast.slot import Adjusted
from slotfast.windows import Plan
from slotfast.worker import Worker

TARGET = 0.75  # of the ceiling
STRIDE = 64
CONTEST = GPTConfig(vocab_size=1024, seq_len=2048, layers=11, width=512, heads=8, kv_heads=4, mlp_width=1536)


@dataclass(frozen=True)
class Case:
    """A model, a stream, and how many windows of it are forwarded a round; the stream shares all of them out."""

    name: str
    model: GPT
    stream: TokenStream
    windows: int


def cases(device: torch.device | str) -> Iterator[Case]:
    """The shipped model on its text, and the contest's shape with random weights on random tokens."""
    inputs = read_inputs(Sources())
    yield Case("512/64, shipped model", inputs.artifact.model().to(device), inputs.stream, 128)
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, CONTEST.vocab_size, 40_000)
    yield Case("2048/64, 11 x 512", GPT(CONTEST).eval().to(device), TokenStream([tokens]), 16)


def operations(model: GPT, keys: float) -> float:
    """Of a token that sees so many keys: two for each weight that it meets, four for each key and channel."""
    config = model.config
    blocks = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in model.blocks]
    weights = sum(blocks[layer] for layer in model.order)
    rest = ((name, p) for name, p in model.named_parameters() if not name.startswith("blocks."))
    weights += sum(p.numel() for name, p in rest if name.endswith("proj.weight"))
    weights += config.vocab_size * config.width
    return 2 * weights + 4 * len(model.order) * config.width * keys


def published(case: Case, plan: Plan, batch: int, device: torch.device | str) -> Callable[[range], Tensor]:
    """The published loop's way: the losses of the tokens that windows score."""
    model, length = case.model, plan.seq_len

    def run(indices: range) -> Tensor:
        losses = []
        for first in range(indices.start, indices.stop, batch):
            windows = [plan[index] for index in range(first, min(first + batch, indices.stop))]
            rows = [torch.from_numpy(case.stream.read(w.start, w.start + length + 1).astype(np.int64)) for w in windows]
            tokens = torch.stack(rows).to(device)
            logits = model.head(model.hidden(tokens[:, :-1], torch.float32))
            nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            losses.append(nll.view(len(rows), length)[:, -plan.stride :].flatten())
        return torch.cat(losses)

    return run


def ours(forward: Forward, plan: Plan, batch: int) -> Callable[[range], Tensor]:
    """One of our forwards: the losses of the tokens that windows score."""

    def run(indices: range) -> Tensor:
        losses = []
        for first in range(indices.start, indices.stop, batch):
            found = forward(range(first, min(first + batch, indices.stop)))
            losses.append(Adjusted(found).nll())
        return torch.cat(losses)

    return run


@torch.inference_mode()
def compare(case: Case, device: torch.device | str, rounds: int) -> dict:
    """All three ways in turns, each over the next windows in every round; checks that they agree in their losses."""
    length, vocabulary = case.model.config.seq_len, case.model.config.vocab_size
    plan = Plan(len(case.stream) - 1, length, STRIDE)
    batch = max(1, min(32, case.windows, windows_that_fit(length, vocabulary)))
    context = (case.model, case.stream, plan, [], Worker(device))
    streaming = Streaming(0, block_that_fits(vocabulary, torch.device(device).type == "cuda"))
    ways = {
        "published": published(case, plan, batch, device),
        "windows": ours(WindowForward(*context, batch), plan, batch),
        "stream": ours(StreamForward(*context, 1, streaming), plan, batch),
    }
    per_round = {"published": case.windows, "windows": case.windows, "stream": (len(plan) - 1) // (rounds + 1)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    at, losses = dict.fromkeys(ways, 1), {}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, way in ways.items():
            indices = range(at[name], at[name] + per_round[name])
            elapsed, losses[name] = wall_ms(lambda way=way, indices=indices: way(indices), device)
            at[name] = indices.stop
            if turn:
                times[name].append(elapsed / (len(indices) * STRIDE))
    torch.testing.assert_close(losses["windows"], losses["published"], rtol=1e-3, atol=1e-3)
    found = {name: spread(values) for name, values in times.items()}
    counted = {
        "published": length / STRIDE * operations(case.model, (length + 1) / 2),
        "stream": operations(case.model, length),
    }
    ratio = found["published"]["median_ms"] / found["stream"]["median_ms"]
    ceiling = counted["published"] / counted["stream"]
    return {
        "ms_a_token": found,
        "operations_a_token": counted,
        "ceiling": ceiling,
        "ratio": ratio,
        "share_of_ceiling": ratio / ceiling,
        "windows_ratio": found["published"]["median_ms"] / found["windows"]["median_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_forward", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", help="where the JSON goes; default: this device's folder of bench/results")
    args = parser.parse_args()
    found = {**provenance(args.device), "cases": {}}
    for case in cases(args.device):
        found["cases"][case.name] = row = compare(case, args.device, args.rounds)
        print(
            f"{case.name}: stream {row['ratio']:.2f} times as fast as the published loop's forward, "
            f"{row['share_of_ceiling']:.0%} of the counted {row['ceiling']:.2f} (target {TARGET:.0%}); "
            f"windows {row['windows_ratio']:.2f}",
            flush=True,
        )
    write_json(args.out or folder_of(args.device) / "forward.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
