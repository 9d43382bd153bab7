"""Score first, then learn: no charge knows a later token, and what learns is what the row says."""

import contextlib
import copy

import pytest
import torch

from slotfast.errors import InputError
from slotfast.learn import Lora, learn, make_loop, parse_row
from slotfast.learn.lora import Weights
from slotfast.stream import CachedForward

from .models import VARIANTS, numbers_held, random_model

V, BOS, WINDOW = 37, 5, 12
ROWS = (
    "learn:chunk=8,lr=0.02,rank=2",
    "learn:chunk=8,lr=0.02,steps=3,what=all,clip=1,decay=0.01",
    "learn:chunk=7,lr=0.05,what=norms,optimizer=sgd,momentum=0.9,scope=document",
    "learn:chunk=8,lr=0.02,rank=2,projections=q/v/head,scope=document,steps=2",
    "learn:chunk=7,lr=0.02,what=all,forget=0.75",
)


def _tokens(n=58, seed=0):
    tokens = torch.randint(6, V, (n,), generator=torch.Generator().manual_seed(seed))
    for place in (0, 21, 24, 40):
        tokens[place : place + 1] = BOS
    return tokens


@pytest.fixture(scope="module")
def model():
    return random_model(layers=2, value_layers=(1,))


@pytest.mark.parametrize("row", ROWS)
def test_no_charge_moves_when_a_later_token_changes(model, row):
    tokens = _tokens()
    before = learn(model, tokens, row, window=WINDOW, sinks=2, bos_id=BOS).nll
    for flipped in (7, 8, 9, 16, 21, 22, 24, 33, 56):
        other = tokens.clone()
        other[flipped] = BOS if flipped in (16, 22, 33) else 6 + (int(tokens[flipped]) + 1) % (V - 6)
        after = learn(model, other, row, window=WINDOW, sinks=2, bos_id=BOS).nll
        assert torch.equal(before[: flipped - 1], after[: flipped - 1])
        assert not torch.equal(before[flipped - 1 :], after[flipped - 1 :])
    for length in (2, 9, 10, 45):
        after = learn(model, tokens[:length], row, window=WINDOW, sinks=2, bos_id=BOS).nll
        torch.testing.assert_close(before[: length - 1], after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("row", ROWS)
def test_the_first_chunk_is_charged_unlearned_and_later_ones_are_not(model, row):
    found = learn(model, _tokens(), row, window=WINDOW, bos_id=BOS)
    first = parse_row(row).chunk
    assert torch.equal(found.nll[:first], found.unlearned[:first])
    assert float((found.nll - found.unlearned)[first:21].abs().max()) > 1e-6


def test_a_document_starts_afresh():
    """What was learned before a BOS is gone, and what follows it is learned from; a window of 1 remembers no key."""
    model, tokens = random_model(layers=2, value_layers=(1,), bos_id=BOS), _tokens()
    found = learn(model, tokens, "learn:chunk=1,lr=0.05,scope=document,projections=up", window=1, bos_id=BOS)
    starts = [0, 21, 24, 40]
    assert torch.equal(found.nll[starts], found.unlearned[starts])
    assert bool((found.nll != found.unlearned)[[22, 25, 26, 41]].all())
    apart = learn(model, tokens[40:], "learn:chunk=1,lr=0.05,projections=up", window=1)
    torch.testing.assert_close(apart.nll, found.nll[40:], rtol=0, atol=1e-12)  # some CPUs round by where data lie


@pytest.mark.parametrize("what", ["what=all", "what=norms", "rank=2"])
def test_what_is_forgotten_where_a_document_begins_is_a_share(what):
    """All of it is what scope=document forgets, but for the optimiser's memory, of which plain SGD has none; a half is
    half of the way back, from the next chunk on."""
    model, tokens = random_model(layers=2, value_layers=(1,), bos_id=BOS), _tokens()
    row = f"learn:chunk=1,lr=0.05,{what},optimizer=sgd"
    losses = {
        each: learn(model, tokens, f"{row},{each}", window=1, bos_id=BOS).nll
        for each in ("scope=document", "forget=1", "forget=0.5", "forget=0")
    }
    torch.testing.assert_close(losses["forget=1"], losses["scope=document"], rtol=0, atol=1e-12)
    assert torch.equal(losses["forget=0"][:21], losses["forget=1"][:21])
    for one, other in (("forget=1", "forget=0.5"), ("forget=0.5", "forget=0")):
        assert not torch.isclose(losses[one][21:], losses[other][21:]).any()
    weights = (
        Weights(model) if what == "what=all" else Weights(model, True) if what == "what=norms" else Lora(model, 2, "q")
    )
    start = [value.clone() for value in weights.values]
    with torch.no_grad():
        for value in weights.values:
            value.add_(1)
    weights.forget(0.25)
    assert all(torch.allclose(value, own + 0.75) for value, own in zip(weights.values, start, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_that_learned_nothing_change_no_bit(variant):
    model = random_model(**VARIANTS[variant])
    lora = Lora(model, 3, ("q", "k", "v", "o", "up", "down", "head"))
    tokens = _tokens(12)[None]
    plain = model.head(model.hidden(tokens))
    with lora.attached():
        assert torch.equal(lora.head(model, model.hidden(tokens)), plain)
        with torch.no_grad():
            for b in lora.parameters[1::2]:
                b.normal_()
        assert not torch.equal(lora.head(model, model.hidden(tokens)), plain)
    assert torch.equal(model.head(model.hidden(tokens)), plain)
    lora.forget()
    with lora.attached():
        assert torch.equal(lora.head(model, model.hidden(tokens)), plain)


def test_factors_are_a_product_added_to_the_weight(model):
    lora, merged = Lora(model, 3, ("q", "down")), copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        pairs = iter(zip(lora.parameters[::2], lora.parameters[1::2], strict=True))
        for block in merged.blocks:
            for layer in (block.attn.c_q, block.mlp.proj):
                a, b = next(pairs)
                assert float(a.abs().max()) <= layer.in_features**-0.5 and not b.any()
                b.normal_()
                layer.weight += b @ a
        tokens = _tokens(12)[None]
        with lora.attached():
            torch.testing.assert_close(model.hidden(tokens), merged.hidden(tokens), rtol=0, atol=1e-9)


def test_it_is_the_optimiser_on_the_mean_loss_of_the_chunk(model):
    """All weights, AdamW, 2 steps on each of 2 chunks by hand; the window takes in the stream, and the last step of a
    chunk does not reach the keys of the one before: those are of the weights that charged it."""
    tokens = _tokens(18)
    found = learn(model, tokens, "learn:what=all,chunk=6,steps=2,lr=0.01,clip=0.5,decay=0.1", window=12)
    mine = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    cached, nll = CachedForward(mine, 12), []
    for start in (0, 6, 12):
        piece = tokens[start : start + 7]
        state = cached.state_dict()
        for step in range(3):
            if step == 1:
                after = cached.state_dict()
            if step:
                losses.mean().backward()  # noqa: F821
                torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            if step < 2:
                cached.load_state_dict(state)
                logits = mine.head(cached(piece[None, :-1]))[0]
                losses = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="none")
            if step == 0:
                nll.append(losses.detach())
        cached.load_state_dict(after)
    torch.testing.assert_close(found.nll, torch.cat(nll), rtol=0, atol=1e-9)
    assert found.forwards == pytest.approx((17 + 6 * 2 + 12 * 2 * 2) / 17)


def test_it_learns_what_repeats_and_leaves_the_model_as_it_was(model):
    tokens = _tokens(40).repeat(6)
    own = copy.deepcopy(model).requires_grad_(True)
    kept = [parameter.detach().clone() for parameter in own.parameters()]
    for row in ("learn:chunk=8,lr=0.02", "learn:chunk=8,lr=0.02,what=all", "learn:chunk=8,lr=0.05,what=norms"):
        found = learn(own, tokens, row, window=WINDOW)
        assert found.nll[160:].mean() < found.unlearned[160:].mean() - 0.3, row
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), kept, strict=True))
        assert all(parameter.requires_grad and parameter.grad is None for parameter in own.parameters())


@pytest.mark.parametrize(
    "row", ["learn:chunk=8", "learn:chunk=8,what=all", "learn:chunk=4,scope=document,slots=2,phases=1,prefix=1,piece=9"]
)
@pytest.mark.parametrize("ends", ["no numbers", "an interrupt", "well"])
def test_a_model_in_training_is_what_it_was_however_a_run_ends(model, monkeypatch, row, ends):
    """Its gradients, and what learns of it, too; also where losses that are no numbers show at the very end alone."""
    monkeypatch.setattr("slotfast.learn.charged._SECONDS", float("inf"))
    own, tokens = copy.deepcopy(model).train().requires_grad_(True), _tokens()
    own.blocks[1].eval().requires_grad_(False)
    for parameter in own.blocks[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    if ends == "no numbers":
        own.tok_emb.weight.data[int(tokens[57])] = float("nan")
    runs = iter(range(7))

    def interrupt(*_):
        if ends == "an interrupt" and next(runs, None) is None:
            raise KeyboardInterrupt

    own.blocks[1].attn.register_forward_hook(interrupt)

    def state():
        parameters = [(x.data_ptr(), x.grad, x.requires_grad) for x in own.parameters()]
        return parameters, [(x.training, len(x._forward_hooks), len(x._forward_pre_hooks)) for x in own.modules()]

    before, values = state(), copy.deepcopy(own.state_dict())
    with {"no numbers": pytest.raises(InputError), "an interrupt": pytest.raises(KeyboardInterrupt)}.get(
        ends, contextlib.nullcontext()
    ):
        learn(own, tokens, row, window=WINDOW, bos_id=BOS)
    torch.testing.assert_close(own.state_dict(), values, rtol=0, atol=0, equal_nan=True)
    for (place, gradient, learns), (*now, learns_now) in zip(before[0], state()[0], strict=True):
        assert now[0] == place and now[1] is gradient and learns == learns_now
    assert state()[1] == before[1]


def test_an_interrupt_while_weights_are_put_back_puts_all_of_them_back_however_it_comes(model, monkeypatch):
    own, plain = copy.deepcopy(model), torch.Tensor.requires_grad_
    values, calls = copy.deepcopy(own.state_dict()), []

    def interrupted(tensor, learns=True):
        calls.extend([] if learns else [tensor])
        if not learns and len(calls) == len(values) + 3:  # behind those of the run's beginning
            raise KeyboardInterrupt
        return plain(tensor, learns)

    monkeypatch.setattr(torch.Tensor, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(own, _tokens(), "learn:what=all,optimizer=sgd,lr=0.1,chunk=8", window=WINDOW)
    torch.testing.assert_close(own.state_dict(), values, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in own.parameters())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("lern", "'lern': no such preset; the nearest is learn"),
        ("learn:rank=0", "rank=0: expected at least 1"),
        ("learn:rank", "'rank' is not of the form"),
        ("learn:rank=2,rank=3", "'rank' is given twice"),
        ("learn:lr=-1", "lr=-1: expected more than 0"),
        ("learn:lr=nan", "lr=nan: expected a finite number"),
        ("learn:lr=inf", "lr=inf: expected a finite number"),
        ("learn:chunk=0", "chunk=0: expected at least 1"),
        ("learn:chunk=1.5", "chunk=1.5: expected a whole number"),
        ("learn:bogus=1", "'bogus' does nothing here"),
        ("learn:chunk=13", "chunk=13 is longer than the window of 12"),
        ("learn:projections=q/w", "projections=q/w: no projection 'w'"),
        ("learn:projections=q/q", "expected different projections"),
        ("learn:keys=old", "keys=old: expected 'stale', 'refresh', 'recompute' or 'windows'"),
        ("learn:keys=recompute,what=all", "keys 'recompute' need what 'lora'"),
        ("learn:keys=recompute,scope=document", "keys 'recompute' with scope 'document' need slots"),
        ("learn:scope=document,forget=0.5", "forget needs scope 'stream' and keys 'stale'"),
        ("learn:keys=recompute,forget=0.5", "forget needs scope 'stream' and keys 'stale'"),
        ("learn:forget=1.5", "forget=1.5: expected at most 1"),
        ("learn:keys=recompute,every=2", "'every' does nothing here"),
        ("learn:slots=4", "slots need what 'lora' and scope 'document'"),
        ("learn:order=longest", "order 'longest' needs slots"),
        ("learn:projections=k/mlp", "projections mlp need slots"),
        ("learn:what=norms,rank=4", "'rank' does nothing here"),
        ("learn:momentum=0.5", "'momentum' does nothing here"),
        ("learn:betas=0.9", "betas=0.9:"),
        ("learn:betas=1+2", "betas (1.0, 2.0): expected"),
        ("learn:chunk=8,scope=document", "scope=document: expected a token that starts a document"),
        ("learn:chunk=8,forget=0.5", "forget: expected a token that starts a document"),
        ("causal", "learns nothing"),
    ],
)
def test_a_row_that_cannot_be_ends_with_one_line(model, row, words):
    with pytest.raises(InputError) as caught:
        learn(model, _tokens().repeat(3), row, window=WINDOW)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_losses_that_are_no_numbers_end_with_one_line(model):
    broken = copy.deepcopy(model)
    broken.tok_emb.weight[30] = float("nan")
    with pytest.raises(InputError, match=r"a loss of nan for the token at position \d+: broken weights, or lr=0.0005"):
        learn(broken, _tokens(), "learn:chunk=8", window=WINDOW)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], ROWS[2]])
def test_memory_is_that_of_the_window(model, row):
    """What a loop holds after a stream twice as long is no more."""

    def held(tokens):
        loop = make_loop(model, parse_row(row), WINDOW, 2, BOS)
        read, predictions = tokens.numpy().__getitem__, len(tokens) - 1
        loop.run(lambda start, stop: read(slice(start, stop)), predictions, lambda charged: None)
        return numbers_held(loop)

    once = _tokens(57)
    assert held(once) == held(torch.cat([once, once])) > 1000
