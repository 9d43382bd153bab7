"""Launches of `triton.jit` functions, run on their PTX; arguments and specialisation are those of a real launch."""

import ctypes
import math
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import numpy as np
import torch

from .memory import Memory, Report
from .parse import parse
from .replicas import torn_sums
from .run import USUAL, Conditions, Machine
from .translate import translate

_BASE, _GAP = 1 << 40, 4096  # address of the device's first byte; bytes between tensors, that nobody may touch
_ALLOCATORS = ("empty", "empty_like", "empty_strided")


class _Driver:
    """Stands in for Triton's: a device of that capability, which compiles and never launches."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return self.capability  # Triton caches a device's kernels by its number

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def _until_ptx(backend=None, stages=None, *_):
    """Hook into Triton's stages: no machine code is made of the PTX."""
    if stages is not None:
        stages["cubin"] = lambda source, metadata: b""
    return "ptx", "ptx"


@cache
def _translated(ptx: str):
    kernel = parse(ptx)
    return kernel, translate(kernel, {"global_smem": 0}), torn_sums(kernel)


def _bytes(storage) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()))


class Emulation:
    """In this block CPU tensors pass for CUDA ones, and launches run on their PTX; `report` says what was found.

    Args:
        target: "sm_80" or "sm_90".
        under: conditions of the launches.

    Not in a process that interprets (TRITON_INTERPRET).
    """

    def __init__(self, target: str = "sm_90", under: Conditions = USUAL):
        self.capability, self.under = int(target.removeprefix("sm_")), under
        self.report = Report()

    def __enter__(self):
        from triton import knobs
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        with ExitStack() as stack:
            launch = JITFunction.run

            def run(kernel, *arguments, grid, warmup, **named):
                compiled = launch(kernel, *arguments, grid=grid, warmup=True, **named)
                if not warmup:
                    binder = kernel.device_caches[self.capability][-1]
                    bound, specialisation, _ = binder(*arguments, **named)
                    values = [v for v, s in zip(bound.values(), specialisation, strict=True) if s[0] != "constexpr"]
                    execute(
                        compiled.asm["ptx"], grid(bound) if callable(grid) else grid, values, compiled.metadata.shared,
                        self.report, self.under,
                    )  # fmt: skip
                return compiled

            stack.enter_context(patch.object(JITFunction, "run", run))
            stack.enter_context(patch.object(knobs.runtime, "add_stages_inspection_hook", _until_ptx))
            stack.enter_context(patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)))
            for name in _ALLOCATORS:
                stack.enter_context(patch.object(torch, name, self._poisoned(getattr(torch, name))))
            stack.enter_context(patch.object(torch.Tensor, "new_empty", self._poisoned(torch.Tensor.new_empty)))
            stack.enter_context(patch.object(driver, "_active", _Driver(self.capability)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def _poisoned(self, allocate):
        def poisoned(*arguments, **named):
            tensor = allocate(*arguments, **named)
            _bytes(tensor.untyped_storage())[:] = self.under.poison
            return tensor

        return poisoned


def execute(ptx: str, grid, values, shared: int, report: Report, under: Conditions = USUAL):
    """Runs the kernel of a module on CPU tensors and numbers; `shared` is bytes a program."""
    kernel, translated, torn = _translated(ptx)
    grid = [*grid, 1, 1][:3]
    report.launches += 1
    report.opcodes.update(each.opcode for each in kernel.instructions)
    for where in torn:
        report.add("replicas may differ", where)
    unit, shared_unit = _units(kernel)
    # Every storage gets a place of its own, with a gap around it and the alignment that it has.
    storages, size = {}, _GAP
    for value in values:
        storage = value.untyped_storage() if isinstance(value, torch.Tensor) else None
        if storage and storage.data_ptr() not in storages:
            place = size + storage.data_ptr() % 256
            storages[storage.data_ptr()] = storage, place
            size = -(-(place + storage.nbytes()) // 256) * 256 + _GAP
    data, valid = np.full(size, under.poison, np.uint8), np.zeros(size // unit, bool)
    for storage, place in storages.values():
        data[place : place + storage.nbytes()] = _bytes(storage)
        valid[place // unit : -(-(place + storage.nbytes()) // unit)] = True
    memory = Memory("global", data, unit, valid, math.prod(grid) > 1, [], report)
    parameters = []
    for (_, width), value in zip(kernel.parameters, values, strict=False):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            place = storages[storage.data_ptr()][1] if storage.nbytes() else 0
            value = _BASE + place + value.data_ptr() - storage.data_ptr()
        if isinstance(value, float):
            parameters.append(np.float32(value) if width == 4 else np.float64(value))
        else:
            parameters.append(getattr(np, f"uint{8 * width}")(int(value) % 2 ** (8 * width)))
    parameters += [np.uint64(0)] * (len(kernel.parameters) - len(parameters))  # Triton's own scratch: none
    with np.errstate(all="ignore"):
        machine = Machine(kernel, translated, grid, parameters, memory, _BASE, shared, shared_unit, under)
        machine.run()
    for storage, place in storages.values():
        _bytes(storage)[:] = data[place : place + storage.nbytes()]


def _units(kernel) -> tuple[int, int]:
    """Bytes of the smallest access to global and to shared memory."""
    found = {"global": 4, "shared": 4}
    for parts in (each.parts for each in kernel.instructions):
        if parts[0] in ("ld", "st") and parts[1] in found:
            found[parts[1]] = min(found[parts[1]], int(parts[-1][1:]) // 8)
        elif parts[0] == "wgmma":
            found["shared"] = min(found["shared"], 2)
    return found["global"], found["shared"]
