"""One process of a run: its place among the others, and what it computes with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .compiled import Mode
from .ops import Backend


@dataclass(frozen=True)
class Worker:
    """One process of a run.

    Args:
        device: of models and batches: cpu, cuda:0, ...
        dtype: of the model's forward.
        rank, world: which of the run's processes this is, 0 <= rank < world.
        backend: of the kernels.
        compile: how the forward of a whole batch or block runs, where nothing is learned from it.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1
    backend: Backend = "auto"
    compile: Mode = "off"

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def device_name(self) -> str:
        """What a report calls the device: cpu, or the GPU's model."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


ALONE = Worker()  # the only process of a run, on a CPU


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host's tensor on a device, without waiting for what that does meanwhile."""
    device = torch.device(device)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
