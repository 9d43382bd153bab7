"""Operators: registered rightly, traceable, with the gradients of plain torch; and attention found by calling it."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from slotfast import flash, ops
from slotfast.errors import InputError
from slotfast.kernels import pack_int6

CASES = {
    "plain": {},
    "bias per window": {"bias": (3, 17)},
    "one bias": {"bias": (17,)},
    "capped": {"softcap": 2.0},
    "capped, then biased": {"softcap": 2.0, "bias": (3, 17)},
    "biased, then capped": {"softcap": 2.0, "bias": (3, 17), "cap_after_bias": True},
}


def _inputs(case, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 17, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 17, (3, 5), generator=generator)
    targets[0, 1] = targets[2, 4] = -100
    options = dict(CASES[case])
    bias = options.pop("bias", None)
    if bias is not None:
        bias = torch.randn(bias, generator=generator).to(dtype).requires_grad_()
    return logits, targets, bias, options


def _plain(logits, targets, bias, softcap=None, cap_after_bias=False):
    def cap(x):
        return softcap * torch.tanh(x / softcap) if softcap else x

    b = 0 if bias is None else bias if bias.ndim == 1 else bias[:, None]
    z = cap(logits + b) if cap_after_bias else cap(logits) + b
    return F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@pytest.mark.parametrize("case", CASES)
def test_cross_entropy_and_its_gradients_are_torchs(case):
    logits, targets, bias, options = _inputs(case, torch.float64)
    inputs = [x for x in (logits, bias) if x is not None]
    weight = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, expected = ops.cross_entropy(logits, targets, bias, **options), _plain(logits, targets, bias, **options)
    assert (got - expected).abs().max() < 1e-12
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_cross_entropy_operator_is_well_formed(case):
    logits, targets, bias, options = _inputs(case)
    arguments = (logits, targets, bias, options.get("softcap"), options.get("cap_after_bias", False), -100)
    torch.library.opcheck(torch.ops.slotfast.bias_cross_entropy.default, arguments)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "x", "weight"])
def test_linear_cross_entropy_operator_is_well_formed(wanted):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 5, 8), (17, 8)))
    targets = torch.randint(0, 17, (2, 5), generator=generator)
    arguments = (x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1]), targets, 2.0, -100)
    torch.library.opcheck(torch.ops.slotfast.linear_cross_entropy.default, arguments)
    inputs = [each for each in (x, weight) if each.requires_grad]
    traced = torch.autograd.grad(torch.ops.slotfast.linear_cross_entropy(*arguments)[0].sum(), inputs)
    called = torch.autograd.grad(ops.linear_cross_entropy(x, weight, targets, softcap=2.0).sum(), inputs)
    for first, second in zip(traced, called, strict=True):
        assert (first - second).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int6_operator_is_well_formed(dtype):
    codes = torch.randint(-31, 32, (20, 33), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    weight = pack_int6(codes, torch.rand(20, generator=torch.Generator().manual_seed(1)).half())
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(2)).to(dtype)
    dense = codes.float() * weight.scale.float()[:, None]
    for kept in (None, dense.to(dtype)):
        arguments = (x, weight.low, weight.high, weight.scale, *weight.shape, kept)
        torch.library.opcheck(torch.ops.slotfast.int6_linear.default, arguments)
    expected = x.float() @ dense.T
    near = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert (ops.int6_linear(x, weight).float() - expected).abs().max() < near * expected.abs().max()


def test_operators_trace_whole(tiny_model):
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(tiny_model, fullgraph=True, backend="aot_eager")
    assert (compiled(tokens, tokens.roll(-1, 1)) - tiny_model(tokens, tokens.roll(-1, 1))).abs() < 1e-5


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_ignored_positions_score_nothing(backend):
    logits, targets, bias, _ = _inputs("bias per window")
    nll = ops.cross_entropy(logits, targets, bias, backend=backend)
    assert nll[0, 1] == 0 and nll[2, 4] == 0 and bool((nll.flatten()[:1] > 0).all()) and nll.dtype == torch.float32


def test_triton_on_a_cpu_is_refused():
    logits, targets, *_ = _inputs("plain")
    with pytest.raises(InputError, match="--backend triton: needs a GPU"):
        ops.cross_entropy(logits, targets, backend="triton")
    assert (
        not ops.uses_triton("auto", "cpu") and not ops.uses_triton("torch", "cuda") and ops.uses_triton("auto", "cuda")
    )


# attention


def _qkv(heads=6, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 9, n, 8, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_attention_is_grouped_and_causal(heads, kv_heads):
    q, k, v = _qkv(heads, kv_heads, torch.float64)
    got = ops.attention(q, k, v)
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[:, :, head] @ k[:, :, group].mT / 8**0.5
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        assert (got[:, :, head] - scores.softmax(-1) @ v[:, :, group]).abs().max() < 1e-12


def _library(monkeypatch, name, function):
    for part in [name.rpartition(".")[0], name]:
        if part and part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    module = types.ModuleType(name)
    module.flash_attn_func = function
    monkeypatch.setitem(sys.modules, name, module)


def _right(with_lse, calls, name):
    def flash_attn_func(q, k, v, causal=False):
        assert causal and q.dtype == torch.bfloat16 and q.shape[2] % k.shape[2] == 0
        calls.append(name)
        out = flash.torch_attention(q, k, v)
        return (out, torch.zeros(1)) if with_lse else out

    return flash_attn_func


@pytest.fixture
def no_libraries(monkeypatch):
    for name in flash.MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # import fails


@pytest.mark.parametrize("name", flash.MODULES)
@pytest.mark.parametrize("with_lse", [False, True])
def test_each_library_is_found_by_calling_it(monkeypatch, no_libraries, name, with_lse):
    calls = []
    _library(monkeypatch, name, _right(with_lse, calls, name))
    found = flash.probe_flash_attention(torch.device("cpu"))
    q, k, v = _qkv(dtype=torch.bfloat16)
    assert torch.equal(found(q, k, v), flash.torch_attention(q, k, v)) and calls == [name, name]


def test_libraries_are_tried_in_order(monkeypatch, no_libraries):
    calls = []
    for name in reversed(flash.MODULES):
        _library(monkeypatch, name, _right(False, calls, name))
    flash.probe_flash_attention(torch.device("cpu"))
    assert calls == ["flash_attn_interface"]


def _raises(q, k, v, causal=False):
    raise RuntimeError("no kernel image is available for execution on the device")


def _not_causal(q, k, v, causal=False):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)


def _nan(q, k, v, causal=False):
    return torch.full_like(q, torch.nan)


@pytest.mark.parametrize("broken", [_raises, _not_causal, _nan])
def test_a_library_that_does_not_work_is_passed_over(monkeypatch, no_libraries, broken):
    calls = []
    _library(monkeypatch, "flash_attn_interface", broken)
    assert flash.probe_flash_attention(torch.device("cpu")) is None
    _library(monkeypatch, "flash_attn", _right(False, calls, "flash_attn"))
    assert flash.probe_flash_attention(torch.device("cpu")) is not None and calls == ["flash_attn"]


def test_torch_attends_where_there_is_no_gpu():
    assert flash.flash_attention(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_under_the_operators_do_not_synchronise():
    logits, targets, bias, _ = (x.cuda() if torch.is_tensor(x) else x for x in _inputs("bias per window"))
    logits, bias = logits.detach().requires_grad_(), bias.detach().requires_grad_()
    ops.cross_entropy(logits, targets, bias).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.cross_entropy(logits, targets, bias).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
