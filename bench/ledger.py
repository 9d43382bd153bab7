"""Which bytes the operators of the model's forward move, and how many operations they take: counted from its shape.

The model itself runs on tensors without data, and each operator that it calls stands in the ledger under the function
that called it. An operator reads its inputs once and writes its outputs once, whatever the caches could spare; what
shares its input's memory is free. Normalisation, attention and products are one kernel each, as they are on a GPU, and
attention moves its queries, keys, values and output alone. Operations are two for each multiply-add of products and of
visible attention, one for each element that another operator writes.

A fused piece is a product and what is behind it: operand, matrix and result are the product's, whatever else it reads
and writes stands beside that, in the group of the operators that it is there instead of.
"""

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slotfast import ops
from slotfast.model import GPT, GPTConfig, Linear
from slotfast.stream import CachedForward

PACKAGE = str(Path(ops.__file__).parent)
# Functions that many call: a line names their caller as well.
HELPERS = {"rms_norm", "rotate", "turned", "rotary_table", "softcap", "document_starts", "_Recent.extend"}

# What a line belongs to, by the end of its operator's or the beginning of its function's name; the first that fits.
GROUPS = {
    "products": ("linear",),
    "attention": ("scaled_dot_product_attention", "banded_attention"),
    "norms": ("rms_norm",),
    "rotary": ("rotate", "turned", "rotary_table"),
    "own value": ("without_own", "without_own_ref"),
    "keys kept": ("_Recent.", "_Memory."),
    "head and loss": ("GPT.head", "GPT.unembed", "softcap", "cross_entropy"),
    "mlp": ("MLP.",),
    "heads": ("Attention.",),
    "residual, mixing": ("Block.", "GPT.add_skip", "GPT.skip_share", "channel_mix"),
    "embedding": ("",),
}
# Fused operators that are products: the group of what they move besides.
FUSED = {
    "linear_heads": "heads",
    "linear_squared": "mlp",
    "linear_residual": "residual, mixing",
    "linear_logits": "head and loss",
    "linear_cross_entropy": "head and loss",
}
ELEMENTWISE = tuple(name for name in GROUPS if name not in ("products", "attention"))


def group_of(function: str, operator: str) -> str:
    """The group of a line whose operator or innermost function is of it."""
    inner = function.rpartition(" > ")[2]
    return next(
        group
        for group, names in GROUPS.items()
        if any((operator.endswith(name) and name) or inner.startswith(name) for name in names)
    )


@dataclass
class Line:
    """What one function's calls of one operator come to.

    Args:
        function: of slotfast, as "caller > callee" where many call it.
        operator: of torch, or a piece's name.
        group: of `GROUPS`.
        calls: launches, one each.
        read, written: bytes.
        flops: operations.
    """

    function: str
    operator: str
    group: str
    calls: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    @property
    def key(self) -> tuple[str, str, str]:
        """Its place in a ledger."""
        return self.function, self.operator, self.group


@dataclass
class Ledger:
    """Lines of one forward, by function, operator and group."""

    lines: dict[tuple[str, str, str], Line] = field(default_factory=dict)

    def add(
        self, function: str, operator: str, *, read: int, written: int, flops: int, calls: int = 1, group: str = ""
    ) -> None:
        """Enter calls; the group is `group_of` the names by default."""
        key = function, operator, group or group_of(function, operator)
        line = self.lines.setdefault(key, Line(*key))
        line.calls, line.flops = line.calls + calls, line.flops + flops
        line.read, line.written = line.read + read, line.written + written

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines.values())

    def total(self, groups: Iterable[str]) -> Line:
        """All lines of these groups as one."""
        found = Ledger()
        groups = tuple(groups)
        for line in self:
            if line.group in groups:
                sums = {name: getattr(line, name) for name in ("calls", "read", "written", "flops")}
                found.add("total", "", **sums, group=groups[0])
        return next(iter(found), Line("total", "", groups[0]))


@dataclass(frozen=True)
class Shape:
    """What one forward is of.

    Args:
        config: the model's.
        windows, length: windows of one forward and their positions; with a block, the cache's length, and no windows.
        scored: the last positions of each window, which are scored.
        block: tokens of one block of a stream; None: windows.
        sinks: of the stream.
    """

    config: GPTConfig
    windows: int = 32
    length: int = 2048
    scored: int = 2048
    block: int | None = None
    sinks: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the forward."""
        return self.windows * self.length if self.block is None else self.block

    @property
    def wanted(self) -> int:
        """Those whose loss is asked for."""
        return self.windows * self.scored if self.block is None else self.block


# ---------------------------------------------------------------------------------------------------------------------
# what the model calls


class Counting(TorchDispatchMode):
    """Enters each operator that touches memory into a ledger; see this file's text for what it is charged.

    Args:
        model: whose linear layers are named.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.ledger = Ledger()
        self.names = {}
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    self.names[id(child)] = f"{type(module).__name__}.{name}"

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.__name__.partition(".")[0]
        out = operator(*args, **(kwargs or {}))
        if name == "scaled_dot_product_attention":  # as FlashAttention lays it out: the heads of a position together
            out = torch.empty_like(out.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        inputs, outputs = tensors([args, kwargs or {}]), tensors(out)
        if operator._schema.is_mutable:  # its first argument is what it writes
            inputs, made = inputs[1:], outputs
        else:
            known = {_storage(x) for x in inputs}
            made = [x for x in outputs if _storage(x) not in known]
        if made and not name.startswith(("empty", "new_empty")):
            read, written = sum(map(size, inputs)), sum(map(size, made))
            if name == "embedding":  # only the rows that it takes
                read = size(inputs[1]) + written
            elif name in ("zeros_like", "ones_like"):
                read = 0
            function = self._calling(sys._getframe(1))
            if name in FUSED:
                (x, weight, *others), (y, *left) = inputs, made
                besides = {"read": sum(map(size, others)), "written": sum(map(size, left))}
                self.ledger.add(function, f"{name}, besides", **besides, flops=0, calls=0, group=FUSED[name])
                read, written = size(x) + size(weight), size(y)
            count = flops(name, inputs, args, made)
            group = "products" if name in FUSED else ""
            self.ledger.add(function, name, read=read, written=written, flops=count, group=group)
        return out

    def _calling(self, frame: FrameType | None) -> str:
        """The innermost function of slotfast on the stack, behind its caller where many call it."""
        names: list[str] = []
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
                if code.co_qualname == "Linear.forward":
                    return self.names.get(id(frame.f_locals["self"]), code.co_qualname)
                names.append(code.co_qualname)
                if code.co_qualname not in HELPERS:
                    break
            frame = frame.f_back
        return " > ".join(reversed(names)) or "the bench"


def tensors(value) -> list[Tensor]:
    """Of nested lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in tensors(part)] if isinstance(value, list | tuple) else []


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def size(x: Tensor) -> int:
    """Bytes of its elements; along a broadcast dimension they are one."""
    return x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 0)


def flops(name: str, inputs: list[Tensor], args: tuple, made: list[Tensor]) -> int:
    """Of one call: two for a multiply-add, one for an element of anything else."""
    if name == "linear" or name in FUSED:
        return 2 * inputs[0].numel() * inputs[1].size(0)
    if name == "scaled_dot_product_attention":
        batch, heads, queries, width = inputs[0].shape
        return 4 * batch * heads * width * visible(queries, inputs[1].size(2), inputs[1].size(2))
    if name == "banded_attention":
        (batch, queries, heads, width), keys, sinks = inputs[0].shape, inputs[1].size(1), args[5]
        pairs = visible(queries, keys, args[7]) + (0 if sinks is None else queries * sinks.size(1))
        return 4 * batch * heads * width * pairs
    return sum(x.numel() for x in made)


def visible(queries: int, keys: int, window: int) -> int:
    """Pairs of the last `queries` positions with those of all `keys` that each sees, itself and `window` at most."""
    first = keys - queries
    return sum(min(first + at + 1, window) for at in range(queries))


def ledger_of(shape: Shape, kernels: bool = False, logits: bool = False) -> Ledger:
    """The ledger of the model as `slotfast/model` has it, in bfloat16: of plain torch, or of the kernels on a GPU.

    `logits`: kernels make them, for rows that adapt; otherwise losses alone, as where no row needs logits.
    """
    dtype, config = torch.bfloat16, shape.config
    with torch.device("meta"), _choosing(kernels):
        model = GPT(config).eval().cast_matrices(dtype)
        count = (1, shape.length) if shape.block else (shape.windows, shape.length)
        tokens = torch.zeros(count, dtype=torch.int64)
        block = torch.zeros(1, shape.block or 0, dtype=torch.int64)
        targets = torch.zeros((1, shape.block) if shape.block else (shape.windows, shape.scored), dtype=torch.int64)
        ops.attention(*[torch.zeros(1, 1, 1, 1, dtype=dtype)] * 3)  # looks for FlashAttention once, uncounted
        with torch.inference_mode():
            cached = CachedForward(model, shape.length, shape.sinks, dtype=dtype)
            if shape.block:
                cached(tokens)  # fills the cache
                cached(block)
            with Counting(model) as counting:
                hidden = cached(block) if shape.block else model.hidden(tokens, dtype, shape.length - shape.scored)
                if kernels and not logits:
                    model.losses(hidden, targets)
                else:  # what every evaluation does whose rows adapt logits
                    ops.cross_entropy(model.head(hidden), targets)
    return counting.ledger


@contextlib.contextmanager
def _choosing(kernels: bool) -> Iterator[None]:
    """Within, operators choose on the meta device as they do on a GPU, or as they do on a CPU."""
    before = ops.uses_triton
    ops.uses_triton = lambda backend, device: kernels and backend != "torch"
    try:
        yield
    finally:
        ops.uses_triton = before
