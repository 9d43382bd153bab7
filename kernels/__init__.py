"""Triton kernels for fitting and scoring logit biases; need torch and triton, nothing else (README.md beside this)."""

from .attention import banded_attention, banded_attention_ref
from .bias_cross_entropy import (
    bias_cross_entropy,
    bias_cross_entropy_grad,
    bias_cross_entropy_grad_ref,
    bias_cross_entropy_ref,
)
from .int6_matmul import PackedInt6, dequantize_int6, int6_matmul, pack_int6, unpack_int6
from .lbfgs import History, lbfgs_direction, lbfgs_history, lbfgs_push, lbfgs_push_
from .p_form import (
    PForm,
    p_form_evaluate,
    p_form_evaluate_ref,
    p_form_prepare,
    p_form_prepare_ref,
    target_counts,
    target_counts_ref,
)
from .rate_scan import rate_scan, rate_scan_ref
from .slot_solve import SlotSolution, Status, slot_solve, slot_solve_mm, slot_solve_mm_ref, slot_solve_ref
from .spec import Case, Compilation, KernelSpec, specs

__all__ = [
    "Case",
    "Compilation",
    "History",
    "KernelSpec",
    "PForm",
    "PackedInt6",
    "SlotSolution",
    "Status",
    "banded_attention",
    "banded_attention_ref",
    "bias_cross_entropy",
    "bias_cross_entropy_grad",
    "bias_cross_entropy_grad_ref",
    "bias_cross_entropy_ref",
    "dequantize_int6",
    "int6_matmul",
    "lbfgs_direction",
    "lbfgs_history",
    "lbfgs_push",
    "lbfgs_push_",
    "p_form_evaluate",
    "p_form_evaluate_ref",
    "p_form_prepare",
    "p_form_prepare_ref",
    "pack_int6",
    "rate_scan",
    "rate_scan_ref",
    "slot_solve",
    "slot_solve_mm",
    "slot_solve_mm_ref",
    "slot_solve_ref",
    "specs",
    "target_counts",
    "target_counts_ref",
    "unpack_int6",
]
