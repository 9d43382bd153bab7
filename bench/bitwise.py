"""Bits of a full launch against the same launch again, and against each window alone.

    python -m bench.bitwise [--out FILE]

Racecheck sees shared memory alone. What programs do to one another through global memory, scratch above all, shows
here: 8,192 windows in one launch must have the bits that they have one by one.
"""

import argparse
import sys

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.bench_kernels import DEVICE, ON_GPU, draw, first_case
from bench.common import Rows, provenance
from slotfast.kernels import KernelSpec, specs

WINDOWS, ALONE, RERUNS = 8192, 16, 2
SEQUENTIAL = {"rate_scan"}  # a window's result follows from the windows before it


def same(one, other) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(a.shape == b.shape and torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@torch.no_grad()
def compare(spec: KernelSpec) -> dict:
    """Raises where bits differ; says what was compared."""
    case = first_case(spec)
    many = "W" in case.shape and spec.name not in SEQUENTIAL
    shape = {**case.shape, "W": WINDOWS} if many and ON_GPU else dict(case.shape)
    kwargs = draw(spec, case, shape)
    whole = spec.fn(**kwargs)
    for _ in range(RERUNS):
        assert same(whole, spec.fn(**kwargs)), "the same launch again has other bits"
    found = {"case": case.reason, "reruns": RERUNS}
    if not many:
        return found
    W = shape["W"]
    chosen = sorted({0, 1, W // 2, W - 1, *torch.randint(W, (ALONE,)).tolist()})[:ALONE]

    def window(w: int, of):
        return tree_map_only(torch.Tensor, lambda t: t[w : w + 1].clone() if t.dim() and t.size(0) == W else t, of)

    differ = [w for w in chosen if not same(window(w, whole), spec.fn(**window(w, kwargs)))]
    assert not differ, f"of {W} windows, {differ} have other bits alone"
    return found | {"windows": W, "alone": len(chosen)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bitwise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="where the rows go")
    args = parser.parse_args()
    rows = Rows(args.out, provenance(DEVICE))
    for spec in specs():
        rows.take({"kernel": spec.name}, compare, spec)
    return 1 if rows.failed else 0


if __name__ == "__main__":
    sys.exit(main())
