"""Triton kernels that fit and score logit biases; torch and triton only. See README.md beside this file."""

from .bias_cross_entropy import (
    bias_cross_entropy,
    bias_cross_entropy_grad,
    bias_cross_entropy_grad_ref,
    bias_cross_entropy_ref,
)
from .p_form import (
    PForm,
    p_form_evaluate,
    p_form_evaluate_ref,
    p_form_prepare,
    p_form_prepare_ref,
    target_counts,
    target_counts_ref,
)
from .spec import Case, Compilation, KernelSpec, specs

__all__ = [
    "Case",
    "Compilation",
    "KernelSpec",
    "PForm",
    "bias_cross_entropy",
    "bias_cross_entropy_grad",
    "bias_cross_entropy_grad_ref",
    "bias_cross_entropy_ref",
    "p_form_evaluate",
    "p_form_evaluate_ref",
    "p_form_prepare",
    "p_form_prepare_ref",
    "specs",
    "target_counts",
    "target_counts_ref",
]
