"""Prunes a quantised model to a file size: the cheapest of the smallest codes become zero, no more than necessary."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import InputError
from .matrix import QuantizedMatrix

Tensors = Mapping[str, QuantizedMatrix | Tensor]


def prune_to_size(
    tensors: Tensors,
    target_bytes: int,
    size: Callable[[Tensors], int],
    costs: Mapping[str, Tensor] | None = None,
    slack_bytes: int = 0,
    deadline: float | None = None,
) -> tuple[dict[str, QuantizedMatrix | Tensor], int]:
    """Zero the fewest codes of +-1 in 6-bit matrices that bring a file down to its target.

    Args:
        tensors: by parameter name.
        target_bytes: decimal, what the contest counts: 16,000,000 is not 16 MiB.
        size: bytes that count when these tensors are stored, with the code where that counts too. Called about
            log2(codes) times; more zeros must not make it larger.
        costs: what zeroing a code of +-1 costs, float [N, K] by name, comparable between matrices; the squared scale
            where None, as in PR #1019.
        slack_bytes: a file this little below its target ends the search for a larger one.
        deadline: of time.perf_counter(), seconds; then the search ends with the best it has.

    Returns:
        The tensors, and how many codes were zeroed.

    Raises:
        InputError: too large even without a single +-1.
    """
    places, values = {}, []
    matrices = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, QuantizedMatrix)}
    for name, matrix in matrices.items():
        if matrix.bits == 6:
            places[name] = (matrix.codes.flatten().abs() == 1).nonzero()[:, 0]
            cost = matrix.scale.float().square()[:, None].expand(matrix.codes.shape) if costs is None else costs[name]
            values.append(cost.flatten()[places[name]])
    rank = torch.cat([*values, torch.empty(0)]).argsort(stable=True).argsort()
    ranks = dict(zip(places, rank.split([len(place) for place in places.values()]), strict=True))

    def pruned(count: int) -> dict[str, QuantizedMatrix | Tensor]:
        found = dict(tensors)
        for name, place in places.items():
            matrix = matrices[name]
            codes = matrix.codes.clone(memory_format=torch.contiguous_format)
            codes.view(-1)[place[ranks[name] < count]] = 0
            found[name] = QuantizedMatrix(codes, matrix.scale, matrix.bits)
        return found

    if size(tensors) <= target_bytes:
        return dict(tensors), 0
    too_few, enough = 0, len(rank)
    smallest = size(pruned(enough))
    if smallest > target_bytes:
        raise InputError(
            f"{smallest:,} bytes without a single code of +-1, the target is {target_bytes:,}: "
            "clip sdclip with a larger factor makes smaller files"
        )
    while enough - too_few > 1 and (deadline is None or time.perf_counter() < deadline):
        count = (too_few + enough) // 2
        found = size(pruned(count))
        if found > target_bytes:
            too_few = count
        else:
            enough = count
            if found >= target_bytes - slack_bytes:
                break
    return pruned(enough), enough


def output_costs(tensors: Tensors, hessians: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What zeroing a code of +-1 adds to its layer's squared output error, leaving other errors aside: scale^2 H_jj.

    At one size, this order leaves a model's predictions closer to those of the float model than squared scales alone
    (bench/bench_gptq.py). The other errors' cross terms are left out: they changed next to nothing.

    Args:
        tensors: by parameter name.
        hessians: as from `collect_hessians`, of all 6-bit matrices.

    Returns:
        float32 [N, K] by name, for `prune_to_size`.
    """
    return {
        name: torch.outer(matrix.scale.float().square(), hessians[name].diagonal().float().cpu())
        for name, matrix in tensors.items()
        if isinstance(matrix, QuantizedMatrix) and matrix.bits == 6
    }
