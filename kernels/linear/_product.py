"""A tile of a product x W^T in registers, for the epilogues beside this file; tiles and launches of all of them."""

from typing import NamedTuple

import torch

from .._triton import _launch, tl, triton
from ..spec import Compilation

EPS = 2.0**-23  # float32's, as torch's rms_norm has it for narrower types too
_EPS = tl.constexpr(EPS)


MOST_COLUMNS = 128  # of a tile


class _Tile(NamedTuple):
    BLOCK_M: int  # rows
    BLOCK_N: int  # columns: rows of W
    BLOCK_K: int
    num_warps: int
    num_stages: int


def _config(N: int, K: int, dtype: torch.dtype) -> _Tile:
    """By the layer's shape and type, never by the number of rows.

    128 x 128 with 8 warps keeps two programs on a multiprocessor of sm_90 (96 KiB of shared memory each), so that the
    epilogue of one overlaps the product of the other. Unmeasured, as all of this is.
    """
    wide = (
        _Tile(128, MOST_COLUMNS, 64, 8, 3) if dtype != torch.float32 else _Tile(32, MOST_COLUMNS, 32, 4, 2)
    )  # unmeasured
    fits = {"BLOCK_N": N, "BLOCK_K": K}
    return wide._replace(**{n: min(getattr(wide, n), max(triton.next_power_of_2(x), 16)) for n, x in fits.items()})


_OPTIONS = {"enable_fp_fusion": False}  # a square and the sum of it round apart, so that lanes that both hold it agree


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    left,
    columns,
    K,
    N: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x W[columns]^T of the first BLOCK_M of `left` rows of x [., K], and W [N, K]: (BLOCK_M, BLOCK_N) float32.

    0 in rows beyond `left` and in columns beyond N.
    """
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask_m, mask_n = (offs_m < left)[:, None], (columns < N)[:, None]
    x_ptrs = x_ptr + offs_m[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + columns[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        within = True if EVEN_K else (offs_k < K - k)[None, :]
        x = tl.load(x_ptrs + k, mask=mask_m & within, other=0.0)
        w = tl.load(w_ptrs + k, mask=mask_n & within, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _inverse_rms(squares_ptr, left, M, K, parts, norm, BLOCK_M: tl.constexpr):
    """norm / rms of rows of K numbers, from the parts [parts, M] of their sums of squares: (BLOCK_M,)."""
    offs_m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(parts):
        total += tl.load(squares_ptr + part * M + offs_m, mask=offs_m < left, other=0.0)
    return norm / tl.sqrt(total / K + _EPS)


@triton.jit
def _store(ptr, columns, x, left, N: tl.constexpr):
    """Writes x into the first of `left` rows of [., N], at these columns."""
    offs_m = tl.arange(0, x.shape[0])
    mask = (offs_m < left)[:, None] & (columns < N)[None, :]
    tl.store(ptr + offs_m[:, None] * N + columns[None, :], x.to(ptr.dtype.element_ty), mask=mask)


# Launches


def _normed_ref(x, squares, norm):
    """x * norm / rms(x), in x's dtype, from squares [parts, ...]."""
    inverse = norm * torch.rsqrt(squares.sum(0) / x.size(-1) + EPS)
    return (x * inverse[..., None]).to(x.dtype)


def _check(x: torch.Tensor, weights: dict[str, torch.Tensor], **others: tuple[torch.Tensor | None, tuple]) -> None:
    """`weights` by name; `others` are float32 (tensor, its shape), or None instead of a tensor."""
    K = x.shape[-1] if x.dim() else 0
    if not K or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x: expected float32, bfloat16 or float16 [..., K], K > 0, got {x.dtype} {list(x.shape)}")
    for name, w in weights.items():
        if w.dim() != 2 or w.shape[1] != K or not w.shape[0] or w.dtype != x.dtype:
            raise ValueError(f"{name}: expected {x.dtype} [N, {K}], N > 0, got {w.dtype} {list(w.shape)}")
    for name, (tensor, shape) in others.items():
        if tensor is not None and (tuple(tensor.shape) != tuple(shape) or tensor.dtype != torch.float32):
            raise ValueError(f"{name}: expected float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    for name, tensor in {**weights, **{name: tensor for name, (tensor, _) in others.items()}}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} like x, got {tensor.device}")


def _constants(N: int, K: int, dtype: torch.dtype, upcast: bool) -> dict:
    """Constants and options of every launch, by name."""
    tile = _config(N, K, dtype)
    return {
        "N": N,
        **tile._asdict(),
        "EVEN_K": K % tile.BLOCK_K == 0,
        "UPCAST": upcast or dtype == torch.float32,
        **_OPTIONS,
    }


def _launch_tiles(kernel, public: str, x: torch.Tensor, N: int, programs: int | None = None, **arguments) -> None:
    """Launches `kernel` for every tile of [M, N], or for `programs` tiles of columns, on contiguous x [..., K]."""
    K = x.shape[-1]
    M = x.numel() // K
    # Off the GPU this is Triton's interpreter, which does arithmetic on bf16 bits as if they were integers.
    constants = _constants(N, K, x.dtype, not x.is_cuda)
    columns = triton.cdiv(N, constants["BLOCK_N"]) if programs is None else programs
    if M:
        grid = (triton.cdiv(M, constants["BLOCK_M"]) * columns,)
        _launch(kernel, grid, public, x_ptr=x, M=M, K=K, **arguments, **constants)


# Compilations of the specs

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def _compilation(kernel, N: int, K: int, dtype=torch.bfloat16, wide=(), absent=(), given=None) -> Compilation:
    """A launch; `wide` are pointers to float32, `absent` pointers that are None, `given` further constants."""
    constants = _constants(N, K, dtype, upcast=False) | dict.fromkeys(absent) | (given or {})
    names = kernel.arg_names
    types = {name: "*fp32" if name in wide else _TYPES[dtype] for name in names if name.endswith("_ptr")}
    types |= {"targets_ptr": "*i64", "norm": "fp32", "slope": "fp32", "softcap": "fp32", "ignore_index": "i32"}
    types |= {"M": "i32:16", "K": "i32:16"}
    fixed = {name: constants[name] for name in names if name in constants}
    return Compilation(
        kernel,
        signature={name: types.get(name, "i32") for name in names if name not in fixed},
        constexprs=fixed,
        num_warps=constants["num_warps"],
        num_stages=constants["num_stages"],
        elements=constants["BLOCK_M"] * constants["BLOCK_N"],
        options=_OPTIONS,
    )
