"""What is specific to the cross-entropies: peers in torch, independence of the batch, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from slotfast import kernels as K
from slotfast.kernels import _triton
from slotfast.kernels._rows import _config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [{}, {"softcap": 5.0}, {"softcap": 5.0, "cap_after_bias": True}]


def draw(W, T, V, seed=0, dtype=torch.float32, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(W, T, V, generator=generator)
    bias = torch.randn(W, V, generator=generator)
    targets = torch.randint(V, (W, T), generator=generator)
    weights = torch.rand(W, T, generator=generator)
    return logits.to(device, dtype), targets.to(device), bias.to(device), weights.to(device)


def scores(logits, bias, softcap=None, cap_after_bias=False):
    """Spelled out again, so that the reference is checked against something that is not itself."""
    if softcap is None:
        return logits + bias[:, None]
    if cap_after_bias:
        return softcap * torch.tanh((logits + bias[:, None]) / softcap)
    return softcap * torch.tanh(logits / softcap) + bias[:, None]


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_is_torch_cross_entropy(options):
    logits, targets, bias, weights = draw(3, 7, 19, dtype=torch.float64)
    targets[0, 2] = -100
    bias = bias.double().requires_grad_()
    z = scores(logits, bias, **options)
    nll = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    got_nll, got_lse = K.bias_cross_entropy_ref(logits, targets, bias, **options)
    torch.testing.assert_close(got_nll, nll)
    used = targets != -100
    torch.testing.assert_close(got_lse[used], z.logsumexp(-1)[used])
    assert got_lse[0, 2] == 0
    weights = weights.double()
    loss = (weights * nll).sum(-1) / (weights * used).sum(-1)
    (dbias,) = torch.autograd.grad(loss.sum(), bias)
    got = K.bias_cross_entropy_grad_ref(logits, targets, bias, weights, **options)
    torch.testing.assert_close(got, (loss.detach(), dbias))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kernel", [K.bias_cross_entropy_grad, K.bias_cross_entropy_grad_ref])
def test_window_gradient_is_that_of_the_tokens(kernel, options):
    logits, targets, bias, weights = draw(2, 6, 40)
    bias.requires_grad_()
    nll, _ = K.bias_cross_entropy(logits, targets, bias, **options)
    mean = (weights * nll).sum(-1) / weights.sum(-1)
    (dbias,) = torch.autograd.grad(mean.sum(), bias)
    loss, got = kernel(logits, targets, bias, weights, **options)
    torch.testing.assert_close(loss, mean.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got, dbias, atol=1e-6, rtol=1e-5)


def test_gradient_through_lse():
    logits, targets, bias, _ = draw(2, 5, 33)
    targets[0, 0] = -100
    logits.requires_grad_()
    _, lse = K.bias_cross_entropy(logits, targets, bias)
    (dlogits,) = torch.autograd.grad(lse.sum(), logits)
    expected = torch.softmax(scores(logits.detach(), bias), -1)
    expected[0, 0] = 0
    torch.testing.assert_close(dlogits, expected, atol=1e-6, rtol=1e-5)


def test_expected_counts_from_the_unnormalised_gradient():
    logits, targets, _, weights = draw(2, 9, 30)
    _, minus = K.bias_cross_entropy_grad(logits, targets, None, weights, reduction="sum")
    expected = (weights[..., None] * torch.softmax(logits, -1)).sum(1)
    came = torch.zeros(2, 30, device=DEVICE).scatter_add_(1, targets, weights)
    torch.testing.assert_close(minus + came, expected, atol=1e-5, rtol=1e-5)


def outputs_of_windows(functions, chosen, logits, targets, bias, weights):
    """Every output of every function on the chosen windows."""
    logits, targets, bias, weights = logits[chosen], targets[chosen], bias[chosen], weights[chosen]
    tokens, grad = functions
    direct = grad(logits, targets, bias, weights, softcap=7.0, cap_after_bias=True)
    return [*tokens(logits, targets, bias), *direct]


def check_independence(functions, W, *tensors):
    together = outputs_of_windows(functions, list(range(W)), *tensors)
    for chosen in [[w] for w in range(W)] + [
        list(range(W))[::-1],
        list(range(W // 2)),
        list(range(W // 2, W)),
        [1, 1, 0],
    ]:
        for index, (alone, batch) in enumerate(
            zip(outputs_of_windows(functions, chosen, *tensors), together, strict=True)
        ):
            assert torch.equal(alone, batch[chosen]), f"output {index} of windows {chosen} depends on the batch"


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("V", [2, 5, 64, 1000, 1024])
@pytest.mark.parametrize("T", [1, 7, 64, 448])
def test_reference_does_not_depend_on_the_batch(T, V, threads):
    references = K.bias_cross_entropy_ref, K.bias_cross_entropy_grad_ref
    tensors = draw(5, T, V, device="cpu")
    check_independence(references, 5, *tensors)
    # A slice of a batch has other alignment than a copy of it.
    together = K.bias_cross_entropy_ref(*tensors[:3])
    for w in range(5):
        alone = K.bias_cross_entropy_ref(*(tensor[w : w + 1] for tensor in tensors[:3]))
        assert all(torch.equal(a, b[w : w + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("T, V", [(1, 2), (7, 61), (5, 1000), (130, 16)])
def test_kernel_does_not_depend_on_the_batch(T, V):
    functions = K.bias_cross_entropy, K.bias_cross_entropy_grad
    check_independence(functions, 4, *draw(4, T, V))


def test_configuration_does_not_know_the_number_of_windows():
    assert "W" not in _config.__code__.co_varnames
    for V in (1, 2, 5, 100, 1024, 1025, 4096, 8192, 16384, 50257, 262144):
        for itemsize in (2, 4):
            tile = _config(64, V, itemsize)
            assert tile.chunks * tile.rows * tile.cols <= 32 * 32 * tile.num_warps
            assert tile.chunks * tile.cols >= V or tile.chunks * tile.cols == 16384


def test_int32_targets_equal_int64_targets():
    logits, targets, bias, _ = draw(2, 5, 30)
    wide, narrow = (K.bias_cross_entropy(logits, t, bias) for t in (targets, targets.int()))
    assert all(map(torch.equal, wide, narrow))


@pytest.mark.parametrize(
    "change, named",
    [
        ({"logits": torch.zeros(3, 4)}, "logits"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.float64)}, "logits"),
        ({"logits": torch.zeros(2, 3, 0)}, "logits"),
        ({"targets": torch.zeros(2, 4, dtype=torch.long)}, "targets"),
        ({"targets": torch.zeros(2, 3)}, "targets"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"bias": torch.zeros(4, dtype=torch.long)}, "bias"),
        ({"weights": torch.zeros(2, 3, dtype=torch.float64)}, "weights"),
        ({"softcap": 0.0}, "softcap"),
        ({"softcap": float("nan")}, "softcap"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_refusals_name_the_argument(change, named):
    good = {"logits": torch.zeros(2, 3, 4), "targets": torch.zeros(2, 3, dtype=torch.long)}
    K.bias_cross_entropy_grad(**{k: v.to(DEVICE) for k, v in good.items()})
    kwargs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        K.bias_cross_entropy_grad(**kwargs)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: 5 GB of logits, rows beyond 2^31 elements")
def test_rows_beyond_32_bit_offsets():
    logits, targets, bias, _ = draw(1, 64, 1024, dtype=torch.bfloat16)
    W = 2**31 // (64 * 1024) + 1
    far = torch.zeros(W, 64, 1024, dtype=torch.bfloat16, device=DEVICE)
    far[-1] = logits[0]
    nll, _ = K.bias_cross_entropy(far, targets.expand(W, -1), bias.expand(W, -1))
    assert torch.equal(nll[-1:], K.bias_cross_entropy(logits, targets, bias)[0])
    _, dbias = K.bias_cross_entropy_grad(far, targets.expand(W, -1), bias.expand(W, -1))
    assert torch.equal(dbias[-1:], K.bias_cross_entropy_grad(logits, targets, bias)[1])


def test_references_work_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from slotfast import kernels as K
logits, targets = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
K.bias_cross_entropy_grad_ref(logits, targets)
try:
    K.bias_cross_entropy(logits, targets)
except ImportError as error:
    assert "triton is not installed" in str(error)
else:
    raise SystemExit("a launch was not refused")
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _triton.triton.__name__ == "triton"  # here it is the real one
