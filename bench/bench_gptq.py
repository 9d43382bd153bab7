"""Quantisation: what rounding, GPTQ and pruning cost in loss, and what calibration and rounding cost in time.

    python -m bench.bench_gptq [--steps 150] [--windows 48] [--out FILE]
    python -m bench.bench_gptq --size full [--out FILE]

The first compares the loss of quantised models with that of the float one, a small model that is trained on from the
shipped one until its weights are off that one's grid. Text: held-out modules of the standard library. Sizes are the
entropy of the codes, not files. The second gives the processor seconds of each stage at the contest's 11 x 512; its
weights are random and stand for no loss.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import slotfast
from bench.common import folder_of, provenance, write_json
from bench.timing import elsewhere_seconds
from slotfast import corpus
from slotfast.artifact import Artifact, read_artifact
from slotfast.data import Tokenizer
from slotfast.generate import sample
from slotfast.model import GPT, GPTConfig
from slotfast.quantize import Quantized, QuantizedMatrix, collect_hessians, output_costs, prune_to_size, quantize_model
from slotfast.stream import CachedForward

LENGTH = 512
DEMO = Path(slotfast.__file__).parent / "demo"
METHODS = {
    "rows": {"method": "rows"},
    "gptq": {"method": "gptq"},
    "gptq, scales by weight error": {"method": "gptq", "choose": "weights"},
    "gptq, output matrix by rows": {"method": "gptq", "embeddings": "rows"},
    "rows, sdclip": {"method": "rows", "clip": "sdclip"},
    "gptq, sdclip": {"method": "gptq", "clip": "sdclip"},
}


def texts() -> tuple[Tensor, Tensor]:
    """Token windows [n, LENGTH + 1] to train on and of documents held out."""
    tokenizer = Tokenizer(DEMO / "demo.model")
    documents = list(corpus.training_documents())
    np.random.default_rng(0).shuffle(documents)
    parts = [], []
    for i, document in enumerate(documents):
        parts[i % 32 == 0].append(document)
    streams = (torch.from_numpy(tokenizer.encode_documents(part)[0].astype(np.int64)) for part in parts)
    return tuple(stream[: len(stream) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1) for stream in streams)


def float_model(windows: Tensor, steps: int) -> GPT:
    """The shipped model, trained on for so many steps of 2,048 tokens."""
    model = read_artifact(DEMO / "demo.slotfast").model().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1 - i / steps))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (4,), generator=generator)]
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return model.requires_grad_(False)


class Judge:
    """The float model's loss and predictions on held-out windows [W, LENGTH + 1], and how far another's are off."""

    def __init__(self, model: GPT, windows: Tensor):
        self.config, self.windows = model.config, windows
        self.expected = [self._log_shares(model, window) for window in windows]

    @torch.inference_mode()
    def _log_shares(self, model: GPT, window: Tensor) -> Tensor:
        return model.head(model.hidden(window[None, :-1]))[0].log_softmax(-1)

    def nats(self) -> float:
        pairs = zip(self.expected, self.windows, strict=True)
        return -float(torch.stack([row.gather(1, w[1:, None]).mean() for row, w in pairs]).mean())

    def __call__(self, tensors) -> dict:
        """Nats a token: increase of the loss with its standard error over windows, and the divergence."""
        model, losses, divergences = Artifact(self.config, tensors).model(), [], []
        for window, expected in zip(self.windows, self.expected, strict=True):
            got = self._log_shares(model, window)
            losses.append((expected - got).gather(1, window[1:, None]).mean())
            divergences.append((expected.exp() * (expected - got)).sum(1).mean())
        losses = torch.stack(losses).double()
        return {
            "increase_nats": float(losses.mean()),
            "increase_se_nats": float(losses.std() / math.sqrt(len(losses))),
            "divergence_nats": float(torch.stack(divergences).double().mean()),
        }


def entropy_bytes(tensors) -> int:
    """Bytes that a perfect coder of single codes needs for all matrices, without scales."""
    bits = 0.0
    for matrix in tensors.values():
        if isinstance(matrix, QuantizedMatrix):
            counts = torch.bincount(matrix.codes.flatten().int() + 128).double()
            bits += matrix.codes.numel() * float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)
    return round(bits / 8)


def loss(steps: int, windows: int) -> dict:
    """What each method, and pruning by each order, does to a trained model."""
    train, held_out = texts()
    model = float_model(train, steps)
    judge = Judge(model, held_out[:windows])
    sampled = list(sample(model, 32, LENGTH))
    drawn = list(train[:32, :-1].split(8))
    found = {"nats": judge.nats(), "tokens": windows * LENGTH, "methods": {}, "pruning": {}}
    for name, options in METHODS.items():
        found["methods"][name] = _row(judge, quantize_model(model, sampled, **options))
    found["methods"]["gptq, training text"] = _row(judge, quantize_model(model, drawn, method="gptq"))
    hessians, _ = collect_hessians(model, sampled)
    for clip, shares in (("percentile", (0.005, 0.015)), ("sdclip", (0.02, 0.06))):
        tensors = quantize_model(model, sampled, method="gptq", clip=clip).tensors
        orders = {"output error": output_costs(tensors, hessians), "squared scale": None}
        for share in shares:
            target = round((1 - share) * entropy_bytes(tensors))
            for order, costs in orders.items():
                pruned, count = prune_to_size(tensors, target, entropy_bytes, costs)
                name = f"gptq, {clip}, {100 * share:g}% smaller by {order}"
                found["pruning"][name] = judge(pruned) | {"entropy_bytes": entropy_bytes(pruned), "pruned": count}
    return found


def _row(judge: Judge, quantized: Quantized) -> dict:
    return judge(quantized.tensors) | {"entropy_bytes": entropy_bytes(quantized.tensors)}


def full_size(windows: int, length: int) -> dict:
    """Processor seconds of each stage at 11 x 512; the contest's runs sample 64 windows of 2,048."""
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised parts would make inputs zero
            if parameter.ndim == 2:
                parameter.normal_(0, 0.04)
    model.eval().requires_grad_(False)
    found = {"windows": windows, "length": length, "parameters": sum(p.numel() for p in model.parameters())}
    tokens = torch.randint(model.config.vocab_size, (windows, length))
    cached, steps = CachedForward(model, length, batch=windows), []
    for column in tokens.T:
        steps.append(_seconds(lambda column=column: model.head(cached(column[:, None]))))
    found |= {
        "sampling_s": sum(steps),
        "first_steps_ms": 1000 * float(np.median(steps[1:101])),
        "last_steps_ms": 1000 * float(np.median(steps[-100:])),
        "forward_s": _seconds(lambda: model.head(model.hidden(tokens))),  # a step's cost without a cache
        "calibration_s": _seconds(collect_hessians, model, [tokens]),
        "rounding_s": _seconds(quantize_model, model, [tokens[:1, :64]], method="gptq"),
    }
    found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def _seconds(function: Callable, *arguments, **options) -> float:
    """Processor seconds of a call: on one thread, what others do on the machine hardly counts."""
    started = time.process_time()
    function(*arguments, **options)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--steps", type=int, default=150, help="of training, small size")
    parser.add_argument("--windows", type=int, help="held-out windows (48), or at full size windows sampled (8)")
    parser.add_argument("--length", type=int, default=2048, help="of those sampled, full size")
    parser.add_argument("--out", help="default: gptq.json, or gptq-full.json, among this machine's results")
    arguments = parser.parse_args()
    begun, elsewhere = time.perf_counter(), elsewhere_seconds()
    if arguments.size == "small":
        found = loss(arguments.steps, arguments.windows or 48)
    else:
        found = full_size(arguments.windows or 8, arguments.length)
    elsewhere = (elsewhere_seconds() - elsewhere) / (time.perf_counter() - begun)
    found |= {"cores_busy_elsewhere": round(elsewhere, 2), **provenance("cpu")}
    name = "gptq.json" if arguments.size == "small" else "gptq-full.json"
    write_json(arguments.out or folder_of("cpu") / name, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
