"""What this machine can do: bytes a second of a copy, operations a second of a matrix product. Measured, not quoted.

python -m bench.roofs [--device cuda|cpu] [--out FILE]
"""

import argparse
import sys

import torch

from .common import Rows, default_device, provenance
from .timing import measure, spread


def copy_bandwidth(device, *, copy_bytes: int | None = None, repeats: int = 20) -> dict:
    """Copies a buffer far larger than the caches; counts bytes read plus bytes written."""
    copy_bytes = copy_bytes or (1 << 32 if torch.device(device).type == "cuda" else 1 << 30)
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    found = spread(measure(lambda: target.copy_(source), device, repeats=repeats))
    return {"bytes": 2 * copy_bytes, **found, "gb_per_s": 2 * copy_bytes / found["median_ms"] / 1e6}


def matmul_rate(device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 10) -> dict:
    """Multiplies square random matrices; fp32 means IEEE fp32, not tf32."""
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        found = spread(measure(lambda: a @ b, device, repeats=repeats))
    finally:
        torch.set_float32_matmul_precision(before)
    return {"size": size, **found, "tflop_per_s": 2 * size**3 / found["median_ms"] / 1e9}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofs", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--tiny", action="store_true", help="only try the code: figures mean nothing")
    parser.add_argument("--out", help="where the rows go")
    args = parser.parse_args()
    sizes = {"size": 64, "repeats": 2} if args.tiny else {}
    rows = Rows(args.out, provenance(args.device))
    rows.take(
        {"roof": "copy"}, copy_bandwidth, args.device, **({"copy_bytes": 1 << 16, "repeats": 2} if args.tiny else {})
    )
    rows.take({"roof": "matmul bf16"}, matmul_rate, args.device, torch.bfloat16, **sizes)
    rows.take({"roof": "matmul fp32"}, matmul_rate, args.device, torch.float32, **sizes)
    return 1 if rows.failed else 0


if __name__ == "__main__":
    sys.exit(main())
