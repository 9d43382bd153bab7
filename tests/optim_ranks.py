"""One rank of tests/test_optim.py: trains a small model on its share of each batch and saves what came out."""

import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group: see slotfast.command.ranks

from slotfast import optim
from slotfast.optim import Muon, average_gradients


def train(group):
    """Weights, momentum, averaged gradients and warnings after four steps; a group of None is one process alone."""
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in ((5, 7), (7, 7), (7, 7), (7, 5))]
    model = torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.Tanh())))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizers = [
        Muon(matrices, 0.02, weight_decay=0.1, equalize_rows=True, process_group=group),
        torch.optim.AdamW(vectors, 0.01),
    ]
    gradients = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            inputs = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
            mine = inputs[rank * 12 // world : (rank + 1) * 12 // world]
            (model(mine) - mine).square().mean().backward()
            optimizers[0].start()
            if group is not None:
                average_gradients(vectors, group)
            gradients += [p.grad.clone() for p in vectors]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return {
        "weights": list(model.state_dict().values()),
        "momentum": optimizers[0].state_dict()["momentum"],
        "gradients": gradients,
        "warned": sum("no reduce-scatter here" in str(warning.message) for warning in caught),
    }


def _refuse(*_, **__):
    raise RuntimeError("not in this version")


def main(rank: int, world: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    fewer = dist.new_group([0, 1])
    results = {"3 ranks": train(dist.group.WORLD)}
    if rank < 2:
        results["2 ranks"] = train(fewer)
    optim._reduce_scatter = _refuse
    results["3 ranks without reduce-scatter"] = train(dist.group.WORLD)
    torch.save(results, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
