"""The performance targets that are not a kernel alone: one launch for the whole fit, 6-bit products, the evaluation.

    python -m bench.targets solve | matmul | evaluate  [--tiny] [--out FILE]

solve      the published loop against one launch for all windows; per window
matmul     int6_matmul against the library's bf16 product: large matrices with cold weights, and the model's shapes for
           every M, where weights stay in L2
evaluate   slotfast.eval on the 11 x 512 model with random weights, as windows and as a stream: tokens a
           second, and what `causal` adds to `none`

A line of JSON a figure; what fails costs its own line.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from bench import bench_solve
from bench.common import ROOT, Rows, default_device, provenance
from bench.timing import is_small, measure
from slotfast.artifact import Artifact, write_artifact
from slotfast.data import Tokenizer, write_shard
from slotfast.eval.__main__ import main as evaluate_command
from slotfast.kernels import dequantize_int6, int6_matmul, pack_int6
from slotfast.model import GPT, GPTConfig

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
DEMO = ROOT / "slotfast" / "demo" / "demo.model"
LARGE = [(4096, 4096), (8192, 8192), (4096, 14336)]  # (N, K)
MODEL = [(512, 512), (256, 512), (1536, 512), (2048, 512), (512, 1536)]
ROWS = [1, 16, 17, 64, 65, 256, 257, 1024, 65536]  # both sides of every border in `_config`


def solve(rows: Rows, tiny: bool) -> None:
    size = {"windows": 1, "length": 128, "vocabulary": 32} if tiny else {}
    inputs = bench_solve.synthetic(DEVICE, **size)
    many, more = (1, 2) if tiny else (8192, 32768)
    rows.take({"what": "one launch"}, bench_solve.one_launch, *inputs, many)
    for name in ("shared", "windows"):
        rows.take({"what": name}, bench_solve.against_the_loop, name, *inputs, rounds=1, ours_a_round=2)
    rows.take({"what": "one launch, bf16 P"}, bench_solve.one_launch, *inputs, many, probs_dtype=torch.bfloat16)
    rows.take({"what": "majorise, ridge 3"}, bench_solve.majorised, *inputs, many)
    rows.take({"what": "one launch, more windows"}, bench_solve.one_launch, *inputs, more)


def _ms_a_call(calls: list, small: bool) -> float:
    """Of calls in turns on several buffers: no warm cache."""
    following = itertools.cycle(calls)
    return statistics.median(measure(lambda: next(following)(), DEVICE, seconds=0.05, small=small, calls=len(calls)))


@torch.no_grad()
def _product(m: int, n: int, k: int, copies: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-31, 32, (n, k), generator=generator, dtype=torch.int8).to(DEVICE)
    scale = (torch.rand(n, generator=generator) * 0.05 + 0.001).half().to(DEVICE)
    dtype = torch.bfloat16 if ON_GPU else torch.float32  # Triton's interpreter cannot multiply bf16
    x = torch.randn(m, k, generator=generator).to(DEVICE, dtype)
    packed = [pack_int6(codes, scale) for _ in range(copies)]
    dense = [dequantize_int6(weight, dtype) for weight in packed]
    expected = x.double() @ dequantize_int6(packed[0], torch.float32).double().T
    for got in (int6_matmul(x, packed[0]), int6_matmul(x, packed[0], dense[0])):
        off = ((got.double() - expected).norm() / expected.norm()).item()
        assert off <= 1e-2, f"{m} x {n} x {k}: {off:.2g} off float64"
    contenders = {
        "int6": [lambda w=w: int6_matmul(x, w) for w in packed],
        "int6, dense kept": [lambda w=w, d=d: int6_matmul(x, w, d) for w, d in zip(packed, dense, strict=True)],
        "library": [lambda d=d: F.linear(x, d) for d in dense],
    }
    small = is_small(contenders["library"][0], DEVICE)
    times = {name: _ms_a_call(calls, small) for name, calls in contenders.items()}
    bytes_kept = {"int6": packed[0].low.nbytes + packed[0].high.nbytes + scale.nbytes, "library": dense[0].nbytes}
    ratio = {name: times["library"] / ms for name, ms in times.items() if name != "library"}
    return {"ms": times, "ratio": ratio, "timed_by": "graph" if small else "events", "weight_bytes": bytes_kept}


def matmul(rows: Rows, tiny: bool) -> None:
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 1 << 25
    shapes = [("large", m, n, k, 1 + 3 * cache // (n * k * 3 // 4)) for (n, k), m in itertools.product(LARGE, (1, 16))]
    shapes += [("model", m, n, k, 1) for m, (n, k) in itertools.product(ROWS, MODEL)]
    for of, m, n, k, copies in [("model", 3, 16, 128, 2)] if tiny else shapes:
        rows.take({"of": of, "m": m, "n": n, "k": k}, _product, m, n, k, copies)


def evaluate(rows: Rows, tiny: bool) -> None:
    small = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16, "rope_dims": 4, "value_layers": (0,)}
    small |= {"seq_len": 128, "bigram_buckets": 16, "bigram_width": 4, "value_width": 4}
    vocabulary = Tokenizer(str(DEMO)).vocab_size
    config = GPTConfig(vocab_size=vocabulary, **(small if tiny else {}))
    most = {"windows": 64 * 3200, "stream": 1 << 22} if ON_GPU else {"windows": 256, "stream": 256}
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).integers(3, vocabulary, config.seq_len + max(most.values()))
    tokens[::1000] = 1  # documents
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("model.slotfast", "tokens_000000.bin", "found.json")]
        # random weights only take time to encode
        with mock.patch("slotfast.artifact.codecs.encode", lambda array: ("raw", array.tobytes())):
            write_artifact(paths[0], Artifact.from_model(GPT(config), {}))
        write_shard(paths[1], tokens.astype(np.uint16))

        def run(forward: str, preset: str, scored: int) -> dict:
            inputs = ["--artifact", paths[0], "--tokens", paths[1], "--tokenizer", str(DEMO), "--device", str(DEVICE)]
            inputs += ["--forward", forward, "--preset", preset, "--max-tokens", str(config.seq_len + scored)]
            evaluate_command([*inputs, "--json", paths[2]])
            found = json.loads(Path(paths[2]).read_text())
            per_window = found["tokens"] / found["windows"]
            named = {"tokens": found["tokens"], "tokens_per_second": per_window * found["windows_per_second"]}
            kept = ("windows", "windows_per_second", "projected_seconds_8gpu", "peak_memory_bytes", "seconds", "plan")
            return named | {name: found[name] for name in kept}

        for forward, preset in itertools.product(most, ("none", "causal")):
            what = {"forward": forward, "preset": preset}
            warm = rows.take(what | {"warm_up": True}, run, forward, preset, most[forward] // 8)
            if "failed" not in warm:
                rows.take(what, run, forward, preset, most[forward])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--tiny", action="store_true", help="only try the code: figures mean nothing")
    parser.add_argument("--out", help="where the rows go")
    args = parser.parse_args()
    rows = Rows(args.out, provenance(DEVICE))
    TARGETS[args.target](rows, args.tiny)
    return 1 if rows.failed else 0


TARGETS = {"solve": solve, "matmul": matmul, "evaluate": evaluate}

if __name__ == "__main__":
    sys.exit(main())
