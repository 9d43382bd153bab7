"""Weights of a few bits: rounding row by row or by GPTQ, calibration, and pruning to a file size."""

from .gptq import quantize_gptq
from .hessian import collect_hessians
from .matrix import SDCLIP_K, Clip, QuantizedMatrix, clip_scales, quantize_rows
from .model import Quantized, TensorReport, format_report, quantize_model, stored_bits
from .prune import output_costs, prune_to_size

__all__ = [
    "SDCLIP_K",
    "Clip",
    "Quantized",
    "QuantizedMatrix",
    "TensorReport",
    "clip_scales",
    "collect_hessians",
    "format_report",
    "output_costs",
    "prune_to_size",
    "quantize_gptq",
    "quantize_model",
    "quantize_rows",
    "stored_bits",
]
