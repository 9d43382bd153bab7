"""Muon for matrices, on one process or shared among ranks; running means of weights.

Matrices of one shape form a bank [slots, N, K]. With several ranks each owns an equal part of the slots of every bank:
gradients are averaged on their way to the owner (reduce-scatter), which alone keeps the momentum and orthogonalises;
updates go back to everybody (all-gather). Transfers hide behind what the caller, or the next bank, computes meanwhile.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has other names for them
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Coefficients = Literal["quintic", "polar-express"]

_QUINTIC = (3.4445, -4.7750, 2.0315)
# Three for each step: the best polynomial for what the steps before it left over.
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrix: Tensor, steps: int = 5, coefficients: Coefficients = "quintic") -> Tensor:
    """An approximation of the nearest (semi-)orthogonal matrix, by an odd quintic polynomial applied repeatedly.

    Args:
        matrix: float [..., N, K]; leading dimensions are a batch.
        steps: iterations; 5 bring singular values into about 0.7..1.2.
        coefficients: `quintic` has the same in every step, `polar-express` its own in each of at most 5: 4 bring
            singular values into about 0.4..1.6, 5 into about 0.85..1.15.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: more steps than there are coefficients.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; arXiv 2505.16932.
    """
    if coefficients == "polar-express" and steps > len(_POLAR_EXPRESS):
        raise ValueError(f"steps {steps}: polar-express has coefficients for {len(_POLAR_EXPRESS)}")
    table = _POLAR_EXPRESS[:steps] if coefficients == "polar-express" else (_QUINTIC,) * steps
    tall = matrix.size(-2) > matrix.size(-1)
    x = _over_its_norm(matrix.mT if tall else matrix, (-2, -1))
    for a, b, c in table:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def normalize_rows(matrix: Tensor) -> Tensor:
    """Rows of unit length, float [..., N, K]; an all-zero row stays zero (MuonEq-R, arXiv 2603.28254)."""
    return _over_its_norm(matrix, (-1,))


def _over_its_norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x / |x|, of any size that the dtype holds; zero stays zero."""
    largest = x.abs().amax(dims, keepdim=True)
    x = x / largest.masked_fill(largest == 0, 1.0)  # squares of tiny numbers would vanish, those of huge ones overflow
    return x / x.norm(dim=dims, keepdim=True).clamp_min(1.0)  # at least its largest, 1, or all zero


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised; for matrices only.

    Args:
        params: float [N, K] parameters, or groups of them.
        lr: step size; the update is scaled by sqrt(max(1, N / K)).
        momentum: 0..1.
        weight_decay: decoupled.
        steps, coefficients: of `orthogonalize`.
        equalize_rows: MuonEq-R, the rows of what is orthogonalised get unit length first.
        dtype: of the iteration; bfloat16 where the machine is fast at it.
        process_group: ranks that share the work; each passes the same parameters and its own gradients, and the
            gradients' mean counts. None: this process alone.

    Source: Muon as PR #1019 of openai/parameter-golf has it, Parallel Muon included.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        steps: int = 5,
        coefficients: Coefficients = "quintic",
        equalize_rows: bool = False,
        dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps, self.coefficients, self.equalize_rows, self.dtype = steps, coefficients, equalize_rows, dtype
        self._ranks = _Ranks(process_group, dtype)
        self._started = False
        self._banks: list[_Bank] = []
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            self._banks += [_Bank(group, parameters, self._ranks) for parameters in by_shape.values()]
        # The longest transfer starts first and hides behind the computing that follows.
        self._banks.sort(key=lambda bank: -bank.momentum.numel())

    @torch.no_grad()
    def start(self) -> None:
        """Start sending gradients between ranks; `step` does it if the caller has not."""
        for bank in self._banks:
            bank.send_gradients()
        self._started = True

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients."""
        if not self._started:
            self.start()
        self._started = False
        before = None
        for bank in self._banks:
            gradient = bank.receive_gradients()
            momentum = bank.group["momentum"]
            bank.momentum.mul_(momentum).add_(gradient)
            update = gradient.add_(bank.momentum, alpha=momentum)
            if self.equalize_rows:
                update = normalize_rows(update)
            bank.send_update(orthogonalize(update.to(self.dtype), self.steps, self.coefficients))
            if before is not None:  # written while this bank's update travels
                before.apply_update()
            before = bank
        if before is not None:
            before.apply_update()

    def state_dict(self) -> dict[str, Any]:
        """Momentum of every matrix, from all ranks' parts; every rank must call this."""
        return {"momentum": [bank.full_momentum() for bank in self._banks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for any number of ranks."""
        for bank, momentum in zip(self._banks, state["momentum"], strict=True):
            bank.load_momentum(momentum)


class _Ranks:
    """A process group as the banks use it; one process alone is a group of one that sends nothing."""

    def __init__(self, group: dist.ProcessGroup | None, dtype: torch.dtype):
        self.group = group
        self.rank, self.world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        nccl = group is not None and dist.get_backend(group) == "nccl"
        self.dtype = dtype if nccl else torch.float32  # gloo sends float32: not every version adds bfloat16
        self.averages = nccl  # gloo only sums
        self.scatters = True

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> dist.Work:
        """Start filling `part` with this rank's part of the sum (NCCL: the mean) of every rank's `whole`."""
        op = dist.ReduceOp.AVG if self.averages else dist.ReduceOp.SUM
        if self.scatters:
            try:
                return _reduce_scatter(part, whole, op, group=self.group, async_op=True)
            except RuntimeError as error:
                self.scatters = False
                warnings.warn(f"no reduce-scatter here ({error}): gradients are reduced whole", stacklevel=2)
        return dist.all_reduce(whole, op, group=self.group, async_op=True)


class _Bank:
    """Matrices of one shape and one group, and the part of them that this rank owns."""

    def __init__(self, group: dict[str, Any], parameters: Sequence[Tensor], ranks: _Ranks):
        self.group, self.parameters, self.ranks = group, parameters, ranks
        self.owned = -(-len(parameters) // ranks.world)  # slots of each rank; the last ones may be empty
        shape = parameters[0].shape
        self.scale = max(1.0, shape[0] / shape[1]) ** 0.5
        self.momentum = torch.zeros((self.owned, *shape), device=parameters[0].device)
        self.work: dist.Work | None = None

    def send_gradients(self) -> None:
        self.whole = self._empty(self.owned * self.ranks.world)
        self.whole[len(self.parameters) :].zero_()
        for slot, parameter in zip(self.whole, self.parameters, strict=False):
            slot.zero_() if parameter.grad is None else slot.copy_(parameter.grad)
        if self.ranks.world > 1:
            self.part = self._empty(self.owned)
            self.work = self.ranks.reduce_scatter(self.part, self.whole)

    def receive_gradients(self) -> Tensor:
        """Mean gradients of the owned slots, float32 [owned, N, K]."""
        if self.ranks.world == 1:
            return self.whole
        self.work.wait()
        mine = self.part if self.ranks.scatters else self.whole[self._mine()]
        return mine.float() if self.ranks.averages else mine / self.ranks.world

    def send_update(self, update: Tensor) -> None:
        if self.ranks.world == 1:
            self.whole = update
            return
        update = update.to(self.ranks.dtype).contiguous()
        self.whole = self._empty(self.owned * self.ranks.world)
        self.work = _all_gather(self.whole, update, group=self.ranks.group, async_op=True)

    def apply_update(self) -> None:
        if self.ranks.world > 1:
            self.work.wait()
        lr, decay = self.group["lr"], self.group["weight_decay"]
        for parameter, update in zip(self.parameters, self.whole.float(), strict=False):
            parameter.mul_(1 - lr * decay).add_(update, alpha=-lr * self.scale)
        self.whole = None

    def full_momentum(self) -> Tensor:
        if self.ranks.world == 1:
            return self.momentum
        whole = torch.empty((self.owned * self.ranks.world, *self.momentum.shape[1:]), device=self.momentum.device)
        _all_gather(whole, self.momentum, group=self.ranks.group)
        return whole[: len(self.parameters)].clone()

    def load_momentum(self, momentum: Tensor) -> None:
        mine = momentum[self._mine()]
        self.momentum[: len(mine)].copy_(mine)  # it may be this very tensor
        self.momentum[len(mine) :].zero_()

    def _mine(self) -> slice:
        return slice(self.ranks.rank * self.owned, (self.ranks.rank + 1) * self.owned)

    def _empty(self, slots: int) -> Tensor:
        dtype = torch.float32 if self.ranks.world == 1 else self.ranks.dtype
        return torch.empty((slots, *self.momentum.shape[1:]), dtype=dtype, device=self.momentum.device)


def average_gradients(parameters: Iterable[Tensor], process_group: dist.ProcessGroup) -> None:
    """Replace gradients by their mean over the ranks of a group, all of them in one transfer."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=process_group)
    means = flat.div_(dist.get_world_size(process_group)).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


class WeightAverage:
    """A running mean of parameters: exponential (EMA) with a decay, equal weights (SWA) without.

    Args:
        parameters: float tensors; an EMA starts from their present values, without bias correction.
        decay: 0..1, share of the old mean that an update keeps; None: every update counts the same.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float | None):
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.mean = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.count += 1
        torch._foreach_lerp_(self.mean, self.parameters, 1 / self.count if self.decay is None else 1 - self.decay)

    @torch.no_grad()
    def load_into_parameters(self) -> None:
        """Replace the parameters by their mean; where nothing was taken in, they stay."""
        if self.count:
            torch._foreach_copy_(self.parameters, self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        torch._foreach_copy_(self.mean, state["mean"])
