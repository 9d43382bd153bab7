"""What the specs say of the three functions: their inputs, their cases, and the launches behind production shapes."""

import torch

from .._inputs import _draw
from .._tile import _OPTIONS, _tile_compilations
from ..bias_cross_entropy import _bias_cross_entropy_bwd_kernel
from ..spec import Case, Compilation
from ._kernels import _p_form_evaluate_kernel, _target_counts_kernel
from ._reference import PForm, p_form_prepare_ref


def _evaluate_inputs(generator, device, dtype, *, W, T, V, reduction="mean", spread=1.0, **rest):
    """`dtype` is that of the probabilities."""
    form = p_form_prepare_ref(
        **_draw(generator, torch.device("cpu"), torch.float32, W=W, T=T, V=V, **rest),
        probs_dtype=dtype if dtype == torch.bfloat16 else None,
    )
    bias = spread * torch.randn(W, V, generator=generator)
    return {"form": PForm(*(t.to(device) for t in form)), "bias": bias.to(device), "reduction": reduction}


def _counts_inputs(generator, device, dtype, *, W, T, V, **rest):
    kwargs = _draw(generator, device, dtype, W=W, T=T, V=V, **rest)
    del kwargs["logits"]
    return {"vocabulary": V, **kwargs}


_CASES = (
    Case("one element", {"W": 1, "T": 1, "V": 1}),
    Case("no windows", {"W": 0, "T": 4, "V": 16}),
    Case("no positions", {"W": 2, "T": 0, "V": 16}),
    Case("primes", {"W": 3, "T": 7, "V": 61}),
    Case("a tile", {"W": 2, "T": 4, "V": 1024}, torch.bfloat16),
    Case("above a tile", {"W": 1, "T": 5, "V": 1025}),
    Case("weights", {"W": 3, "T": 9, "V": 33, "weights": True}),
    Case("some ignored", {"W": 3, "T": 9, "V": 33, "weights": True, "edit": "some ignored"}, torch.bfloat16),
    Case("all ignored", {"W": 2, "T": 5, "V": 33, "edit": "all ignored"}),
    Case("two parts", {"W": 3, "T": 131, "V": 24, "weights": True}),
    Case("production bfloat16", {"W": 8192, "T": 64, "V": 1024}, torch.bfloat16, production=True),
    Case("production float32", {"W": 8192, "T": 64, "V": 1024}, torch.float32, production=True),
    Case("production V 8192", {"W": 1024, "T": 64, "V": 8192}, torch.bfloat16, production=True),
)
_PREPARE_CASES = (
    *_CASES,
    Case("capped", {"W": 2, "T": 5, "V": 48, "softcap": 3.0}),
    Case("rows that are NaN", {"W": 4, "T": 6, "V": 33, "weights": True, "edit": "poor rows"}),
    Case("rounded to bfloat16", {"W": 2, "T": 5, "V": 48, "probs_dtype": torch.bfloat16}),
    Case("large vocabulary", {"W": 1, "T": 2, "V": 20011}),
)
_EVALUATE_CASES = (
    *_CASES,
    Case("rows that are NaN", {"W": 4, "T": 6, "V": 33, "weights": True, "edit": "poor rows"}),
    Case("sums", {"W": 3, "T": 9, "V": 33, "weights": True, "reduction": "sum"}),
    Case("uneven bias", {"W": 3, "T": 9, "V": 33, "spread": 20.0}),
)


def _evaluate_compilations(*, W, T, V, **_):
    return _tile_compilations(_p_form_evaluate_kernel, T, V, log_s_ptr=None)


def _prepare_compilations(*, W, T, V, softcap=None, **_):
    """The pass that writes P; the forward's is that of `bias_cross_entropy`."""
    without = dict.fromkeys(("bias_ptr", "dnll_ptr", "dlse_ptr", "dbias_ptr"))
    cap = "none" if softcap is None else "before"
    return _tile_compilations(_bias_cross_entropy_bwd_kernel, T, V, CAP=cap, **without)


def _counts_compilations(*, W, T, V, **_):
    types = {"targets_ptr": "*i64", "weights_ptr": "*fp32", "counts_ptr": "*fp32"}
    types |= {"T": "i32", "V": "i32:16", "ignore_index": "i32"}
    fixed = dict.fromkeys(("nll_ptr", "weights_out_ptr", "total_ptr", "base_loss_ptr"))
    fixed |= {"BLOCK_T": 16, "BLOCK_V": 512}
    return [Compilation(_target_counts_kernel, types, fixed, num_warps=4, elements=16 * 512, options=_OPTIONS)]
