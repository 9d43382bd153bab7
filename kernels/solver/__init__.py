"""The whole adaptation of a window in one launch: a logit bias that minimises its cross-entropy. One program a window.

    F(b) = ( sum_t w_t (log sum_v exp(z_tv + b_v) - z_t,y_t - b_y_t) + (r / 2) |b - prior|^2 ) / sum_t w_t

`slot_solve` is L-BFGS with a strong Wolfe line search (`_lbfgs.py`), `slot_solve_mm` is majorise-minimise
(`_majorise.py`). Both evaluate F in P-form: with P = softmax(z), made once by the kernel itself, u = exp(b - max b) and
s = P u, the loss is sum_t w_t (log s_t + max b) - counts . b and its gradient u * P^T (w / s) - counts, besides what
does not depend on b and the ridge: V exponentials instead of T V, one pass over P for both.

| tensor                          | shape     | type                                        |
|---------------------------------|-----------|---------------------------------------------|
| logits                          | [W, T, V] | float32, bfloat16, float16; any strides     |
| targets                         | [W, T]    | int64, int32                                |
| weights                         | [W, T]    | float32, >= 0                               |
| start, prior, bias              | [W, V]    | float32                                     |
| loss                            | [W]       | float32; float64 until it is stored         |
| iterations, evaluations, status | [W]       | int32                                       |

Scratch belongs to a program, not to a window, and there are as many programs as the GPU holds at once: memory is flat
in W. For each, P is T V values in float32 or bfloat16, and L-BFGS keeps 2 (history + 1) + 6 vectors. Which program
solves a window, and what it solved before, has no influence: a window's bits are the same alone, in any batch, in any
order.

What sm_90 code for V = 1024, T = 64, history 20 consists of (Triton 3.9; one program of 8 warps at a time on an SM, as
255 registers allow; no spills; instructions of one warp):

| part                        | bfloat16 P        | float32 P         | barriers in the loop |
|-----------------------------|-------------------|-------------------|----------------------|
| evaluation: loop, trips     | 210 x 8           | 166 x 8           | 0                    |
| of that, an element of P    | 6.6               | 5.2               |                      |
| evaluation: besides         | about 500         | about 500         |                      |
| direction, n = 20: products | 168 x 6           | 168 x 6           | 4                    |
| direction: combination      | 72 x 6            | 72 x 6            | 0                    |
| direction: besides          | about 1,100       | about 1,100       |                      |

Predicted from that, not measured (`python -m bench.predict`, constants named there): a bfloat16 P, 128 KB, stays in the
256 KB of L1, as the pairs do not pass through it: they are read from L2, twice a direction, 16 KB n, 7,500 cycles on
average over 25 iterations at 24 bytes a cycle. A solve of 25 iterations and 29 evaluations is then bound by its
instructions and the waits of its serial parts: 390,000 cycles, 1.6 us a window over 132 SMs; 2.1 us where L1 keeps
nothing of P. A float32 P, 256 KB, comes from L2 in each evaluation: 2.8 us. A majorise-minimise step costs an
evaluation and about 700 instructions more.

Two programs of 4 warps a multiprocessor, the serial parts of one behind the other's, were compiled and left: each
thread then has twice the elements of every vector and spills 152 bytes (Triton 3.6: 40), and two programs' scratch is
87 MB, not 43, of 50 MB of L2, and twice 128 KB of P no longer fits L1: 1.4 to 2.5 us predicted.

One program a window fits windows whose scratch stays in L2. At T = 1984 or V = 8192 it does not, and every evaluation
reads P from memory: 4 MB and 1 MB in bfloat16, so about 30 and 20 us a window, again predicted; and fewer windows than
SMs leave SMs idle, as a window never has more than one. Above V = 1024 several warps share a row, with two barriers a
row. Above 2048, with histories above 31, or with weights, start and prior given and a V that fills no tile, some 100 to
500 bytes a thread of scalars and matrices spill, outside the loops over P.
"""

from typing import NamedTuple

import torch

from .._inputs import _check_windows, _contiguous
from .._rules import Status
from .._triton import _launch
from ..cases.solver import CASES, MM_CASES, inputs
from ..spec import Compilation, KernelSpec
from ._lbfgs import _lbfgs_kernel, _phase_arguments, _scratch
from ._majorise import _majorise_kernel
from ._reference import SlotSolution, slot_solve_mm_ref, slot_solve_ref
from ._window import _config

__all__ = ["SlotSolution", "Status", "slot_solve", "slot_solve_mm", "slot_solve_mm_ref", "slot_solve_ref"]

MOST_COLUMNS = 16384
MOST_PAIRS = 63
_PROGRAMS_PER_SM = 1  # what 8 warps of 255 registers leave room for; unmeasured
_OPTIONS = {"enable_fp_fusion": True, "num_stages": 1}


# Launches


def _programs(windows, device):
    """As many as the device holds at once: scratch does not grow with the windows, and stays in the L2 cache."""
    resident = 3
    if device.type == "cuda":
        resident = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    return min(windows, resident)


class _Fit(NamedTuple):
    """What the public functions have in common, as it is given to them."""

    logits: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    start: torch.Tensor | None
    prior: torch.Tensor | None
    ridge: float
    clamp: float | None
    probs_dtype: torch.dtype | None


def _check(fit: _Fit):
    logits, targets, weights, start, prior, ridge, clamp, probs_dtype = fit
    _check_windows(logits, targets, weights, start=start, prior=prior)
    W, _, V = logits.shape
    if V > MOST_COLUMNS:
        raise ValueError(f"logits: expected V <= {MOST_COLUMNS}, got {V}")
    for name, tensor in (("start", start), ("prior", prior)):
        if tensor is not None and (tensor.shape != (W, V) or tensor.dtype != torch.float32):
            raise ValueError(f"{name}: expected float32 {[W, V]}, got {tensor.dtype} {list(tensor.shape)}")
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge: expected a finite number >= 0, got {ridge!r}")
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp: expected a number above 0, or None, got {clamp!r}")
    if probs_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"probs_dtype: expected float32 or bfloat16, got {probs_dtype}")


def _outputs(logits):
    W, _, V = logits.shape
    bias, loss = logits.new_empty((W, V), dtype=torch.float32), logits.new_empty((W,), dtype=torch.float32)
    return SlotSolution(bias, loss, *(logits.new_empty((W,), dtype=torch.int32) for _ in range(3)))


def _solve_windows(kernel, public, fit: _Fit, **given):
    """What the kernels have in common: checks, scratch, sizes, tile."""
    _check(fit)
    logits = fit.logits
    W, T, V = logits.shape
    probs_dtype = fit.probs_dtype or torch.float32
    tile = _config(V, min(logits.dtype.itemsize, probs_dtype.itemsize))
    rows, padded = -(-T // tile.rows) * tile.rows, -(-V // 16) * 16
    programs = _programs(W, logits.device)
    targets, weights, start, prior = _contiguous(fit.targets, fit.weights, fit.start, fit.prior)
    solution = _outputs(logits)
    if not W:
        return solution
    vectors = 2
    if "BLOCK_H" in given:
        vectors, numbers = _scratch(given["BLOCK_H"])
        given["small_ptr"] = logits.new_empty((programs, numbers), dtype=torch.float64)
    _launch(
        kernel,
        (programs,),
        public,
        logits_ptr=logits,
        targets_ptr=targets,
        weights_ptr=weights,
        start_ptr=start,
        prior_ptr=prior,
        probs_ptr=logits.new_empty((programs, rows, padded), dtype=probs_dtype),
        row_weights_ptr=logits.new_empty((programs, rows), dtype=torch.float32),
        vectors_ptr=logits.new_empty((programs, vectors, padded), dtype=torch.float32),
        bias_ptr=solution.bias,
        loss_ptr=solution.loss,
        iterations_ptr=solution.iterations,
        evaluations_ptr=solution.evaluations,
        status_ptr=solution.status,
        W=W,
        T=T,
        V=V,
        VP=padded,
        stride_lw=logits.stride(0),
        stride_lt=logits.stride(1),
        stride_lv=logits.stride(2),
        ridge=float(fit.ridge),
        box=float("inf") if fit.clamp is None else float(fit.clamp),
        EVEN=padded == tile.chunks * tile.cols,
        CHUNKS=tile.chunks,
        ROWS=tile.rows,
        COLS=tile.cols,
        num_warps=tile.num_warps,
        **_OPTIONS,
        **given,
    )
    return solution


# Public functions


@torch.no_grad()
def slot_solve(
    logits,
    targets,
    weights=None,
    start=None,
    prior=None,
    *,
    ridge=0.0,
    clamp=None,
    phases=((25, 20),),
    max_eval=None,
    max_line_search=None,
    tolerance_grad=1e-7,
    tolerance_change=1e-9,
    ignore_index=-100,
    probs_dtype=None,
):
    """Fits a logit bias to each window by L-BFGS with a strong Wolfe line search, in one launch.

    Each window is solved as torch.optim.LBFGS(line_search_fn="strong_wolfe", lr=1) would solve it alone; the constants
    are torch's. Where torch would carry on with a loss that is not finite, a trial point counts as infinitely bad.

    Args:
        logits: [W, T, V] float32, bfloat16 or float16, any strides, 1 <= V <= 16384. Never written.
        targets: [W, T] int64 or int32 token ids, or `ignore_index`.
        weights: None for 1, or [W, T] float32 >= 0 (unchecked). Positions of weight 0 are not read.
        start: None for 0, or [W, V] float32.
        prior: None for 0, or [W, V] float32: what the ridge pulls towards.
        ridge: r >= 0, on the sum of the positions' losses. Without it the bias of a token that is no target has no
            bound but the iterations and the clamp: compare losses there, not biases.
        clamp: None, or c > 0: |bias| <= c, applied to the result; the loss is that of the clamped bias, whose
            evaluation is not counted.
        phases: (iterations >= 0, history >= 1) of each phase; a phase starts from the last one's result, with fresh
            memory. At most 4 phases of at most 32767 iterations, with a history of at most 63; what is more than
            iterations - 1 is never needed and does not count.
        max_eval: evaluations after which a phase starts no further iteration; None: iterations * 5 // 4.
        max_line_search: trials of a line search after its first; None: what is left of max_eval, as in recent torch
            (25 in older versions).
        tolerance_grad, tolerance_change: as in torch.optim.LBFGS. Near an optimum, changes below about 1e-7 of the loss
            are rounding, and the default 1e-9 may spend a few evaluations on them.
        ignore_index: target of positions that do not count. They are not read.
        probs_dtype: None for float32; bfloat16 halves the traffic of an evaluation and moves the loss at the solution
            by up to 1e-5.

    Returns:
        `SlotSolution`: bias [W, V] and loss [W] in float32; iterations, evaluations and status (values of `Status`) [W]
        in int32, as torch would count them. A window with a counting position whose target is outside [0, V), or whose
        row holds NaN, +inf or only -inf, has status NOT_FINITE, a loss that is not finite, and its start as bias. One
        where no position counts has loss 0 and its start as bias, clamped.

    Raises:
        ValueError: a shape, type, device or number is not as above.

    Tolerance: the loss within 1e-5 of what `slot_solve_ref` reaches. At convergence within 1e-7 of the optimum's, which
        puts the bias within 3e-4 of it with a ridge >= 1, within 3e-3 with 0.1 (20 positions).
    Source: parameter-golf PR #1350 (L-BFGS on a logit bias); Nocedal & Wright; `_lbfgs.py`.
    """
    phases = tuple((int(most), int(history)) for most, history in phases)
    if not phases or any(most < 0 or history < 1 for most, history in phases):
        raise ValueError(f"phases: expected (iterations >= 0, history >= 1) at least once, got {phases!r}")
    if len(phases) > 4 or any(most > 32767 or min(most - 1, history) > MOST_PAIRS for most, history in phases):
        raise ValueError(
            f"phases: expected at most 4, of at most 32767 iterations, with a history of at most {MOST_PAIRS}, "
            f"got {phases!r}"
        )
    if not tolerance_change >= 0:
        raise ValueError(f"tolerance_change: expected >= 0, got {tolerance_change!r}")
    return _solve_windows(
        _lbfgs_kernel,
        "slot_solve",
        _Fit(logits, targets, weights, start, prior, ridge, clamp, probs_dtype),
        tolerance_grad=float(tolerance_grad),
        tolerance_change=float(tolerance_change),
        max_eval=-1 if max_eval is None else max_eval,
        max_line_search=-1 if max_line_search is None else max_line_search,
        ignore_index=ignore_index,
        **_phase_arguments(phases),
    )


@torch.no_grad()
def slot_solve_mm(
    logits,
    targets,
    weights=None,
    start=None,
    prior=None,
    *,
    ridge=0.0,
    clamp=None,
    iterations=10,
    tolerance_grad=1e-7,
    tolerance_change=1e-9,
    ignore_index=-100,
    probs_dtype=None,
):
    """Fits a logit bias to each window by majorise-minimise steps, in one launch: the loss never increases.

    One evaluation a step. The box holds in every step. With a ridge of 1 or more, some 5 to 10 steps are as good as
    convergence; towards ridge 0 it slows to the pace of generalised iterative scaling, and `slot_solve` is faster.

    Args:
        logits, targets, weights, start, prior, ignore_index, probs_dtype: as `slot_solve`. A start outside the box is
            moved to it.
        ridge: r >= 0; above 0 unless there is a clamp.
        clamp: None, or c > 0: minimises over |bias| <= c.
        iterations: most steps, >= 0; evaluations are one more than the steps taken.
        tolerance_grad: stops at max |b - clip(b - gradient)| <= this, the gradient's maximum where the box is idle.
        tolerance_change: stops once the last step, or the last change of the loss, was below this.

    Returns:
        As `slot_solve`; the loss is that of the bias returned.

    Raises:
        ValueError: a shape, type, device or number is not as above.

    Tolerance: the loss within 1e-6 of `slot_solve_mm_ref`, relative; rounding may raise it by as much in a step.
    Source: own derivation, after Darroch & Ratcliff 1972; `_majorise.py`.
    """
    if not ridge and clamp is None:
        raise ValueError("ridge, clamp: expected at least one of them; without, tokens that are no target go to -inf")
    if iterations < 0:
        raise ValueError(f"iterations: expected >= 0, got {iterations!r}")
    return _solve_windows(
        _majorise_kernel,
        "slot_solve_mm",
        _Fit(logits, targets, weights, start, prior, ridge, clamp, probs_dtype),
        tolerance_grad=float(tolerance_grad),
        tolerance_change=float(tolerance_change),
        max_iterations=iterations,
        ignore_index=ignore_index,
    )


# The contract

_TYPES = {
    **dict.fromkeys(("targets_ptr",), "*i64"),
    **dict.fromkeys(("iterations_ptr", "evaluations_ptr", "status_ptr"), "*i32"),
    **dict.fromkeys(("row_weights_ptr", "vectors_ptr", "bias_ptr", "loss_ptr"), "*fp32"),
    "small_ptr": "*fp64",
    **dict.fromkeys(("W", "T", "V", "VP", "stride_lw", "stride_lt"), "i32:16"),
    **dict.fromkeys(("ridge", "box", "tolerance_grad", "tolerance_change"), "fp32"),
    **dict.fromkeys(("packed_iterations", "packed_histories"), "i64"),
    **dict.fromkeys(("max_eval", "max_line_search", "max_iterations", "ignore_index"), "i32"),
}


def _compilations(kernel, V, phases=None):
    """Contiguous logits, weights of 1, from 0: bfloat16 logits with either type of P, float32 with its own."""
    found = []
    for logits, probs in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        tile = _config(V, 2 if "bf16" in (logits, probs) else 4)
        types = {**_TYPES, "logits_ptr": f"*{logits}", "probs_ptr": f"*{probs}"}
        fixed = {"weights_ptr": None, "start_ptr": None, "prior_ptr": None, "stride_lv": 1}
        fixed |= {"EVEN": V == tile.chunks * tile.cols, "CHUNKS": tile.chunks, "ROWS": tile.rows, "COLS": tile.cols}
        if phases is not None:
            fixed |= {"PHASES": len(phases), "BLOCK_H": _phase_arguments(phases)["BLOCK_H"]}
        found.append(
            Compilation(
                kernel,
                signature={name: types[name] for name in kernel.arg_names if name in types},
                constexprs={name: fixed[name] for name in kernel.arg_names if name in fixed},
                num_warps=tile.num_warps,
                num_stages=1,
                elements=tile.chunks * tile.rows * tile.cols,
                options={"enable_fp_fusion": True},
            )
        )
    return found


def _bytes_moved(*, W, T, V, itemsize, **_):
    return W * (T * (V * itemsize + 8) + 4 * V + 16)


SPECS = (
    KernelSpec(
        name="slot_solve",
        fn=slot_solve,
        reference=slot_solve_ref,
        inputs=inputs,
        cases=CASES,
        compilations=lambda *, V, phases, **_: _compilations(_lbfgs_kernel, V, phases),
        bytes_moved=_bytes_moved,
        # as many evaluations as the phases allow, and of directions as many as iterations, with a full history
        flops=lambda *, W, T, V, phases, **_: sum(W * V * (5 * n // 4 * 4 * T + n * 12 * h) for n, h in phases),
    ),
    KernelSpec(
        name="slot_solve_mm",
        fn=slot_solve_mm,
        reference=slot_solve_mm_ref,
        inputs=inputs,
        cases=MM_CASES,
        compilations=lambda *, V, **_: _compilations(_majorise_kernel, V),
        bytes_moved=_bytes_moved,
        flops=lambda *, W, T, V, iterations=10, **_: 4 * W * T * V * (iterations + 1),
    ),
)
