"""Decayed counts of a stream before each of its windows, and the log ratio of what came to what was expected: a scan.

For windows w = 0, 1, ... in the stream's order, with the state (C, E) before the first one:

    ratio_wv = log((C_v + k_v) / (E_v + k_v))
    C_v <- left_w C_v + c_wv,    E_v <- left_w E_v + e_wv

so ratio_w is made of what came before window w, and of nothing in it. It is the MAP estimate of each token's rate under
a Gamma prior, in logarithms: the bias of slotfast's `causal`.

| tensor                    | shape  | type    |                                                      |
|---------------------------|--------|---------|------------------------------------------------------|
| left                      | [W]    | float64 | what a window's tokens leave of the state            |
| new_counts, new_expected  | [W, V] | float64 | c, e: what they add to it                            |
| k                         | [V]    | float64 | pseudo-counts, > 0                                   |
| counts, expected          | [V]    | float64 | C, E before the first window; and behind the last    |
| ratio                     | [W, V] | float64 |                                                      |

24 W V bytes are moved, and W V logarithms taken. A program owns some columns for all windows: the chain of W multiply-
adds is in registers, and what a window adds does not depend on it, so its loads run ahead. Sums are in the windows'
order, whatever a launch holds: the bits are those of any other division of the stream into batches.

Why float64: the counts decay over tens of thousands of tokens, and ranks that start at other places must agree. Why a
kernel: in torch each window is some ten launches, 50 us; a window's share of a forward pass is 200 us.
"""

import torch
from torch import Tensor

from ._triton import _launch, tl, triton
from .cases.rates import CASES, inputs
from .spec import Compilation, KernelSpec


def rate_scan_ref(
    left: Tensor, new_counts: Tensor, new_expected: Tensor, k: Tensor, counts: Tensor, expected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`rate_scan` in plain torch, any floating dtype."""
    ratios = []
    for window in range(len(left)):
        ratios.append(((counts + k) / (expected + k)).log())  # before the window's own tokens go in
        counts = left[window] * counts + new_counts[window]
        expected = left[window] * expected + new_expected[window]
    return torch.stack(ratios) if ratios else new_counts.new_zeros(0, len(k)), counts, expected


def _config(V: int) -> tuple[int, int]:
    """BLOCK_V and warps: one column a thread, so that as many SMs as possible share the chains."""
    return min(32, triton.next_power_of_2(V)), 1  # unmeasured


_OPTIONS = {"enable_fp_fusion": False}  # a product and a sum round apart, as in torch


@triton.jit
def _rate_scan_kernel(
    left_ptr,
    new_counts_ptr,
    new_expected_ptr,
    k_ptr,
    counts_ptr,
    expected_ptr,
    ratio_ptr,
    last_counts_ptr,
    last_expected_ptr,
    W,
    V,
    BLOCK_V: tl.constexpr,
):
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    k = tl.load(k_ptr + offs_v, mask=mask_v, other=1.0)  # (BLOCK_V,)
    counts = tl.load(counts_ptr + offs_v, mask=mask_v, other=0.0)
    expected = tl.load(expected_ptr + offs_v, mask=mask_v, other=0.0)
    offs = offs_v.to(tl.int64)
    for w in range(W):
        left = tl.load(left_ptr + w)
        new_counts = tl.load(new_counts_ptr + offs, mask=mask_v, other=0.0)
        new_expected = tl.load(new_expected_ptr + offs, mask=mask_v, other=0.0)
        tl.store(ratio_ptr + offs, tl.log((counts + k) / (expected + k)), mask=mask_v)
        counts = left * counts + new_counts
        expected = left * expected + new_expected
        offs += V
    tl.store(last_counts_ptr + offs_v, counts, mask=mask_v)
    tl.store(last_expected_ptr + offs_v, expected, mask=mask_v)


def rate_scan(
    left: Tensor, new_counts: Tensor, new_expected: Tensor, k: Tensor, counts: Tensor, expected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log ratios before each of some consecutive windows, and the state behind the last.

    Args:
        left: float64 [W], in 0..1.
        new_counts, new_expected: float64 [W, V], >= 0.
        k: float64 [V], > 0.
        counts, expected: float64 [V], >= 0; they are not written to.

    Returns:
        ratio float64 [W, V], counts float64 [V], expected float64 [V].

    Raises:
        ValueError: a shape, type or device is not as above.

    Tolerance: the sums are those of plain torch to the bit, the logarithm is within 2 units in the last place.
    Source: own work; docs/adaptation.md.
    """
    W, V = new_counts.shape if new_counts.ndim == 2 else (-1, -1)
    shapes = {"left": (left, (W,)), "new_counts": (new_counts, (W, V)), "new_expected": (new_expected, (W, V))}
    shapes |= {name: (x, (V,)) for name, x in (("k", k), ("counts", counts), ("expected", expected))}
    for name, (x, shape) in shapes.items():
        if tuple(x.shape) != shape or x.dtype != torch.float64 or x.device != left.device:
            raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)} on {x.device}, expected float64 {shape}")
    block_v, num_warps = _config(max(V, 1))
    ratio, last_counts, last_expected = left.new_empty(W, V), left.new_empty(V), left.new_empty(V)
    if V:
        _launch(
            _rate_scan_kernel,
            (triton.cdiv(V, block_v),),
            "rate_scan",
            left_ptr=left.contiguous(),
            new_counts_ptr=new_counts.contiguous(),
            new_expected_ptr=new_expected.contiguous(),
            k_ptr=k.contiguous(),
            counts_ptr=counts.contiguous(),
            expected_ptr=expected.contiguous(),
            ratio_ptr=ratio,
            last_counts_ptr=last_counts,
            last_expected_ptr=last_expected,
            W=W,
            V=V,
            BLOCK_V=block_v,
            num_warps=num_warps,
            **_OPTIONS,
        )
    return ratio, last_counts, last_expected


# The contract


def _compilations(*, V, **_):
    block_v, num_warps = _config(V)
    names = [name for name in _rate_scan_kernel.arg_names if name.endswith("_ptr")]
    return [
        Compilation(
            _rate_scan_kernel,
            signature={**dict.fromkeys(names, "*fp64"), "W": "i32", "V": "i32:16" if V % 16 == 0 else "i32"},
            constexprs={"BLOCK_V": block_v},
            num_warps=num_warps,
            elements=block_v,
            options=_OPTIONS,
        )
    ]


SPEC = KernelSpec(
    name="rate_scan",
    fn=rate_scan,
    reference=rate_scan_ref,
    inputs=inputs,
    cases=CASES,
    compilations=_compilations,
    bytes_moved=lambda *, W, V, itemsize, **_: 24 * W * V + 40 * V,
    flops=lambda *, W, V, **_: 8 * W * V,
)
