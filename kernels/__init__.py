"""Triton kernels for fitting and scoring logit biases; need torch and triton, nothing else (README.md beside this)."""

from .spec import Case, Compilation, KernelSpec, specs

__all__ = ["Case", "Compilation", "KernelSpec", "specs"]
