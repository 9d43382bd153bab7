"""Values of a saved state, held to what they may be before anything computes with them: a file may say anything."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def whole(value: Any, low: int, high: int) -> int:
    """A whole number in low..high; raises ValueError else."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{_shown(value)}: expected a whole number in {low}..{high}")
    return value


def seconds(value: Any) -> dict[str, float]:
    """Seconds by phase, finite and >= 0; raises ValueError else."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{_shown(value)}: expected seconds by phase")
    for phase, spent in value.items():
        if type(phase) is not str or type(spent) not in (int, float) or not 0 <= spent < 1e12:
            raise ValueError(f"{_shown(phase)}: {_shown(spent)}, expected seconds")
    return {phase: float(spent) for phase, spent in value.items()}


def tensor(value: Any, dtype: torch.dtype, *sizes: int | range, below: int | None = None) -> Tensor:
    """A tensor of a type and of sizes, each a number or a range of them; raises ValueError else.

    Args:
        below: of whole numbers: all are in 0..below - 1.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.dtype != dtype:
        raise ValueError(f"{_shown(value)}: expected a tensor of {dtype}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{_shown(value)}: expected numbers of its own, not the same ones again and again")
    allowed = [range(size, size + 1) if isinstance(size, int) else size for size in sizes]
    if value.dim() != len(sizes) or not all(size in fit for size, fit in zip(value.shape, allowed, strict=True)):
        raise ValueError(f"{_shown(value)}: expected sizes {list(sizes)}")
    if below is not None and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < below:
        raise ValueError(f"{_shown(value)}: expected numbers in 0..{below - 1}")
    return value


def alike(value: Any, expected: Tensor) -> Tensor:
    """A tensor of another one's type and sizes; raises ValueError else."""
    return tensor(value, expected.dtype, *expected.shape)


def optimizer(value: Any, expected: torch.optim.Optimizer) -> Mapping[str, Any]:
    """The state of an optimizer with the same parameters and options, its tensors as these need them; raises ValueError
    else: fused steps trust their sizes."""
    own = expected.state_dict()
    parameters = [parameter for group in expected.param_groups for parameter in group["params"]]
    if not isinstance(value, Mapping) or value.keys() != own.keys() or value["param_groups"] != own["param_groups"]:
        raise ValueError("expected the state of an optimizer with the same options")
    if not isinstance(value["state"], Mapping) or not all(
        type(number) is int and 0 <= number < len(parameters) and isinstance(kept, Mapping)
        for number, kept in value["state"].items()
    ):
        raise ValueError("expected what an optimizer keeps, by parameter")
    adam, momentum = isinstance(expected, torch.optim.AdamW), expected.defaults.get("momentum")
    names = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
    for number, kept in value["state"].items():
        if kept.keys() != names and not (momentum == 0 and not kept):
            raise ValueError(f"parameter {number}: {sorted(map(str, kept))}, expected {sorted(names)}")
        for name, part in kept.items():
            if name == "step":
                tensor(part, torch.float32)
            elif momentum != 0 or part is not None:
                alike(part, parameters[number])
    if not momentum or not value["state"]:
        return value
    # A fused step wants momentum of all parameters or of none; 0 is what one without has
    none = {number: {"momentum_buffer": torch.zeros_like(part)} for number, part in enumerate(parameters)}
    return {**value, "state": none | dict(value["state"])}


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
