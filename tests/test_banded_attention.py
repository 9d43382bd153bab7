"""Banded attention against a dense softmax over a mask of the whole stream, in float64, query by query."""

import math
from itertools import product

import pytest
import torch

from slotfast import ops
from slotfast.kernels import banded_attention, banded_attention_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(B=2, T=5, C=3, H=2, Hkv=1, D=16, S=0, position=None, seed=0, dtype=torch.float64):
    """Arguments but for the window: q, k, v, position, sinks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(B, T, H, D), normal(B, C + T, Hkv, D), normal(B, C + T, Hkv, D)
    sinks = (normal(B, T, H, D), normal(B, S, Hkv, D), normal(B, S, Hkv, D)) if S else None
    return q, k, v, None if position is None else torch.tensor(position), sinks


def oracle(q, k, v, window, position=None, sinks=None, exclude_own=False):
    """One query at a time: lists what it sees by stream position, then one softmax."""
    B, T, H, D = q.shape
    cached, group = k.shape[1] - T, H // k.shape[2]
    out = []
    for b, t, h in product(range(B), range(T), range(H)):
        me = 10**6 + t if position is None else int(position[b]) + t
        scores, values = [], []
        for j in range(k.shape[1]):
            place = me - (cached + t - j)  # of key j in the stream
            if 0 <= place <= me and me - place < window:
                scores.append(q[b, t, h] @ k[b, j, h // group])
                values.append(v[b, j, h // group])
        for s in range(0 if sinks is None else sinks[1].shape[1]):
            if me - s >= window:
                scores.append(sinks[0][b, t, h] @ sinks[1][b, s, h // group])
                values.append(sinks[2][b, s, h // group])
        o = torch.softmax(torch.stack(scores) / math.sqrt(D), 0) @ torch.stack(values)
        if exclude_own:
            own = v[b, cached + t, h // group]
            o = o - (o @ own) / (own @ own) * own
        out.append(o)
    return torch.stack(out).view(B, T, H, D)


CASES = {
    "one query": ({"T": 1, "C": 0}, 3),
    "no cache": ({"T": 7, "C": 0}, 3),
    "window of one": ({"T": 5, "C": 4}, 1),
    "window of one, no cache": ({"T": 5, "C": 0}, 1),
    "window larger than all": ({"T": 9, "C": 4}, 1000),
    "full cache": ({"T": 9, "C": 6}, 7),
    "cache longer than the window": ({"T": 6, "C": 11}, 4),
    "cache shorter than the window": ({"T": 6, "C": 2}, 5),
    "partly filled cache": ({"T": 6, "C": 5, "position": [2, 4]}, 6),
    "the stream's start behind an empty cache": ({"T": 6, "C": 5, "position": [0, 1]}, 6),
    "keys were dropped": ({"T": 3, "C": 2, "position": [50, 51]}, 9),
    "grouped heads": ({"T": 5, "C": 3, "H": 6, "Hkv": 2}, 4),
    "a sink for each": ({"T": 5, "C": 3, "S": 1, "position": [40, 3]}, 4),
    "sinks partly in the band": ({"T": 9, "C": 5, "S": 4, "position": [1, 5]}, 6),
    "sinks in the band for all": ({"T": 3, "C": 5, "S": 4, "position": [1, 0]}, 6),
    "sinks and groups": ({"T": 5, "C": 3, "S": 3, "H": 4, "Hkv": 2, "position": [9, 2]}, 4),
    "width 80": ({"T": 3, "C": 2, "D": 80}, 3),
    "width 128": ({"B": 1, "T": 2, "C": 2, "D": 128, "S": 2, "position": [3]}, 3),
}


@pytest.mark.parametrize("exclude_own", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_oracle(case, exclude_own):
    sizes, window = CASES[case]
    q, k, v, position, sinks = draw(**sizes)
    expected = oracle(q, k, v, window, position, sinks, exclude_own)
    for function in (banded_attention_ref, ops.banded_attention):
        got = function(q, k, v, window, position, sinks, exclude_own)
        assert got.shape == expected.shape and (got - expected).abs().max() < 1e-12


def dense(q, k, v, window, position=None, sinks=None, exclude_own=False):
    """All queries at once, over a mask of T x (C + T + S)."""
    T, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    t, j = torch.arange(T)[:, None], torch.arange(keys)
    age = keys - T + t - j
    seen = ((age >= 0) & (age < window)).expand(len(q), T, keys)
    if position is not None:
        seen = seen & (age <= position[:, None, None] + t)
    scores = torch.einsum("bthd,bjhd->bhtj", q, k.repeat_interleave(group, 2))
    if sinks is not None:
        at = position[:, None, None] + t - torch.arange(sinks[1].shape[1])
        seen = torch.cat([seen, at >= window], 2)
        others = torch.einsum("bthd,bshd->bhts", sinks[0], sinks[1].repeat_interleave(group, 2))
        scores, v = torch.cat([scores, others], 3), torch.cat([v, sinks[2]], 1)
    weights = (scores / q.shape[3] ** 0.5).masked_fill(~seen[:, None], -math.inf).softmax(-1)
    out = torch.einsum("bhtj,bjhd->bthd", weights, v.repeat_interleave(group, 2))
    if exclude_own:
        own = v[:, keys - T : keys].repeat_interleave(group, 2)
        out = out - (out * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    return out


def gradients(function, tensors, *arguments):
    """Output, and the gradients of its fixed random combination; `tensors` are q, k, v and the sinks' three or none."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    window, position, exclude_own = arguments
    out = function(*tensors[:3], window, position, tuple(tensors[3:]) or None, exclude_own)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return out.detach(), torch.autograd.grad((out * weight).sum(), tensors)


def both(sizes, window, exclude_own, functions=(banded_attention_ref, ops.banded_attention)):
    q, k, v, position, sinks = draw(**sizes)
    arguments = (window, position, exclude_own)
    expected = gradients(dense, [q, k, v, *(sinks or ())], *arguments)
    for function in functions:
        got = gradients(function, [q, k, v, *(sinks or ())], *arguments)
        assert (got[0] - expected[0]).abs().max() < 1e-12
        for name, a, b in zip(("q", "k", "v", "q_sink", "k_sink", "v_sink"), got[1], expected[1], strict=False):
            assert (a - b).abs().max() < 1e-11, name


@pytest.mark.parametrize("exclude_own", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_a_dense_mask(case, exclude_own):
    both(*CASES[case], exclude_own)


@pytest.mark.parametrize("sizes, window", [
    ({"B": 1, "T": 300, "C": 70, "S": 4, "position": [33]}, 90),
    ({"B": 2, "T": 259, "C": 10, "S": 2, "position": [0, 400]}, 200),
])  # fmt: skip
def test_many_blocks_are_one_band(sizes, window):
    both(sizes, window, True)


def test_no_query():
    q, k, v, position, sinks = draw(T=0, C=3, S=2, position=[5, 0])
    for function in (banded_attention_ref, ops.banded_attention):
        out, found = gradients(function, [q, k, v, *sinks], 3, position, True)
        assert out.shape == q.shape and not any(g.any() for g in found)


def poisoned(T, C, S, window, position, dtype=torch.float64, **sizes):
    """Arguments, and the same with NaN in every slot that no query sees."""
    q, k, v, position, sinks = draw(T=T, C=C, S=S, position=position, dtype=dtype, **sizes)
    clean = [q, k, v, *sinks]
    dirty = [x.clone() for x in clean]
    for b, first in enumerate(position.tolist()):
        unseen = max(C - first, C - window + 1, 0)
        dirty[1][b, :unseen] = dirty[2][b, :unseen] = torch.nan
        left = first - (window - 1)  # sinks behind the band of query 0
        dirty[3][b, : max(0, 1 - left)] = torch.nan
        behind = max(0, left + T - 1)
        dirty[4][b, behind:] = dirty[5][b, behind:] = torch.nan
    assert sum(x.isnan().sum() for x in dirty) > 0
    return clean, dirty, position


@pytest.mark.parametrize("position", [[0, 2], [4, 9], [7, 6]])
def test_what_no_query_sees_may_be_nan(position):
    clean, dirty, at = poisoned(6, 8, 4, 5, position)
    expected = gradients(dense, clean, 5, at, True)
    for function in (banded_attention_ref, ops.banded_attention):
        got = gradients(function, dirty, 5, at, True)
        assert (got[0] - expected[0]).abs().max() < 1e-12
        assert all((a - b).abs().max() < 1e-11 for a, b in zip(got[1], expected[1], strict=True))


def test_reference_gradcheck():
    q, k, v, position, sinks = draw(T=4, C=3, H=2, Hkv=1, S=2, D=16, position=[5, 2])
    inputs = [x.requires_grad_() for x in (q, k, v, *sinks)]

    def function(q, k, v, *sinks):
        return banded_attention_ref(q, k, v, 4, position, sinks, True)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 3])
def test_operator_is_well_formed(count, dtype):
    q, k, v, position, sinks = draw(T=5, C=6, S=count, position=[9, 3], dtype=dtype)
    sinks = sinks or (None, None, None)
    given = [x if x is None else x.requires_grad_() for x in (q, k, v, *sinks)]
    arguments = (*given[:3], position, *given[3:], 4, True)
    torch.library.opcheck(torch.ops.slotfast.banded_attention.default, arguments)


def test_operator_traces_whole():
    q, k, v, position, sinks = draw(T=5, C=6, S=2, position=[9, 3], dtype=torch.float32)
    given = [q, k, v, *sinks]

    def function(q, k, v, window, position, sinks, exclude_own):
        return ops.banded_attention(2 * q, k, v, window, position, sinks, exclude_own)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (out, found), (expected, wanted) = (gradients(f, given, 4, position, True) for f in (compiled, function))
    assert torch.equal(out, expected) and all(map(torch.equal, found, wanted))


# The kernels, in the interpreter where there is no GPU. tests/test_kernels.py runs the cases of their spec.


def on_device(sizes):
    q, k, v, position, sinks = draw(**sizes, dtype=torch.float32)
    return [x.to(DEVICE) for x in (q, k, v, *sinks)], position.to(DEVICE)


def test_kernels_are_the_dense_mask():
    sizes = {"T": 70, "C": 75, "S": 2, "H": 2, "position": [60, 200]}
    tensors, position = on_device(sizes)
    out, found = gradients(banded_attention, tensors, 74, position, True)
    wide = [x.double().cpu() for x in tensors]
    expected, wanted = gradients(dense, wide, 74, position.cpu(), True)
    # The weights of the combination are float64 on one side: the sums differ by their rounding
    assert (out.cpu() - expected).abs().max() < 1e-5
    for a, b in zip(found, wanted, strict=True):
        assert (a.cpu() - b).abs().max() < 1e-4 * max(1, b.abs().max())


def test_a_sequence_has_the_same_bits_in_any_batch():
    sizes = {"B": 3, "T": 40, "C": 30, "S": 2, "H": 2, "position": [3, 30, 100]}
    tensors, position = on_device(sizes)
    out, found = gradients(banded_attention, tensors, 31, position, True)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    for order in ([2, 0, 1], [1]):
        given = [x[order].clone().requires_grad_() for x in tensors]
        other = banded_attention(*given[:3], 31, position[order], tuple(given[3:]), True)
        assert torch.equal(other, out[order])
        again = torch.autograd.grad(other, given, weight[order])
        assert all(torch.equal(a, b[order]) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("name, change", [
    ("q", {"q": torch.zeros(2, 5, 2, 129)}),
    ("q", {"q": torch.zeros(2, 5, 2, 16, dtype=torch.float64)}),
    ("k", {"k": torch.zeros(2, 4, 1, 16), "v": torch.zeros(2, 4, 1, 16)}),
    ("k", {"k": torch.zeros(2, 8, 3, 16), "v": torch.zeros(2, 8, 3, 16)}),
    ("k", {"k": torch.zeros(2, 8, 1, 8)}),
    ("v", {"v": torch.zeros(2, 9, 1, 16)}),
    ("v", {"v": torch.zeros(2, 8, 1, 16, dtype=torch.float16)}),
    ("position", {"position": None}),
    ("position", {"position": torch.zeros(2, dtype=torch.int32)}),
    ("position", {"position": torch.zeros(3, dtype=torch.int64)}),
    ("k_sink", {"sinks": (torch.zeros(2, 5, 2, 16), *[torch.zeros(2, 65, 1, 16)] * 2)}),
    ("q_sink", {"sinks": (torch.zeros(2, 4, 2, 16), *[torch.zeros(2, 2, 1, 16)] * 2)}),
    ("v_sink", {"sinks": (torch.zeros(2, 5, 2, 16), torch.zeros(2, 2, 1, 16), torch.zeros(2, 3, 1, 16))}),
    ("window", {"window": 0}),
    ("window", {"window": 2**31}),
])  # fmt: skip
def test_wrong_arguments_are_named(name, change):
    q, k, v, position, sinks = draw(S=2, position=[9, 9], dtype=torch.float32)
    given = {"q": q, "k": k, "v": v, "window": 4, "position": position, "sinks": sinks} | change
    with pytest.raises(ValueError, match=f"^{name}: expected|^{name}: sinks need"):
        banded_attention(**given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_under_the_operator_do_not_synchronise():
    tensors, position = on_device({"T": 40, "C": 30, "S": 2, "position": [3, 30]})
    tensors = [x.requires_grad_() for x in tensors]
    ops.banded_attention(*tensors[:3], 31, position, tuple(tensors[3:]), True).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.banded_attention(*tensors[:3], 31, position, tuple(tensors[3:]), True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("S", [0, 3])
@pytest.mark.parametrize("window", [1, 17, 130, 1000])
@pytest.mark.parametrize("T", [1, 5, 64, 65, 150])
def test_what_a_cpu_runs_is_the_reference(T, window, S):
    """Blocks of 64 queries, any cache, one group or more, gradients too."""
    for past, heads in product((0, 3, 70, 300), (2, 6)):
        position = [past + 7, past + 1] if S else None
        q, k, v, place, sinks = draw(T=T, C=past, H=heads, Hkv=2, D=8, S=S, position=position)
        inputs = [x.requires_grad_() for x in (q, k, v, *(sinks or ()))]
        weight = torch.randn_like(q)
        for exclude_own in (False, True):
            got = ops.banded_attention(q, k, v, window, place, sinks, exclude_own)
            expected = banded_attention_ref(q, k, v, window, place, sinks, exclude_own)
            assert (got - expected).abs().max() < 1e-12
        pairs = zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (got, expected)), strict=True)
        assert all((mine - other).abs().max() < 1e-11 for mine, other in pairs)
