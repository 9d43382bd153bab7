"""Blocks of fused operators, by kernels in the interpreter or on a GPU, against blocks of torch's own."""

import copy

import pytest
import torch

from slotfast import fused, ops
from slotfast.kernels import pack_int6, without_own_ref
from slotfast.model import Linear, PackedLinear
from slotfast.stream import CachedForward
from tests.models import PLAIN, SMALL, randomised

pytest.importorskip("triton", reason="launches, interpreted or not, need triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE = {**SMALL, "width": 32, "heads": 4, "mlp_width": 24, "layers": 4, "value_layers": (0, 3)}  # heads of 8
VARIANTS = {
    "every part": {},
    "plain GPT": PLAIN,
    "gated skips, a repeated segment": {"skip_gates": True, "loops": 1, "loop_start": 1, "loop_end": 2},
    "parallel residuals": {"parallel_from": 2},
}


@pytest.fixture
def pieces(monkeypatch):
    """Blocks are fused, whatever the type of their states; gives the names of the pieces launched."""
    launched = []

    def noted(name):
        function = getattr(fused, name)

        def call(*arguments, **options):
            launched.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(fused, name, call)

    for name in ("mix_kernel", "heads_kernel", "squared_kernel", "residual_kernel"):
        noted(name)
    monkeypatch.setattr(ops, "fuses", lambda backend, x, width: backend != "torch" and x.dtype == torch.float32)
    return launched


def _model(**changes):
    return randomised({**WHOLE, **changes}).to(DEVICE)


def _tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=generator).to(DEVICE)


def _once_a_block(model):
    runs = len(model.order)
    return dict(mix_kernel=runs, heads_kernel=runs, squared_kernel=runs, residual_kernel=2 * runs)


def _close(found, exact, plain):
    """As near to float64 as plain float32 is, some rounding apart."""
    error, allowed = (found.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 4 * allowed + 1e-6, (float(error), float(allowed))


@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_windows(pieces, changes, first):
    model, tokens = _model(**changes), _tokens(2, 12)
    with torch.no_grad():
        ours = model.hidden(tokens, first=first)
        assert {name: pieces.count(name) for name in pieces} == _once_a_block(model)
        model.backend = "torch"
        plain = model.hidden(tokens, first=first)
        assert len(pieces) == sum(_once_a_block(model).values()), "plain blocks launch nothing"
        exact = copy.deepcopy(model).double().hidden(tokens, first=first)
    _close(ours, exact, plain)


@pytest.mark.parametrize("sinks", [0, 2])
def test_streams(pieces, sinks):
    """Blocks of several lengths, past the window, so that sinks leave it."""
    model, tokens = _model(), _tokens(2, 30)
    exact = copy.deepcopy(model).double()
    exact.backend = "torch"
    plain = copy.deepcopy(model)
    plain.backend = "torch"
    streams = [CachedForward(each, 8, sinks, 2) for each in (model, exact, plain)]
    with torch.no_grad():
        for part in tokens.split((1, 9, 5, 15), 1):
            ours, *others = (stream(part, first=part.size(1) // 2) for stream in streams)
            _close(ours, *others)
    assert len(pieces) == 4 * sum(_once_a_block(model).values())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_all_weights(pieces, changes):
    model, tokens = _model(**changes).requires_grad_(True), _tokens(2, 11)
    exact = copy.deepcopy(model).double()
    plain = copy.deepcopy(model)
    exact.backend = plain.backend = "torch"
    found = []
    for each in (model, exact, plain):
        each(tokens[:, :-1], tokens[:, 1:]).backward()
        found.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert len(pieces) == sum(_once_a_block(model).values())
    for name, gradient in found[0].items():
        _close(gradient, found[1][name], found[2][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pieces, monkeypatch, dtype):
    """States and gradients, windows and streams: as near to float64 as plain half precision is."""
    monkeypatch.setattr(ops, "fuses", lambda backend, x, width: backend != "torch" and x.dtype == dtype)
    model, tokens = _model().requires_grad_(True), _tokens(2, 30)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    plain.backend, found = "torch", []
    for each, type_ in ((model, dtype), (plain, dtype), (exact, torch.float64)):
        states = each.hidden(tokens[:, :11], type_)
        weights = torch.linspace(-1, 1, states.numel(), dtype=torch.float64, device=DEVICE).view_as(states)
        (states.double() * weights).sum().backward()
        stream = CachedForward(each, 8, 2, 2, type_)
        with torch.no_grad():
            read = [stream(part) for part in tokens.split((1, 9, 5, 15), 1)]
        gradients = {name: x.grad for name, x in each.named_parameters() if x.grad is not None}
        found.append({"states": states.detach(), "stream": torch.cat(read, 1)} | gradients)
    ours, theirs, right = found
    assert set(pieces) == set(_once_a_block(model)) and ours.keys() == right.keys()
    worse = {}
    for name, value in right.items():
        if value.numel() > 4:  # a scale's gradient is one sum of much that cancels: chance
            error, allowed = ((x[name].double() - value).norm() / value.norm() for x in (ours, theirs))
            worse[name] = float(error / allowed)
    assert max(worse.values()) < 4 and sum(worse.values()) / len(worse) < 1.2, sorted(
        worse.items(), key=lambda x: -x[1]
    )[:5]


def test_what_is_hooked_steps_aside(pieces):
    """LoRA adapters, Hessians: whoever looks at a layer's input, or adds to its output, finds the layer called."""
    model, tokens, seen = _model(), _tokens(1, 6), []
    handle = model.blocks[1].mlp.fc.register_forward_hook(lambda layer, inputs, y: seen.append(y) or y + 1)
    with torch.no_grad():
        hooked = model.hidden(tokens)
        assert len(seen) == 1 and pieces.count("heads_kernel") == len(model.order) - 1
        handle.remove()
        assert not torch.allclose(model.hidden(tokens), hooked) and len(seen) == 1


def test_attention_that_turns_for_itself_gets_what_it_wants(pieces):
    class Attend:
        def __call__(self, run, q, k, v, exclude_own):
            return torch.zeros_like(q)

    _model().states(_tokens(1, 6), Attend(), torch.float32)
    assert not pieces


def test_packed_layers_are_fused_where_they_keep_a_matrix(pieces):
    model = _model()
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, Linear):
            codes = torch.randint(-31, 32, layer.weight.shape, dtype=torch.int8)
            model.blocks.set_submodule(name, PackedLinear(pack_int6(codes, torch.full((len(codes),), 0.01))))
    packed = [module for module in model.to(DEVICE).modules() if isinstance(module, PackedLinear)]
    with torch.no_grad():
        model.hidden(_tokens(1, 6))
        assert packed and not pieces
        for module in packed:
            module.keep_dense(torch.float32)
        model.hidden(_tokens(1, 6))
    assert {name: pieces.count(name) for name in pieces} == _once_a_block(model)


def test_blocks_trace_whole(pieces):
    """Into one graph, forward and backward, with the operators in it."""
    model, tokens = _model().requires_grad_(True), _tokens(1, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradient = model.blocks[0].attn.c_q.weight.grad.clone()
    model.zero_grad()
    expected = model(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, model.blocks[0].attn.c_q.weight.grad)


def test_gradients_without_the_own_value():
    generator = torch.Generator().manual_seed(2)
    y, v, dx = (torch.randn(2, 5, heads, 8, generator=generator).to(DEVICE) for heads in (4, 2, 4))
    found = []
    for function, dtype in ((fused.without_own, torch.float32), (without_own_ref, torch.float64)):
        given = [x.detach().to(dtype, copy=True).requires_grad_() for x in (y, v)]
        function(*given).backward(dx.to(dtype))
        found.append([x.grad.double() for x in given])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_the_own_value_leaves_by_a_kernel_in_half_precision(monkeypatch):
    y, v = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8)
    monkeypatch.setattr(ops, "fused_without_own", lambda y, v: "kernel")
    assert torch.equal(ops.without_own(y, v), without_own_ref(y, v)) and ops.without_own(y.half(), v.half()) != "kernel"
    monkeypatch.setattr(ops, "uses_triton", lambda backend, device: True)
    assert ops.without_own(y.half(), v.half()) == "kernel"
    assert torch.equal(ops.without_own(y, v), without_own_ref(y, v))


def test_only_half_precision_on_a_gpu_is_fused(monkeypatch):
    x = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    assert not ops.fuses("auto", x, 64) and not ops.fuses("torch", x, 64)
    monkeypatch.setattr(ops, "uses_triton", lambda backend, device: backend != "torch")
    assert ops.fuses("auto", x, 64) and ops.fuses("auto", x.half(), 2) and not ops.fuses("torch", x, 64)
    assert not ops.fuses("auto", x.float(), 64)
    assert not any(ops.fuses("auto", x, width) for width in (1, 24, 256))
