"""The model's forward as it is, by torch.compile, and as CUDA graphs; windows or the stream.

    python -m bench.bench_compile windows | stream  [--rounds 10] [--tiny] [--out FILE]

On a GPU the 11 x 512 model with random weights, in bfloat16, its blocks of fused kernels and of torch's own operators;
elsewhere the shipped model on its text. All modes take turns in one process, over the same batches of windows, or
blocks of the stream, logits included. The first call of each compiles, and takes less where the machine has compiled
the like before. A line of JSON for each kind of blocks.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import torch

from bench.bench_forward import CONTEST, STRIDE
from bench.common import Rows, default_device, provenance
from bench.timing import spread, wall_ms
from slotfast.compiled import Mode
from slotfast.data import TokenStream
from slotfast.eval.forward import Forward, StreamForward, Streaming, WindowForward, block_that_fits, windows_that_fit
from slotfast.eval.inputs import Sources, read_inputs
from slotfast.model import GPT, GPTConfig
from slotfast.windows import Plan
from slotfast.worker import Worker

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
MODES: tuple[Mode, ...] = ("off", "on", "graphs") if ON_GPU else ("off", "on")
TINY = {"vocab_size": 64, "seq_len": 128, "layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16}
TINY |= {"value_layers": (0,), "value_width": 4, "bigram_buckets": 16, "bigram_width": 4, "rope_dims": 4}


def cases(tiny: bool, tokens: int) -> Iterator[tuple[str, GPT, TokenStream]]:
    """What the blocks are made of, a model, and as many tokens of a stream."""
    if not (tiny or ON_GPU):
        inputs = read_inputs(Sources())
        yield "plain", inputs.artifact.model().cast_matrices(torch.float32), inputs.stream
        return
    config = GPTConfig(**TINY) if tiny else CONTEST
    torch.manual_seed(0)
    model = GPT(config).eval().to(DEVICE).cast_matrices(torch.bfloat16 if ON_GPU else torch.float32)
    stream = TokenStream([np.random.default_rng(0).integers(0, config.vocab_size, tokens)])
    for blocks in ("fused", "plain") if ON_GPU else ("plain",):
        model.backend = "auto" if blocks == "fused" else "torch"
        yield blocks, model, stream


@torch.inference_mode()
def compare(model: GPT, stream: TokenStream, way: str, rounds: int) -> dict:
    """Milliseconds of a forward in every mode, seconds of what comes before, and how far logits are from eager ones."""
    config = model.config
    plan = Plan(len(stream) - 1, config.seq_len, STRIDE)
    block = block_that_fits(config.vocab_size, ON_GPU)
    batch = max(1, min(32, windows_that_fit(config.seq_len, config.vocab_size)))
    each = batch if way == "windows" else block // STRIDE
    # Compiles; of the stream, some blocks until it is steady
    before = range(1, 1 + each) if way == "windows" else range(3 * each + config.seq_len // STRIDE)
    forwards: dict[Mode, Forward] = {}
    first: dict[str, float] = {}
    for mode in MODES:
        worker = Worker(DEVICE, torch.bfloat16 if ON_GPU else torch.float32, compile=mode)
        context = (model, stream, plan, [], worker)
        if way == "windows":
            forwards[mode] = WindowForward(*context, batch, True)
        else:
            forwards[mode] = StreamForward(*context, 0, Streaming(0, block), True)
        first[mode] = wall_ms(lambda mode=mode: forwards[mode](before), DEVICE)[0] / 1000
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    off: dict[str, float] = dict.fromkeys(MODES, 0.0)
    for start in range(before.stop, before.stop + rounds * each, each):
        eager = None
        for mode, forward in forwards.items():
            elapsed, found = wall_ms(lambda forward=forward, start=start: forward(range(start, start + each)), DEVICE)
            times[mode].append(elapsed)
            logits = found.logits[:: max(1, each // 4)].float().clone()
            eager = logits if eager is None else eager
            off[mode] = max(off[mode], (logits - eager).abs().max().item())
    assert max(off.values()) < (0.5 if ON_GPU else 1e-3), off
    found = {mode: spread(values) for mode, values in times.items()}
    eager_ms = found["off"]["median_ms"]
    ratio = {mode: eager_ms / found[mode]["median_ms"] for mode in MODES}
    longer = {mode: (first[mode] - first["off"]) * 1000 for mode in MODES}
    saved = {mode: eager_ms - found[mode]["median_ms"] for mode in MODES}
    return {
        "shape": [batch, config.seq_len] if way == "windows" else [1, block],
        "ran": {mode: forward.compiled.mode for mode, forward in forwards.items()},
        "ms_a_forward": found,
        "ratio": ratio,
        "first_s": first,
        "pays_after_forwards": {
            mode: longer[mode] / saved[mode] if saved[mode] > 0 else None for mode in MODES if mode != "off"
        },
        "logits_off": off,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_compile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=("windows", "stream"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="only try the code: figures mean nothing")
    parser.add_argument("--out", help="where the rows go")
    args = parser.parse_args()
    rows = Rows(args.out, provenance(DEVICE))
    rounds = 1 if args.tiny else args.rounds
    tokens = 1 << 15 if args.tiny else (rounds + 6) << 14
    for blocks, model, stream in cases(args.tiny, tokens):
        rows.take({"forward": args.way, "blocks": blocks}, compare, model, stream, args.way, rounds)
    return 1 if rows.failed else 0


if __name__ == "__main__":
    sys.exit(main())
