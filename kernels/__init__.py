"""Triton kernels for fitting and scoring logit biases; need torch and triton, nothing else (README.md beside this)."""

from ._rules import Status
from .attention import banded_attention, banded_attention_ref
from .cross_entropy import bias_cross_entropy, bias_cross_entropy_ref
from .cross_entropy_grad import bias_cross_entropy_grad, bias_cross_entropy_grad_ref
from .int6 import PackedInt6, dequantize_int6, dequantize_int6_ref, pack_int6, unpack_int6
from .int6_product import int6_matmul, int6_matmul_ref
from .lbfgs import (
    History,
    lbfgs_direction,
    lbfgs_direction_ref,
    lbfgs_history,
    lbfgs_push,
    lbfgs_push_,
    lbfgs_push_ref,
)
from .linear import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    linear_heads,
    linear_heads_ref,
    linear_logits,
    linear_logits_ref,
    linear_residual,
    linear_residual_ref,
    linear_squared,
    linear_squared_ref,
)
from .mixing import channel_mix, channel_mix_ref
from .own import without_own, without_own_ref
from .rates import rate_scan, rate_scan_ref
from .scan import decay_scan, decay_scan_ref
from .solver import SlotSolution, slot_solve, slot_solve_mm, slot_solve_mm_ref, slot_solve_ref
from .spec import Case, Compilation, KernelSpec, specs

__all__ = [
    "Case",
    "Compilation",
    "History",
    "KernelSpec",
    "PackedInt6",
    "SlotSolution",
    "Status",
    "banded_attention",
    "banded_attention_ref",
    "bias_cross_entropy",
    "bias_cross_entropy_grad",
    "bias_cross_entropy_grad_ref",
    "bias_cross_entropy_ref",
    "channel_mix",
    "channel_mix_ref",
    "decay_scan",
    "decay_scan_ref",
    "dequantize_int6",
    "dequantize_int6_ref",
    "int6_matmul",
    "int6_matmul_ref",
    "lbfgs_direction",
    "lbfgs_direction_ref",
    "lbfgs_history",
    "lbfgs_push",
    "lbfgs_push_",
    "lbfgs_push_ref",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "linear_heads",
    "linear_heads_ref",
    "linear_logits",
    "linear_logits_ref",
    "linear_residual",
    "linear_residual_ref",
    "linear_squared",
    "linear_squared_ref",
    "pack_int6",
    "rate_scan",
    "rate_scan_ref",
    "slot_solve",
    "slot_solve_mm",
    "slot_solve_mm_ref",
    "slot_solve_ref",
    "specs",
    "unpack_int6",
    "without_own",
    "without_own_ref",
]
