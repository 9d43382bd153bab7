"""Repeats and bigram rates: against their definitions, as distributions, in bounded memory."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from slotfast import ops
from slotfast.audit import Hints, audit_rows
from slotfast.audit.own import OwnLoop
from slotfast.audit.streams import Stream
from slotfast.data import ByteTable, Text, TokenStream
from slotfast.errors import InputError
from slotfast.eval import SlidingPass
from slotfast.slot import Adapter, Calibration, WindowBatch, parse_preset, sorted_repeats
from slotfast.slot.rates import BigramRates, Rates
from slotfast.slot.repeats import CONTEXTS, DEFAULT_GATES, Repeats, fit_gates, mix, mix_rows
from slotfast.slot.sorted_repeats import SortedRepeats
from slotfast.windows import Plan
from tests.streams import BOS, L, V, stream

DECAY, DOCUMENT_DECAY = 0.97, 0.1


def _tokens(n=300, seed=0):
    """Few kinds of tokens, so that long contexts come back; documents."""
    tokens = np.random.default_rng(seed).integers(2, 5, n)
    tokens[[0, 120, 121, 200]] = BOS
    return torch.from_numpy(tokens)


BOTH = pytest.mark.parametrize("kind", [Repeats, SortedRepeats])


def _slow(tokens, t, v, length):
    """c_j(v): every earlier token that is v and follows the same tokens, decayed by what came since."""
    tokens, total = tokens.tolist(), 0.0
    for s in range(length, t):
        if t >= length and tokens[s] == v and tokens[s - length : s] == tokens[t - length : t]:
            documents = tokens[s:t].count(BOS)
            total += DECAY ** (t - s) * DOCUMENT_DECAY**documents
    return total


@BOTH
def test_followers_are_decayed_counts_of_exact_contexts(kind):
    tokens = _tokens()
    found = kind(DECAY, DOCUMENT_DECAY, BOS).take(tokens, all_rows=True)
    rows = Counter()
    for *where, weight in zip(*(column.tolist() for column in found.rows), strict=True):
        rows[tuple(where)] += weight
    for t in (0, 1, 2, 5, 30, 119, 120, 121, 122, 125, 199, 201, 299):
        for j, length in enumerate(CONTEXTS):
            counts = [_slow(tokens, t, v, length) for v in range(6)]
            assert float(found.total[t, j]) == pytest.approx(sum(counts), rel=1e-9)
            assert float(found.hits[t, j]) == pytest.approx(counts[int(tokens[t])], rel=1e-9)
            for v, count in enumerate(counts):
                assert rows[t, j, v] == pytest.approx(count, rel=1e-9)


@BOTH
def test_pieces_of_a_stream_count_like_the_whole(kind):
    tokens = _tokens()
    whole, parts = (kind(DECAY, DOCUMENT_DECAY, BOS) for _ in range(2))
    whole = whole.take(tokens)
    cut = [parts.take(tokens[a:b]) for a, b in ((0, 1), (1, 4), (4, 4), (4, 150), (150, 300))]
    for name in ("total", "hits"):
        mine, expected = torch.cat([getattr(part, name) for part in cut]), getattr(whole, name)
        # a sum's terms are paired by where they lie in the piece
        assert torch.equal(mine, expected) if kind is Repeats else torch.allclose(mine, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
@pytest.mark.parametrize("decay", [0.99, 0.95])
def test_sorting_counts_like_the_table(monkeypatch, device, decay):
    """Over several chunks, several documents, past what is forgotten, and past the range of the table's unit."""
    monkeypatch.setattr(sorted_repeats, "_CHUNK", 700)
    random = np.random.default_rng(3)
    tokens = random.zipf(1.3, 20_000) % 300
    for start in random.integers(100, 19_000, 60):  # passages that come back
        tokens[start : start + 50] = tokens[start - 70 : start - 20]
    tokens[random.integers(0, 20_000, 12)] = BOS
    table, ours = (kind(decay, DOCUMENT_DECAY, BOS) for kind in (Repeats, SortedRepeats))
    first = 0
    for size in (1, 0, 2, 7, 2000, 64, 5000, 12_926):
        piece = torch.from_numpy(tokens[first : first + size])
        expected, got = table.take(piece), ours.take(piece.to(device))
        first += size
        for name in ("total", "hits"):
            assert torch.allclose(getattr(got, name).cpu(), getattr(expected, name), rtol=1e-9, atol=1e-9), name
    assert first == len(tokens) and len(ours.recent) < 3000


def test_the_kernels_scan_counts_as_torch_does(monkeypatch):
    pytest.importorskip("triton", reason="launches, interpreted or not, need triton")
    monkeypatch.setattr(ops, "uses_triton", lambda backend, device: backend == "triton")  # interpreted where no GPU is
    tokens = _tokens().to("cuda" if torch.cuda.is_available() else "cpu")
    for piece in (tokens[:7], tokens[7:], tokens[:0]):
        for torch_, ours in zip(*(_of_the_scan(piece, backend) for backend in ("torch", "triton")), strict=True):
            assert torch.allclose(ours, torch_, rtol=1e-12, atol=1e-12)


def _of_the_scan(tokens, backend):
    found = SortedRepeats(DECAY, DOCUMENT_DECAY, BOS).take(tokens, backend=backend)
    return found.total, found.hits


@BOTH
def test_without_a_token_that_starts_documents_nothing_but_tokens_decays(kind):
    tokens = _tokens()
    assert torch.equal(kind(DECAY, DOCUMENT_DECAY, None).take(tokens).total, kind(DECAY, 1.0, BOS).take(tokens).total)


@BOTH
def test_no_count_sees_a_later_token(kind):
    tokens = _tokens()
    before = kind(DECAY, DOCUMENT_DECAY, BOS).take(tokens)
    for at in (0, 1, 7, 120, 121, 250, 299):
        other = tokens.clone()
        other[at] = 5
        after = kind(DECAY, DOCUMENT_DECAY, BOS).take(other)
        assert torch.equal(after.total[: at + 1], before.total[: at + 1])
        assert torch.equal(after.hits[:at], before.hits[:at])


@pytest.mark.parametrize("tokens", [[], [3], [3, 3], [3] * 9, [BOS] * 40], ids=len)
def test_short_streams(tokens):
    tokens = torch.tensor(tokens, dtype=torch.int64)
    table, ours = (kind(DECAY, DOCUMENT_DECAY, BOS).take(tokens, True) for kind in (Repeats, SortedRepeats))
    assert ours.total.shape == table.total.shape == (len(tokens), len(CONTEXTS))
    assert torch.allclose(ours.total, table.total, rtol=1e-12) and torch.allclose(ours.hits, table.hits, rtol=1e-12)
    rows = torch.softmax(torch.arange(8.0, dtype=torch.float64), 0).expand(len(tokens), -1)
    gates = torch.tensor(DEFAULT_GATES, dtype=torch.float64)
    assert torch.allclose(mix_rows(rows, ours, gates), mix_rows(rows, table, gates), rtol=1e-12)


@BOTH
def test_mixtures_are_distributions_that_hold_the_charge(kind):
    tokens = _tokens()
    found = kind(DECAY, DOCUMENT_DECAY, BOS).take(tokens, all_rows=True)
    base = torch.softmax(torch.randn(300, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1)
    gates = torch.tensor(DEFAULT_GATES, dtype=torch.float64) + 1
    rows = mix_rows(base, found, gates)
    assert (rows.sum(-1) - 1).abs().max() < 1e-12 and rows.min() > 0
    index = tokens[:, None]
    assert (rows.gather(1, index)[:, 0] - mix(base.gather(1, index)[:, 0], found, gates)).abs().max() < 1e-12
    assert (rows - base).abs().max() > 0.3


def test_memory_is_bounded_and_forgetting_changes_nothing_else():
    tokens = torch.from_numpy(np.random.default_rng(1).integers(2, 40, 6000))
    repeats = Repeats(0.99, DOCUMENT_DECAY, BOS)  # a unit of 1e12 after 2,750 tokens
    sizes = []
    for first in range(0, 6000, 500):
        found = repeats.take(tokens[first : first + 500])
        sizes.append(sum(map(len, repeats.tables)))
    assert max(sizes) < 6 * 6000
    weights = [w for table in repeats.tables for followers in table.values() for w in followers.values()]
    assert min(weights) >= 1e-12  # a frequent context forgets its rare followers too
    recent = Repeats(0.99, DOCUMENT_DECAY, BOS)
    recent.take(tokens[1500:5500])
    again = recent.take(tokens[5500:])
    np.testing.assert_allclose(found.total, again.total, rtol=1e-9, atol=1e-9)


def test_fitted_gates_beat_the_default_where_they_were_fitted_and_open_only_if_it_pays():
    tokens = torch.cat([_tokens(2000), _tokens(2000, seed=5)])
    found = Repeats(0.999, DOCUMENT_DECAY, BOS).take(tokens)
    generator = np.random.default_rng(3)
    nll = generator.uniform(0.9, 1.3, len(tokens))  # a model that knows the three kinds, about

    def loss(gates):
        gates = torch.tensor(gates, dtype=torch.float64)
        return float(-mix(torch.from_numpy(np.exp(-nll)), found, gates).log().sum())

    fitted = fit_gates(nll, found)
    assert loss(fitted) < loss(DEFAULT_GATES) and np.shape(fitted) == (len(CONTEXTS), 2)
    # what comes is random: after a long context, its few followers say nothing
    typical = found.total[-1000:]
    opened = 1 / (1 + np.exp(-(np.array(fitted)[-1] @ [1, math.log(typical[:, -1].mean())])))
    assert opened < 1 / (1 + np.exp(-(np.array(DEFAULT_GATES)[-1] @ [1, math.log(typical[:, -1].mean())])))


def _slow_bigram(logits, targets, context, scored, row, k):
    """The bigram form from its definition, window by window: only windows before count."""
    seen, out = [], []
    previous = None
    for w in range(len(targets)):
        weights, weight = [], 1.0
        for _, _, target in reversed(seen):
            weights.append(weight)
            weight *= row.decay * (row.document_decay if target == BOS else 1)
        weights.reverse()
        counts, expected = torch.zeros(V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
        for (_, p, target), weight in zip(seen, weights, strict=True):
            counts[target] += weight
            expected += weight * p
        ratio = ((counts + k) / (expected + k)) ** row.scale
        ratio = ratio.clamp(math.exp(-row.clamp), math.exp(row.clamp)) ** (1 / row.scale)
        new = []
        for t in range(int(context[w]), int(scored[w])):
            target = int(targets[w, t])
            before = target if previous is None else previous
            counts, expected = torch.zeros(V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
            for (other, p, seen_target), weight in zip(seen, weights, strict=True):
                if other == before:
                    counts[seen_target] += weight
                    expected += weight * p
            bias = (row.scale * ((counts + row.k2 * ratio) / (expected + row.k2)).log()).clamp(-row.clamp, row.clamp)
            out.append(-(logits[w, t] + bias).log_softmax(-1)[target])
            new.append((before, logits[w, t].softmax(-1), target))
            previous = target
        seen += new
    return torch.stack(out)


def test_bigram_rates_agree_with_their_definition():
    windows = stream(9, dtype=torch.float64)
    row = Calibration().resolve(parse_preset("causal-bigram:scale=0.8,decay=0.98"))
    expected = _slow_bigram(*windows, row, torch.full((V,), 2.0, dtype=torch.float64))
    for pieces in ([9], [1] * 9, [4, 5]):
        adapter, got, first = Adapter(row, bos_id=BOS), [], 0
        for size in pieces:
            got.append(adapter.step(WindowBatch(*(x[first : first + size] for x in windows))).nll())
            first += size
        assert (torch.cat(got) - expected).abs().max() < 1e-5  # tables are float32


def test_bigram_tables_are_rescaled_without_a_trace():
    windows = stream(60)
    row = Calibration().resolve(parse_preset("causal-bigram:decay=0.9"))
    adapter = Adapter(row, bos_id=BOS)
    nll = adapter.step(WindowBatch(*windows)).nll()
    slow = _slow_bigram(*windows, row, torch.full((V,), 2.0, dtype=torch.float64))
    assert 1e-6 <= adapter._bigram.unit <= 1 and (nll - slow).abs().max() < 1e-3


def test_tables_that_would_not_fit_are_refused():
    row = Calibration().resolve(parse_preset("causal-bigram"))
    with pytest.raises(InputError, match=r"a vocabulary of 50257 needs 20,206,128,392 bytes of bigram tables"):
        BigramRates(Rates(row, torch.ones(50257), BOS))


def test_repeats_see_the_window_s_own_earlier_tokens_and_nothing_later():
    """A token that has just come back after the same eight moves the next repeat, inside one window."""
    logits, targets, context, scored = stream(3)
    targets = torch.full_like(targets, 7)
    targets[:, ::2] = 9
    adapter = Adapter(parse_preset("causal"), bos_id=BOS)
    nll = adapter.step(WindowBatch(logits[:1], targets[:1], context[:1], scored[:1])).nll()
    base = Adapter(parse_preset("none")).step(WindowBatch(logits[:1], targets[:1], context[:1], scored[:1])).nll()
    assert torch.equal(nll[:2], base[:2]) and nll[L - 4 :].mean() < base[L - 4 :].mean() - 1


def test_causal_with_sorted_repeats_scores_like_with_tables(tiny_model, monkeypatch):
    """And the auditor finds nothing in it."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, 12, 300))
    tokens[[0, 90, 91, 210]] = BOS
    plan = Plan(len(tokens) - 1, 32, 8)
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)

    def scores():
        adapter, parts = Adapter(parse_preset("causal:decay=0.98"), bos_id=BOS), []
        passed = SlidingPass(
            tiny_model,
            Text(TokenStream([tokens.numpy()]), table, BOS),
            plan,
            [adapter],
            batch_windows=4,
            adapt_windows=8,
        )
        passed.run(parts.append)
        return adapter._repeats, np.concatenate([part.nll for part in parts], 1)

    repeats, expected = scores()
    assert isinstance(repeats, Repeats)
    monkeypatch.setattr("slotfast.slot.adapters.Repeats", SortedRepeats)
    repeats, nll = scores()
    assert isinstance(repeats, SortedRepeats)
    np.testing.assert_allclose(nll, expected, atol=1e-6)
    assert np.abs(nll[1] - nll[0]).max() > 0.1
    hints = Hints(32, 8, 4, 2)
    row = {"causal": parse_preset("causal:decay=0.98")}
    loop = OwnLoop(tiny_model, row, Calibration(), table, BOS, hints)
    (report,) = audit_rows(
        loop, ["causal"], Stream(tokens, 64, BOS), byte_rule=loop.byte_rule, hints=hints, seeds=[0], reruns=12
    )
    assert report.clean, str(report)


def test_only_what_is_short_enough_is_sorted():
    assert SortedRepeats.suits(0.97 ** (1 / 64)) and not SortedRepeats.suits(1.0) and not SortedRepeats.suits(0.99999)
