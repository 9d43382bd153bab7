"""A kernel's cases on its PTX: no hazard, and as close to float64 as the spec promises."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from slotfast.kernels import Case, KernelSpec, int6_product, specs
from tests.test_kernels import check_close, evaluate

from . import launch
from .launch import Emulation
from .memory import Report
from .parse import parse
from .run import Conditions

# What is read but was never written differs between the runs, as do the last bits of approximate instructions.
RUNS = (Conditions(), Conditions(poison=0x71, error=True))
ARRIVALS = (1, 2)  # other orders of programs at an atomic, in which results must have the same bits


# Of a production case as many windows, sequences, queries, rows and columns as show what all of its programs do.
_MOST = {"W": 4, "B": 1, "T": 200, "m": 300, "M": 300, "n": 512}


def _fewer(case: Case) -> Case:
    """The same tiles and loops in fewer programs."""
    shape = {name: min(value, _MOST.get(name, value)) for name, value in case.shape.items() if name in _MOST}
    if "phases" in case.shape:  # where a search does not turn on the last bits of a loss
        shape |= {"ridge": 3.0, "max_eval": 8}
    if "position" in case.shape:
        shape["position"] = case.shape["position"][: shape.get("B", 1)]
    return replace(case, shape={**case.shape, **shape})


def pairs(*wanted: str, production: bool = False) -> list[tuple[KernelSpec, Case]]:
    """Specs and their cases, production or not, whose "name | reason" contains one of these, or all."""
    return [
        (spec, _fewer(case) if production else case)
        for spec in specs()
        for case in spec.cases
        if case.production == production
        and (not wanted or any(part in f"{spec.name} | {case.reason}" for part in wanted))
    ]


def check(spec: KernelSpec, case: Case, target: str, runs=RUNS) -> tuple[list[str], Report]:
    """What is wrong, and the reports of all runs as one."""
    drawn = spec.inputs(torch.Generator().manual_seed(0), torch.device("cpu"), case.dtype, **case.shape)
    wide = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, drawn)
    plain, exact = evaluate(spec.reference, spec, drawn), evaluate(spec.reference, spec, wide)
    problems, whole = [], Report()

    def run(under: Conditions):
        with Emulation(target, under) as emulation:
            found = evaluate(spec.fn, spec, drawn)
        whole.merge(emulation.report)
        return found

    for under in runs:
        outputs, gradients = run(under)
        triples = list(zip(outputs, plain[0], exact[0], strict=True))
        named = {f"output {i}": triple for i, triple in enumerate(triples)}
        named |= {f"gradient of {name}": (got, plain[1][name], exact[1][name]) for name, got in gradients.items()}
        for name, triple in named.items():
            try:
                check_close(name, *triple, spec.atol)
            except AssertionError as wrong:
                problems.append(str(wrong).splitlines()[0])
    if any(opcode.startswith(("atom", "red")) for opcode in whole.opcodes):
        for arrivals in ARRIVALS:
            again = run(runs[-1]._replace(arrivals=arrivals))
            if not all(map(_same_bits, tree_leaves((outputs, gradients)), tree_leaves(again))):
                problems.append("the order in which programs arrive at an atomic changes bits")
    return problems + whole.hard, whole


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


@contextmanager
def mutated(function, old: str, new: str = "") -> Iterator[None]:
    """In this block a `triton.jit` function, and what calls it, are compiled with `old` replaced in its source."""
    from triton.runtime.jit import JITFunction

    source = function.src
    if source.count(old) != 1:
        raise ValueError(f"{function.__name__}: expected {old!r} once, found it {source.count(old)} times")
    known = [
        value
        for name, module in list(sys.modules.items())
        if name.startswith("slotfast.kernels")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    ]

    def become(text):
        function._unsafe_update_src(text)
        for each in known:
            each.hash = None
            each.device_caches.clear()

    become(source.replace(old, new))
    try:
        yield
    finally:
        become(source)
        int6_product._arrivals_of.clear()  # a fault may leave counts


@contextmanager
def no_barrier_before_atomics() -> Iterator[None]:
    """In this block the barriers that precede an atomic in the PTX, with no load between, are not there.

    In the source there is one; the compiler may put another behind it, for its own use of shared memory.
    """

    def without(text: str):
        lines, kept, passing = text.splitlines(), [], False
        for line in reversed(lines):
            passing = "atom." in line or (passing and "st.global" not in line and "ld." not in line)
            if not (passing and "bar.sync" in line):
                kept.append(line)
        return parse("\n".join(reversed(kept)))

    launch._translated.cache_clear()
    try:
        with patch.object(launch, "parse", without):
            yield
    finally:
        launch._translated.cache_clear()


def function(module: str, name: str):
    """A `triton.jit` function of a module of slotfast.kernels."""
    return getattr(importlib.import_module(f"slotfast.kernels.{module}"), name)


# For the suite: the fewest cases of each kernel with every kind of instruction, and every way at a branch, that all its
# cases have; and more windows than programs, where scratch is used again.
SUITE = {
    "banded_attention": (
        "sinks partly in the band", "bfloat16, tiles within the band", "float16", "BLOCK + 1, groups of three",
        "queries beside keys and values",
    ),
    "bias_cross_entropy": (
        "slice of a wider vocabulary", "large vocabulary", "float16", "another ignore index", "two parts",
        "above a tile", "capped without bias", "rows that are NaN",
    ),
    "bias_cross_entropy_grad": (
        "float16", "two parts", "large vocabulary", "weights, rows that are NaN", "above a tile", "strided", "a tile",
        "several tiles of rows", "capped after the bias",
    ),
    "channel_mix": ("primes, no skip", "above a tile", "several programs, bfloat16", "float16"),
    "decay_scan": ("primes", "strided", "NaN spreads to all behind it", "two blocks and one"),
    "int6_matmul": (
        "groups of 32, ragged", "single weight", "leading dimensions", "columns of sizes 1e-3 to 1e3",
        "tile of rows and one", "several tiles of rows", "library product", "split eight ways",
    ),
    "lbfgs_direction": ("one variable, one pair", "poor problems", "prime, history not a power of two", "largest V"),
    "lbfgs_push": ("one variable, one pair", "refused pairs", "the contest's smallest vocabulary"),
    "linear_cross_entropy": (
        "primes", "several tiles, bfloat16", "several steps, float16", "banned tokens", "some ignored",
    ),
    "linear_heads": (
        "primes, groups of three, a value", "nothing turns", "several tiles, bfloat16", "several steps, float16",
    ),
    "linear_logits": ("primes, capped", "several tiles, bfloat16", "several steps, float16"),
    "linear_residual": ("several parts", "several parts, bfloat16", "several steps, float16"),
    "linear_squared": ("primes", "above a tile of bfloat16", "several steps, float16"),
    "rate_scan": ("strided", "one token, one window"),
    "slot_solve": ("primes, more windows than programs", "two phases", "above a tile", "no positions", "float16"),
    "slot_solve_mm": ("primes, more windows than programs", "above a tile", "one element", "float16"),
    "without_own": ("primes, groups of three", "beside queries and keys", "several programs, bfloat16", "no value"),
}  # fmt: skip


def torn_pairs(block: int | None = None, fusion: bool = False) -> int:
    """Pairs that `lbfgs_push` stores in part, of 64 of 24 variables whose y.s is within rounding of the threshold.

    With `block` elements in the place of what `_config` says, and `fusion`, as it once was launched.
    """
    from slotfast.kernels import lbfgs
    from slotfast.kernels._rules import SMALLEST_CURVATURE

    generator = torch.Generator().manual_seed(0)
    s, y = torch.randn(64, 24, generator=generator), torch.rand(64, 24, generator=generator)
    y *= s
    s *= SMALLEST_CURVATURE / (s * y).sum(-1, keepdim=True)
    history = lbfgs.lbfgs_history(64, 1, 24)
    history.s.zero_()
    given = lbfgs._config(24) if block is None else (block, 1)
    with patch.multiple(lbfgs, _config=lambda V: given, _PUSH_OPTIONS={"enable_fp_fusion": fusion}), Emulation():
        lbfgs.lbfgs_push_(history, s, y)
    stored = history.s[:, 0] != 0
    assert stored.all(1).any() and not stored.all()  # both sides of the threshold are there
    return int((stored.any(1) & ~stored.all(1)).sum())


# Faults that must be found: module, function, what is replaced in its source, by what; and the case that shows it.
_BARRIER = "tl.debug_barrier()  # "
_SPLIT = "int6_matmul | float32 primes"  # in five, and float32 shows the order of a sum
_OWN_FIRST = "tl.where(pid_k + split < SPLIT_K, pid_k + split, pid_k + split - SPLIT_K) * size"
MUTANTS = (
    ("solver._window", "_evaluate", _BARRIER + "the store of u", "# ", "slot_solve | primes"),
    ("solver._direction", "_direction", _BARRIER + "the stores of the products", "# ", "slot_solve | primes"),
    ("cross_entropy_grad", "_bias_cross_entropy_grad_kernel", _BARRIER + "dbias and", "# ", "entropy_grad | primes"),
    ("cross_entropy_grad", "_bias_cross_entropy_grad_kernel", _BARRIER + "the weights", "# ", "entropy_grad | primes"),
    ("solver._lbfgs", "_lbfgs_kernel", "tl.store(d_ptr, nothing, mask=in_row)", "pass", "slot_solve | primes"),
    ("int6_product", "_int6_matmul_kernel", "acq_rel", "relaxed", _SPLIT),
    ("int6_product", "_int6_matmul_kernel", "split * size", _OWN_FIRST, _SPLIT),
    ("int6_product", "_int6_matmul_kernel", "tl.store(arrivals_ptr, 0)", "pass", _SPLIT),
    ("solver._direction", "_product", "tl.fma(a, b, tl.zeros_like(a))", "a * b", "slot_solve | primes"),
)
