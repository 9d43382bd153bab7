"""Losses where no row needs logits: no tensor holds those of all rows, and the bits are those of a run that keeps them.

Where a GPU's kernels would run, they are interpreted here.
"""

from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slotfast import kernels, losses, ops
from slotfast.data import ByteTable, Text, TokenStream
from slotfast.eval import SlidingPass, Streaming
from slotfast.eval import forward as forwards
from slotfast.foreign.models import LanguageModel
from slotfast.learn import FrozenLoop, make_loop, parse_row
from slotfast.slot import Adapter, parse_preset
from slotfast.stream import CachedForward
from slotfast.windows import Plan
from slotfast.worker import Worker
from tests.models import randomised
from tests.test_linear_cross_entropy import Largest

V, L, STRIDE, BATCH = 509, 32, 8, 4
WAYS = pytest.mark.parametrize("way", [None, Streaming(0, 48)], ids=["windows", "stream"])
CONFIG = dict(vocab_size=V, seq_len=L, layers=2, width=16, heads=2, kv_heads=1, mlp_width=24, rope_dims=4)
CONFIG |= dict(bigram_buckets=32, bigram_width=8, value_width=8, value_layers=(1,))


@pytest.fixture(scope="module")
def model():
    return randomised(CONFIG, spread=0.5)


class Launched(torch.autograd.Function):
    """The operator as a GPU would run it."""

    @staticmethod
    def forward(ctx, *inputs):
        found = losses._launch(*inputs)
        losses._save(ctx, inputs, found)
        return found

    @staticmethod
    def backward(ctx, *gradients):
        with patch.object(losses, "_backward", losses._launch_backward):
            return losses._differentiate(ctx, *gradients)


def interpreted():
    """Within, no logits are kept, and the operator's kernels run, interpreted."""
    stack = ExitStack()
    stack.enter_context(patch.object(ops, "fuses_output", lambda backend, x: True))
    stack.enter_context(patch.object(ops, "linear_loss", Launched.apply))
    return stack


def logits_interpreted():
    """Within, kernels run, interpreted, on logits in memory."""

    def losses(logits, targets, bias, softcap, cap_after_bias, ignore_index):
        options = {"softcap": softcap, "cap_after_bias": cap_after_bias, "ignore_index": ignore_index}
        return kernels.bias_cross_entropy(logits, targets, bias, **options)

    stack = ExitStack()
    stack.enter_context(patch.object(ops, "uses_triton", lambda backend, device: True))
    stack.enter_context(patch.object(ops, "bias_loss", losses))
    return stack


def score(model, way, rows=(), keep_logprobs=False, predictions=150):
    tokens = np.random.default_rng(0).integers(2, V, predictions + 1)
    text = Text(TokenStream([tokens]), ByteTable(np.ones(V, np.int64), np.zeros(V, bool), np.arange(V) < 2), 1)
    adapters = [Adapter(parse_preset(name), bos_id=1) for name in rows]
    found = []
    options = {"batch_windows": BATCH, "streaming": way, "worker": Worker(), "keep_logprobs": keep_logprobs}
    SlidingPass(model, text, Plan(predictions, L, STRIDE), adapters, **options).run(on_scored=found.append)
    return np.concatenate([part.nll for part in found], 1)


@WAYS
def test_losses_alone_have_the_bits_of_a_run_that_keeps_logits(model, way):
    alone = score(model, way)
    assert alone.shape == (1, 150)
    for given in ({"rows": ["causal"]}, {"rows": ["none"]}, {"keep_logprobs": True}):
        assert np.array_equal(score(model, way, **given)[0], alone[0]), given


@WAYS
@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "kernel"])
def test_no_tensor_holds_the_logits_of_all_rows(model, way, kernel, monkeypatch):
    monkeypatch.setattr(forwards, "_ROWS", 16)
    expected = score(model, way)
    with ExitStack() as stack:
        if kernel:
            stack.enter_context(interpreted())
        largest = stack.enter_context(Largest())
        found = score(model, way, ["none"])
    most = 4 * V * (16 if way else L)  # bytes: of one window, where all of it is scored; and of the output matrix
    assert largest.bytes <= most
    for nll in found:
        np.testing.assert_allclose(nll, expected[0], rtol=0, atol=1e-5)
    with Largest() as largest:  # it can fail
        score(model, way, ["none", "causal"])
    assert largest.bytes > most


def test_logits_are_the_product_s_and_carry_no_gradients(model):
    """Where kernels run, in half precision: otherwise, and where gradients are asked for, the plain ones."""
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    expected = model.head(hidden)
    launched = patch.object(ops, "linear_logits", kernels.linear_logits)
    with patch.object(ops, "fuses_output", lambda backend, x: True), launched:
        assert (model.head(hidden) - expected).abs().max() < 1e-5
        learning = model.head(hidden.requires_grad_())
        assert learning.requires_grad and torch.equal(learning.detach(), expected)
        biased = torch.ones(2, 5, V)
        assert (model.head(hidden, biased) - model.head(hidden.detach(), biased)).abs().max() == 0
    traced = torch.ops.slotfast.linear_logits(hidden.detach(), model.output_matrix(torch.float32), 30.0)
    assert torch.allclose(traced, expected, rtol=0, atol=1e-5)


@WAYS
def test_somebody_else_s_model_has_the_logits_of_some_rows_at_a_time(model, way, monkeypatch):
    monkeypatch.setattr(forwards, "_ROWS", 16)
    theirs = LanguageModel(model, model.hidden, model.head, lambda window, sinks: CachedForward(model, window, sinks))
    expected = score(model, way)[0]
    for kernel in (ExitStack(), logits_interpreted()):
        with kernel, Largest() as largest:
            found = score(theirs, way)[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert largest.bytes <= 4 * V * (16 if way else L)


@WAYS
def test_float32_on_a_gpu_has_the_logits_of_some_rows_at_a_time(model, way, monkeypatch):
    monkeypatch.setattr(forwards, "_ROWS", 16)
    with logits_interpreted(), patch.object(ops, "fuses", lambda *_: False), Largest() as largest:
        found = score(model, way)[0]
    np.testing.assert_allclose(found, score(model, way)[0], rtol=0, atol=1e-5)
    assert largest.bytes <= 4 * V * (16 if way else L)


def plain(model, tokens, targets):
    """The mean loss through logits in memory."""
    logits = model.head(model.hidden(tokens))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("softcap", [30.0, 2.0, None])
@pytest.mark.parametrize("tied", [True, False])
def test_a_training_step_through_the_kernels_has_the_gradients_of_autograd(softcap, tied):
    """Against float64, for every parameter, about as close as autograd in float32; and no tensor of all logits."""
    model = randomised({**CONFIG, "softcap": softcap, "tied": tied}, spread=0.5).requires_grad_()
    windows = torch.randint(0, V, (3, L + 1), generator=torch.Generator().manual_seed(0))
    tokens, targets = windows[:, :-1], windows[:, 1:]
    names, parameters = zip(*model.named_parameters(), strict=True)
    rough = torch.autograd.grad(plain(model, tokens, targets), parameters)
    on_cpu = torch.autograd.grad(model(tokens, targets), parameters)
    parts = patch.object(kernels.linear._cross_entropy, "_PART", 20 * V)
    with interpreted(), parts, Largest() as largest:
        found = torch.autograd.grad(model(tokens, targets), parameters)
    assert largest.bytes < 4 * V * targets.numel()
    model.double()
    exact = torch.autograd.grad(plain(model, tokens, targets), parameters)
    for name, ours, cpu, theirs, right in zip(names, found, on_cpu, rough, exact, strict=True):
        error, allowed = (ours - right).abs().max(), (theirs - right).abs().max()
        # How near autograd comes is the CPU's; the kernels' own rounding, of exponents above all, is the same on all
        assert error <= 4 * allowed + 1e-5 * right.abs().max(), name
        assert (cpu - right).abs().max() <= 4 * allowed + 2e-6 * right.abs().max(), name


@pytest.mark.parametrize("preset", ["learn:rank=2,chunk=16", "learn:what=all,chunk=16,lr=1e-4", "lora-1530:chunk=16"])
def test_rows_that_learn_need_no_logits_unless_others_do(model, preset):
    """The same losses as with them, and with the kernels."""
    tokens = np.random.default_rng(0).integers(2, V, 81)
    row = parse_row(preset)

    def charge(**given):
        found = []
        make_loop(model, row, L, bos_id=1, **given).run(lambda start, stop: tokens[start:stop], 80, found.append)
        return torch.cat([part.nll for part in found])

    alone = charge()
    assert torch.allclose(alone, charge(keep_logprobs=True), rtol=0, atol=1e-5)
    with interpreted():
        assert torch.allclose(charge(), alone, rtol=0, atol=1e-4)


def test_what_learning_is_compared_with_needs_no_logits(model):
    tokens, found = np.random.default_rng(0).integers(2, V, 81), []
    with interpreted(), Largest() as largest:
        FrozenLoop(model, L, block=40).run(lambda start, stop: tokens[start:stop], 80, found.append)
    assert len(torch.cat([part.nll for part in found])) == 80 and largest.bytes < 4 * V * 40
