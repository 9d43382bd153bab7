"""kernels/lbfgs.py beyond its spec: sequences of pushes, what stays untouched, bits in any batch, machine code."""

import re

import pytest
import torch

from slotfast.kernels.lbfgs import (
    SPECS,
    History,
    lbfgs_direction,
    lbfgs_direction_ref,
    lbfgs_history,
    lbfgs_push,
    lbfgs_push_,
    lbfgs_push_ref,
)
from slotfast.lbfgs.memory import Memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="the kernels need triton")


def two_loops(pairs, g):
    """The recursion for one problem and a list of its pairs, oldest first; float64."""
    q, alphas = -g, []
    for s, y in reversed(pairs):
        alphas.append(s.dot(q) / y.dot(s))
        q = q - alphas[-1] * y
    d = q * (pairs[-1][0].dot(pairs[-1][1]) / pairs[-1][1].dot(pairs[-1][1]) if pairs else 1.0)
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        d = d + (alpha - y.dot(d) / y.dot(s)) * s
    return d


def pushes(W, V, steps, generator):
    """Pairs of quadratics, some of negative curvature, so that the rings of the W problems come apart."""
    scale = torch.exp2(3 * torch.rand(W, V, generator=generator) - 1)
    for _ in range(steps):
        s = torch.randn(W, V, generator=generator)
        sign = torch.where(torch.rand(W, 1, generator=generator) < 0.3, -1.0, 1.0)
        yield s, sign * scale * s, torch.randn(W, V, generator=generator)


def poisoned(W, H, V, dtype=torch.float32, device=DEVICE) -> History:
    history = lbfgs_history(W, H, V, device, dtype)
    for tensor in (history.s, history.y, history.rho):
        tensor.fill_(torch.nan)
    return history


def same_bits(a, b):
    return all(torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("H", "V"), [(1, 5), (3, 40), (4, 130)])
def test_a_run_of_pushes_and_directions(H, V):
    W = 5
    history, exact = poisoned(W, H, V), poisoned(W, H, V, torch.float64)
    memory = Memory.empty(torch.zeros(W, V, dtype=torch.float64), H)
    pairs = [[] for _ in range(W)]
    assert torch.equal(lbfgs_direction(history, torch.ones(W, V, device=DEVICE)).cpu(), -torch.ones(W, V))
    for s, y, g in pushes(W, V, 3 * H + 4, torch.Generator().manual_seed(V)):
        lbfgs_push_(history, s.to(DEVICE), y.to(DEVICE))
        exact = lbfgs_push_ref(exact, *(t.to(DEVICE, torch.float64) for t in (s, y)))
        for w in range(W):
            if y[w].dot(s[w]) > 0:
                pairs[w] = [*pairs[w], (s[w].double(), y[w].double())][-H:]
        assert history.count.tolist() == [len(kept) for kept in pairs] == exact.count.tolist()
        assert torch.equal(history.head, exact.head)

        want = torch.stack([two_loops(pairs[w], g[w].double()) for w in range(W)])
        reference = lbfgs_direction_ref(exact, g.to(DEVICE, torch.float64)).cpu()
        torch.testing.assert_close(reference, want, rtol=1e-10, atol=1e-12)
        matrix_form = memory.direction(torch.arange(W).numpy(), s.double(), y.double(), g.double())
        torch.testing.assert_close(matrix_form, want, rtol=1e-9, atol=1e-11)
        plain = lbfgs_direction_ref(History(*(t.clone() for t in history)), g.to(DEVICE)).cpu()
        error = (lbfgs_direction(history, g.to(DEVICE)).cpu() - want).abs().max()
        assert error <= 2 * (plain - want).abs().max() + 1e-6
    assert H == 1 or len(set(history.head.tolist())) > 1  # some pairs were refused: the rings are at different slots


def test_push_in_place_and_on_a_copy():
    W, H, V = 4, 3, 20
    history = poisoned(W, H, V)
    for s, y, _ in pushes(W, V, 7, torch.Generator().manual_seed(0)):
        s, y = s.to(DEVICE), y.to(DEVICE)
        before = History(*(t.clone() for t in history))
        copy = lbfgs_push(history, s, y)
        assert same_bits(history, before)
        assert lbfgs_push_(history, s, y) is history
        assert same_bits(history, copy)
        for w in range(W):
            slot = int(before.head[w])
            others = [h for h in range(H) if h != slot]
            if (y[w] * s[w]).sum() > 0:
                assert torch.equal(history.s[w, slot], s[w]) and torch.equal(history.y[w, slot], y[w])
            else:
                others = range(H)
                assert all(torch.equal(history[i][w], before[i][w]) for i in (3, 4, 5))
            assert same_bits([t[w, others] for t in history[:3]], [t[w, others] for t in before[:3]])


@pytest.mark.parametrize("V", [1, 100, 700])
def test_same_bits_alone_and_in_any_order(V):
    W, H = 5, 4
    history, rows = poisoned(W, H, V), torch.tensor([3, 0, 4, 4, 1, 2])
    for s, y, g in pushes(W, V, 6, torch.Generator().manual_seed(1)):
        s, y, g = s.to(DEVICE), y.to(DEVICE), g.to(DEVICE)
        before = History(*(t.clone() for t in history))
        lbfgs_push_(history, s, y)
        direction = lbfgs_direction(history, g)
        for index in (rows, *([w] for w in range(W))):
            part = lbfgs_push(History(*(t[index] for t in before)), s[index], y[index])
            assert same_bits(part, [t[index] for t in history])
            assert torch.equal(lbfgs_direction(part, g[index]), direction[index])


def test_problems_do_not_touch_each_other():
    W, H, V = 3, 2, 30
    history, generator = poisoned(W, H, V), torch.Generator().manual_seed(2)
    for s, y, _ in pushes(W, V, 4, generator):
        lbfgs_push_(history, s.to(DEVICE), y.to(DEVICE))
    g = torch.randn(W, V, generator=generator).to(DEVICE)
    healthy = lbfgs_direction(history, g)
    g[1, 3] = torch.nan
    broken = lbfgs_direction(history, g)
    assert broken[1].isnan().any() and torch.equal(broken[[0, 2]], healthy[[0, 2]])


def test_errors_name_the_argument():
    history, vector = lbfgs_history(2, 3, 8, DEVICE), torch.zeros(2, 8, device=DEVICE)
    wrong = history._replace(head=history.head.long())
    turned = history._replace(s=torch.zeros(2, 8, 3, device=DEVICE).mT)
    for message, call in {
        "gradient: expected": lambda: lbfgs_direction(history, vector[:1]),
        "y: expected torch.float32": lambda: lbfgs_push(history, vector, vector.double()),
        "history.head: expected torch.int32": lambda: lbfgs_direction(wrong, vector),
        "history.s: expected contiguous": lambda: lbfgs_direction(turned, vector),
        "V <= 8192": lambda: lbfgs_direction(lbfgs_history(1, 1, 8193, DEVICE), torch.zeros(1, 8193, device=DEVICE)),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


# Machine code; in a process of its own, for here kernels may be interpreted


def report():
    """Prints, for each production shape, the order of barriers (B), wide stores (S) and single stores (s) of a push."""
    from bench.compile import compile_for

    (spec,) = (spec for spec in SPECS if spec.name == "lbfgs_push")
    for case in (case for case in spec.cases if case.production):
        (compilation,) = spec.compilations(**case.shape)
        marks = re.findall(r"(bar)\.sync|(st)\.global(\.v4)?", compile_for(compilation).asm["ptx"])
        print(case.shape["V"], "".join("B" if bar else "S" if vector else "s" for bar, _, vector in marks))


def test_a_barrier_parts_the_pair_from_head_and_count(compiling):
    lines = [line.split() for line in compiling(__file__).splitlines()]
    assert [int(V) for V, _ in lines] == [1024, 4096, 8192]
    assert all(re.search(r"S+Bs{4}$", order) for _, order in lines), lines


if __name__ == "__main__":
    report()
