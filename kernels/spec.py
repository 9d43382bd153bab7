"""What a kernel promises: the record that tests, benches and the static report discover.

Every kernel's file, or its folder's `__init__.py`, ends with `SPEC = KernelSpec(...)`. A spec names the public
function, the plain-torch reference with identical semantics, how to draw inputs, and the cases worth testing, each with
its reason. `specs()` finds them all, so a new kernel is tested, benched and reported on without being listed anywhere.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One set of inputs that a kernel is checked on.

    Args:
        reason: why this case exists, in a few words; becomes the test's id.
        shape: keyword arguments for `KernelSpec.inputs` (sizes, options).
        dtype: of the floating-point inputs that may be narrow (logits, activations).
        production: True for shapes that real runs use; the static report compiles and the benches time exactly these.
    """

    reason: str
    shape: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    production: bool = False


@dataclass(frozen=True)
class Compilation:
    """One `triton.jit` function with the argument types and constants of a real launch, for compiling without a GPU.

    Args:
        kernel: the `triton.jit` function.
        signature: argument name -> Triton type ("*fp32", "i32", ...); constants map to "constexpr". Pointers are taken
            to be multiples of 16, as torch's allocations are; an integer that a launch finds to be one is "i32:16".
        constexprs: argument name -> value.
        num_warps, num_stages: launch options.
        elements: elements that one program handles in one trip of its hot loop, the denominator of "instructions per
            element"; 0 where the figure means nothing.
        options: further options of the compiler, such as `enable_fp_fusion`.
        spill_bytes: stack and spills that are accepted, in bytes a thread; anything but 0 wants a reason beside it.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    elements: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    spill_bytes: int = 0


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's contract.

    Args:
        name: unique; the operator's and the benchmark's name.
        fn: public function that launches the kernel; returns a tensor or a tuple of tensors.
        reference: plain torch, same signature, same semantics, any floating dtype including float64.
        inputs: `inputs(generator, device, dtype, **shape)` -> keyword arguments of `fn` and `reference`; drawn on the
            generator's device, then moved.
        cases: what to check.
        differentiable: names of the arguments that `fn` propagates gradients to.
        compilations: `compilations(**shape)` -> the launches behind `fn` for a production shape.
        bytes_moved: `bytes_moved(**shape, itemsize=...)` -> fewest bytes through device memory, all once.
        flops: `flops(**shape)` -> floating-point operations.
        atol: absolute slack on top of "at most twice the error of plain torch in the same dtype against float64".
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    cases: tuple[Case, ...]
    differentiable: tuple[str, ...] = ()
    compilations: Callable[..., list[Compilation]] | None = None
    bytes_moved: Callable[..., int] | None = None
    flops: Callable[..., int] | None = None
    atol: float = 1e-6


def specs() -> list[KernelSpec]:
    """Every kernel's spec, by name: `SPEC` or `SPECS` of the modules beside this one."""
    package = __name__.rpartition(".")[0]
    found: list[KernelSpec] = []
    for module_info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{module_info.name}")
        found += [module.SPEC] if isinstance(getattr(module, "SPEC", None), KernelSpec) else []
        found += list(getattr(module, "SPECS", ()))
    return sorted(found, key=lambda spec: spec.name)
