"""What learning costs beside the forward that it learns from: target P12.

    python -m bench.learn_cost [--model FOLDER --text FILE] [--row learn] [--tokens 2048] [--rounds 7] [--out FILE]

A row scores a chunk, learns from it and goes on. The same stream is forwarded without learning, in blocks of the
chunk's size and of larger ones; contenders take turns, and what counts is the ratio of medians. Memory is the most
bytes of tensors alive at a time, counted, weights apart: of the row along the stream, and of one training step on its
last chunk behind the same keys. On a GPU the JSON projects the contest's text on eight, the stream cut into contiguous
pieces that learn apart.
"""

import argparse
import functools
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common import default_device, folder_of, provenance, write_json
from bench.timing import elsewhere_seconds, spread, wall_ms
from slotfast.contest import VALIDATION_TOKENS, projected_seconds
from slotfast.errors import InputError
from slotfast.eval.inputs import Sources, read_inputs
from slotfast.foreign.models import LanguageModel, cached_forward, language_model
from slotfast.learn import FrozenLoop, Learning, LearningLoop, Lora, parse_row
from slotfast.model import GPT

SAME_BLOCK, FASTEST_BLOCK = 3.2, 6.0  # times the forward alone, at most
_MEASURED = "lora", "adamw", "stale", "stream"


class Alive(TorchDispatchMode):
    """Bytes of tensors that operators have made and that are still there; `most` at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        self._known.add(name)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def memory(model: GPT | LanguageModel, row: Learning, ids: np.ndarray, window: int, sinks: int) -> dict[str, int]:
    """Most bytes alive: of the row along the stream, and in a training step on its last chunk behind the same keys."""
    with Alive() as alive:
        loop = LearningLoop(model, row, window, sinks)
        loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, lambda charged: None)
    along = alive.most
    del loop
    tokens = torch.from_numpy(ids.astype(np.int64)).to(next(model.parameters()).device)[None]
    model.requires_grad_(False)
    with Alive() as alive:
        cached = cached_forward(model, window, sinks, None)
        learner = Lora(model, row.rank, row.projections, row.alpha)
        optimizer = torch.optim.AdamW(learner.parameters, row.lr, row.betas, row.eps, row.decay, fused=True)
        last = tokens.size(1) - 1 - row.chunk
        with torch.no_grad():
            for begin in range(0, last - row.chunk, row.chunk):
                cached(tokens[:, begin : min(begin + row.chunk, last - row.chunk)])

        def step(begin: int) -> None:
            with learner.attached():
                logits = learner.head(model, cached(tokens[:, begin : begin + row.chunk]))[0]
                F.cross_entropy(logits, tokens[0, begin + 1 : begin + row.chunk + 1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        step(last - row.chunk)  # from here on the optimiser remembers something
        alive.most = alive.now
        step(last)
    return {"row": along, "training_step": alive.most, "times": along / alive.most}


def contenders(
    model: GPT | LanguageModel, row: Learning, ids: np.ndarray, window: int, sinks: int
) -> dict[str | int, Callable[[], None]]:
    """The row, and by the size of its blocks the forward alone."""

    def forward(block: int) -> None:
        loop = FrozenLoop(model, window, sinks, block=block)
        loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, lambda charged: None)

    def learn() -> None:
        loop = LearningLoop(model, row, window, sinks)
        loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, lambda charged: None)

    blocks = [row.chunk]
    while 2 * blocks[-1] <= window:
        blocks.append(2 * blocks[-1])
    return {"row": learn} | {block: functools.partial(forward, block) for block in blocks}


def cost(
    model: GPT | LanguageModel, row: Learning, ids: np.ndarray, window: int, sinks: int, rounds: int
) -> dict[str, Any]:
    """Times of all contenders in turns, after one round that warms up, and what they come to."""
    runs, device = contenders(model, row, ids, window, sinks), next(model.parameters()).device
    times: dict[str | int, list[float]] = {who: [] for who in runs}
    begun, elsewhere = 0.0, 0.0
    for number in range(rounds + 1):
        if number == 1:
            times = {who: [] for who in runs}
            begun, elsewhere = time.perf_counter(), elsewhere_seconds()
        for who, run in runs.items():
            times[who].append(wall_ms(run, device)[0])
    elsewhere = (elsewhere_seconds() - elsewhere) / (time.perf_counter() - begun)
    median = {who: statistics.median(values) for who, values in times.items()}
    learned, same = median.pop("row"), median[row.chunk]
    fastest = min(median, key=median.__getitem__)
    seconds = projected_seconds(VALIDATION_TOKENS, len(ids) - 1, learned / 1000)
    return {
        "row": row.name,
        "chunk": row.chunk,
        "times_same_block": learned / same,
        "times_fastest_block": learned / median[fastest],
        "fastest_block": fastest,
        "projected_seconds_8gpu": seconds if device.type == "cuda" else None,
        "contenders": {str(who): spread(values) for who, values in times.items()},
        "cores_busy_elsewhere": round(elsewhere, 2),
        "alive_bytes": memory(model, row, ids, window, sinks),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.learn_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as of slotfast eval; the shipped model by default")
    parser.add_argument("--tokenizer", help="as of slotfast eval")
    parser.add_argument("--text", help="as of slotfast eval")
    parser.add_argument("--row", default="learn", help="a preset that learns with LoRA, NAME:key=value,...")
    parser.add_argument("--tokens", type=int, default=2048, help="of the stream")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens that one attends to")
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out", help="where the JSON goes; default: this device's folder of bench/results")
    args = parser.parse_args()
    try:
        found = run(args)
    except InputError as error:
        sys.exit(f"learn_cost: {error}")
    name = "shipped" if args.model is None else found["model"].lower()
    write_json(args.out or folder_of(args.device) / f"learn-cost-{name}.json", found)
    print(json.dumps(found, indent=1))
    print(
        f"{found['row']}: {found['times_same_block']:.2f} times the forward alone in blocks of {found['chunk']} "
        f"(target {SAME_BLOCK:g}), {found['times_fastest_block']:.2f} in the fastest, of {found['fastest_block']} "
        f"(target {FASTEST_BLOCK:g}); memory {found['alive_bytes']['times']:.2f} times that of a training step"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for; raises InputError on bad input."""
    row = parse_row(args.row)
    if not isinstance(row, Learning) or (row.what, row.optimizer, row.keys, row.scope) != _MEASURED or row.top:
        raise InputError(f"--row {args.row!r}: expected one stream that LoRA learns from, by AdamW and with old keys")
    sources = Sources(model=args.model, tokenizer=args.tokenizer, text=args.text, max_tokens=args.tokens + 1)
    inputs = read_inputs(sources)
    model, _ = language_model(inputs.artifact.model())
    model = model.eval().to(args.device)
    ids = inputs.text.stream.read(0, args.tokens + 1)
    about = {"model": type(model.module).__name__ if args.model else "shipped", "tokens": len(ids) - 1}
    about |= {"sha256": inputs.text.stream.sha256(), "seq_len": args.seq_len, "sinks": args.sinks}
    return {**provenance(args.device), **about, **cost(model, row, ids, args.seq_len, args.sinks, args.rounds)}


if __name__ == "__main__":
    main()
