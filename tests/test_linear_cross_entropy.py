"""Losses straight from hidden states: some rows at a time, the same as all at once; what is refused."""

import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slotfast.kernels import linear_cross_entropy, linear_cross_entropy_ref
from slotfast.kernels.linear import _cross_entropy

M, V, K = 70, 150, 24
BOTH = pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_ref])


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def drawn(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((M, K), (V, K), (V,)))
    targets = torch.randint(V, (M,), generator=generator)
    targets[::9] = -100
    return [tensor.requires_grad_() for tensor in (x, weight, bias)], targets


def gradients(function, inputs, targets):
    x, weight, bias = inputs
    nll = function(x, weight, targets, bias, softcap=5.0)
    return nll.detach(), torch.autograd.grad(nll @ torch.linspace(-1, 1, M, dtype=nll.dtype), inputs)


def some_rows_at_a_time(count):
    return patch.multiple(_cross_entropy, _PART=count * V, _PART_REF=count * V)


@BOTH
@pytest.mark.parametrize("count", [9, 32, 69])
def test_some_rows_at_a_time_are_all_of_them(function, count):
    """The same losses, the gradients of autograd through logits in memory."""
    inputs, targets = drawn()
    whole, _ = gradients(function, inputs, targets)
    with some_rows_at_a_time(count):
        parts, found = gradients(function, inputs, targets)
    assert torch.allclose(whole, parts, rtol=0, atol=2e-6)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def plain(x, weight, targets, bias, softcap):
        z = softcap * torch.tanh((x @ weight.T + bias) / softcap)
        return F.cross_entropy(z, targets, reduction="none")

    exact, expected = gradients(plain, wide, targets)
    assert (parts - exact).abs().max() < 1e-5
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


@BOTH
@pytest.mark.parametrize("learns", [False, True])
def test_no_tensor_is_as_large_as_all_logits(function, learns):
    inputs, targets = drawn()
    with some_rows_at_a_time(32), Largest() as largest, torch.set_grad_enabled(learns):
        nll = function(inputs[0], inputs[1], targets, inputs[2], softcap=5.0)
        if learns:
            nll.sum().backward()
    assert 0 < largest.bytes <= 4 * 32 * V < 4 * M * V


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(M + 1, dtype=torch.int64)}, r"targets: expected int64 or int32 \[70\] on cpu, got"),
        ({"targets": torch.zeros(M)}, "targets: expected int64 or int32"),
        ({"weight": torch.zeros(V, K + 1)}, r"weight: expected torch.float32 \[N, 24\]"),
        ({"bias": torch.zeros(V + 1)}, r"bias: expected floating \[150\] on cpu, got torch.float32 \[151\]"),
        ({"softcap": 0.0}, "softcap: expected a finite number above 0, or None, got 0.0"),
        ({"softcap": math.inf}, "softcap: expected a finite number above 0"),
        ({"x": torch.zeros(M, K, dtype=torch.float64)}, r"x: expected float32, bfloat16 or float16 \[\.\.\., K\]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(change, message):
    (x, weight, _), targets = drawn()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"x": x, "weight": weight, "targets": targets, **change})
