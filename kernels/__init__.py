"""Triton kernels for fitting and scoring logit biases; needs torch and triton, nothing else. See README.md beside this file."""

from .spec import Case, Compilation, KernelSpec, specs

__all__ = ["Case", "Compilation", "KernelSpec", "specs"]
