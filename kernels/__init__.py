"""Triton kernels for fitting and scoring logit biases; need torch and triton, nothing else (README.md beside this)."""

from .int6_matmul import PackedInt6, dequantize_int6, int6_matmul, pack_int6, unpack_int6
from .spec import Case, Compilation, KernelSpec, specs

__all__ = [
    "Case",
    "Compilation",
    "KernelSpec",
    "PackedInt6",
    "dequantize_int6",
    "int6_matmul",
    "pack_int6",
    "specs",
    "unpack_int6",
]
