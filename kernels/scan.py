"""How often something had come before, decayed: a scan of each row, r_i = left_i (r_{i-1} + 1).

For the occurrences i = 0, 1, ... of one thing, in order, left_i says how much of a count is left since the occurrence
before, so that r_i sums what is left of all earlier ones. left_i = 0 starts another thing: one row holds those of many,
one thing after another. Steps compose: a piece of a row is x -> a x + b, two pieces after one another are

    (a1, b1) then (a2, b2)  =  (a2 a1, a2 b1 + b2)

so a row is cut into blocks that know nothing of each other: one launch makes each block's (a, b), a second combines
those of the blocks before its own, from r_{-1} = 0, and scans its own from there.

| tensor | shape  | type    |
|--------|--------|---------|
| left   | [A, n] | float64 |
| r      | [A, n] | float64 |

24 bytes an element are moved; in plain torch log2(n) steps move 60 each. Why float64: counts decay over 100,000 tokens.
"""

import torch
from torch import Tensor

from ._triton import _launch, tl, triton
from .cases.scan import CASES, inputs
from .spec import Compilation, KernelSpec

LARGEST_N = 1 << 22


def decay_scan_ref(left: Tensor) -> Tensor:
    """`decay_scan` in plain torch, any floating dtype, in log2(n) steps."""
    a, r = left.clone(), left.clone()
    a[:, :1], r[:, :1] = 0, 0  # nothing has come before the first
    step = 1
    while step < left.size(1):
        r[:, step:] += a[:, step:] * r[:, :-step]
        a[:, step:] = a[:, step:] * a[:, :-step]
        step *= 2
    return r


def _config(n: int) -> tuple[int, int]:
    """BLOCK and warps: eight elements a thread."""
    return max(32, min(2048, triton.next_power_of_2(n))), 8 if n > 1024 else 1  # unmeasured


_OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def _then(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _last(values, SIZE: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SIZE) == SIZE - 1, values, 0.0), axis=0)


@triton.jit
def _load_block(left_ptr, n, BLOCK: tl.constexpr):
    """A program's elements (BLOCK,) and where they are; the row's first counts from nothing, what is behind it is 1."""
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(left_ptr + tl.program_id(1).to(tl.int64) * n + offs_n, mask=offs_n < n, other=1.0)
    return tl.where(offs_n == 0, 0.0, left), offs_n


@triton.jit
def _totals_kernel(left_ptr, a_ptr, b_ptr, n, blocks, BLOCK: tl.constexpr):
    left, _ = _load_block(left_ptr, n, BLOCK)
    a, b = tl.associative_scan((left, left), 0, _then)
    at = tl.program_id(1) * blocks + tl.program_id(0)
    tl.store(a_ptr + at, _last(a, BLOCK))
    tl.store(b_ptr + at, _last(b, BLOCK))


@triton.jit
def _decay_scan_kernel(left_ptr, a_ptr, b_ptr, r_ptr, n, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    before = 0.0
    if BLOCKS > 1:
        offs_b = tl.arange(0, BLOCKS)
        at = tl.program_id(1) * blocks + offs_b
        a = tl.load(a_ptr + at, mask=offs_b < tl.program_id(0), other=1.0)  # 1 and 0 change nothing
        b = tl.load(b_ptr + at, mask=offs_b < tl.program_id(0), other=0.0)
        _, b = tl.associative_scan((a, b), 0, _then)
        before = _last(b, BLOCKS)
    left, offs_n = _load_block(left_ptr, n, BLOCK)
    a, b = tl.associative_scan((left, left), 0, _then)
    tl.store(r_ptr + tl.program_id(1).to(tl.int64) * n + offs_n, a * before + b, mask=offs_n < n)


def decay_scan(left: Tensor) -> Tensor:
    """Decayed counts of what had come before each element of each row.

    Args:
        left: float64 [A, n], in 0..1, A <= 65535, n <= 4194304: what is left of a count since the element before; 0
            where nothing is. What a row begins with is taken as 0.

    Returns:
        float64 [A, n].

    Raises:
        ValueError: left is not as above.

    Tolerance: 1e-12 of a result that is summed from up to 4,096 counts.
    Source: Blelloch, Prefix sums and their applications, 1990.
    """
    if left.ndim != 2 or left.dtype != torch.float64 or left.size(0) > 65535 or left.size(1) > LARGEST_N:
        raise ValueError(f"left: expected float64 [A <= 65535, n <= {LARGEST_N}], got {left.dtype} {list(left.shape)}")
    A, n = left.shape
    r = torch.empty(A, n, dtype=torch.float64, device=left.device)
    if not r.numel():
        return r
    block, num_warps = _config(n)
    blocks = triton.cdiv(n, block)
    left = left.contiguous()
    totals = torch.empty(2, A, blocks, dtype=torch.float64, device=left.device)
    shared = {"left_ptr": left, "a_ptr": totals[0], "b_ptr": totals[1], "n": n, "blocks": blocks, "BLOCK": block}
    if blocks > 1:
        _launch(_totals_kernel, (blocks, A), "decay_scan", **shared, num_warps=num_warps, **_OPTIONS)
    _launch(
        _decay_scan_kernel,
        (blocks, A),
        "decay_scan",
        **shared,
        r_ptr=r,
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=num_warps,
        **_OPTIONS,
    )
    return r


# The contract


def _compilations(*, n, **_):
    block, num_warps = _config(n)
    blocks = triton.cdiv(n, block)
    integers = {"n": "i32:16" if n % 16 == 0 else "i32", "blocks": "i32:16" if blocks % 16 == 0 else "i32"}
    constants = {"BLOCK": block, "BLOCKS": triton.next_power_of_2(blocks)}
    return [
        Compilation(
            kernel,
            signature={x: integers.get(x, "*fp64") for x in kernel.arg_names if x not in constants},
            constexprs={x: constants[x] for x in kernel.arg_names if x in constants},
            num_warps=num_warps,
            options=_OPTIONS,
        )
        for kernel in ((_totals_kernel, _decay_scan_kernel) if blocks > 1 else (_decay_scan_kernel,))
    ]


SPEC = KernelSpec(
    name="decay_scan",
    fn=decay_scan,
    reference=decay_scan_ref,
    inputs=inputs,
    cases=CASES,
    compilations=_compilations,
    bytes_moved=lambda *, A, n, itemsize, **_: 16 * A * n,
    flops=lambda *, A, n, **_: 3 * A * n,
    atol=1e-9,
)
