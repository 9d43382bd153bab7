"""The launches behind a call, recorded instead of run: what a GPU would be asked to compile, without one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slotfast.kernels import Compilation

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


@contextmanager
def recorded() -> Iterator[list[Compilation]]:
    """In this block launches of `triton.jit` functions leave their record in the list, and outputs unwritten."""
    from triton.runtime.jit import JITFunction

    launches: list[Compilation] = []

    def record(kernel, *arguments, grid, warmup, **named):
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        values = {name: values[name] for name in kernel.arg_names}
        constant = {p.name for p in kernel.params if p.is_constexpr or values[p.name] is None}
        plain = {p.name for p in kernel.params if p.do_not_specialize}
        constant |= {name for name, value in values.items() if type(value) is int and value == 1} - plain
        launches.append(
            Compilation(
                kernel,
                signature={name: _kind(value, name in plain) for name, value in values.items() if name not in constant},
                constexprs={name: values[name] for name in values if name in constant},
                num_warps=options.pop("num_warps", 4),
                num_stages=options.pop("num_stages", 3),
                options=options,
            )
        )

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def _kind(value, plain: bool) -> str:
    """The type that a launch gives an argument that is no constant; ":16" at multiples of 16, unless it is `plain`."""
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return ("i32" if -(2**31) <= value < 2**31 else "i64") + ":16" * (value % 16 == 0 and not plain)
