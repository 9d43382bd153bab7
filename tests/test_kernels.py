"""Every kernel against its contract. The checks follow from `KernelSpec` and know no kernel by name.

Inputs are drawn on the CPU and moved, so that a seed means the same numbers everywhere. They and everything the kernels
allocate lie between fences: NaN (the largest integer, for integers) fills what is allocated, the gaps of strided
tensors, and a margin around each tensor. So an output that is not written, a read that strays and a write that
strays all show, in the interpreter as on a GPU. What the kernels compile to is the business of test_static_report.py.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from slotfast.kernels import Case, KernelSpec, specs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MARGIN = 64  # elements; keeps the 16-byte alignment that torch's allocations have
ALLOCATORS = {name: getattr(torch, name) for name in ("empty", "empty_like", "empty_strided")}
GRADCHECK_NUMEL = 2048
SPECS = specs()
# The benches run production cases, and check them first.
PAIRS = [(spec, case) for spec in SPECS for case in spec.cases if not case.production]


# Fences


def poison(dtype):
    return float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max


def fenced(size, stride, dtype, device):
    """A poisoned tensor of this geometry, and the whole buffer that it lies in."""
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
    buffer = ALLOCATORS["empty"](span + 2 * MARGIN, dtype=dtype, device=device).fill_(poison(dtype))
    return ALLOCATORS["empty"](0, dtype=dtype, device=device).set_(buffer, MARGIN, size, stride), buffer


def fenced_copy(tensor):
    """`tensor` on DEVICE, strides kept (0 for expanded dimensions too), and its buffer."""
    base = tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
    copy, buffer = fenced(base.size(), base.stride(), tensor.dtype, DEVICE)
    return copy.copy_(base).expand(tensor.size()), buffer


@contextmanager
def poisoned_allocations():
    """`torch.empty` and relatives give poisoned, fenced tensors; on leaving, no fence may have been touched."""
    buffers = []

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            plain = allocate(*args, **kwargs)
            tensor, buffer = fenced(plain.size(), plain.stride(), plain.dtype, plain.device)
            buffers.append(buffer)
            return tensor

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name, allocate in ALLOCATORS.items():
            patch.setattr(torch, name, poisoned(allocate))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield
    for buffer in buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[-MARGIN:]])
        untouched = margins.isnan() if buffer.dtype.is_floating_point else margins == poison(buffer.dtype)
        assert untouched.all(), f"wrote outside a {buffer.dtype} tensor of {buffer.numel() - 2 * MARGIN} elements"


# One case, run


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().clone()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def evaluate(function, spec, kwargs):
    """Outputs of `function`, and the gradients of their fixed random combination."""
    arguments = {name: kwargs[name] for name in spec.differentiable if isinstance(kwargs.get(name), torch.Tensor)}
    arguments = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    outputs = function(**{**kwargs, **arguments})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    followed = [output for output in outputs if output.requires_grad]
    if not arguments:
        return outputs, {}
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(output.shape, generator=generator).to(output) for output in followed]
    return outputs, dict(zip(arguments, torch.autograd.grad(followed, [*arguments.values()], cotangents), strict=True))


@dataclass
class Run:
    """What the checks below look at: each field is (outputs, gradients)."""

    spec: KernelSpec
    poisoned: tuple  # the kernel, on poisoned memory
    again: tuple  # the kernel, on the allocator's own memory
    ungraded: tuple  # the kernel's outputs where no gradient is asked for
    plain: tuple  # the reference in the case's dtype
    exact: tuple  # the reference in float64
    inputs_unwritten: bool


def run(spec, case):
    torch.manual_seed(0)
    drawn = spec.inputs(torch.Generator().manual_seed(0), torch.device("cpu"), case.dtype, **case.shape)
    buffers = []

    def move(tensor):
        copy, buffer = fenced_copy(tensor)
        buffers.append(buffer)
        return copy

    kwargs = tree_map_only(torch.Tensor, move, drawn)
    before = [bits(buffer) for buffer in buffers]
    with poisoned_allocations():
        poisoned = evaluate(spec.fn, spec, kwargs)
        ungraded = evaluate(spec.fn, replace(spec, differentiable=()), kwargs)
    again = evaluate(spec.fn, spec, kwargs)
    after = [bits(buffer) for buffer in buffers]
    wide = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, kwargs)
    return Run(
        spec,
        poisoned,
        again,
        ungraded,
        plain=evaluate(spec.reference, spec, kwargs),
        exact=evaluate(spec.reference, spec, wide),
        inputs_unwritten=all(map(torch.equal, before, after)),
    )


# The checks, on a run


def check_close(name, got, plain, exact, atol):
    """At most twice the error of plain torch in the same dtype, plus one rounding of that dtype, plus `atol`."""
    assert (got.shape, got.dtype, got.device) == (plain.shape, plain.dtype, plain.device), name
    rounding = torch.finfo(got.dtype).eps if got.dtype.is_floating_point else 0.0
    got, plain, exact = (tensor.detach().double().cpu() for tensor in (got, plain, exact))
    finite = plain.isfinite()
    # A kernel is not finite exactly where plain torch is not; unwritten memory is NaN and fails here.
    assert torch.equal(got[~finite].nan_to_num(nan=-1.0), plain[~finite].nan_to_num(nan=-1.0)), f"{name}: not finite"
    assert got[finite].isfinite().all(), f"{name}: not finite at {(finite & ~got.isfinite()).nonzero()[:5].tolist()}"
    finite &= exact.isfinite()
    if not finite.any():
        return
    error, allowed = ((t - exact)[finite].abs().max().item() for t in (got, plain))
    allowed = 2 * allowed + rounding * exact[finite].abs().max().item() + atol
    assert error <= allowed, f"{name}: error {error:.3g} against float64, allowed {allowed:.3g}"


def check_outputs(run):
    (got, _), (plain, _), (exact, _) = run.poisoned, run.plain, run.exact
    assert len(got) == len(plain)
    assert [t.requires_grad for t in got] == [t.requires_grad for t in plain], "outputs that carry gradients differ"
    for index, tensors in enumerate(zip(got, plain, exact, strict=True)):
        check_close(f"output {index}", *tensors, run.spec.atol)


def check_gradients(run):
    for name, got in run.poisoned[1].items():
        check_close(f"gradient of {name}", got, run.plain[1][name], run.exact[1][name], run.spec.atol)


def check_rerun(run):
    for first, second in zip(tree_leaves(run.poisoned), tree_leaves(run.again), strict=True):
        assert same_bits(first, second), "a second run gave other bits"
    for first, second in zip(run.poisoned[0], run.ungraded[0], strict=True):
        assert same_bits(first, second), "without gradients the outputs have other bits"


def check_inputs(run):
    assert run.inputs_unwritten, "an input was written"


@cache
def run_of(index):
    return run(*PAIRS[index])


def over(wanted):
    """Parametrises a test by the index of every pair that is wanted."""
    return pytest.mark.parametrize(
        "index",
        [
            pytest.param(index, id=f"{spec.name}-{case.reason}".replace(" ", "_"))
            for index, (spec, case) in enumerate(PAIRS)
            if wanted(spec)
        ],
    )


every_case = over(lambda spec: True)


@every_case
def test_outputs(index):
    check_outputs(run_of(index))


@over(lambda spec: spec.differentiable)
def test_gradients(index):
    check_gradients(run_of(index))


@every_case
def test_rerun_gives_the_same_bits(index):
    check_rerun(run_of(index))


@every_case
def test_inputs_are_not_written(index):
    check_inputs(run_of(index))


# The specs themselves


def test_there_are_specs():
    assert SPECS and PAIRS


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_spec_is_complete(spec):
    reasons = [case.reason for case in spec.cases]
    assert len(set(reasons)) == len(reasons), "two cases share a reason"
    assert any(case.production for case in spec.cases), "no production case"
    assert spec.compilations is not None, "nothing to compile without a GPU"
    for case in spec.cases:
        if not case.production:
            continue
        assert spec.compilations(**case.shape)
        if spec.bytes_moved is not None:
            assert spec.bytes_moved(**case.shape, itemsize=case.dtype.itemsize) > 0
        if spec.flops is not None:
            assert spec.flops(**case.shape) > 0


@pytest.mark.parametrize("spec", [s for s in SPECS if s.differentiable], ids=lambda spec: spec.name)
def test_reference_gradcheck(spec):
    checked = 0
    for case in spec.cases:
        if case.production:
            continue
        kwargs = spec.inputs(torch.Generator().manual_seed(0), torch.device("cpu"), torch.float64, **case.shape)
        kwargs = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, kwargs)
        names = [name for name in spec.differentiable if isinstance(kwargs.get(name), torch.Tensor)]
        tensors = [kwargs[name].detach().clone().requires_grad_() for name in names]
        if not 0 < sum(tensor.numel() for tensor in tensors) <= GRADCHECK_NUMEL:
            continue

        def outputs(*tensors, kwargs=kwargs, names=names):
            found = spec.reference(**{**kwargs, **dict(zip(names, tensors, strict=True))})
            return tuple(t for t in (found if isinstance(found, tuple) else (found,)) if t.requires_grad)

        # Differences mean nothing at NaN, nor where 1e-6 of the input is lost in the rounding of 1e4.
        values = [*tensors, *outputs(*tensors)]
        if not all(tensor.isfinite().all() and (tensor.abs() < 1e3).all() for tensor in values):
            continue
        assert torch.autograd.gradcheck(outputs, tensors)
        checked += 1
    assert checked, f"no case of {spec.name} is finite and has at most {GRADCHECK_NUMEL} differentiable elements"


# The checks can fail: each is shown a function that breaks what it guards


def squares(x):
    return x * x


def broken_value(x):
    return x * x * 1.001


def broken_gradient(x):
    return x * x.detach()


def broken_by_writing_its_input(x):
    result = x * x
    x.data.add_(1.0)
    return result


def broken_by_leaving_output_unwritten(x):
    result = torch.empty_like(x)
    result[1:] = x[1:] * x[1:]
    return result + 0 * x


def broken_by_writing_past_the_end(x):
    result = torch.empty_like(x)
    result.as_strided((x.numel() + 1,), (1,)).fill_(0.0)
    return x * x + 0 * result


def broken_by_reading_past_the_end(x):
    return x * x + 0 * x.detach().as_strided((x.numel(),), (1,), x.storage_offset() + 1)


def broken_by_chance(x):
    return x * x * (1 + 1e-7 * torch.rand(()))


@pytest.mark.parametrize(
    "function, check",
    [
        (broken_value, check_outputs),
        (broken_gradient, check_gradients),
        (broken_by_writing_its_input, check_inputs),
        (broken_by_leaving_output_unwritten, check_outputs),
        (broken_by_writing_past_the_end, None),
        (broken_by_reading_past_the_end, check_outputs),
        (broken_by_chance, check_rerun),
        (squares, None),
    ],
)
def test_the_checks_can_fail(function, check):
    def inputs(generator, device, dtype, n):
        return {"x": torch.randn(n, generator=generator).to(device, dtype)}

    spec = KernelSpec("toy", function, squares, inputs, (), differentiable=("x",))
    case = Case("toy", {"n": 100})
    if function is squares:
        for passes in (check_outputs, check_gradients, check_rerun, check_inputs):
            passes(run(spec, case))
        return
    with pytest.raises(AssertionError):
        result = run(spec, case)  # fences are checked here
        check(result)
