"""slotfast.lbfgs: parity with torch.optim.LBFGS, the same bits in any batch, and what happens at the edges."""

import math

import pytest
import torch
import torch.optim.lbfgs as reference
from torch import Tensor

from slotfast.lbfgs import BiasObjective, Solution, Status, minimize


def draw(generator: torch.Generator, W: int, T: int, V: int, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits around Zipf's law, targets from a disturbed Zipf's law, weights of 1."""
    zipf = -torch.log(torch.arange(1, V + 1, dtype=torch.float64))[torch.randperm(V, generator=generator)]
    z = zipf + 1.5 * torch.randn(W, T, V, generator=generator, dtype=torch.float64)
    truth = (zipf + torch.randn(V, generator=generator, dtype=torch.float64)).softmax(-1)
    targets = torch.multinomial(truth.expand(W, V), T, replacement=True, generator=generator)
    return z.to(dtype), targets, torch.ones(W, T, dtype=dtype)


def direct_loss(z: Tensor, targets: Tensor, weights: Tensor, ridge: float, b: Tensor, prior=0.0) -> Tensor:
    """F for one problem, spelled out."""
    nll = torch.logsumexp(z + b, -1) - (z + b).gather(1, targets[:, None])[:, 0]
    return ((weights * nll).sum() + ridge / 2 * (b - prior).square().sum()) / weights.sum()


def torch_lbfgs(z, targets, weights, ridge=0.0, phases=((25, 20),), start=None, max_eval=None, prior=0.0):
    """torch.optim.LBFGS with autograd -> bias, loss, iterations, evaluations, losses after each iteration."""
    b = (torch.zeros(z.shape[1], dtype=z.dtype) if start is None else start.clone()).requires_grad_()
    losses, iterations, evaluations = [], 0, 0
    line_search = reference._strong_wolfe

    def recorded(*args, **kwargs):
        result = line_search(*args, **kwargs)
        losses.append(float(result[0]))
        return result

    def closure():
        b.grad = None
        loss = direct_loss(z, targets, weights, ridge, b, prior)
        loss.backward()
        return loss.detach()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_strong_wolfe", recorded)
        for most, history in phases:
            optimizer = torch.optim.LBFGS(
                [b], max_iter=most, history_size=history, max_eval=max_eval, line_search_fn="strong_wolfe"
            )
            optimizer.step(closure)
            state = optimizer.state[b]
            iterations, evaluations = iterations + state["n_iter"], evaluations + state["func_evals"]
    return b.detach(), float(closure()), iterations, evaluations, losses


def zeros(z: Tensor) -> Tensor:
    return torch.zeros(z.shape[0], z.shape[2], dtype=z.dtype)


def counts(solution: Solution, row: int = 0) -> tuple[int, int]:
    return int(solution.iterations[row]), int(solution.evaluations[row])


def status(solution: Solution, row: int = 0) -> Status:
    return Status(int(solution.status[row]))


def same_bits(a: Solution, b: Solution, rows_a, rows_b) -> bool:
    fields = ("x", "loss", "iterations", "evaluations", "status")
    return all(torch.equal(getattr(a, f)[rows_a].nan_to_num(), getattr(b, f)[rows_b].nan_to_num()) for f in fields)


def test_follows_torch_on_random_problems():
    generator = torch.Generator().manual_seed(0)
    equal = 0
    for trial in range(100):
        V, T = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((64, 1025), (8, 129)))
        ridge = (0.0, 3.0)[trial % 2]
        z, targets, weights = draw(generator, 1, T, V)
        _, loss, iterations, evaluations, losses = torch_lbfgs(z[0], targets[0], weights[0], ridge)
        trace = []
        ours = minimize(BiasObjective(z, targets, weights, ridge), zeros(z), trace=trace)
        assert float(ours.loss) <= loss + 1e-5
        if counts(ours) == (iterations, evaluations):
            equal += 1
            assert trace[0] == pytest.approx(losses, rel=1e-6)
    assert equal >= 95


def test_float32_reaches_the_same_losses():
    generator = torch.Generator().manual_seed(1)
    z, targets, weights = draw(generator, 8, 64, 512)
    for ridge in (0.0, 3.0):
        wide = minimize(BiasObjective(z, targets, weights, ridge), zeros(z))
        objective = BiasObjective(z.float(), targets, weights, ridge)
        narrow = minimize(objective, zeros(z).float())
        assert narrow.x.dtype == torch.float32 and narrow.loss.dtype == torch.float64
        # without a ridge 25 iterations are not convergence, and roundings that differ end in other places
        assert torch.allclose(narrow.loss, wide.loss, atol=1e-6 if ridge else 3e-4)


def test_objective_is_the_direct_loss_and_its_gradient():
    generator = torch.Generator().manual_seed(2)
    W, T, V = 3, 70, 33
    z, targets, _ = draw(generator, W, T, V)
    weights = torch.rand(W, T, generator=generator, dtype=z.dtype) * (torch.rand(W, T, generator=generator) > 0.3)
    b, prior = (torch.randn(W, V, generator=generator, dtype=z.dtype) for _ in range(2))
    for ridge, mean in ((0.0, None), (0.7, None), (0.7, prior)):
        loss, gradient = BiasObjective(z, targets, weights, ridge, mean)(b)
        narrow_loss, narrow_gradient = BiasObjective(z.float(), targets, weights, ridge, mean)(b.float())
        for w in range(W):
            at = b[w].clone().requires_grad_()
            want = direct_loss(z[w], targets[w], weights[w], ridge, at, 0.0 if mean is None else mean[w])
            want.backward()
            assert float(loss[w]) == pytest.approx(want.item(), rel=1e-12)
            assert torch.allclose(gradient[w], at.grad, rtol=1e-10, atol=1e-14)
            assert float(narrow_loss[w]) == pytest.approx(want.item(), rel=1e-6)
            assert torch.allclose(narrow_gradient[w].double(), at.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("V", [2, 5, 50, 64, 1000, 1024])
def test_same_bits_alone_in_any_batch_in_any_order(V, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(V)
        for T in (1, 7, 64, 448):
            W, phases = 5, ((6, 3),)
            z, targets, weights = draw(generator, W, T, V, dtype)
            weights[1] = 0  # stops at once
            weights[2, 1:] = 0  # has fewer rows than the others
            start = 0.1 * torch.randn(W, V, generator=generator, dtype=dtype)

            def solve(rows, pad=0, z=z, targets=targets, weights=weights, start=start, phases=phases):
                z, targets, weights = z[rows], targets[rows], weights[rows]
                if pad:
                    shape = (len(rows), pad)
                    z = torch.cat((z.new_full((*shape, z.shape[2]), torch.nan), z), 1)
                    targets = torch.cat((targets.new_full(shape, -1), targets), 1)
                    weights = torch.cat((weights.new_zeros(shape), weights), 1)
                return minimize(BiasObjective(z, targets, weights, 0.1), start[rows], phases=phases)

            full = solve(range(W))
            assert (full.iterations[[0, 3, 4]] > 1).all()
            batches = [([3], 0), ([4, 2, 0, 3, 1], 0), ([0, 1], 0), ([2, 3, 4], 100)]
            if T < 448:  # the longest is there for its blocks of rows, and slow
                batches += [([0], 0), ([1], 0), ([2], 0), ([4], 9), ([3, 0, 0, 3, 4, 4, 0, 3, 2, 2, 1, 0, 0, 3, 4], 0)]
            for rows, pad in batches:
                assert same_bits(solve(rows, pad), full, range(len(rows)), rows), (T, rows, pad)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_with_a_large_vocabulary_and_a_long_history(threads):
    """Torch and MKL split one problem's reduction among threads once it is long, several problems' never."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        z, targets, weights = draw(torch.Generator().manual_seed(0), 2, 9, 40000, torch.float32)
        full = minimize(BiasObjective(z, targets, weights, 0.3), zeros(z), phases=((3, 40),))
        for w in range(2):
            alone = BiasObjective(z[w : w + 1], targets[w : w + 1], weights[w : w + 1], 0.3)
            assert same_bits(minimize(alone, zeros(z)[:1], phases=((3, 40),)), full, [0], [w])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "T, step, V, dtype",
    [
        (448, 64, 1024, torch.float32),
        (448, 64, 50, torch.float64),
        (200, 7, 50, torch.float32),
        (70, 69, 64, torch.bfloat16),
        (5, 1, 1000, torch.float32),
        (9, 0, 16, torch.float32),
    ],
)
def test_same_bits_on_a_tape_as_in_windows_of_their_own(T, step, V, dtype, threads):
    """Overlapping windows are views of one tape; problems that stop leave the batch, and it goes on without a copy."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        W, phases = 7, ((6, 3),)
        generator = torch.Generator().manual_seed(T)
        tape, _, _ = draw(generator, 1, (W - 1) * step + T + 3, V, dtype)
        tape[0, -3:] = torch.nan  # rows that no window has
        views = tape[0].as_strided((W, T, V), (step * V, V, 1))
        targets = torch.randint(0, V, (W, T), generator=generator)
        weights = torch.rand(W, T, generator=generator) + 0.5
        weights[1] = 0
        weights[3, T // 2 :] = 0
        wide = torch.promote_types(dtype, torch.float32)
        start = 0.1 * torch.randn(W, V, generator=generator, dtype=wide)
        start[4:] = 0
        weights[4:, 1:] = 0  # few rows: done early
        alone = minimize(BiasObjective(views.clone(), targets, weights, 0.1), start, phases=phases)
        assert same_bits(minimize(BiasObjective(views, targets, weights, 0.1), start, phases=phases), alone, ..., ...)
        if step:
            tape[0, (W - 1) * step + 1 :] = torch.nan  # of the last window, one row is used: what is not is never read
            spoilt = minimize(BiasObjective(views, targets, weights, 0.1), start, phases=phases)
            whole = [w for w in range(W) if w * step + int(weights[w].count_nonzero()) <= (W - 1) * step + 1]
            assert same_bits(spoilt, alone, whole, whole) and {1, 4, 5, 6} <= set(whole)
            assert all(status(spoilt, w) is Status.NOT_FINITE for w in range(W) if w not in whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_row_of_no_weight_may_be_one_whose_sum_underflows(overlap):
    rows = torch.zeros(4, 8)
    rows[2:, 0] = 200  # all mass where the bias leaves none
    z = rows.as_strided((2, 3, 8), (8, 8, 1))
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    objective = BiasObjective(z if overlap else z.clone(), torch.ones(2, 3, dtype=torch.int64), weights)
    b = torch.zeros(2, 8)
    b[:, 0] = -200
    loss, gradient = objective(b)
    assert torch.allclose(loss, torch.full((2,), math.log(7), dtype=torch.float64))
    assert bool(gradient.isfinite().all())


class Quadratics:
    """0.5 sum_v c_v (x_v - m_v)^2: any objective will do, and this one counts its calls' rows."""

    def __init__(self, c: Tensor, m: Tensor, sizes: list[int]) -> None:
        self.c, self.m, self.sizes = c, m, sizes

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(x))
        return (0.5 * self.c * (x - self.m).square()).sum(-1), self.c * (x - self.m)

    def take(self, index: Tensor) -> "Quadratics":
        return Quadratics(self.c[index], self.m[index], self.sizes)


def test_any_objective_and_stopped_problems_leave_the_batch():
    generator = torch.Generator().manual_seed(3)
    V = 30
    c = torch.cat((torch.ones(12, V), torch.logspace(0, 3, V).expand(4, V))).double()
    m = torch.randn(16, V, generator=generator, dtype=torch.float64)
    sizes = []
    solution = minimize(Quadratics(c, m, sizes), torch.zeros_like(m), phases=((300, 10),))
    assert torch.allclose(solution.x, m, atol=1e-3)
    assert (solution.iterations[:12] < solution.iterations[12:].min()).all()
    assert sizes[0] == 16 and sizes[-1] <= 4
    assert len(sizes) == solution.evaluations.max()


def test_converges_to_the_newton_solution_with_a_ridge():
    generator = torch.Generator().manual_seed(4)
    W, T, V = 6, 40, 80
    z, targets, weights = draw(generator, W, T, V)
    prior = 0.5 * torch.randn(W, V, generator=generator, dtype=z.dtype)
    for ridge in (0.1, 3.0):
        newton = prior.clone()
        for w in range(W):
            for _ in range(60):
                p = (z[w] + newton[w]).softmax(-1)
                g = p.sum(0) - torch.bincount(targets[w], minlength=V) + ridge * (newton[w] - prior[w])
                hessian = torch.diag(p.sum(0) + ridge) - p.T @ p
                step = torch.linalg.solve(hessian, g)
                newton[w] -= step * min(1.0, 2.0 / float(step.abs().max()))
            assert step.abs().max() < 1e-9
        ours = minimize(
            BiasObjective(z, targets, weights, ridge, prior), prior, phases=((200, 20),), tolerance_change=0.0
        )
        assert (ours.x - newton).abs().max() < 1e-4
        # float32 losses cannot tell apart what is nearer to the optimum, of curvature ridge / 40, than this
        objective = BiasObjective(z.float(), targets, weights, ridge, prior)
        narrow = minimize(objective, prior.float(), phases=((200, 20),), tolerance_change=0.0)
        assert (narrow.x - newton).abs().max() < (3e-3 if ridge < 1 else 5e-4)
        for w in range(W):
            least = direct_loss(z[w], targets[w], weights[w], ridge, newton[w], prior[w])
            reached = direct_loss(z[w], targets[w], weights[w], ridge, narrow.x[w].double(), prior[w])
            assert reached - least < 3e-7


@pytest.mark.parametrize("ridge", [0.0, 3.0])
def test_edges_follow_torch(ridge):
    generator = torch.Generator().manual_seed(5)
    z, targets, weights = draw(generator, 1, 24, 96)
    peaked = z.clone()
    peaked[..., 7] += 40.0
    hit = torch.full_like(targets, 7)
    cases = {
        "one position": (z[:, :1], targets[:, :1], weights[:, :1]),
        "all targets equal": (z, torch.full_like(targets, 3), weights),
        "peaked and wrong": (peaked, targets, weights),
        "peaked and right": (peaked, hit, weights),  # the gradient is ~0 at the start
        "some rows without weight": (z, targets, weights * (torch.arange(24) % 3 > 0)),
        "uneven weights": (z, targets, torch.rand(1, 24, generator=generator, dtype=z.dtype) ** 4),
    }
    for name, (z_, targets_, weights_) in cases.items():
        b, loss, iterations, evaluations, losses = torch_lbfgs(z_[0], targets_[0], weights_[0], ridge)
        trace = []
        ours = minimize(BiasObjective(z_, targets_, weights_, ridge), zeros(z_), trace=trace)
        assert counts(ours) == (iterations, evaluations), name
        assert trace[0] == pytest.approx(losses, rel=1e-6, abs=1e-9), name
        assert float(ours.loss) == pytest.approx(loss, rel=1e-6, abs=1e-9), name
        assert torch.allclose(ours.x[0], b, atol=1e-5), name


def test_phases_start_with_fresh_memory():
    generator = torch.Generator().manual_seed(6)
    for ridge in (0.0, 0.5):
        z, targets, weights = draw(generator, 1, 64, 200)
        phases = ((5, 10), (18, 20))
        _, loss, iterations, evaluations, losses = torch_lbfgs(z[0], targets[0], weights[0], ridge, phases)
        trace = []
        ours = minimize(BiasObjective(z, targets, weights, ridge), zeros(z), phases=phases, trace=trace)
        assert counts(ours) == (iterations, evaluations)
        assert trace[0] == pytest.approx(losses, rel=1e-6)
        assert float(ours.loss) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("max_eval", [1, 2, 3, 5, 9, 17])
def test_limits_follow_torch(max_eval):
    z, targets, weights = draw(torch.Generator().manual_seed(7), 1, 64, 200)
    _, loss, iterations, evaluations, _ = torch_lbfgs(z[0], targets[0], weights[0], max_eval=max_eval)
    ours = minimize(BiasObjective(z, targets, weights), zeros(z), max_eval=max_eval)
    assert counts(ours) == (iterations, evaluations)
    assert float(ours.loss) == pytest.approx(loss, rel=1e-9)
    assert status(ours) is Status.OUT_OF_EVALUATIONS
    limited = minimize(BiasObjective(z, targets, weights), zeros(z), phases=((3, 5),), max_eval=100)
    assert counts(limited)[0] == 3 and status(limited) is Status.OUT_OF_ITERATIONS


def test_a_line_search_limit_of_its_own():
    z, targets, weights = draw(torch.Generator().manual_seed(8), 1, 64, 200)
    objective = BiasObjective(z, targets, weights)
    free = minimize(objective, zeros(z), max_eval=60, max_line_search=25)
    tight = minimize(objective, zeros(z), max_eval=60, max_line_search=0)
    assert counts(free)[1] > counts(free)[0] + 1  # some line search took more than one trial
    assert counts(tight)[1] == counts(tight)[0] + 1
    assert status(minimize(objective, zeros(z), phases=((0, 1),))) is Status.OUT_OF_ITERATIONS


def test_warm_start_at_the_optimum_stays():
    z, targets, weights = draw(torch.Generator().manual_seed(9), 2, 64, 100)
    objective = BiasObjective(z, targets, weights, 3.0)
    optimum = minimize(objective, zeros(z), phases=((200, 20),), tolerance_change=0.0)
    again = minimize(objective, optimum.x)
    assert counts(again) <= (2, 4)
    assert (again.x - optimum.x).abs().max() < 1e-6
    still = minimize(objective, optimum.x, tolerance_grad=1e-5)
    assert torch.equal(still.x, optimum.x) and counts(still) == (0, 1) and status(still) is Status.GRADIENT


def test_not_finite_problems_stop_at_once_and_alone():
    z, targets, weights = draw(torch.Generator().manual_seed(10), 5, 24, 50)
    start = 0.1 * torch.ones_like(zeros(z))
    healthy = minimize(BiasObjective(z, targets, weights, 0.1), start)
    broken, wrong = z.clone(), targets.clone()
    broken[0, 3, 5], broken[1, 0, 0], broken[2, 4] = torch.nan, torch.inf, -torch.inf
    wrong[3, 2] = 50
    ours = minimize(BiasObjective(broken, wrong, weights, 0.1), start)
    for w in range(4):
        assert status(ours, w) is Status.NOT_FINITE and counts(ours, w) == (0, 1)
        assert torch.equal(ours.x[w], start[w])
        assert not math.isfinite(float(ours.loss[w]))
    assert same_bits(ours, healthy, [4], [4])
    # the same rows without weight are never looked at
    weights[0, 3] = weights[1, 0] = weights[2, 4] = weights[3, 2] = 0
    unread = minimize(BiasObjective(broken, wrong, weights, 0.1), start)
    assert same_bits(unread, minimize(BiasObjective(z, targets, weights, 0.1), start), range(5), range(5))


def test_a_window_without_weight_keeps_its_start():
    z, targets, weights = draw(torch.Generator().manual_seed(11), 2, 24, 50)
    weights[0] = 0
    start = torch.randn(2, 50, dtype=z.dtype)
    ours = minimize(BiasObjective(z, targets, weights, 3.0), start)
    assert torch.equal(ours.x[0], start[0]) and float(ours.loss[0]) == 0 and status(ours) is Status.GRADIENT
    empty = minimize(BiasObjective(z[:0], targets[:0], weights[:0]), start[:0])
    assert empty.x.shape == (0, 50) and empty.loss.shape == (0,)
    no_rows = minimize(BiasObjective(z[:, :0], targets[:, :0], weights[:, :0]), start)
    assert torch.equal(no_rows.x, start)


class Cliff:
    """x^2 / 2 - x, infinite or not a number beyond x = 1.5: the first trial step of 1 is fine, later ones overshoot."""

    def __init__(self, beyond: float) -> None:
        self.beyond = beyond

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outside = x > 1.5
        loss, gradient = (0.01 * x * x / 2 - x), 0.01 * x - 1
        return torch.where(outside, self.beyond, loss)[:, 0], torch.where(outside, torch.nan, gradient)

    def take(self, index: Tensor) -> "Cliff":
        return self


@pytest.mark.parametrize("beyond", [torch.inf, torch.nan, -torch.inf])
def test_a_trial_point_that_is_not_finite_counts_as_bad(beyond):
    solution = minimize(Cliff(beyond), torch.zeros(1, 1, dtype=torch.float64), phases=((30, 5),))
    assert 1.4 < float(solution.x) <= 1.5 and math.isfinite(float(solution.loss))


def test_inputs_are_left_alone_and_checked():
    z, targets, weights = draw(torch.Generator().manual_seed(12), 2, 24, 50)
    start = zeros(z)
    given = [a.clone() for a in (z, targets, weights, start)]
    minimize(BiasObjective(z, targets, weights, 1.0), start)
    assert all(torch.equal(a, b) for a, b in zip(given, (z, targets, weights, start), strict=True))
    objective = BiasObjective(z, targets, weights)
    for message, call in {
        "start": lambda: minimize(objective, start.half()),
        "phases": lambda: minimize(objective, start, phases=((5, 0),)),
        "lr": lambda: minimize(objective, start, lr=0.0),
        "targets": lambda: BiasObjective(z, targets[:1], weights),
        "ridge": lambda: BiasObjective(z, targets, weights, -1.0),
        "prior": lambda: BiasObjective(z, targets, weights, 1.0, start[0]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
