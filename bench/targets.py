"""The performance targets that are not a kernel alone: one launch for the whole fit, 6-bit products, the evaluation.

    python -m bench.targets solve | matmul | evaluate  [--tiny] [--out FILE]

solve      the published loop against one launch for all windows; per window
matmul     int6_matmul against the library's bf16 product: large matrices with cold weights, and the model's shapes for
           every M, where weights stay in L2
evaluate   slotfast.eval on the 11 x 512 model with random weights: windows a second, and what `causal` adds to `none`
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from bench import bench_solve
from bench.common import ROOT, default_device, measure, provenance, write_json
from slotfast.kernels import dequantize_int6, int6_matmul, pack_int6

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
LARGE = [(4096, 4096), (8192, 8192), (4096, 14336)]  # (N, K)
MODEL = [(512, 512), (256, 512), (1536, 512), (2048, 512), (512, 1536)]
ROWS = [1, 16, 17, 64, 65, 256, 257, 1024, 65536]  # both sides of every border in `_config`


def solve(tiny: bool) -> dict:
    size = {"windows": 2, "length": 128, "vocabulary": 32} if tiny else {}
    logits, targets = bench_solve.synthetic(DEVICE, **size)
    found = bench_solve.compare(logits, targets, rounds=1, ours_a_round=2)
    published_ms = found["shared"]["ms_a_window"]["published"]
    found["one launch"] = [
        bench_solve.one_launch(logits, targets, published_ms, windows) for windows in ([4] if tiny else [8192, 32768])
    ]
    return found


def _ms_a_call(calls: list) -> float:
    """Mean of several calls inside one graph: no launch gaps; with several buffers, no warm cache."""
    if not ON_GPU:
        return sum(min(measure(call, DEVICE, repeats=1)) for call in calls) / len(calls)
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(lambda: [call() for call in calls], rep=2, return_mode="median") / len(calls)


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
    times = {
        "int6": _ms_a_call([lambda w=w: int6_matmul(x, w) for w in packed]),
        "int6, dense kept": _ms_a_call([lambda w=w, d=d: int6_matmul(x, w, d) for w, d in zip(packed, dense)]),  # noqa: B905
        "library": _ms_a_call([lambda d=d: F.linear(x, d) for d in dense]),
    }
    bytes_kept = {"int6": packed[0].low.nbytes + packed[0].high.nbytes + scale.nbytes, "library": dense[0].nbytes}
    ratio = {name: times["library"] / ms for name, ms in times.items() if name != "library"}
    return {"m": m, "n": n, "k": k, "ms": times, "ratio": ratio, "weight_bytes": bytes_kept}


def matmul(tiny: bool):
    """Yields a row a shape."""
    if tiny:
        yield _product(3, 16, 128, 2)
        return
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 1 << 25
    for (n, k), m in itertools.product(LARGE, (1, 16)):
        yield {"of": "large", **_product(m, n, k, copies=1 + 3 * cache // (n * k * 3 // 4))}
    for (n, k), m in itertools.product(MODEL, ROWS):
        yield {"of": "model", **_product(m, n, k, copies=1)}


def evaluate(tiny: bool) -> dict:
    try:
        from slotfast.artifact import Artifact, write_artifact
        from slotfast.data import Tokenizer, write_shard
        from slotfast.eval.__main__ import main as evaluate_command
        from slotfast.model import GPT, GPTConfig
    except ImportError as missing:
        return {"skipped": f"the evaluation cannot be imported: {missing}"}
    demo = ROOT / "slotfast" / "demo" / "demo.model"
    if not demo.exists():
        return {"skipped": "slotfast/demo/demo.model is not there: the evaluation needs a tokenizer"}
    small = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 16, "rope_dims": 4, "value_layers": (0,)}
    small |= {"seq_len": 128, "bigram_buckets": 16, "bigram_width": 4, "value_width": 4}
    vocabulary = Tokenizer(str(demo)).vocab_size
    config = GPTConfig(vocab_size=vocabulary, **(small if tiny else {}))
    torch.manual_seed(0)
    windows = 4 if tiny else 3200 if ON_GPU else 32
    tokens = np.random.default_rng(0).integers(3, vocabulary, config.seq_len + 64 * windows)
    tokens[::1000] = 1  # documents
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("model.slotfast", "tokens_000000.bin", "found.json")]
        # random weights only take time to encode
        with mock.patch("slotfast.artifact.codecs.encode", lambda array: ("raw", array.tobytes())):
            write_artifact(paths[0], Artifact.from_model(GPT(config), {}))
        write_shard(paths[1], tokens.astype(np.uint16))
        for preset in ("none", "causal", "none", "causal"):  # the first time, to warm up
            inputs = ["--artifact", paths[0], "--tokens", paths[1], "--tokenizer", str(demo)]
            evaluate_command(
                [*inputs, "--device", str(DEVICE), "--preset", preset, "--stride", "64", "--json", paths[2]]
            )
            seconds[preset] = json.loads(Path(paths[2]).read_text())
    none, causal = (seconds[preset]["windows_per_second"] for preset in ("none", "causal"))
    return {
        "windows": seconds["none"]["windows"],
        "windows_per_second": {"none": none, "causal": causal},
        "projected_seconds_8gpu": {"none": 969_088 / 8 / none, "causal": 969_088 / 8 / causal},
        "causal_costs": none / causal - 1,
        "seconds": {preset: found["seconds"] for preset, found in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=["solve", "matmul", "evaluate"])
    parser.add_argument("--tiny", action="store_true", help="only try the code: figures mean nothing")
    parser.add_argument("--out", help="where the JSON goes")
    args = parser.parse_args()
    found = provenance(DEVICE)
    if args.target == "matmul":
        found["rows"] = []
        for row in matmul(args.tiny):
            found["rows"].append(row)
            write_json(args.out, found)
            ratios = ", ".join(f"{name} {value:.2f}x" for name, value in row["ratio"].items())
            print(f"M {row['m']}, N {row['n']}, K {row['k']}: {ratios}", flush=True)
    else:
        found |= {"solve": solve, "evaluate": evaluate}[args.target](args.tiny)
        write_json(args.out, found)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
