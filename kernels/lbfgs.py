"""L-BFGS memory for W independent problems of V variables: push a curvature pair, and the two-loop direction.

A pair is a step s and the change y of the gradient over it. `lbfgs_push` keeps it if y.s > 1e-10 (torch.optim.LBFGS's
test), in place of the oldest once H are kept, and then sets gamma = y.s / y.y. With the pairs numbered from the oldest,
0 .. n - 1, and rho_i = 1 / y_i.s_i, `lbfgs_direction` is

    q = -g
    for i = n - 1 .. 0:  a_i = rho_i (s_i . q),  q = q - a_i y_i
    d = gamma q
    for i = 0 .. n - 1:  d = d + (a_i - rho_i (y_i . d)) s_i

which is -g for an empty memory (gamma starts at 1).

| tensor              | shape, dtype         |                                                            |
|---------------------|----------------------|------------------------------------------------------------|
| History.s, .y       | [W, H, V] float32    | rings of pairs; a slot that holds none may hold anything    |
| History.rho, .gamma | [W, H], [W] float32  |                                                            |
| History.head, .count| [W] int32            | the slot that the next pair goes to; how many pairs there are |
| s, y, gradient      | [W, V] float32       |                                                            |
| direction           | [W, V] float32       |                                                            |

A push moves 16 W V bytes and takes 4 W V flops; a direction with full memory moves (8 H + 8) W V bytes if the second
loop finds the pairs in L2, (16 H + 8) W V if not, and takes 8 H W V flops.

One program owns one problem, keeps q in registers and sums in an order that V alone decides: a problem's bits are the
same alone and in any batch. The 2 n dot products depend on each other, each costs two block barriers; the pairs of the
next one are fetched meanwhile. The matrix form (slotfast/lbfgs/memory.py) needs two passes and no such chain, but also
[H, H] matrices a problem, in float64, and dot products of every kept pair with every new one: a third pass. It is left
to the one-launch solver, which can keep them on chip.

Source: Nocedal & Wright, Numerical Optimization, algorithm 7.4.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ._rules import SMALLEST_CURVATURE
from ._triton import _launch, tl, triton
from .cases.lbfgs import DIRECTION_CASES, PUSH_CASES, direction_inputs, push_inputs
from .spec import Compilation, KernelSpec


class History(NamedTuple):
    """Curvature pairs of W problems, in rings of H slots."""

    s: Tensor  # [W, H, V]
    y: Tensor  # [W, H, V]
    rho: Tensor  # [W, H]
    gamma: Tensor  # [W]
    head: Tensor  # [W], int32
    count: Tensor  # [W], int32


def lbfgs_history(W: int, H: int, V: int, device: torch.device | str = "cpu", dtype=torch.float32) -> History:
    """An empty memory.

    Args:
        W, H, V: problems, pairs kept of each, variables of each.
        device, dtype: of the tensors; the kernels take float32.
    Returns:
        History.
    """
    s, y = (torch.empty(W, H, V, device=device, dtype=dtype) for _ in range(2))
    head, count = (torch.zeros(W, device=device, dtype=torch.int32) for _ in range(2))
    return History(s, y, s.new_empty(W, H), s.new_ones(W), head, count)


def lbfgs_push_ref(history: History, s: Tensor, y: Tensor) -> History:
    """Plain torch, any floating dtype; see `lbfgs_push`."""
    ys, yy = (y * s).sum(-1), (y * y).sum(-1)
    H = history.rho.shape[1]
    curved = ys > SMALLEST_CURVATURE
    put = curved[:, None] & (torch.arange(H, device=s.device) == history.head[:, None])
    return History(
        torch.where(put[:, :, None], s[:, None], history.s),
        torch.where(put[:, :, None], y[:, None], history.y),
        torch.where(put, (1 / ys)[:, None], history.rho),
        torch.where(curved, ys / yy, history.gamma),
        torch.where(curved, (history.head + 1) % H, history.head),
        torch.where(curved, (history.count + 1).clamp(max=H), history.count),
    )


def lbfgs_direction_ref(history: History, gradient: Tensor) -> Tensor:
    """Plain torch, any floating dtype; see `lbfgs_direction`."""
    H, rows = history.rho.shape[1], torch.arange(len(gradient), device=gradient.device)
    q, alpha = -gradient, gradient.new_zeros(history.rho.shape)
    pairs = []
    for age in range(H):  # the newest first
        at = rows, (history.head.long() - 1 - age) % H
        pairs.append(((age < history.count)[:, None], history.s[at], history.y[at], history.rho[at][:, None]))
    for age, (kept, s, y, rho) in enumerate(pairs):
        alpha[:, age : age + 1] = rho * (s * q).sum(-1, keepdim=True)
        q = torch.where(kept, q - alpha[:, age : age + 1] * y, q)
    d = history.gamma[:, None] * q
    for age, (kept, s, y, rho) in reversed([*enumerate(pairs)]):
        beta = rho * (y * d).sum(-1, keepdim=True)
        d = torch.where(kept, d + (alpha[:, age : age + 1] - beta) * s, d)
    return d


# Launch parameters

LARGEST_V = 8192


def _config(V: int) -> tuple[int, int]:
    """BLOCK_V and warps, by V alone.

    16 numbers of each vector a thread: five vectors (q, a pair, the next pair) make 80 registers, far from spilling.
    Compiled for sm_90 by Triton 3.9 with H = 20 and V = 1024, 4096, 8192, a direction takes 96 to 102 registers and no
    spills, and a pair 118 to 140 instructions and 2 barriers in each loop; a push takes 47 to 51 registers, 4 barriers.
    Fewer warps would wait less at barriers, more would hide more latency; no GPU was asked yet.
    """
    block_v = max(triton.next_power_of_2(V), 64)  # two elements a lane: then all lanes round a fused sum alike
    return block_v, min(max(block_v // 512, 1), 16)  # unmeasured


# A push decides by y.s whether to store. Fused, a sum over lanes that hold one element each starts with
# fma(y, s, product of the next lane): two lanes of a pair would round it differently, and could decide differently.
_PUSH_OPTIONS = {"enable_fp_fusion": False}
_DIRECTION_OPTIONS = {"enable_fp_fusion": True}  # q - a y in one rounding


@triton.jit
def _lbfgs_push_kernel(
    s_history_ptr,
    y_history_ptr,
    rho_ptr,
    gamma_ptr,
    head_ptr,
    count_ptr,
    s_ptr,
    y_ptr,
    V,
    H: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    w = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    head = tl.load(head_ptr + w)
    count = tl.load(count_ptr + w)
    s = tl.load(s_ptr + w * V + offs_v, mask=mask_v, other=0.0)  # (BLOCK_V,)
    y = tl.load(y_ptr + w * V + offs_v, mask=mask_v, other=0.0)  # (BLOCK_V,)
    ys = tl.sum(y * s, axis=0)
    yy = tl.sum(y * y, axis=0)
    if ys > SMALLEST:
        row = (w * H + head) * V
        tl.store(s_history_ptr + row + offs_v, s, mask=mask_v)
        tl.store(y_history_ptr + row + offs_v, y, mask=mask_v)
        # Every warp loads head and count for itself, one thread writes them back: without the barrier a warp that is
        # late could load what another has written, and put its part of the pair into the next slot.
        tl.debug_barrier()
        tl.store(rho_ptr + w * H + head, 1.0 / ys)
        tl.store(gamma_ptr + w, ys / yy)
        tl.store(head_ptr + w, (head + 1) % H)
        tl.store(count_ptr + w, tl.minimum(count + 1, H))


@triton.jit
def _lbfgs_direction_kernel(
    s_history_ptr,
    y_history_ptr,
    rho_ptr,
    gamma_ptr,
    head_ptr,
    count_ptr,
    gradient_ptr,
    direction_ptr,
    V,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """No barrier of our own: nothing written is read, and what the second loop needs of the first is in registers."""
    w = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    offs_h = tl.arange(0, BLOCK_H)
    s_history_ptr += w * H * V + offs_v
    y_history_ptr += w * H * V + offs_v
    rho_ptr += w * H
    head = tl.load(head_ptr + w)
    count = tl.load(count_ptr + w)
    q = -tl.load(gradient_ptr + w * V + offs_v, mask=mask_v, other=0.0)  # (BLOCK_V,)
    alpha = tl.zeros((BLOCK_H,), dtype=tl.float32)  # by age, the newest pair's first

    # The pair after the current one is fetched before the dot product that does not need it. That is one fetch more
    # than there are pairs, from a slot that may hold none; what it brings is not used.
    slot = (head + H - 1) % H
    s = tl.load(s_history_ptr + slot * V, mask=mask_v, other=0.0)  # (BLOCK_V,)
    y = tl.load(y_history_ptr + slot * V, mask=mask_v, other=0.0)  # (BLOCK_V,)
    for age in range(count):
        rho = tl.load(rho_ptr + slot)
        slot = (slot + H - 1) % H
        next_s = tl.load(s_history_ptr + slot * V, mask=mask_v, other=0.0)
        next_y = tl.load(y_history_ptr + slot * V, mask=mask_v, other=0.0)
        a = rho * tl.sum(s * q, axis=0)
        q -= a * y
        alpha = tl.where(offs_h == age, a, alpha)
        s = next_s
        y = next_y

    d = tl.load(gamma_ptr + w) * q
    slot = (head + H - count) % H
    s = tl.load(s_history_ptr + slot * V, mask=mask_v, other=0.0)
    y = tl.load(y_history_ptr + slot * V, mask=mask_v, other=0.0)
    for rank in range(count):
        rho = tl.load(rho_ptr + slot)
        slot = (slot + 1) % H
        next_s = tl.load(s_history_ptr + slot * V, mask=mask_v, other=0.0)
        next_y = tl.load(y_history_ptr + slot * V, mask=mask_v, other=0.0)
        a = tl.sum(tl.where(offs_h == count - 1 - rank, alpha, 0.0), axis=0)
        d += (a - rho * tl.sum(y * d, axis=0)) * s
        s = next_s
        y = next_y
    tl.store(direction_ptr + w * V + offs_v, d, mask=mask_v)


# Public functions


def _check(history: History, **vectors: Tensor) -> tuple[int, int, int]:
    W, H, V = history.s.shape
    shapes = {"s": (W, H, V), "y": (W, H, V), "rho": (W, H), "gamma": (W,), "head": (W,), "count": (W,)}
    expected = {f"history.{name}": (getattr(history, name), shape) for name, shape in shapes.items()}
    expected.update({name: (tensor, (W, V)) for name, tensor in vectors.items()})
    for name, (tensor, shape) in expected.items():
        dtype = torch.int32 if name in ("history.head", "history.count") else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != history.s.device:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}: expected {dtype} {list(shape)} on {history.s.device}, got {got}")
        if name.startswith("history.") and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {tensor.stride()}")
    if H < 1 or not 1 <= V <= LARGEST_V:
        raise ValueError(f"history: expected H >= 1 and 1 <= V <= {LARGEST_V}, got H = {H} and V = {V}")
    return W, H, V


def _history_arguments(history: History) -> dict[str, Tensor]:
    rings = {"s_history_ptr": history.s, "y_history_ptr": history.y}
    return rings | {f"{name}_ptr": getattr(history, name) for name in ("rho", "gamma", "head", "count")}


def lbfgs_push_(history: History, s: Tensor, y: Tensor) -> History:
    """Adds a curvature pair to each problem's memory, in place; pairs with y.s <= 1e-10, or NaN, change nothing.

    Args:
        history: contiguous float32 (int32: head, count) tensors as `lbfgs_history` makes them; V <= 8192. Written to.
        s: [W, V] float32, steps.
        y: [W, V] float32, changes of the gradient.

    Returns:
        history itself.

    Raises:
        ValueError: a shape, type, device or layout is not as above.

    Tolerance: 2x the error of plain float32 torch against float64, plus one rounding. A pair whose y.s is within
    rounding of 1e-10 may be kept by one and not by the other.
    Source: torch.optim.LBFGS, update of the memory.
    """
    W, H, V = _check(history, s=s, y=y)
    block_v, num_warps = _config(V)
    if W:
        _launch(
            _lbfgs_push_kernel,
            (W,),
            "lbfgs_push",
            **_history_arguments(history),
            s_ptr=s.contiguous(),
            y_ptr=y.contiguous(),
            V=V,
            H=H,
            SMALLEST=SMALLEST_CURVATURE,
            BLOCK_V=block_v,
            num_warps=num_warps,
            **_PUSH_OPTIONS,
        )
    return history


def lbfgs_push(history: History, s: Tensor, y: Tensor) -> History:
    """`lbfgs_push_` on a copy of the memory: for tests, and where 8 H W V bytes more do not matter."""
    return lbfgs_push_(History(*(tensor.clone() for tensor in history)), s, y)


def lbfgs_direction(history: History, gradient: Tensor) -> Tensor:
    """The L-BFGS direction -H g of each problem, by the two-loop recursion.

    Args:
        history: as `lbfgs_push_` leaves it, of at most 8192 variables.
        gradient: [W, V] float32.

    Returns:
        [W, V] float32. NaN for a problem whose gradient or kept pairs are not finite; the others are not touched by it.

    Raises:
        ValueError: a shape, type, device or layout is not as above.

    Tolerance: 2x the error of plain float32 torch against float64, plus one rounding.
    Source: Nocedal & Wright, Numerical Optimization, algorithm 7.4.
    """
    W, H, V = _check(history, gradient=gradient)
    block_v, num_warps = _config(V)
    direction = torch.empty((W, V), dtype=torch.float32, device=gradient.device)
    if W:
        _launch(
            _lbfgs_direction_kernel,
            (W,),
            "lbfgs_direction",
            **_history_arguments(history),
            gradient_ptr=gradient.contiguous(),
            direction_ptr=direction,
            V=V,
            H=H,
            BLOCK_H=triton.next_power_of_2(H),
            BLOCK_V=block_v,
            num_warps=num_warps,
            **_DIRECTION_OPTIONS,
        )
    return direction


# The contract


def _compilation(kernel, V: int, options: dict[str, bool], **constexprs) -> Compilation:
    block_v, num_warps = _config(V)
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    types = {name: "*i32" if name in ("head_ptr", "count_ptr") else "*fp32" for name in names}
    return Compilation(
        kernel,
        signature={**types, "V": "i32:16" if V % 16 == 0 else "i32"},
        constexprs={**constexprs, "BLOCK_V": block_v},
        num_warps=num_warps,
        elements=block_v,
        options=options,
    )


SPECS = (
    KernelSpec(
        name="lbfgs_push",
        fn=lbfgs_push,
        reference=lbfgs_push_ref,
        inputs=partial(push_inputs, History),
        cases=PUSH_CASES,
        compilations=lambda *, V, H, **_: [
            _compilation(_lbfgs_push_kernel, V, _PUSH_OPTIONS, H=H, SMALLEST=SMALLEST_CURVATURE)
        ],
        bytes_moved=lambda *, W, V, itemsize, **_: 16 * W * V,
        flops=lambda *, W, V, **_: 4 * W * V,
    ),
    KernelSpec(
        name="lbfgs_direction",
        fn=lbfgs_direction,
        reference=lbfgs_direction_ref,
        inputs=partial(direction_inputs, History),
        cases=DIRECTION_CASES,
        compilations=lambda *, V, H, **_: [
            _compilation(_lbfgs_direction_kernel, V, _DIRECTION_OPTIONS, H=H, BLOCK_H=triton.next_power_of_2(H))
        ],
        bytes_moved=lambda *, W, H, V, itemsize, **_: (8 * H + 8) * W * V,
        flops=lambda *, W, H, V, **_: 8 * H * W * V,
    ),
)
