"""Fits as a GPU makes them, by kernels in the interpreter, held to those of a CPU."""

import pytest
import torch

import slotfast
from slotfast import ops
from slotfast.kernels import lbfgs_direction
from slotfast.lbfgs import BiasObjective, SharedBias, launched, minimize
from slotfast.slot import WindowBatch, fit
from slotfast.slot.fit import stored_probabilities
from slotfast.slot.presets import parse_preset
from tests.streams import BOS, head, stream, to_hidden

pytest.importorskip("triton", reason="launches, interpreted or not, need triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Every choice of a backend is the GPU's; gives what was launched."""
    launches = set()

    def noted(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            launches.add(name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    monkeypatch.setattr(
        ops, "uses_triton", lambda backend, device: backend != "torch" and torch.device(device).type == DEVICE
    )
    for name in ("lbfgs_push_", "lbfgs_direction", "bias_cross_entropy_grad"):
        noted(launched, name)
    return launches


def _problems(W, T, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(W, T, V, generator=generator)
    targets = torch.randint(V, (W, T), generator=generator)
    weights = (torch.rand(W, T, generator=generator) > 0.3).float()
    return tuple(x.to(DEVICE) for x in (logits, targets, weights))


def test_separate_problems_end_where_torch_ends_them(as_on_a_gpu):
    logits, targets, weights = _problems(5, 12, 40)
    weights[3] = 0  # nothing to fit: it stops at once, while the others go on
    start = torch.zeros(5, 40, device=DEVICE)
    options = {"phases": ((6, 3), (8, 20)), "tolerance_change": 1e-6}
    ours, theirs = (
        minimize(BiasObjective(logits, targets, weights, ridge=0.5), start, backend=backend, **options)
        for backend in ("auto", "torch")
    )
    assert as_on_a_gpu == {"lbfgs_push_", "lbfgs_direction"}
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.x, theirs.x, rtol=0, atol=5e-3)
    assert int(ours.iterations[3]) == 0 and (ours.iterations[[0, 1, 2, 4]] > 2).all()


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_windows_under_one_bias_are_one_problem(ridge):
    logits, targets, weights = _problems(3, 9, 33, seed=1)
    x = torch.randn(1, 33, device=DEVICE)
    flat = logits.flatten(0, 1)[None], targets.reshape(1, -1), weights.reshape(1, -1)
    exact = BiasObjective(flat[0].double(), *flat[1:], ridge=ridge)(x.double())
    loss, gradient = SharedBias(logits, targets, weights, ridge)(x)
    torch.testing.assert_close(loss, exact[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact[1], rtol=0, atol=1e-6)
    nothing = SharedBias(logits, targets, torch.zeros_like(weights))(x)
    assert not nothing[0].any() and not nothing[1].any()


def test_only_the_problems_that_ended_a_search_remember_it():
    memory = launched.LaunchedMemory.empty(torch.zeros(3, 8, device=DEVICE), 2)
    s = torch.rand(3, 8, device=DEVICE) + 0.1
    y = s.clone()
    y[1] = torch.nan
    g = torch.ones(3, 8, device=DEVICE)
    first = memory.direction(torch.tensor([0]).numpy(), s, y, g)
    assert memory.history.count.tolist() == [1, 0, 0] and torch.equal(first[1:], -g[1:])
    part = memory.take(torch.tensor([2, 0]).numpy())
    assert part.history.count.tolist() == [0, 1]
    assert torch.equal(lbfgs_direction(part.history, g[:2]), first[[2, 0]])


@pytest.mark.parametrize("name", ["pr1350", "pr1372", "film-lbfgs", "film-lbfgs-logit"])
def test_shared_and_joint_fits_by_kernels_score_as_on_a_cpu(name, request):
    windows = tuple(x.to(DEVICE) for x in stream(2))
    through = {"hidden": to_hidden(windows[0]), "head": head}

    def nll(preset):
        return slotfast.adapt(*windows, preset=preset, bos_id=BOS, allow_noncausal=True, **through).nll

    on_a_gpu = torch.cuda.is_available()
    plain, theirs = nll("none"), None if on_a_gpu else nll(name)
    launches = request.getfixturevalue("as_on_a_gpu")
    ours = nll(name)
    assert {"lbfgs_push_", "lbfgs_direction"} <= launches
    assert ("bias_cross_entropy_grad" in launches) == name.startswith("pr")
    if on_a_gpu:
        through["head"], windows = head, tuple(x.cpu() for x in windows)
        through["hidden"] = to_hidden(windows[0])
        theirs = nll(name)
    ours, plain, theirs = (x.cpu() for x in (ours, plain, theirs))
    assert torch.equal(ours.isnan(), theirs.isnan())
    moved = (theirs - plain).nan_to_num().abs().mean()
    assert moved > 0.01, "the fit did nothing, so the test shows nothing"
    assert (ours - theirs).nan_to_num().abs().mean() < 0.02 * moved


def test_probabilities_are_rounded_where_a_ridge_holds():
    assert stored_probabilities(parse_preset("causal-lbfgs")) == torch.bfloat16
    assert stored_probabilities(parse_preset("causal-lbfgs:ridge=0.5")) == torch.float32
    for name in ("pr1350", "pr1350-window", "pr1350-window:ridge=3"):
        assert stored_probabilities(parse_preset(name)) == torch.float32, name


@pytest.mark.parametrize("optimizer", ["lbfgs", "mm"])
def test_launched_fits_keep_them_so(monkeypatch, as_on_a_gpu, optimizer):
    found = []
    name = {"lbfgs": "slot_solve", "mm": "slot_solve_mm"}[optimizer]
    launch = getattr(fit, name)
    monkeypatch.setattr(fit, name, lambda *windows, **options: found.append(options) or launch(*windows, **options))
    logits, targets, _ = _problems(2, 12, 24)
    ends = (torch.full((2,), end, device=DEVICE) for end in (8, 12))
    batch = WindowBatch(logits, targets, *ends)
    for ridge in (0.5, 1.0):
        fit.Fit(parse_preset(f"causal-lbfgs:optimizer={optimizer},ridge={ridge}")).parameters(batch)
    assert [options["probs_dtype"] for options in found] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_rounded_probabilities_move_the_loss_by_little(spread):
    """The loss, in float64, where the fit to rounded probabilities ends, against the optimum; ridge 1, 64 positions."""
    generator = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(64, 256, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 40, (64,), generator=generator)
    exact = torch.softmax(logits, -1)

    def loss(bias, probabilities):
        mean = (probabilities @ bias.exp()).log().sum() - bias[targets].sum()
        return (mean + bias.square().sum() / 2) / 64

    found = []
    for probabilities in (exact, exact.bfloat16().double()):
        bias = torch.zeros(256, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([bias], max_iter=60, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def closure(bias=bias, probabilities=probabilities, optimizer=optimizer):
            optimizer.zero_grad()
            value = loss(bias, probabilities)
            value.backward()
            return value

        optimizer.step(closure)
        found.append(loss(bias.detach(), exact).item())
    assert 0 <= found[1] - found[0] < 1.3e-6
