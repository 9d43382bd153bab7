"""Documents in slots: the published loops number by number, and what no document may know."""

import copy

import pytest
import torch

from bench import published_lora
from slotfast.errors import InputError
from slotfast.learn import DocumentLoop, learn, parse_row
from slotfast.learn.slots import SlotLora

from .models import VARIANTS, numbers_held, random_model

V, BOS, WINDOW = 37, 5, 12
REPLICAS = (
    "lora-1530:chunk=4,rank=2,slots=3,lr=0.02",
    "lora-1855:chunk=4,rank=2,slots=3,lr=0.02,prefix=6,piece=30",
    "lora-2014:chunk=6,rank=2,slots=4,lr=0.02,prefix=5,piece=16,short=20+3/9+2",
)
DOC = "lora-doc:chunk=4,rank=2,slots=3,lr=0.02"


def _tokens(lengths, seed=0):
    source = torch.Generator().manual_seed(seed)
    parts = [torch.randint(6, V, (length,), generator=source) for length in lengths]
    for part in parts:
        part[:1] = BOS
    return torch.cat(parts)


LENGTHS = (17, 5, 40, 1, 9, 23, 2, 11, 30, 4, 6)


@pytest.fixture(scope="module")
def model():
    return random_model(layers=1, value_layers=(0,), bos_id=BOS)


@pytest.fixture(scope="module")
def looped():
    return random_model(layers=2, value_layers=(1,), bos_id=BOS, loops=1, loop_start=0, loop_end=1)


@pytest.mark.parametrize("text", REPLICAS)
def test_replicas_give_the_published_loops_numbers(looped, text):
    model = looped
    row, tokens = parse_row(text), _tokens(LENGTHS)
    found = learn(model, tokens, row, window=WINDOW, bos_id=BOS)
    expected = published_lora.run(model, tokens, row, WINDOW, BOS, published_lora.drawing(model, row))
    torch.testing.assert_close(found.nll, expected, rtol=0, atol=1e-9)
    assert float((found.nll - found.unlearned).abs().max()) > 0.1


def test_each_document_by_itself_gives_the_honest_rows_numbers(model):
    row = parse_row(DOC)
    tokens = _tokens(
        (16, 5, 40, 1, 9, 24, 2)
    )  # behind the window, whole chunks: the published ones' last windows begin early
    alone = parse_row("lora-1530:chunk=4,rank=2,slots=1,lr=0.02,alpha=144,betas=0+0.99,start=cold")
    found, draw = learn(model, tokens, row, window=WINDOW, bos_id=BOS).nll, published_lora.drawing(model, row)
    for start, targets in published_lora.cut(tokens, BOS):
        own = published_lora.run(model, tokens[start : start + targets + 1], alone, WINDOW, BOS, draw)
        torch.testing.assert_close(found[start : start + targets], own, rtol=0, atol=1e-9)


def test_the_replicas_are_told_apart_by_what_they_say_they_do(model):
    """Phases train, short groups have shorter chunks, a kept A is not a fresh one: each moves losses."""
    tokens = _tokens(LENGTHS)
    for text, off in (
        (REPLICAS[1], "phases=0"),
        (REPLICAS[1], "start=fresh"),
        (REPLICAS[2], "short=none"),
        (REPLICAS[2], "projections=q/k/v/attn/mlp/head"),
        (REPLICAS[0], "alpha=4"),
    ):
        kept = [part for part in text.split(",") if part.split("=")[0] not in (off.split("=")[0], "prefix", "piece")]
        kept += [part for part in text.split(",") if part.split("=")[0] in ("prefix", "piece") and off != "phases=0"]
        one, other = (learn(model, tokens, row, window=WINDOW, bos_id=BOS) for row in (text, ",".join([*kept, off])))
        assert float((one.nll - other.nll).abs().max()) > 1e-3, off


# the honest row


def test_other_documents_do_not_matter(model):
    """Permuted, next to others, in fewer or more slots: a document's losses are the same to rounding."""
    parts = [_tokens([length], seed) for seed, length in enumerate(LENGTHS)]

    def losses(order, row):
        found = learn(model, torch.cat([parts[i] for i in order]), row, window=WINDOW, bos_id=BOS).nll
        ends = torch.tensor([len(parts[i]) for i in order]).cumsum(0).tolist()
        own = {i: found[end - len(parts[i]) : end - 1] for i, end in zip(order, ends, strict=True)}
        return torch.cat([own[i] for i in range(len(parts))])  # but for the BOS of the next one, which is charged to it

    first = losses(range(len(parts)), DOC)
    for order, row in (
        (torch.randperm(len(parts), generator=torch.Generator().manual_seed(1)).tolist(), DOC),
        (list(range(len(parts)))[::-1], DOC.replace("slots=3", "slots=1")),
        (list(range(len(parts))), DOC.replace("slots=3", "slots=20")),
    ):
        torch.testing.assert_close(losses(order, row), first, rtol=0, atol=1e-9)


@pytest.mark.parametrize("row", [DOC, DOC + ",steps=2,clip=0.5", DOC + ",phases=2,prefix=4,piece=12,start=warm"])
def test_no_charge_moves_when_a_later_token_changes(model, row):
    """On either side of chunk borders, and of documents' ends; also where documents learn from those before them."""
    tokens = _tokens(LENGTHS)
    before = learn(model, tokens, row, window=WINDOW, bos_id=BOS).nll
    start = LENGTHS[0] + LENGTHS[1]
    for flipped in (start + 4, start + 5, start + 22, start + 39, 16, 17, len(tokens) - 1):
        other = tokens.clone()
        other[flipped] = BOS if flipped in (start + 22, 16) else 6 + (int(tokens[flipped]) + 1) % (V - 6)
        after = learn(model, other, row, window=WINDOW, bos_id=BOS).nll
        torch.testing.assert_close(before[: flipped - 1], after[: flipped - 1], rtol=0, atol=1e-8)
        assert float((before - after)[flipped - 1].abs()) > 1e-9
        if flipped == start + 4:  # the first chunk's last target, which the second chunk has learned
            assert float((before - after)[flipped : flipped + 4].abs().min()) > 1e-6
    for length in (2, start + 6, 99):
        after = learn(model, tokens[:length], row, window=WINDOW, bos_id=BOS).nll
        torch.testing.assert_close(before[: length - 1], after, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_that_learned_nothing_change_no_bit(variant):
    """Every place of every variant; what they add once they are something is the product, in its place and run."""
    model = random_model(**VARIANTS[variant])
    row = parse_row("lora-doc:rank=3,slots=2,alpha=6,projections=q/k/v/o/up/down/attn/mlp/head")
    lora, tokens = SlotLora(model, row, 2), torch.randint(6, V, (2, 11), generator=torch.Generator().manual_seed(0))
    for slot in (0, 1):
        lora.put(slot, lora.draw(slot))
    with torch.no_grad(), lora.hooked(model):
        plain = model.head(model.hidden(tokens))
        with lora.using([0, 1], torch.float64):
            assert torch.equal(lora.head(model, model.hidden(tokens)), plain)
        ones = torch.ones(lora.values.size(1), dtype=torch.float64)
        for slot in (0, 1):
            lora.put(slot, lora.draw(slot) + 0.01 * (slot + 1) * ones)
        with lora.using([0, 1], torch.float64):
            both = lora.head(model, model.hidden(tokens))
        assert float((both - plain).abs().min(0).values.max()) > 1e-4
        for slot in (0, 1):
            with lora.using([slot], torch.float64):
                alone = lora.head(model, model.hidden(tokens[slot : slot + 1]))
            torch.testing.assert_close(alone[0], both[slot], rtol=0, atol=1e-10)
        lora.begin(1)
        with lora.using([1], torch.float64):
            assert torch.equal(lora.head(model, model.hidden(tokens[1:])), model.head(model.hidden(tokens[1:])))
    assert torch.equal(model.head(model.hidden(tokens)), plain)


def test_factors_beside_layers_are_products_added_to_their_weights():
    """Of each run of a repeated layer one of its own: with the same factors in both runs, a changed weight."""
    model = random_model(**VARIANTS["a repeated segment"])
    row = parse_row("lora-doc:rank=2,alpha=6,projections=q/k/v/o/up/down")
    lora, merged = SlotLora(model, row, 1), copy.deepcopy(model)
    values, source, own = [], torch.Generator().manual_seed(0), {}
    names = {"q": "attn.c_q", "k": "attn.c_k", "v": "attn.c_v", "o": "attn.proj", "up": "mlp.fc", "down": "mlp.proj"}
    for layer in model.order:
        for name in row.projections:
            matrix = merged.blocks[layer].get_submodule(names[name]).weight
            if (layer, name) not in own:
                a, b = (0.1 * torch.randn(n, generator=source).double() for n in (2 * matrix.size(1), 2 * len(matrix)))
                own[layer, name] = a, b
                matrix += 3 * b.view(-1, 2) @ a.view(2, -1)
            values += own[layer, name]
    lora.put(0, torch.cat(values))
    tokens = torch.randint(6, V, (1, 11), generator=source)
    with torch.no_grad(), lora.hooked(model), lora.using([0], torch.float64):
        torch.testing.assert_close(model.hidden(tokens), merged.hidden(tokens), rtol=0, atol=1e-10)


def test_a_document_begins_with_the_models_own_losses(model):
    found, starts = learn(model, _tokens(LENGTHS), DOC, window=WINDOW, bos_id=BOS), [0]
    for length in LENGTHS[:-1]:
        starts.append(starts[-1] + length)
    for start, length in zip(starts, LENGTHS, strict=True):
        first = slice(start, start + min(4, length))
        assert torch.equal(found.nll[first], found.unlearned[first])
    assert bool((found.nll != found.unlearned)[starts[2] + 4 : starts[3]].all())


def _loop(model, row, **options):
    return DocumentLoop(model, parse_row(row), WINDOW, BOS, **options)


def _run(loop, tokens):
    """What a loop charges, in its order."""
    charged, ids = [], tokens.numpy()
    loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, charged.append)
    return charged


def test_charges_come_in_the_streams_order_with_their_distributions(model, monkeypatch):
    """Also where few may wait for an earlier document; of the longest first, in that order."""
    tokens = _tokens(LENGTHS)
    whole = _run(_loop(model, DOC, keep_logprobs=True), tokens)
    assert [part.start for part in whole] == sorted(part.start for part in whole)
    nll, logprobs = (torch.cat([getattr(part, name) for part in whole]) for name in ("nll", "logprobs"))
    torch.testing.assert_close(-logprobs[torch.arange(len(nll)), tokens[1:]], nll, rtol=0, atol=1e-12)
    monkeypatch.setattr("slotfast.learn.documents._WAITING", 6)
    monkeypatch.setattr("slotfast.learn.documents._FETCHED", 8)
    few = _run(_loop(model, DOC), tokens)
    torch.testing.assert_close(torch.cat([part.nll for part in few]), nll, rtol=0, atol=1e-7)
    assert [part.start for part in few] == [part.start for part in whole]
    longest = _run(_loop(model, "lora-1530:chunk=4,rank=2,slots=3"), tokens)
    assert longest[0].start == sum(
        LENGTHS[:8]
    )  # of the two longest, which are the first group, the one that ends first
    assert sorted(part.start for part in longest) == [part.start for part in whole]


# several ranks deal documents out


def _ranks(model, row, tokens, world):
    """Losses of the ranks, one after the other, in the stream's order; and by rank and phase the weights it left."""
    parts, left, ids = [], [], tokens.numpy()
    for rank in range(world):
        loop, by_phase = _loop(model, row, rank=rank, world=world), {}

        def note(loop=loop, by_phase=by_phase):
            state = loop.state_dict()
            if state["at"]["phase"] not in by_phase:
                by_phase[state["at"]["phase"]] = copy.deepcopy(state["trained"])

        loop.run(lambda start, stop: ids[start:stop], len(ids) - 1, parts.append, note)
        left.append(by_phase)
    parts.sort(key=lambda part: part.start)
    assert [part.start for part in parts[1:]] == [part.start + len(part.nll) for part in parts[:-1]]  # each once
    return torch.cat([part.nll for part in parts]), left


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("text", [REPLICAS[1].replace("slots=3", "slots=2"), REPLICAS[2].replace("slots=4", "slots=2")])
def test_ranks_give_the_numbers_of_published_ones_that_take_turns(looped, text, world):
    """One whose last turn has no group for it, too; and all have the same weights, though none asks another."""
    row, tokens = parse_row(text), _tokens((*LENGTHS, 7, 20), seed=1)
    found, left = _ranks(looped, text, tokens, world)
    expected = published_lora.run(looped, tokens, row, WINDOW, BOS, published_lora.drawing(looped, row), world)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    alone = learn(looped, tokens, row, window=WINDOW, bos_id=BOS).nll
    assert float((found - alone).abs().max()) > 1e-3  # a rank's A comes from its own documents
    before = looped.state_dict()
    for phase in set(left[0]) & set(left[1]):
        moved = any(not torch.equal(weights, before[name]) for name, weights in left[0][phase].items())
        assert moved == (phase > 0)
        for other in left[1:]:
            assert all(torch.equal(weights, left[0][phase][name]) for name, weights in other.get(phase, {}).items())
    assert 1 in left[0] and 1 in left[1]


@pytest.mark.parametrize(("start", "world"), [("cold", 2), ("fresh", 3), ("cold", 13)])
def test_phases_as_documents_come_are_the_same_on_any_number_of_ranks(model, start, world):
    """Nothing but the weights goes from document to document, and phases train on the same ones."""
    row, tokens = f"{DOC},phases=2,prefix=7,piece=12,start={start}", _tokens(LENGTHS)
    alone = learn(model, tokens, row, window=WINDOW, bos_id=BOS).nll
    torch.testing.assert_close(_ranks(model, row, tokens, world)[0], alone, rtol=0, atol=1e-9)
    without = learn(model, tokens, f"{DOC},start={start}", window=WINDOW, bos_id=BOS).nll
    assert float((alone - without)[sum(LENGTHS[:7]) :].abs().min()) > 1e-6


def test_longest_first_one_turn_of_two_ranks_is_two_of_one(model):
    """Where a phase is due behind a whole turn, and A begins alike."""
    row = "lora-1855:chunk=4,rank=2,slots=2,lr=0.02,phases=2,prefix=8,piece=20,start=cold"
    tokens = _tokens((17, 5, 40, 9, 23, 2, 11, 30, 4, 6, 8, 14))
    alone = learn(model, tokens, row, window=WINDOW, bos_id=BOS).nll
    torch.testing.assert_close(_ranks(model, row, tokens, 2)[0], alone, rtol=0, atol=1e-9)


def test_only_a_chunks_rows_go_through_head_and_last_layer(model):
    loop = _loop(model, DOC)
    _run(loop, _tokens(LENGTHS))
    ledger = loop.ledger
    assert ledger["charged"] == sum(LENGTHS) - 1 and ledger["rows"] < 2 * ledger["charged"] < ledger["forward"]
    assert ledger["backward"] < ledger["forward"] and loop.forwards > 2 and min(loop.seconds.values()) > 0


@pytest.mark.parametrize("keys", ["recompute", "stale"])
def test_memory_is_that_of_the_slots(model, keys):
    """What a loop holds after a stream three times as long is no more."""

    def held(lengths):
        loop = _loop(model, f"{DOC},keys={keys}")
        _run(loop, _tokens(lengths))
        return numbers_held(loop)

    assert held(LENGTHS) == held(LENGTHS * 3) > 3 * 1000


def test_the_model_is_left_as_it_was(model):
    own = copy.deepcopy(model).requires_grad_(True)
    kept = [parameter.detach().clone() for parameter in own.parameters()]
    learn(own, _tokens(LENGTHS), REPLICAS[1], window=WINDOW, bos_id=BOS)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), kept, strict=True))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in own.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in own.modules())


def test_a_stream_may_be_one_document(model):
    """`learn` with keys that are forwarded again: the same as one document that no BOS cuts."""
    tokens = _tokens((30,))
    found = learn(model, tokens, "learn:keys=recompute,chunk=4,lr=0.02,rank=2,projections=k/mlp", window=WINDOW)
    own = "lora-doc:chunk=4,lr=0.02,rank=2,projections=k/mlp,betas=0.9+0.99,eps=1e-8,decay=0,alpha=none"
    torch.testing.assert_close(found.nll, learn(model, tokens, own, window=WINDOW, bos_id=BOS).nll, rtol=0, atol=1e-12)


HOW = "chunk=4,lr=0.02,rank=2"


@pytest.mark.parametrize("how", ["", ",steps=2", ",projections=k/o/head,optimizer=sgd,momentum=0.5,clip=1"])
def test_old_keys_in_slots_are_those_of_the_stream(how):
    """One document, by the loop that keeps a stream's keys; no layer repeats, as each run has its own factors here."""
    model, tokens = random_model(layers=2, value_layers=(1,), bos_id=BOS), _tokens((50,))
    own = learn(model, tokens, f"learn:{HOW}{how}", window=WINDOW)
    for row in (f"learn:{HOW}{how},scope=document,slots=2", f"learn:{HOW}{how},keys=refresh,every=50"):
        found = learn(model, tokens, row, window=WINDOW, bos_id=BOS)
        torch.testing.assert_close(found.nll, own.nll, rtol=0, atol=1e-5)  # A's draws round otherwise
        torch.testing.assert_close(found.unlearned, own.unlearned, rtol=0, atol=1e-12)
        assert found.forwards == pytest.approx(own.forwards)


def test_momentum_of_slots_that_begin_to_learn_at_different_times(model):
    """A slot whose first documents end before they teach anything; then one by one gives the same numbers."""
    tokens, row = _tokens((40, 2, 3, 30, 20)), f"{DOC},optimizer=sgd,momentum=0.9,projections=k/o"
    rows = (row.replace("slots=3", f"slots={n}") for n in (2, 1))
    side, one = (learn(model, tokens, each, window=WINDOW, bos_id=BOS) for each in rows)
    torch.testing.assert_close(side.nll, one.nll, rtol=0, atol=1e-9)
    assert float((side.nll - side.unlearned).abs().max()) > 1e-3


def test_keys_refreshed_each_time_are_recomputed(looped):
    tokens = _tokens(LENGTHS)
    rows = [f"{DOC},keys={keys}" for keys in ("recompute", "refresh,every=1", "refresh,every=3", "stale")]
    every, once, third, stale = (learn(looped, tokens, row, window=WINDOW, bos_id=BOS) for row in rows)
    torch.testing.assert_close(once.nll, every.nll, rtol=0, atol=1e-9)
    start = sum(LENGTHS[:2])  # the longest document; three of its chunks fit into a window
    assert torch.equal(third.nll[start : start + 12], stale.nll[start : start + 12])
    assert float((third.nll - stale.nll)[start + 12 : start + 40].abs().min()) > 1e-6
    assert every.forwards > third.forwards > stale.forwards and stale.forwards < 2.2


@pytest.mark.parametrize("keys", ["stale", "refresh,every=2"])
def test_old_keys_know_no_later_token_and_no_other_document(model, keys):
    row, tokens = f"{DOC},keys={keys}", _tokens(LENGTHS)
    before, start = learn(model, tokens, row, window=WINDOW, bos_id=BOS).nll, sum(LENGTHS[:2])
    for flipped in (start + 5, start + 22, start + 39, 17):
        other = tokens.clone()
        other[flipped] = BOS if flipped == start + 22 else 6 + (int(tokens[flipped]) + 1) % (V - 6)
        after = learn(model, other, row, window=WINDOW, bos_id=BOS).nll
        torch.testing.assert_close(before[: flipped - 1], after[: flipped - 1], rtol=0, atol=1e-8)
        assert float((before - after)[flipped - 1].abs()) > 1e-9
    own = learn(model, tokens[start : start + 41], row, window=WINDOW, bos_id=BOS).nll
    torch.testing.assert_close(own, before[start : start + 40], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("lora-doc:rank=0", "rank=0: expected at least 1"),
        ("lora-doc", "chunk=48 is longer than the window of 12"),
        ("lora-1855:projections=q/w", "projections=q/w: no projection 'w'"),
        ("lora-doc:slots=0", "slots=0: expected at least 1"),
        ("lora-doc:what=all", "slots need what 'lora'"),
        ("lora-doc:short=20+4", "short needs order 'longest'"),
        ("lora-2014:short=20+x", "short=20+x"),
        ("lora-2014:short=20+49", "expected tokens and chunks of 1 to 48"),
        ("lora-doc:prefix=3", "'prefix' does nothing here"),
        ("lora-1855:prefix=2", "phases 3: prefix 2 has no document for each of them"),
        ("lora-doc:start=hot", "start=hot: expected 'cold', 'fresh' or 'warm'"),
        ("lora-155", "the nearest is lora-1855"),
    ],
)
def test_a_row_that_cannot_be_ends_with_one_line(model, row, words):
    with pytest.raises(InputError) as caught:
        learn(model, _tokens(LENGTHS), row, window=WINDOW, bos_id=BOS)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_losses_that_are_no_numbers_end_with_one_line(model):
    broken = copy.deepcopy(model)
    broken.tok_emb.weight[30] = float("nan")
    with pytest.raises(InputError, match=r"a loss of nan for the token at position \d+: broken weights, or lr=0.02"):
        learn(broken, _tokens(LENGTHS), DOC, window=WINDOW, bos_id=BOS)


def test_of_old_keys_in_another_order_nothing_looks_ahead_but_the_order():
    """No window begins anew there, so that no document's length sets where."""
    old, anew = (parse_row(f"lora-1530:keys={keys}").compliance for keys in ("stale", "recompute"))
    assert (old.c1, old.c2, old.c3, old.c4) == (True, True, True, False) and "how long" not in old.why
    assert (anew.c1, anew.c2, anew.c3, anew.c4) == (False, False, True, False) and "windows' start" in anew.why
    assert not parse_row("lora-1855:keys=stale").compliance.c1  # phases
