"""Optimisers against naive ones written from their descriptions, alone and on several ranks."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slotfast.optim import Muon, WeightAverage, normalize_rows, orthogonalize

ROOT = Path(__file__).parents[1]
POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _naive_polar(matrix, table):
    """Each singular value through the polynomials, by an SVD instead of products of matrices."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt


@pytest.mark.parametrize("shape", [(8, 8), (3, 20), (20, 3)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrix = _random(4, *shape)
    singular = torch.linalg.svdvals(orthogonalize(matrix))
    assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonalize(matrix).flatten(1), (u @ v).flatten(1))
    assert float(cosine.min()) > 0.97


@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("coefficients", ["quintic", "polar-express"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalize_is_its_polynomial_on_singular_values(shape, coefficients, steps):
    matrix = _random(*shape).double()
    table = POLAR_EXPRESS[:steps] if coefficients == "polar-express" else [(3.4445, -4.7750, 2.0315)] * steps
    expected = _naive_polar(matrix.numpy(), table)
    # the quintic amplifies the 1e-7 that keeps a zero matrix finite
    np.testing.assert_allclose(orthogonalize(matrix, steps, coefficients).numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-7, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_gradient_does_not_matter(size, dtype):
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(2, 6, 4, generator=generator)
    singular = torch.linalg.svdvals(orthogonalize((matrix.double() * size).to(dtype)).float())
    assert 0.5 < singular.min() and singular.max() < 1.3
    assert torch.allclose(
        normalize_rows((matrix.double() * size).to(dtype)).float().norm(dim=-1), torch.ones(2, 6), atol=2e-2
    )


def test_a_zero_row_stays_zero_among_others():
    matrix = torch.tensor([[0.0, 0.0], [3e-30, 4e-30]])
    assert torch.allclose(normalize_rows(matrix), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert not orthogonalize(matrix)[0].any()


def test_zero_stays_zero_and_steps_beyond_the_table_are_refused():
    assert not orthogonalize(torch.zeros(2, 3, 4)).any() and not normalize_rows(torch.zeros(3, 4)).any()
    with pytest.raises(ValueError, match="steps 6: polar-express has coefficients for 5"):
        orthogonalize(torch.ones(2, 2), 6, "polar-express")


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("equalize_rows", [False, True])
@pytest.mark.parametrize("coefficients", ["quintic", "polar-express"])
def test_muon_is_the_naive_one(shape, equalize_rows, coefficients):
    """Momentum summed, Nesterov, rows to unit length, polynomial; decay apart from the step; momentum that changes."""
    parameters = [torch.nn.Parameter(_random(*shape, seed=seed)) for seed in range(3)]
    weights = [p.detach().double().numpy().copy() for p in parameters]
    optimizer = Muon(
        parameters, lr=0.1, weight_decay=0.5, steps=4, coefficients=coefficients, equalize_rows=equalize_rows
    )
    buffers = [np.zeros(shape) for _ in parameters]
    table = POLAR_EXPRESS[:4] if coefficients == "polar-express" else [(3.4445, -4.7750, 2.0315)] * 4
    for step, momentum in enumerate((0.85, 0.9, 0.95)):
        optimizer.param_groups[0]["momentum"] = momentum
        for i, parameter in enumerate(parameters):
            parameter.grad = _random(*shape, seed=10 + 3 * step + i)
            gradient = parameter.grad.double().numpy()
            buffers[i] = momentum * buffers[i] + gradient
            update = gradient + momentum * buffers[i]
            if equalize_rows:
                update = update / np.linalg.norm(update, axis=1, keepdims=True)
            update = _naive_polar(update, table) * max(1, shape[0] / shape[1]) ** 0.5
            weights[i] = weights[i] * (1 - 0.1 * 0.5) - 0.1 * update
        optimizer.step()
    for parameter, weight in zip(parameters, weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), weight, atol=1e-4)


def test_muoneq_differs_where_rows_differ_in_length_and_only_there():
    gradient = _random(5, 7)
    results = {}
    for name, rows in (("equal", torch.ones(5)), ("unequal", torch.tensor([1.0, 1.0, 30.0, 1.0, 0.1]))):
        for equalize in (False, True):
            parameter = torch.nn.Parameter(torch.zeros(5, 7))
            parameter.grad = normalize_rows(gradient) * rows[:, None]
            Muon([parameter], lr=1.0, equalize_rows=equalize).step()
            results[name, equalize] = parameter.detach()
    assert (results["equal", False] - results["equal", True]).abs().max() < 1e-5
    assert (results["unequal", False] - results["unequal", True]).abs().max() > 0.1
    assert (results["unequal", True] - results["equal", True]).abs().max() < 1e-5


def test_muon_takes_its_own_state_back():
    parameters = [torch.nn.Parameter(_random(4, 3, seed=i)) for i in range(3)]
    muon = Muon(parameters)
    for i, parameter in enumerate(parameters):
        parameter.grad = _random(4, 3, seed=7 + i)
    muon.step()
    (before,) = (momentum.clone() for momentum in muon.state_dict()["momentum"])
    muon.load_state_dict(muon.state_dict())
    (after,) = muon.state_dict()["momentum"]
    assert before.any() and torch.equal(after, before)


def test_muon_continues_from_its_state():
    def run(parameters, optimizer, seeds):
        for seed in seeds:
            for i, parameter in enumerate(parameters):
                parameter.grad = _random(*parameter.shape, seed=10 * seed + i)
            optimizer.step()

    def fresh():
        parameters = [torch.nn.Parameter(_random(*shape, seed=9)) for shape in ((4, 6), (3, 3), (4, 6))]
        return parameters, Muon(parameters)

    straight = fresh()
    run(*straight, range(5))
    first = fresh()
    run(*first, range(3))
    second = fresh()
    for ours, theirs in zip(second[0], first[0], strict=True):
        ours.data.copy_(theirs.data)
    second[1].load_state_dict(first[1].state_dict())
    run(*second, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(straight[0], second[0], strict=True))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three processes ended with, by the group that worked."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.optim_ranks"]
    paths = [str(folder / "store"), str(folder / "out")]
    running = [subprocess.Popen([*command, str(rank), "3", *paths], cwd=ROOT) for rank in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    return [torch.load(f"{paths[1]}.{rank}", weights_only=True) for rank in range(3)]


@pytest.mark.parametrize("group", ["2 ranks", "3 ranks", "3 ranks without reduce-scatter"])
def test_ranks_do_what_one_does_with_all_of_the_batch(ranks, group):
    expected = runpy.run_path(str(ROOT / "tests" / "optim_ranks.py"))["train"](None)
    results = [found[group] for found in ranks if group in found]
    assert len(results) == int(group[0])
    for found in results:
        for key in ("weights", "momentum", "gradients"):
            for ours, alone in zip(found[key], expected[key], strict=True):
                assert (ours - alone).abs().max() < 2e-6
        assert all(torch.equal(a, b) for a, b in zip(found["weights"], results[0]["weights"], strict=True))
        assert found["warned"] == ("without" in group)


def test_averages_are_what_their_names_say():
    parameter = torch.nn.Parameter(torch.zeros(3))
    ema, swa = WeightAverage([parameter], 0.9), WeightAverage([parameter], None)
    values = [_random(3, seed=seed) for seed in range(4)]
    expected = torch.zeros(3)
    for value in values:
        parameter.data.copy_(value)
        ema.update()
        swa.update()
        expected = 0.9 * expected + 0.1 * value
    ema.load_into_parameters()
    assert (parameter - expected).abs().max() < 1e-6
    swa.load_into_parameters()
    assert (parameter - torch.stack(values).mean(0)).abs().max() < 1e-6


def test_an_average_of_nothing_changes_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = WeightAverage([parameter], None)
    parameter.data.fill_(2.0)
    average.load_into_parameters()
    assert torch.equal(parameter.data, torch.full((3,), 2.0))
