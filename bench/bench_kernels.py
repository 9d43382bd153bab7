"""Every kernel at the shapes that real runs use, against its peers, in one process on the same inputs.

On a GPU "ours" is the kernel; on the CPU it is the path that CPUs take, plain torch, on fewer windows. Before anything
is timed, its result is checked. The gates at the end compare times of this same run, never with another's.
"""

import functools
import itertools
import statistics

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.common import default_device, need
from bench.peers import contenders
from bench.roofs import copy_bandwidth
from bench.timing import is_small, measure
from slotfast.kernels import specs

pytest = need("pytest")

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
INPUT_BYTES = 1 << 29 if ON_GPU else 1 << 25  # windows are halved until a case moves no more

# Least (time of the peer) / (time of ours), on a GPU: spec, which shapes, peer, ratio.
LEAST_RATIO = [
    ("bias_cross_entropy_grad", lambda shape: True, "eager", 5.0),
    ("bias_cross_entropy_grad", lambda shape: True, "compile", 1.5),
    ("bias_cross_entropy_grad", lambda shape: True, "liger", 1.2),
    ("int6_matmul", lambda shape: shape["m"] <= 16 and min(shape["n"], shape["k"]) >= 4096, "eager", 1.8),
    ("int6_matmul", lambda shape: "group" not in shape, "eager", 0.95),
    ("linear_cross_entropy", lambda shape: True, "eager", 2.0),
]
# On the CPU both are plain torch; ours pays for batch-independent rounding. The gate only notices a blunder.
LEAST_RATIO_CPU = [("bias_cross_entropy_grad", lambda shape: True, "eager", 0.4)]


def shrunk(spec, case, most_bytes: int) -> dict:
    """The case's shape with fewer windows (or rows, or queries), so that it moves at most `most_bytes`."""
    shape = dict(case.shape)
    key = next(key for key in ("W", "m", "M", "T") if key in shape)
    while shape[key] > 1 and spec.bytes_moved(**shape, itemsize=case.dtype.itemsize) > most_bytes:
        shape[key] //= 2
    return shape


def first_case(spec):
    """A production case; off the GPU a small one of an ordinary shape, that Triton's interpreter gets through."""
    if ON_GPU:
        return next(case for case in spec.cases if case.production)
    small = [case for case in spec.cases if not case.production and case.dtype == torch.float32]
    return next((case for case in small if "prime" in case.reason), small[len(small) // 2])


def draw(spec, case, shape):
    """Inputs, drawn on the device: a CPU takes minutes over the largest."""
    return spec.inputs(torch.Generator(DEVICE).manual_seed(0), DEVICE, case.dtype, **shape)


def rotating(kwargs) -> list:
    """Copies of the inputs, together larger than the last cache that a run could keep them in."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 1 << 25
    size = sum(t.nbytes for t in tree_leaves(kwargs) if isinstance(t, torch.Tensor))
    copies = min(3 * cache // max(size, 1), 1000)
    return [kwargs, *(tree_map_only(torch.Tensor, torch.clone, kwargs) for _ in range(copies))]


def error(got, exact) -> float:
    """The largest ||got - exact|| / ||exact|| of the outputs; NaN never passes."""
    pairs = zip(tree_leaves(got), tree_leaves(exact), strict=True)
    found = [((g.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)).item() for g, e in pairs]
    return max(float("inf") if value != value else value for value in found)


def outcome(found):
    """What results are compared by: of a solver the loss, for its path turns on roundings."""
    return getattr(found, "loss", found)


@torch.no_grad()
def check_ours(spec, case, function) -> None:
    """Against float64, on fewer windows: at most twice the reference's error."""
    kwargs = draw(spec, case, shrunk(spec, case, 1 << 22))
    wide = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, kwargs)
    exact, plain, got = spec.reference(**wide), spec.reference(**kwargs), function(**kwargs)
    off, allowed = error(got, exact), 2 * error(plain, exact) + 1e-5
    assert off <= allowed, f"{off:.2g} off float64, allowed {allowed:.2g}: not timed"


@torch.no_grad()
def check_peer(case, function, ours, kwargs) -> None:
    """Against ours, on what is timed: peers round bf16 their own way."""
    off, allowed = error(function(**kwargs), ours(**kwargs)), max(2 * torch.finfo(case.dtype).eps, 1e-4)
    assert off <= allowed, f"{off:.2g} off ours, allowed {allowed:.2g}: not timed"


GATES = LEAST_RATIO if ON_GPU else LEAST_RATIO_CPU
CASES = [(spec, case) for spec in specs() for case in spec.cases if case.production]
TIMED = [
    pytest.param((spec, case, name), id=f"{spec.name}-{case.reason}-{name}".replace(" ", "_"))
    for last in (False, True)  # compiling takes longest: when time runs out, it is that which is missing
    for spec, case in CASES
    for name in contenders(spec, DEVICE)
    if (name == "compile") == last
]
GATED = [
    pytest.param((spec, case, gate), id=f"{spec.name}-{case.reason}-{gate[2]}".replace(" ", "_"))
    for spec, case in CASES
    for gate in GATES
    if gate[0] == spec.name and gate[1](case.shape)
]
TIMES: dict[tuple[str, str, str], float] = {}  # (spec, case, contender) -> median ms on the device


@pytest.fixture(scope="session")
def copy_roof():
    return copy_bandwidth(DEVICE, copy_bytes=None if ON_GPU else 1 << 29, repeats=7)["gb_per_s"]


@functools.cache
def prepared(spec_name: str, reason: str):
    """(spec, case, shape, contenders, inputs, whether ours is small); kept for one case at a time."""
    prepared.cache_clear()
    spec = next(spec for spec in specs() if spec.name == spec_name)
    case = next(case for case in spec.cases if case.reason == reason)
    shape = shrunk(spec, case, INPUT_BYTES)
    found, inputs = contenders(spec, DEVICE), rotating(draw(spec, case, shape))
    with torch.no_grad():
        small = not isinstance(found["ours"], str) and is_small(lambda: found["ours"](**inputs[0]), DEVICE)
    return spec, case, shape, found, inputs, small


@pytest.mark.parametrize("of", TIMED)
def test_time(of, benchmark, copy_roof):
    name = of[2]
    spec, case, shape, found, inputs, small = prepared(of[0].name, of[1].reason)
    function = found[name]
    if isinstance(function, str):
        pytest.skip(function)
    if name.startswith("ours"):
        check_ours(spec, case, function)
    else:
        check_peer(case, function, found["ours"], inputs[0])
    following = itertools.cycle(inputs)

    @torch.no_grad()
    def call():
        return function(**next(following))

    def call_and_wait():
        call()
        if ON_GPU:
            torch.cuda.synchronize()

    device_ms = statistics.median(measure(call, DEVICE, small=small, calls=len(inputs)))
    rounds = int(min(max(500 / device_ms, 5), 200))
    benchmark.group = f"{spec.name}, {case.reason}"
    benchmark.pedantic(call_and_wait, rounds=rounds, warmup_rounds=1)
    moved = spec.bytes_moved(**shape, itemsize=case.dtype.itemsize)
    rate = moved / device_ms / 1e6
    benchmark.extra_info.update(
        shape={key: str(value) for key, value in shape.items()},
        device_ms=device_ms,
        timed_by="graph" if small else "events" if ON_GPU else "clock",
        bytes=moved,
        flops=spec.flops(**shape),
        gb_per_s=rate,
        copy_roof_gb_per_s=copy_roof,
        percent_of_roof=100 * rate / copy_roof,
    )
    TIMES[spec.name, case.reason, name] = device_ms


@pytest.mark.parametrize("of", GATED)
def test_ratio(of):
    """Ours against a peer, both of this run."""
    spec, case, (_, _, peer, least) = of
    times = {name: ms for (*which, name), ms in TIMES.items() if which == [spec.name, case.reason]}
    ours = [ms for name, ms in times.items() if name.startswith("ours")]
    if not ours or peer not in times:
        pytest.skip("was not timed in this run")
    ratio = times[peer] / min(ours)
    assert ratio >= least, f"{peer} takes {ratio:.2f} times as long as ours, the gate is {least}"
