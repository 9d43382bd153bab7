"""The published systems: each against a direct loop in torch, written from its description."""

import math

import pytest
import torch

from slotfast.slot import Adapter, WindowBatch, parse_preset
from tests.streams import MATRIX, STRIDE, L, V, head, stream, to_hidden


def _batches(size, windows=8):
    logits, targets, context, scored = stream(windows, dtype=torch.float64)
    hidden = to_hidden(logits)
    for first in range(0, windows, size):
        cut = slice(first, first + size)
        yield WindowBatch(logits[cut], targets[cut], context[cut], scored[cut], hidden=hidden[cut], head=head)


def _nll(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def _lbfgs(parameters, loss, iterations, history):
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=iterations, history_size=history, line_search_fn="strong_wolfe", tolerance_change=1e-9
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _cosine(start, end, step, steps):
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def test_pr1372_runs_two_phases_with_fresh_memory():
    adapter, delta = Adapter(parse_preset("pr1372:focal=10,batch=4,clamp=0.5")), torch.zeros(V, dtype=torch.float64)
    for batch in _batches(4):
        mask = torch.zeros(4, L, dtype=torch.bool)
        mask[:, L - 10 : L - STRIDE] = True
        mask[batch.context_end == 0] = False
        delta.requires_grad_()

        def loss(delta=delta, mask=mask, batch=batch):
            return _nll(batch.logits + delta, batch.targets)[mask].mean()

        for phase in ((5, 10), (18, 20)):
            _lbfgs([delta], loss, *phase)
        delta = delta.detach().clamp(-0.5, 0.5)
        assert (adapter.step(batch).bias - delta).abs().max() < 1e-6


def test_importance_weights_are_half_uniform_half_surprise():
    """PR #1372's option: sum of weighted losses, weights (1 - p)^0.5 of the base model; here for each window alone."""
    row = parse_preset("pr1372-window:focal=20,importance=0.5,ridge=1,phases=40x20")
    for batch in _batches(8):
        bias = Adapter(row).step(batch).bias
        for w in range(1, 8):
            seen = slice(L - 20, L - STRIDE)
            z, y = batch.logits[w, seen], batch.targets[w, seen]
            surprise = (1 - (-_nll(z, y)).exp()).sqrt()
            weights = (1 + surprise / surprise.mean()) / 2
            delta = torch.zeros(V, dtype=torch.float64, requires_grad=True)

            def loss(z=z, y=y, weights=weights, delta=delta):
                return ((_nll(z + delta, y) * weights).sum() + delta.square().sum() / 2) / weights.sum()

            _lbfgs([delta], loss, 100, 20)
            assert (bias[w] - delta.detach()).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["pr1217", "pr1306", "pr1217-window"])
def test_hidden_shift_by_adamw(name):
    row = parse_preset(name + ":batch=4" * (name != "pr1217-window"))
    betas = (0.3, 0.9) if name == "pr1306" else (0.9, 0.999)
    adapter = Adapter(row)
    for batch in _batches(4):
        got = adapter.step(batch).nll()
        context = torch.arange(L) < batch.context_end[:, None]
        rows = 4 if name.endswith("-window") else 1
        delta = torch.zeros(rows, 1, MATRIX.size(0), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([delta], 0.005, betas, eps=1e-5, weight_decay=1e-8)
        for _ in range(8):
            nll = _nll(head(batch.hidden + delta), batch.targets)
            # elementwise steps: a sum over windows gives each window its own
            each = [nll[w][context[w]].mean() for w in range(4) if context[w].any()]
            loss = sum(each) if name.endswith("-window") else nll[context].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected = _nll(head(batch.hidden + delta.detach()), batch.targets)[batch.scored]
        assert (got - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["pr1229", "film-v1"])
def test_hidden_shift_and_bias_before_the_cap(name):
    steps, start, end = (16, 0.008, 0.0008) if name == "pr1229" else (24, 0.012, 0.001)
    for batch in _batches(8):
        got = Adapter(parse_preset(name)).step(batch).nll()
        position = torch.arange(L)
        fitted = batch.scored if name == "pr1229" else position < batch.context_end[:, None]
        delta = torch.zeros(8, 1, MATRIX.size(0), dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(8, 1, V, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([delta, bias], start, eps=1e-5, weight_decay=1e-8)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = _cosine(start, end, step, steps)
            nll = _nll(head(batch.hidden + delta, bias), batch.targets)
            optimizer.zero_grad()
            sum(nll[w][fitted[w]].mean() for w in range(8) if fitted[w].any()).backward()
            optimizer.step()
        expected = _nll(head(batch.hidden + delta.detach(), bias.detach()), batch.targets)[batch.scored]
        assert (got - expected).abs().max() < 1e-9


def test_film_lbfgs_is_one_optimiser_over_all_windows_started_from_the_mean():
    adapter, mean = Adapter(parse_preset("film-lbfgs-logit:batch=4,focal=12,clamp=0.4,steps=3")), None
    for batch in _batches(4):
        mask = torch.zeros(4, L, dtype=torch.bool)
        mask[:, L - 12 : L - STRIDE] = True
        mask[batch.context_end == 0] = False
        bias = torch.zeros(4, 1, V, dtype=torch.float64)
        if mean is not None:
            bias += mean
        bias.requires_grad_()

        def loss(bias=bias, mask=mask, batch=batch):
            return _nll(head(batch.hidden, bias), batch.targets)[mask].mean()

        _lbfgs([bias], loss, 3, 20)
        bias = bias.detach().clamp(-0.4, 0.4)
        mean = bias[mask.any(1)].mean(0)
        got = adapter.step(batch).nll()
        assert (got - _nll(head(batch.hidden, bias), batch.targets)[batch.scored]).abs().max() < 1e-6


def test_lowrank_moves_only_from_a_random_start():
    (batch,) = _batches(8)
    base = Adapter(parse_preset("none")).step(batch).nll()
    published, repaired = (
        Adapter(parse_preset(name + ":batch=8,focal=20")).step(batch).nll()
        for name in ("film-lowrank", "film-lowrank-repaired")
    )
    assert (published - base).abs().max() < 1e-12
    assert (repaired - base).abs().max() > 0.1


@pytest.mark.parametrize("choice", ["parameter=bias+temperature", "optimizer=mm,steps=60", "optimizer=adamw,lr=0.05"])
def test_other_choices_lower_the_loss_that_they_fit(choice):
    row = parse_preset(f"causal-lbfgs:ridge=1,{choice}")
    (batch,) = _batches(8)
    context = torch.arange(L) < batch.context_end[:, None]
    adapter = Adapter(row)
    parameters = adapter._fit.parameters(batch)
    bias, scale = parameters[:, :V], parameters[:, V:].exp() if row.parameter == "bias+temperature" else 1.0
    adapted = batch.logits * (scale[..., None] if torch.is_tensor(scale) else scale) + bias[:, None]
    fitted = _nll(adapted, batch.targets)[context].mean()
    assert fitted < _nll(batch.logits, batch.targets)[context].mean() - 0.05
    if row.optimizer == "mm":  # the same minimum as L-BFGS
        other = Adapter(parse_preset("causal-lbfgs:ridge=1,phases=100x20"))._fit.parameters(batch)
        assert (parameters - other).abs().max() < 1e-3


def test_places_keep_their_own_start():
    """warm_start=place starts a window from the window at its place in the batch before; one step shows where from."""
    first, second = _batches(4)
    row = parse_preset("film-logit-only:batch=4,focal=20,warm_start=place,steps=1,lr=0.01,lr_end=none,softcap=after")
    adapter = Adapter(row)
    adapter.step(first)
    kept = adapter._fit.last.clone()
    adapter.step(second)
    moved = (adapter._fit.last - kept).abs()
    assert kept[1:].abs().max() <= 0.0101 and not torch.equal(kept[1], kept[2])
    assert moved.max() <= 0.0101 and moved.min(1).values.max() >= 0


def test_distributions_are_what_is_charged():
    for name in (
        "none",
        "causal",
        "causal-bigram",
        "causal-lbfgs",
        "pr1217-window",
        "film-v1",
        "film-lowrank-repaired:batch=8",
    ):
        for batch in _batches(8):
            adjusted = Adapter(parse_preset(name), bos_id=1).step(batch, all_rows=True)
            logprobs, nll = adjusted.logprobs(), adjusted.nll()
            assert logprobs.shape == (int(batch.scored.sum()), V)
            assert (logprobs.exp().sum(-1) - 1).abs().max() < 1e-12
            charged = -logprobs.gather(1, batch.targets[batch.scored][:, None])[:, 0]
            assert (charged - nll).abs().max() < 1e-12
