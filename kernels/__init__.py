"""Triton kernels for fitting and scoring logit biases; needs torch and triton, nothing else. See README.md beside this file."""

from .lbfgs import History, lbfgs_direction, lbfgs_history, lbfgs_push, lbfgs_push_
from .spec import Case, Compilation, KernelSpec, specs

__all__ = [
    "Case",
    "Compilation",
    "History",
    "KernelSpec",
    "lbfgs_direction",
    "lbfgs_history",
    "lbfgs_push",
    "lbfgs_push_",
    "specs",
]
