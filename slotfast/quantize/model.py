"""Quantises a whole model in one call: calibrate, round, prune, report."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..model import GPT
from .gptq import Choose, quantize_gptq
from .hessian import collect_hessians
from .matrix import SDCLIP_K, Clip, QuantizedMatrix, quantize_rows
from .prune import Tensors, output_costs, prune_to_size

Method = Literal["rows", "gptq"]


@dataclass(frozen=True)
class TensorReport:
    """What became of a tensor; JSON-able.

    Args:
        name: the parameter's.
        shape: its sizes.
        method: gptq, rows or float16.
        bits: 6, 8 or 16.
        entropy_bits: bits a weight that a perfect coder of single codes needs, without scales; 16 for float16.
        zeros: share of weights that are 0.
        weight_error: |Q - W| / |W|.
        output_error: |X (Q - W)^T| / |X W^T| over the calibration inputs X; None where there are none.
    """

    name: str
    shape: list[int]
    method: str
    bits: int
    entropy_bits: float
    zeros: float
    weight_error: float
    output_error: float | None


@dataclass(frozen=True)
class Quantized:
    """A quantised model.

    Args:
        tensors: by parameter name; matrices quantised, the rest float32 that float16 holds exactly. On the CPU.
        report: one entry a tensor.
        calibration_tokens: how many were read.
        pruned: codes zeroed for the size.
        seconds: used for calibration, rounding and pruning.
    """

    tensors: dict[str, QuantizedMatrix | Tensor]
    report: list[TensorReport]
    calibration_tokens: int
    pruned: int
    seconds: dict[str, float]


@torch.no_grad()
def quantize_model(
    model: GPT,
    calibration: Iterable[Tensor] | None = None,
    *,
    method: Method = "rows",
    clip: Clip = "percentile",
    choose: Choose = "output",
    embeddings: Method = "gptq",
    damping: float = 0.01,
    sdclip_k: Mapping[int, float] = SDCLIP_K,
    target_bytes: int | None = None,
    size: Callable[[Tensors], int] | None = None,
    budget_seconds: float | None = None,
    dtype: torch.dtype | None = None,
) -> Quantized:
    """Quantise a model: matrices of the blocks to 6 bits, other matrices to 8, the rest to float16.

    Args:
        model: in evaluation mode; unchanged.
        calibration: batches of token windows, int [B, T]: `generate.sample`, or training data. gptq needs them; with
            rows they serve the report.
        method: gptq, or rows: every weight to its nearest code.
        clip, sdclip_k, damping: as in `quantize_gptq`.
        choose: output: scales and the codes to prune are chosen by the output error they cause. weights: scales by the
            squared error of the weights, codes by their squared scale, both as PR #1019 has it. Without calibration
            there are only weights.
        embeddings: of the output matrix, tied or not, under gptq; tables that are only looked up get rows anyway.
        target_bytes: prune until `size` says this or less.
        size: bytes that count, as in `prune_to_size`; needed with `target_bytes`.
        budget_seconds: calibration stops in time to leave half of this for rounding; matrices that GPTQ does not get to
            are rounded row by row, as the report says; pruning stops its search. Exceeded only by a first batch, or two
            calls of `size`, that take longer.
        dtype: of the calibration's forward pass; the embedding's where None.

    Returns:
        The tensors as they are to be stored, and what became of each.

    Raises:
        InputError: an unknown choice, gptq without calibration, NaN or infinite weights or activations, a target that
            pruning cannot reach.
    """
    for what, value in (("method", method), ("embeddings", embeddings)):
        if value not in ("rows", "gptq"):
            raise InputError(f"{what} {value!r}: expected rows or gptq")
    if method == "gptq" and calibration is None:
        raise InputError("method gptq: calibration tokens are missing")
    if (target_bytes is None) != (size is None):
        raise InputError("target_bytes and size: expected both or neither")
    if budget_seconds is not None and not budget_seconds > 0:
        raise InputError(f"budget_seconds {budget_seconds}: expected a positive number")
    marks = [time.perf_counter()]
    deadline = halfway = None
    if budget_seconds is not None:
        deadline, halfway = marks[0] + budget_seconds, marks[0] + budget_seconds / 2
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise InputError(f"tensor {name!r} holds NaN or infinite values")
    hessians: dict[str, Tensor] = {}
    tokens = 0
    if calibration is not None:
        hessians, tokens = collect_hessians(model, calibration, dtype, halfway)
    marks.append(time.perf_counter())
    corrected = set(hessians) if method == "gptq" else set()
    if embeddings == "rows":
        corrected -= {"tok_emb.weight", "lm_head.weight"}
    tensors: dict[str, QuantizedMatrix | Tensor] = {}
    methods, slowest = {}, 0.0
    for name, weight in weights.items():
        started, bits = time.perf_counter(), stored_bits(name, weight)
        if bits == 16:
            methods[name], tensors[name] = "float16", _half(name, weight)
        elif name in corrected and (deadline is None or started + slowest < deadline):
            matrix = quantize_gptq(weight, hessians[name], bits, clip, choose, damping, sdclip_k=sdclip_k)
            methods[name], tensors[name] = "gptq", _on_cpu(matrix)
            slowest = max(slowest, time.perf_counter() - started)
        else:
            methods[name], tensors[name] = "rows", _on_cpu(quantize_rows(weight, bits, clip, sdclip_k))
    marks.append(time.perf_counter())
    pruned = 0
    if target_bytes is not None and size is not None:
        prunable = {name for name, weight in weights.items() if stored_bits(name, weight) == 6}
        by_output = choose == "output" and prunable <= hessians.keys()
        costs = output_costs(tensors, hessians) if by_output else None
        tensors, pruned = prune_to_size(tensors, target_bytes, size, costs, deadline=deadline)
    marks.append(time.perf_counter())
    report = [
        _tensor_report(name, weight, tensors[name], methods[name], hessians.get(name))
        for name, weight in weights.items()
    ]
    spent = (end - start for start, end in pairwise(marks))
    seconds = dict(zip(("calibration", "rounding", "pruning"), spent, strict=True))
    return Quantized(tensors, report, tokens, pruned, seconds)


def stored_bits(name: str, tensor: Tensor) -> int:
    """Bits a weight: 6 for the blocks' matrices, 8 for other matrices, 16 for parameters that are not a `.weight`."""
    if tensor.ndim != 2 or not name.endswith(".weight"):
        return 16
    return 6 if name.startswith("blocks.") else 8


def _half(name: str, tensor: Tensor) -> Tensor:
    half = tensor.half().float().cpu()
    if not half.isfinite().all():
        raise InputError(f"tensor {name!r} holds values beyond float16's 65,504")
    return half


def _on_cpu(matrix: QuantizedMatrix) -> QuantizedMatrix:
    return QuantizedMatrix(matrix.codes.cpu(), matrix.scale.cpu(), matrix.bits)


def _tensor_report(
    name: str, weight: Tensor, stored: QuantizedMatrix | Tensor, method: str, hessian: Tensor | None
) -> TensorReport:
    weight = weight.double()
    if isinstance(stored, QuantizedMatrix):
        values, codes, bits = stored.dequantize(), stored.codes, stored.bits
        counts = torch.bincount(codes.flatten().int() + 128).double()
        entropy_bits = float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)
    else:
        values, codes, bits, entropy_bits = stored, stored, 16, 16.0
    error = values.to(weight.device).double() - weight
    output_error = None
    if hessian is not None:
        output_error = _ratio((error @ hessian * error).sum(), (weight @ hessian * weight).sum())
    return TensorReport(
        name=name,
        shape=list(weight.shape),
        method=method,
        bits=bits,
        entropy_bits=entropy_bits,
        zeros=float((codes == 0).double().mean()),
        weight_error=_ratio(error.square().sum(), weight.square().sum()),
        output_error=output_error,
    )


def _ratio(error: Tensor, of: Tensor) -> float:
    """The ratio of two norms, from their squares; a tensor of zeros is kept exactly."""
    return math.sqrt(max(float(error), 0.0) / float(of)) if float(of) > 0 else 0.0


def format_report(report: Sequence[TensorReport]) -> str:
    """A table of the matrices, one line each, and their mean bits a weight."""
    rows = [row for row in report if row.bits < 16]
    width = max((len(row.name) for row in rows), default=4)
    lines = [f"{'tensor':<{width}}  {'shape':>11}  method  bits  entropy  zeros  weight error  output error"]
    for row in rows:
        output = "" if row.output_error is None else f"{row.output_error:.5f}"
        lines.append(
            f"{row.name:<{width}}  {'x'.join(map(str, row.shape)):>11}  {row.method:>6}  {row.bits:>4}  "
            f"{row.entropy_bits:>7.3f}  {row.zeros:>5.3f}  {row.weight_error:>12.5f}  {output:>12}".rstrip()
        )
    weights = sum(math.prod(row.shape) for row in rows)
    if weights:
        bits = sum(math.prod(row.shape) * row.entropy_bits for row in rows) / weights
        lines.append(f"{weights:,} weights in matrices, {bits:.3f} bits each")
    return "\n".join(lines)
