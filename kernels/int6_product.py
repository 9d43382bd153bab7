"""Matrix product with 6-bit weights: y = x @ W^T, W[n, k] = scale[n, k // group] * q[n, k], q an integer in [-32, 31].

Forward, with u = q + 32 in [0, 63] as it is stored:

    y[m, n] = sum over groups g of  scale[n, g] * sum over k in g of  x[m, k] * (u[n, k] - 32)

The inner sum is a tensor-core product: q is exact in bf16 and fp16, sums are fp32, and scales touch sums, not weights.
So a weight is never rounded, where torch with a dequantised matrix rounds each. Backward: dx = dy @ W; W gets no
gradient.

    x      [..., K]         fp16, bf16 or fp32 (fp32 products are IEEE: exact, but not fast), any strides
    low    [N, Kp / 2]      uint8, bits 0-3 of u;  Kp is K rounded up to a multiple of 128, padding is q = 0
    high   [N, Kp / 4]      uint8, bits 4-5 of u
    scale  [N] or [N, G]    fp16, bf16 or fp32; G = ceil(K / group), group 32, 64 or 128
    y      [..., N]         x's dtype

Bytes: 0.75 N Kp + scales + x + y (bf16 weights: 2 N K). Flops: 2 M N K. How the planes are laid out, and why:
`int6.py`.

Source: the exponent trick is that of Kim et al., "Who Says Elephants Can't Run", 2022 (arXiv 2211.10017); the layout
is our own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._triton import _launch, tl, triton
from .cases.int6 import CASES, inputs
from .int6 import (
    _DTYPES,
    _MASKS,
    BLOCK,
    GROUPS,
    PackedInt6,
    _cdiv,
    _check_weight,
    _dequantize_int6,
    _dequantize_int6_kernel,
    _describe,
    _group,
    _load_words,
    _unpack,
    _weight_arguments,
    dequantize_int6_ref,
)
from .spec import Compilation, KernelSpec


def _check(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_weight(weight)
    n, k = weight.shape
    if not isinstance(x, torch.Tensor) or x.dtype not in dtypes or x.device != weight.low.device:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"x: expected {names} on {weight.low.device}, got {_describe(x)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected shape [..., {k}], got {_describe(x)}")
    if dense is not None and (dense.shape != (n, k) or dense.dtype != x.dtype or dense.device != x.device):
        raise ValueError(f"dense: expected {x.dtype} [{n}, {k}] on {x.device}, got {_describe(dense)}")


def int6_matmul_ref(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None = None) -> torch.Tensor:
    """`int6_matmul` in plain torch, for float64 too. `dense` is only a cache, so it is checked and not used."""
    _check(x, weight, dense, (*_DTYPES, torch.float64))
    return F.linear(x, dequantize_int6_ref(weight, x.dtype))


# Launch parameters


class _Launch(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT_K: int
    num_warps: int
    num_stages: int


def _stays_in_l2(n_bytes: int, device: torch.device) -> bool:
    """Whether so many bytes that every product reads stay in a GPU's L2 cache: half of it, for the rows pass through it
    too, and where it has two partitions, each keeps what its own multiprocessors read."""
    if device.type != "cuda":
        return False
    return n_bytes <= getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) // 2


def _most_rows(dense: torch.Tensor | None) -> int:
    """Rows of x up to which the fused kernel runs; the rest is the library's product. unmeasured

    Packed weights save bytes of memory. Where a dense matrix is there and stays in the cache, nothing is left to save.
    """
    if dense is None:
        return 256
    return 0 if _stays_in_l2(dense.nbytes, dense.device) else 64


def _config(m: int, n: int, k: int, group: int, dtype: torch.dtype, most_rows: int = 256) -> _Launch | None:
    """How to launch the fused kernel, or None where the library's product with dequantised weights is the choice.

    Every figure below is unmeasured: no GPU has run it. Where a choice rests on a compilation, the comment gives what
    that showed: sm_90, bf16, Triton 3.9.0, instructions of the whole hot loop per weight, nothing spilled; printed by
    `python -m bench.static_report --kernel int6_matmul` in slotfast's repository.
    """
    if m > most_rows:
        return None
    if dtype == torch.float32:
        # No tensor cores: multiply-adds, operands in registers. unmeasured
        block_m, block_n, block_k, num_warps, num_stages = 16, 32, 32, 4, 2
    else:
        # 64 rows of weights are the least that a Hopper warpgroup multiplies.
        block_m, block_n, num_warps = (16 if m <= 16 else 32 if m <= 32 else 64), 64, 4
        block_k, num_stages = 128, 4
        if m <= 16 and group not in GROUPS:
            # Two warps multiply out of registers; a warpgroup would pass weights through shared memory, with a barrier
            # every 16. 16 x 32 x 256: 4.8 instructions a weight, 5 programs a multiprocessor. With BLOCK_K 128: 5.2 and
            # 9, and finer splits, for the matrices that are too small to fill the machine. unmeasured
            block_n, num_warps, num_stages = 32, 2, 3
            block_k = 256 if k >= 2048 else 128
    if group in GROUPS:
        block_k = min(block_k, group)  # so that a tile has one scale a row
    # Split K until there are eight warps for each of 132 multiprocessors, while every one has a tile to do. unmeasured
    tiles = _cdiv(m, block_m) * _cdiv(n, block_n)
    split_k = max(1, min(8, 132 * 8 // num_warps // tiles, _cdiv(k, block_k)))
    return _Launch(block_m, block_n, block_k, split_k, num_warps, num_stages)


# Kernels


@triton.jit(do_not_specialize=["M"])  # one compilation for every M of a tile; that for M = 1 would spill
def _int6_matmul_kernel(
    x_ptr,
    low_ptr,
    high_ptr,
    scale_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    M,
    N,
    K,
    n_blocks,
    n_groups,
    stride_xm,
    stride_xk,
    nibbles,
    sextets,
    GROUP: tl.constexpr,  # 0: one scale a row
    TAIL: tl.constexpr,  # K is not a multiple of BLOCK_K
    UPCAST: tl.constexpr,  # multiply in fp32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """out = x @ W^T, as [M, N]; with SPLIT_K > 1 out of the programs' partial sums, [SPLIT_K, M, N].

    Program s of a tile adds up every SPLIT_K-th block of K from the s-th on. The last of them to arrive adds up the
    partial sums, in the order of s whoever came when, and leaves the tile's counter at 0, as it found it.
    """
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    mask_m = offs_m < M
    X_T: tl.constexpr = x_ptr.dtype.element_ty
    DOT_T: tl.constexpr = tl.float32 if UPCAST else X_T

    # Rows past the end repeat the last one: loads need no mask, and the store drops them.
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    low_rows = low_ptr + rows[:, None] * (n_blocks * 16)  # strides as multiples of 16 words: seen to be aligned
    high_rows = high_ptr + rows[:, None] * (n_blocks * 8)
    x_rows = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm

    # W is the left operand: its rows fill the long side of the tensor-core tile, however few rows x has.
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(pid_k * BLOCK_K, K, SPLIT_K * BLOCK_K):
        low_0, low_1, high = _load_words(low_rows, high_rows, k // 16, n_blocks * 8, BLOCK_K // 16, TAIL)
        offs_k = k + tl.arange(0, BLOCK_K)
        mask = mask_m[None, :] & (offs_k < K)[:, None] if TAIL else mask_m[None, :]
        x = tl.load(x_rows + offs_k.to(tl.int64)[:, None] * stride_xk, mask=mask, other=0.0)  # (BLOCK_K, BLOCK_M)
        w = _unpack(low_0, low_1, high, nibbles, sextets, X_T == tl.bfloat16, DOT_T)  # (BLOCK_N, BLOCK_K)
        if GROUP:
            scale = tl.load(scale_ptr + rows * n_groups + k // GROUP).to(tl.float32)
            acc += tl.dot(w, x.to(DOT_T), input_precision="ieee") * scale[:, None]
        else:
            acc = tl.dot(w, x.to(DOT_T), acc, input_precision="ieee")
    if GROUP == 0:
        acc *= tl.load(scale_ptr + rows).to(tl.float32)[:, None]

    mask = mask_n[:, None] & mask_m[None, :]
    offs = tl.arange(0, BLOCK_M)[None, :] * N + offs_n[:, None]  # inside a tile 32 bits do
    first = pid_m.to(tl.int64) * BLOCK_M * N
    out_ptr += first
    if SPLIT_K == 1:
        tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        partial_ptr += first
        size = tl.cast(M, tl.int64) * N
        arrivals_ptr += pid_m * tl.num_programs(0) + pid_n
        tl.store(partial_ptr + pid_k * size + offs, acc, mask=mask)
        tl.debug_barrier()  # the stores above, by all threads, before the arrival, which releases them
        arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")  # its value comes through a barrier
        if arrived == SPLIT_K - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for split in tl.range(0, SPLIT_K, num_stages=1):
                total += tl.load(partial_ptr + split * size + offs, mask=mask, other=0.0)
            tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(arrivals_ptr, 0)


# Launches

_LEAST_COUNTERS = 1024
_arrivals_of: dict[tuple, torch.Tensor] = {}


def _arrivals(device: torch.device, tiles: int) -> torch.Tensor:
    """Counters of the programs that have arrived at each tile: int32, 0 before a launch and after it.

    A stream has its own, as launches on several may overlap. What is recorded for later gets new ones, zeroed with each
    replay: a graph's memory is not ours to keep, and its replays may overlap with anything.
    """
    on_gpu = device.type == "cuda"
    if torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    found = _arrivals_of.get(key)
    if found is None or len(found) < tiles:
        found = _arrivals_of[key] = torch.zeros(max(tiles, _LEAST_COUNTERS), dtype=torch.int32, device=device)
    return found


def _int6_matmul_fwd(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    rows = x.reshape(-1, k) if k else x.new_empty(x.shape[:-1].numel(), 0)
    m = rows.shape[0]
    if m == 0 or n == 0 or k == 0:
        return x.new_zeros(*x.shape[:-1], n)
    group = _group(weight.scale, k)
    launch = _config(m, n, k, group, x.dtype, _most_rows(dense))
    if launch is None:
        return F.linear(x, _dequantize_int6(weight, x.dtype) if dense is None else dense)

    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tiles_n, tiles_m = triton.cdiv(n, launch.BLOCK_N), triton.cdiv(m, launch.BLOCK_M)
    partial = arrivals = None
    if launch.SPLIT_K > 1:
        partial = torch.empty((launch.SPLIT_K, m, n), dtype=torch.float32, device=x.device)
        arrivals = _arrivals(x.device, tiles_n * tiles_m)
    _launch(
        _int6_matmul_kernel,
        (tiles_n, tiles_m, launch.SPLIT_K),
        "int6_matmul",
        x_ptr=rows,
        out_ptr=y,
        partial_ptr=partial,
        arrivals_ptr=arrivals,
        M=m,
        stride_xm=rows.stride(0),
        stride_xk=rows.stride(1),
        TAIL=k % launch.BLOCK_K != 0,
        # Off the GPU this is Triton's interpreter, which does arithmetic on bf16 bits as if they were integers.
        UPCAST=x.dtype == torch.float32 or not x.is_cuda,
        enable_fp_fusion=True,
        **launch._asdict(),
        **_weight_arguments(weight),
    )
    return y.view(*x.shape[:-1], n)


class _Int6Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high, scale, shape, dense):
        ctx.save_for_backward(low, high, scale, dense)
        ctx.shape = shape
        return _int6_matmul_fwd(x, PackedInt6(low, high, scale, shape), dense)

    @staticmethod
    def backward(ctx, dy):
        low, high, scale, dense = ctx.saved_tensors
        if dense is None:
            dense = _dequantize_int6(PackedInt6(low, high, scale, ctx.shape), dy.dtype)
        return dy @ dense, None, None, None, None, None


# Public function


def int6_matmul(x: torch.Tensor, weight: PackedInt6, dense: torch.Tensor | None = None) -> torch.Tensor:
    """Multiplies by 6-bit weights: x @ W^T.

    Which of three ways runs is decided by the number of rows M of x: split along K (few), fused (some), or the
    library's product with dequantised weights (many). A result is bit-identical on rerun; for another M it may be
    rounded differently. Gradients reach x only. Launches on different streams may overlap.

    Args:
        x: [..., K] float16, bfloat16 or float32, any strides. NaN and infinite entries spoil their own rows only.
        weight: from `pack_int6`, with scales as they are there.
        dense: [N, K] in x's dtype, `dequantize_int6(weight, x.dtype)` kept by the caller. Saves dequantising at large M
            for 2.7 times the memory, and is what gets multiplied at every M where it stays in the GPU's L2 cache. Only
            its own size is known here: where a model's matrices exceed the cache together, leave it out at small M.
            The result's meaning does not change.
    Returns:
        [..., N] in x's dtype, summed in float32.
    Raises:
        ValueError: wrong dtype, shape, device or strides. ImportError: no triton.
    Tolerance:
        At most twice the error of torch with the dequantised matrix in the same dtype, against float64.
    """
    _check(x, weight, dense, _DTYPES)
    if x.requires_grad and torch.is_grad_enabled():
        return _Int6Matmul.apply(x, *weight, dense)
    return _int6_matmul_fwd(x, weight, dense)


# The contract


def _compilations(m, n, k, group=0, scale_dtype=torch.float16, dtype=torch.bfloat16, **_):
    integers = {"M": m, "N": n, "K": k, "n_blocks": _cdiv(k, BLOCK), "n_groups": _cdiv(k, group or k), "stride_xm": k}
    integers |= _MASKS
    pointer = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    pointers = {"x_ptr": pointer[dtype], "low_ptr": "*i32", "high_ptr": "*i32", "out_ptr": pointer[dtype]}
    pointers |= {"scale_ptr": pointer[scale_dtype], "partial_ptr": "*fp32", "arrivals_ptr": "*i32"}
    group = group if group < k else 0

    def compilation(kernel, constexprs, num_warps, num_stages, elements, fusion):
        # As a launch does: 1 becomes a constant, multiples of 16 are marked; M is what it is.
        names = kernel.arg_names
        constexprs = {**constexprs, **{name: 1 for name in names if name != "M" and integers.get(name) == 1}}
        marked = {name for name, value in integers.items() if name != "M" and value % 16 == 0}
        known = {name: "i32:16" if name in marked else "i32" for name in integers} | pointers
        signature = {name: "constexpr" if name in constexprs else known[name] for name in names}
        options = {"enable_fp_fusion": fusion}
        return Compilation(kernel, signature, constexprs, num_warps, num_stages, elements, options)

    launch = _config(m, n, k, group or k, dtype)
    if launch is None:
        constexprs = {"GROUP": group, "BLOCK_N": 16, "BLOCK_K": BLOCK}
        return [compilation(_dequantize_int6_kernel, constexprs, 4, 3, 0, False)]
    tiles = {name: value for name, value in launch._asdict().items() if name.isupper()}
    constexprs = {
        "GROUP": group,
        "TAIL": k % launch.BLOCK_K != 0,
        "UPCAST": dtype == torch.float32,
        "stride_xk": 1,
        **tiles,
    }
    if launch.SPLIT_K == 1:
        constexprs |= {"partial_ptr": None, "arrivals_ptr": None}
    elements = launch.BLOCK_N * launch.BLOCK_K
    return [compilation(_int6_matmul_kernel, constexprs, launch.num_warps, launch.num_stages, elements, True)]


def _bytes_moved(m, n, k, itemsize, group=0, scale_dtype=torch.float16, **_):
    weights = n * _cdiv(k, BLOCK) * BLOCK * 3 // 4 + n * _cdiv(k, group or k) * scale_dtype.itemsize
    return weights + (m * k + m * n) * itemsize


SPEC = KernelSpec(
    name="int6_matmul",
    fn=int6_matmul,
    reference=int6_matmul_ref,
    inputs=inputs,
    cases=CASES,
    differentiable=("x",),
    compilations=_compilations,
    bytes_moved=_bytes_moved,
    flops=lambda m, n, k, **_: 2 * m * n * k,
)
