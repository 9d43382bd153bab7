"""Passes back with fewer temporaries: the values of the plain expressions bit for bit, and autograd's gradients."""

import pytest
import torch
import torch.nn.functional as F

from bench.learn_cost import Alive
from slotfast import ops
from slotfast.model import layers, lean, rotary_table
from tests.models import random_model

CONFIG = random_model().config
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def _same(ours, plain, *leaves):
    """Equal bits, and gradients of a random cotangent to rounding."""
    assert torch.equal(ours, plain)
    cotangent = torch.randn_like(ours)
    for own, autograds in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(own, autograds)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5, 3, 8), (1, 7, 24)])
def test_rms_norm(dtype, shape):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    _same(layers.rms_norm(x), F.rms_norm(x, shape[-1:]), x)


@DTYPES
def test_rotation(dtype):
    table = rotary_table(32, CONFIG, torch.arange(3, 12))
    x = torch.randn(2, 9, CONFIG.heads, CONFIG.head_width, dtype=dtype, requires_grad=True)
    _same(layers.rotate(x, *table), lean.turned(x, *(part[:, None].to(dtype) for part in table)), x)


@DTYPES
def test_squared_leaky_relu(dtype):
    mlp = layers.MLP(CONFIG).to(dtype)
    torch.nn.init.normal_(mlp.proj.weight)
    x = torch.randn(2, 5, CONFIG.width, dtype=dtype, requires_grad=True)
    wide = F.leaky_relu(mlp.fc(x), mlp.slope).square()
    leaves = (x, mlp.fc.weight, mlp.proj.weight)
    ours, plain = mlp(x), mlp.proj(wide)
    assert torch.equal(ours, plain)
    for own, autograds in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(own, autograds)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1.8])
def test_low_rank(dtype, scale):
    y, x = torch.randn(2, 5, 7, dtype=dtype), torch.randn(2, 5, 6, dtype=dtype)
    a, b = torch.randn(3, 6, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    leaves = [part.requires_grad_() for part in (y, x, a, b)]
    ours, plain = lean.LowRank.apply(*leaves, scale), y + scale * (x @ a.mT) @ b.mT
    torch.testing.assert_close(ours, plain)
    for own, autograds in zip(*(torch.autograd.grad(z.square().sum(), leaves) for z in (ours, plain)), strict=True):
        torch.testing.assert_close(own, autograds, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)
    assert torch.equal(lean.LowRank.apply(y, x, a, torch.zeros_like(b), scale), y)


@DTYPES
@pytest.mark.parametrize("length", [2, 9, 64])
def test_attention_behind_a_cache_that_nobody_learns(dtype, length):
    past, window = 20, 16
    q, k, v = (torch.randn(1, n, heads, 8, dtype=dtype) for n, heads in ((length, 4), (length, 2), (length, 2)))
    cache = [torch.randn(1, past, 2, 8, dtype=dtype) for _ in range(2)]
    leaves = [part.requires_grad_() for part in (q, k, v)]
    found = [
        ops.banded_attention(
            q, *(torch.cat(pair, 1) for pair in zip(cache, (k, v), strict=True)), window, None, None, own, fixed
        )
        for own in (False, True)
        for fixed in (True, False)
    ]
    for ours, plain in (found[:2], found[2:]):
        _same(ours, plain, *leaves)


def test_nothing_is_kept_for_a_pass_back_that_nobody_asks_for():
    x = torch.randn(2, 3, 8, requires_grad=True)
    with torch.no_grad():
        assert layers.rms_norm(x).grad_fn is None
    assert not lean.goes_back(x.detach())


def test_bytes_alive_are_those_of_storages_that_operators_made():
    given = torch.zeros(1000)
    with Alive() as alive:
        first = given + 1
        view = first[10:]
        second = first * 2
        del first
        assert (alive.now, alive.most) == (8000, 8000)  # the view holds it
        del view
        second += 1
        assert (alive.now, alive.most) == (4000, 8000)
