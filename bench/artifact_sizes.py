"""Bytes of a contest-sized model in our artifact and in the published containers, on the same codes.

    python -m bench.artifact_sizes            prints the table
    python -m bench.artifact_sizes --write    also keeps it in bench/results

The weights are drawn, not trained: row sizes, column sizes and what is left when both are divided out are resampled
from the shipped model's matrices of the same kind (a fresh initialisation would be half zeros). Three ways to round:

    row scales            the published search among clipping ranges, row by row: the full range of 6 bits
    published artifact    PR #1019's scale, not below 1/31, on weights so large that its own container comes to the
                          15,850,000 bytes that its artifacts had
    SDClip                PR #1394's scale, 12.85 standard deviations a row over 31

Containers: xz -9 of torch.save (PR #1019), brotli 11 of the shuffled torch.save (PR #1179), ours. The bound is the
order-0 entropy of each matrix's codes, with everything that is no code as it is in our artifact.
"""

import argparse
import gc
import lzma
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import brotli
import numpy as np
import torch
from torch import Tensor

from slotfast.artifact import Artifact, load_artifact, read_artifact, write_artifact, write_community
from slotfast.artifact.codecs import order0_bytes
from slotfast.artifact.contents import parameter_shapes
from slotfast.artifact.format import read_entries
from slotfast.model import GPTConfig
from slotfast.quantize import QuantizedMatrix, quantize_rows

from .common import ROOT, folder_of, provenance, write_json

LIMIT_BYTES = 16_000_000
PUBLISHED_BYTES = 15_850_000
# What xz takes above the entropy of such codes; only how large the weights are drawn depends on it.
_XZ_OVERHEAD = 1.049


class Statistics:
    """Row sizes, column sizes and the rest of one trained matrix.

    Args:
        matrix: of the shipped model.
    """

    def __init__(self, matrix: QuantizedMatrix, rng: np.random.Generator):
        codes = matrix.codes.numpy() + rng.uniform(-0.5, 0.5, matrix.codes.shape)  # what rounding took
        weight = codes * matrix.scale.numpy().astype(np.float64)[:, None]
        self.size = float(np.sqrt(np.square(weight).mean()))
        square = np.square(weight / self.size) + 1e-12
        self.rows, self.columns = np.ones(len(weight)), np.ones(weight.shape[1])
        for _ in range(8):
            self.columns = np.sqrt((square / self.rows[:, None] ** 2).mean(0))
            self.rows = np.sqrt((square / self.columns**2).mean(1))
        self.rest = (weight / self.size / self.rows[:, None] / self.columns).ravel().astype(np.float32)

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> Tensor:
        """A matrix of other sizes with the same statistics and a root mean square of about 1."""
        rows, columns = rng.choice(self.rows, shape[0])[:, None], rng.choice(self.columns, shape[1])
        return torch.from_numpy((rng.choice(self.rest, shape) * rows * columns).astype(np.float32))


def statistics(rng: np.random.Generator) -> dict[str, Statistics]:
    """By parameter name of the shipped model."""
    shipped = read_artifact(ROOT / "slotfast" / "demo" / "demo.slotfast")
    return {name: Statistics(t, rng) for name, t in shipped.tensors.items() if isinstance(t, QuantizedMatrix)}


def like(name: str, layers: int, known: dict[str, Statistics]) -> Statistics | None:
    """Statistics of the shipped model's matrix of this kind, as deep in it."""
    match = re.match(r"blocks\.(\d+)\.(.*)", name)
    if match is None:
        return known.get(name)
    depth = 1 + max(int(other.split(".")[1]) for other in known if other.startswith("blocks."))
    return known.get(f"blocks.{int(match[1]) * depth // layers}.{match[2]}")


def published(size: float) -> Callable[[Tensor, int], QuantizedMatrix]:
    """PR #1019's rounding of weights of this size: no scale below 1 / limit."""

    def rounded(weight: Tensor, bits: int) -> QuantizedMatrix:
        limit = 2 ** (bits - 1) - 1
        scale = (size * weight.abs().amax(1) / limit).clamp_min(1 / limit).half()
        return _rounded(size * weight, scale, bits)

    return rounded


def sdclip(weight: Tensor, bits: int) -> QuantizedMatrix:
    """PR #1394's rounding."""
    limit = 2 ** (bits - 1) - 1
    return _rounded(weight, ((12.85 if bits == 6 else 20.0) * weight.std(1) / limit).half(), bits)


def _rounded(weight: Tensor, scale: Tensor, bits: int) -> QuantizedMatrix:
    limit = 2 ** (bits - 1) - 1
    codes = (weight / scale.float()[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return QuantizedMatrix(codes, scale, bits)


def artifact(config: GPTConfig, known: dict[str, Statistics], rounded: Callable, seed: int) -> Artifact:
    """A drawn model, quantised."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor | QuantizedMatrix] = {}
    for name, shape in parameter_shapes(config, limit=1 << 40).items():
        source = like(name, config.layers, known)
        if source is None:
            tensors[name] = torch.from_numpy(rng.normal(1, 0.1, shape).astype(np.float32)).half().float()
        else:
            tensors[name] = rounded(source.draw(shape, rng), 6 if name.startswith("blocks.") else 8)
    return Artifact(config, tensors, {}, torch.rand(config.vocab_size).softmax(0))


def matching_size(config: GPTConfig, known: dict[str, Statistics], target: float) -> float:
    """Size of the weights at which one layer's codes, rounded as published, have its share of the target."""
    small = config.model_copy(update={"layers": 1, "value_layers": (0,)})
    low, high = 0.02, 2.0
    for _ in range(8):
        size = (low * high) ** 0.5
        found = artifact(small, known, published(size), 0)
        codes = {n: t.codes.numpy() for n, t in found.tensors.items() if isinstance(t, QuantizedMatrix)}
        layer = sum(order0_bytes(c) for name, c in codes.items() if name.startswith("blocks."))
        total = config.layers * layer + sum(order0_bytes(c) for n, c in codes.items() if not n.startswith("blocks."))
        low, high = (size, high) if total < target else (low, size)
    return size


def measure(found: Artifact, folder: Path) -> dict:
    """Bytes in each container, and seconds of ours."""
    codes = [t.codes.numpy() for t in found.tensors.values() if isinstance(t, QuantizedMatrix)]
    started = time.perf_counter()
    ours = write_artifact(folder / "a.slotfast", found)
    written = time.perf_counter() - started
    loads = []
    for _ in range(4):  # the first imports
        gc.collect()
        started = time.perf_counter()
        load_artifact(folder / "a.slotfast").model()
        loads.append(time.perf_counter() - started)
    in_codes = sum(entry.bytes for entry in read_entries(folder / "a.slotfast") if entry.type.startswith("int"))
    bound = sum(order0_bytes(each) for each in codes)
    xz = write_community(folder / "a.ptz", found)
    raw = lzma.decompress((folder / "a.ptz").read_bytes())
    return {
        "weights": sum(each.size for each in codes),
        "order0_code_bytes": round(bound),
        "code_bytes": in_codes,
        "codecs": sorted({entry.codec for entry in read_entries(folder / "a.slotfast")}),
        "bytes": ours,
        "bound_bytes": round(ours - in_codes + bound),
        "xz_bytes": xz,
        "brotli_bytes": len(brotli.compress(b"BSHF\2\0" + raw[::2] + raw[1::2], quality=11)),
        "write_seconds": round(written, 2),
        "load_seconds": [round(each, 2) for each in loads[1:]],
    }


def code_bytes() -> int:
    """What a submission of all our evaluation code would add: every module of the package, compressed together."""
    sources = sorted((ROOT / "slotfast").rglob("*.py"))
    return len(lzma.compress(b"".join(path.read_bytes() for path in sources), preset=9))


def table(found: dict) -> str:
    lines = [
        f"{'':<22}{'bits/weight':>12}{'ours':>12}{'order 0':>12}{'xz':>12}{'brotli':>12}{'load s':>8}{'write s':>9}"
    ]
    for name, row in found["models"].items():
        lines.append(
            f"{name:<22}{8 * row['code_bytes'] / row['weights']:>12.3f}{row['bytes']:>12,}{row['bound_bytes']:>12,}"
            f"{row['xz_bytes']:>12,}{row['brotli_bytes']:>12,}{sorted(row['load_seconds'])[1]:>8.2f}"
            f"{row['write_seconds']:>9.1f}"
        )
    lines.append(f"all modules of slotfast, xz: {found['code_bytes']:,} bytes; the limit is {LIMIT_BYTES:,} with code")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="keep the table in bench/results")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    known, config = statistics(rng), GPTConfig()
    size = matching_size(config, known, PUBLISHED_BYTES / _XZ_OVERHEAD)
    ways = {"row scales": quantize_rows, "published artifact": published(size), "SDClip": sdclip}
    found = {"provenance": provenance("cpu"), "published_weight_size": size, "code_bytes": code_bytes(), "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        shipped = read_artifact(ROOT / "slotfast" / "demo" / "demo.slotfast")
        found["models"]["the shipped model"] = measure(shipped, Path(folder))
        for name, rounded in ways.items():
            found["models"][name] = measure(artifact(config, known, rounded, 1), Path(folder))
            print(f"{name}: measured", flush=True)
    print(table(found))
    if arguments.write:
        write_json(folder_of("cpu") / "artifact_sizes.json", found)


if __name__ == "__main__":
    main()
