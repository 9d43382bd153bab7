"""Triton kernels that fit and score logit biases; torch and triton only. See README.md beside this file."""

from .spec import Case, Compilation, KernelSpec, specs

__all__ = ["Case", "Compilation", "KernelSpec", "specs"]
