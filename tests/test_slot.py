"""Adaptation: rows and their verdicts, the closed form against a slow one, and independence from the batch."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import slotfast
from slotfast.errors import InputError
from slotfast.slot import PRESETS, Adapter, Adjusted, Calibration, WindowBatch, from_environment, parse_preset
from tests.streams import BOS, STRIDE, D, L, V, head, stream, to_hidden

LEAKY = {"pr1350", "pr1372", "pr1217", "pr1306", "pr1318", "pr1229"}
LEAKY |= {"film-lbfgs", "film-lbfgs-logit", "film-lowrank-repaired"}
BATCHED = {"film-logit-only"}  # causal, but started from the batch before: batch limits matter


def _run(name, windows, sizes, padded=False):
    """NLLs [W, L], NaN where not scored, with the stream cut into batches of the given sizes."""
    logits, targets, context, scored = windows
    state, out, first = None, [], 0
    for size in sizes:
        part = [x[first : first + size] for x in (logits, targets, context, scored)]
        if padded:
            part = [torch.cat([x, torch.zeros_like(x[:1]).expand(3, *x.shape[1:])]) for x in part]
        through = {"hidden": to_hidden(part[0]), "head": head}
        result = slotfast.adapt(*part, preset=name, state=state, bos_id=BOS, allow_noncausal=True, **through)
        state = result.state
        out.append(result.nll[:size])
        first += size
    assert first == len(logits)
    return torch.cat(out)


def _equal(a, b):
    return torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))


CAUSAL = sorted(set(PRESETS) - LEAKY)


@pytest.mark.parametrize("name", sorted(set(CAUSAL) - BATCHED))
def test_the_batch_does_not_matter(name):
    windows = stream(13)
    whole = _run(name, windows, [13])
    assert _equal(whole, _run(name, windows, [1] * 13))
    assert _equal(whole, _run(name, windows, [5, 1, 7]))
    assert _equal(whole, _run(name, windows, [5, 1, 7], padded=True))
    assert bool(whole[1:, : L - STRIDE].isnan().all()) and not bool(whole[0].isnan().any())
    assert int(whole.isnan().logical_not().sum()) == L + 12 * STRIDE - 2


@pytest.mark.parametrize("name", [name for name in CAUSAL if not PRESETS[name].carries])
def test_the_order_does_not_matter(name):
    windows = stream(13)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    assert _equal(_run(name, windows, [13])[order], _run(name, tuple(x[order] for x in windows), [13]))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_verdict_is_what_changing_the_future_shows(name):
    """With every target changed from some token on, inside a window, causal rows score what came before alike."""
    logits, targets, context, scored = stream(13)
    border = 7 * STRIDE + L - 2
    # a joint fit of so few tokens would end with every bias at the clamp, whatever the others see
    text = name + ":steps=2,clamp=none" if PRESETS[name].scope == "joint" else name
    position = STRIDE * torch.arange(13)[:, None] + torch.arange(L)
    future = torch.where(position >= border, (targets + 1) % V, targets)
    before = _run(text, (logits, targets, context, scored), [13])[position < border]
    after = _run(text, (logits, future, context, scored), [13])[position < border]
    assert _equal(before, after) == PRESETS[name].compliance.causal


def test_compliance_follows_from_the_choices():
    assert {name for name, row in PRESETS.items() if not row.compliance.causal} == LEAKY
    assert not parse_preset("pr1350-window:positions=scored").compliance.c3
    assert parse_preset("pr1350:scope=window,warm_start=0").compliance.causal
    assert not parse_preset("causal-lbfgs:scope=batch").compliance.c1


def _slow_rates(nll_logits, targets, context, scored, row, k, per_window):
    """The closed form from its definition: a sum over all earlier tokens, each decayed by what came after it."""
    seen, out = [], torch.full(targets.shape, math.nan, dtype=torch.float64)
    for w in range(len(targets)):
        if per_window:
            seen = [(nll_logits[w, t].softmax(-1), int(targets[w, t])) for t in range(int(context[w]))]
        counts, expected = torch.zeros(V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
        weight = 1.0
        for probability, target in reversed(seen):
            counts[target] += weight
            expected += weight * probability
            weight *= row.decay * (row.document_decay if target == BOS else 1)
        bias = (row.scale * ((counts + k) / (expected + k)).log()).clamp(-row.clamp, row.clamp)
        for t in range(int(context[w]), int(scored[w])):
            out[w, t] = -(nll_logits[w, t] + bias).log_softmax(-1)[targets[w, t]]
            if not per_window:
                seen.append((nll_logits[w, t].softmax(-1), int(targets[w, t])))
    return out


@pytest.mark.parametrize("preset", ["causal-unigram:scale=0.8", "causal-window:scale=0.8,decay=0.9"])
def test_rates_agree_with_their_definition(preset):
    windows = stream(6, dtype=torch.float64)
    row = Calibration().resolve(parse_preset(preset))
    frequency = torch.rand(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frequency /= frequency.sum()
    k = (2 * (1024 * frequency.double()).sqrt()).clamp(min=0.2)
    expected = _slow_rates(*windows, row, k, row.scope == "window")
    got = slotfast.adapt(*windows, preset=preset, frequency=frequency, bos_id=BOS).nll
    assert (got - expected).abs().nan_to_num().max() < 1e-10
    assert torch.equal(got.isnan(), expected.isnan())


def test_published_schedule():
    """PR #1350: mean loss over [L - 128, L - stride) of every window but the stream's first, clamp, warm start."""
    torch.manual_seed(0)
    row = parse_preset("pr1350:focal=10,clamp=0.5,batch=4")
    logits, targets, context, scored = stream(8, dtype=torch.float64)
    adapter, delta = Adapter(row), torch.zeros(V, dtype=torch.float64, requires_grad=True)
    for first in (0, 4):
        cut = slice(first, first + 4)
        mask = torch.zeros(4, L, dtype=torch.bool)
        mask[:, L - 10 : L - STRIDE] = True
        mask[context[cut] == 0] = False
        optimizer = torch.optim.LBFGS(
            [delta], max_iter=25, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-9
        )

        def closure(cut=cut, mask=mask, optimizer=optimizer):
            optimizer.zero_grad()
            nll = -(logits[cut] + delta).log_softmax(-1).gather(-1, targets[cut][..., None]).squeeze(-1)
            loss = nll[mask].mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            delta.clamp_(-0.5, 0.5)
        got = adapter.step(WindowBatch(logits[cut], targets[cut], context[cut], scored[cut])).bias
        assert (got - delta.detach()).abs().max() < 1e-6
        assert float(got.abs().max()) == 0.5


def test_nothing_fitted_to_nothing():
    """The stream's first window has no context: every causal row that does not count inside it leaves it as it is."""
    logits, targets, context, scored = (x[:1] for x in stream(2))
    for name in set(CAUSAL) - {"causal"}:
        result = slotfast.adapt(
            logits, targets, context, scored, preset=name, hidden=to_hidden(logits), head=lambda h, b=0.0: logits[0] + b
        )
        assert torch.equal(result.nll, result.base_nll)


def test_base_scores_are_cross_entropy():
    logits, targets, context, scored = stream(4)
    result = slotfast.adapt(logits, targets, context, scored, preset="none")
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    kept = ~result.base_nll.isnan()
    assert (result.base_nll.double() - expected.view(4, L))[kept].abs().max() < 1e-5


def test_options_and_their_errors():
    row = parse_preset("pr1350-window:steps=7,ridge=2,clamp=3")
    assert row.phases == ((7, 20),) and row.ridge == 2 and row.clamp == 3
    assert parse_preset("pr1350:phases=5x10+18x20").phases == ((5, 10), (18, 20))
    for text, message in {
        "pr135": "no such preset; the nearest is pr1350",
        "causal:ridge=3": "'ridge' does nothing here",
        "causal-lbfgs:rigde=3": "the nearest is ridge",
        "causal-lbfgs:ridge=-1": "ridge=-1: expected at least 0",
        "causal-lbfgs:steps=x": "invalid literal",
        "causal-lbfgs:phases=3": "phases",
        "causal-lbfgs:ridge": "not of the form key=value",
        "causal:scope=batch": "needs optimizer 'rates' and scope 'prefix'",
        "causal-unigram:scope=batch": "'rates' needs",
        "pr1350:warm_start=place": "needs a parameter for each window",
        "causal-lbfgs:scope=prefix": "scope 'prefix' needs optimizer 'rates'",
        "pr1217:scope=joint": "scope 'joint' needs optimizer 'lbfgs'",
        "pr1350-window:optimizer=mm,clamp=none": "and a ridge or a clamp",
        "pr1217:betas=0.3+1": "expected 0 <= beta < 1",
        "pr1217:clamp=3": "'clamp' does nothing here",
        "none:clamp=3": "does nothing here",
        "causal-lbfgs:focal=3": "'focal' does nothing here",
        "causal-lbfgs:name=x": "'name' does nothing here",
        "pr1350:batch=1": "batch=1: expected at least 2",
        "pr1350:steps=3,phases=3x4": "say the same",
        "pr1350:phases=2x1000000000": "expected iterations and history of 1 to 1000",
        "pr1350:clamp=inf": "clamp=inf: expected a finite number",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            parse_preset(text)
        assert "\n" not in str(caught.value)


def test_environment_changes_rows_but_not_what_is_said_explicitly(monkeypatch):
    monkeypatch.setenv("SLOT_STEPS", "4")
    monkeypatch.setenv("SLOT_FOCAL_CTX", "96")
    monkeypatch.setenv("SLOT_WARMSTART", "0")
    assert from_environment(parse_preset("pr1350"), "pr1350").phases == ((4, 20),)
    changed = from_environment(parse_preset("pr1350:steps=9"), "pr1350:steps=9")
    assert changed.phases == ((9, 20),) and changed.focal == 96 and changed.warm_start == "no"
    assert from_environment(parse_preset("pr1350:phases=7x7"), "pr1350:phases=7x7").phases == ((7, 7),)
    assert from_environment(parse_preset("causal"), "causal") == PRESETS["causal"]
    monkeypatch.setenv("SLOT_STEPS", "many")
    with pytest.raises(InputError, match="SLOT_STEPS"):
        from_environment(parse_preset("pr1350"), "pr1350")


def test_uncalibrated_is_weaker():
    assert Calibration().resolve(PRESETS["causal"]).scale == 0.7
    assert Calibration(torch.ones(V) / V).resolve(PRESETS["causal"]).scale == 1.0
    assert Calibration(torch.ones(V) / V, scale=0.0).resolve(PRESETS["causal"]).scale == 0.0
    assert set(Calibration().pseudo_counts(PRESETS["causal"], V).tolist()) == {2.0}


def test_adapt_refuses_leaks_and_wrong_shapes():
    logits, targets, context, scored = stream(2)
    with pytest.raises(InputError, match="'pr1350' is not causal: 32 windows share"):
        slotfast.adapt(logits, targets, context, preset="pr1350")
    with pytest.raises(InputError, match=r"expected \[W, T, V\] and \[W, T\]"):
        slotfast.adapt(logits, targets[:, 1:], context)
    with pytest.raises(InputError, match="0 <= context <= scored <= 24"):
        slotfast.adapt(logits, targets, 25)
    with pytest.raises(InputError, match="an integer or 2 of them"):
        slotfast.adapt(logits, targets, torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match=r"frequency \(3,\): expected \(50,\)"):
        slotfast.adapt(logits, targets, context, frequency=torch.ones(3))
    with pytest.raises(InputError, match=r"targets: expected 0\.\.49"):
        slotfast.adapt(logits, targets.masked_fill(targets == targets[0, 0], -100), context)
    state = slotfast.adapt(logits, targets, context, preset="causal").state
    with pytest.raises(InputError, match="'causal' or of other options, not of 'none'"):
        slotfast.adapt(logits, targets, context, preset="none", state=state)
    leaky = slotfast.adapt(logits, targets, context, preset="pr1350", allow_noncausal=True).state
    with pytest.raises(InputError, match="'pr1350' is not causal"):
        slotfast.adapt(logits, targets, context, preset="pr1350", state=leaky)


def test_adapt_keeps_no_graph():
    logits, targets, context, scored = stream(2)
    result = slotfast.adapt(logits.requires_grad_(), targets, context, scored)
    assert not result.nll.requires_grad and not result.state._rates.expected.requires_grad


def test_what_lies_behind_the_scored_positions_may_be_anything():
    """Rows of padding are often NaN; no preset reads them."""
    logits, targets, context, scored = stream(9)
    end = L - 2
    context, scored = (context - 2).clamp(min=0), scored.clamp(max=end)
    broken = logits.clone()
    broken[:, end:] = math.nan
    for name in set(CAUSAL) - {"pr1217-window", "film-v1", "film-logit-only", "film-lowrank"}:
        expected = slotfast.adapt(logits, targets, context, scored, preset=name, bos_id=BOS).nll
        assert _equal(expected, slotfast.adapt(broken, targets, context, scored, preset=name, bos_id=BOS).nll), name


def test_frequencies_may_be_counts():
    windows, counts = stream(6), torch.arange(1, V + 1)
    shares = counts / counts.sum()
    a, b = (slotfast.adapt(*windows, bos_id=BOS, frequency=f).nll for f in (counts, shares))
    assert (a - b).abs().nan_to_num().max() < 1e-5
    with pytest.raises(InputError, match="frequency: expected counts or shares"):
        slotfast.adapt(*windows, frequency=torch.zeros(V))


def test_no_windows_and_foreign_states():
    windows = stream(6)
    for name in CAUSAL:
        through = {"hidden": to_hidden(windows[0])[:0], "head": head}
        assert slotfast.adapt(*(x[:0] for x in windows), preset=name, **through).nll.shape == (0, L)
    state = slotfast.adapt(*windows, bos_id=BOS).state
    with pytest.raises(InputError, match="state: built for a vocabulary of 50; logits have 40"):
        slotfast.adapt(windows[0][..., :40], windows[1] % 40, *windows[2:], state=state)
    with pytest.raises(InputError, match="NaN or infinite losses at scored positions"):
        slotfast.adapt(torch.full_like(windows[0], math.nan), *windows[1:])
    with pytest.raises(InputError, match="bos_id 999 in 0..49"):
        slotfast.adapt(*windows, bos_id=999)


@pytest.mark.parametrize("name", ["causal", "causal-bigram", "film-logit-only"])
def test_a_carried_state_goes_on_where_it_ended(name):
    """Windows that come again, that jump, or that stand in another order would learn from their own tokens."""
    windows = stream(13)

    def run(first, stop, state=None, windows=windows):
        through = {"hidden": to_hidden(windows[0][first:stop]), "head": head}
        return slotfast.adapt(*(x[first:stop] for x in windows), preset=name, state=state, **through).state

    for again, message in {
        (4, 8): "the context of window 0, 18 tokens, is not what was scored last before it.* after those of the state",
        (7, 12): "the context of window 0",
        (9, 12): "the context of window 0",
        (0, 8): "the call before scored the same 66 tokens",
    }.items():
        state = run(0, 8)
        with pytest.raises(InputError, match=message):
            run(*again, state)
        run(8, 12, state)  # refused before the state took anything in
    with pytest.raises(InputError, match="the context of window 1, 18 tokens, is not what was scored last before it"):
        run(0, 12, windows=tuple(x[torch.tensor([0, 2, 1, *range(3, 13)])] for x in windows))
    # the first call may begin anywhere; a document may come after another
    run(0, 8, run(8, 12, run(4, 8)), stream(13, seed=1))


def test_a_second_pass_is_refused_however_it_is_cut():
    """Windows of 40 tokens without context, whose text comes again after other text."""
    tokens = torch.randint(V, (6, 40), generator=torch.Generator().manual_seed(3))

    def run(order, state=None):
        targets = tokens[torch.tensor(order)]
        return slotfast.adapt(torch.zeros(*targets.shape, V), targets, 0, preset="causal", state=state).state

    for first, again in (([0, 1, 2], [0, 1]), ([0, 1], [2, 0]), ([0, 1, 2], [0]), ([0], [1, 0, 2])):
        for calls in ([first, [3, 4], again], [[*first, *again]]):
            with pytest.raises(InputError, match="the first 40 tokens of the stream come again: each may be scored"):
                state = None
                for order in calls:
                    state = run(order, state)
    run([1, 2, 1], run([0]))  # a document that is in the stream twice is no second pass


def test_fits_of_each_window_alone_may_come_again_with_a_state():
    windows = stream(9)
    first = slotfast.adapt(*windows, preset="causal-lbfgs")
    assert _equal(slotfast.adapt(*windows, preset="causal-lbfgs", state=first.state).nll, first.nll)


def test_a_state_is_one_of_the_same_call():
    windows, shares = stream(6), torch.arange(1, V + 1)
    for early, late, message in (
        ({"bos_id": BOS}, {"bos_id": 2}, "state: built with bos_id 1; this call has bos_id 2"),
        ({}, {"bos_id": 2}, "state: built with bos_id None; this call has bos_id 2"),
        ({"frequency": shares}, {"frequency": shares.flip(0)}, "state: built with another frequency"),
        ({}, {"frequency": shares}, "state: built with another frequency"),
    ):
        first, second = ([x[part] for x in windows] for part in (slice(0, 3), slice(3, 6)))
        result = slotfast.adapt(*first, **early)
        with pytest.raises(InputError, match=message):
            slotfast.adapt(*second, state=result.state, **late)
        expected = slotfast.adapt(*windows, **early).nll[3:]
        assert _equal(expected, slotfast.adapt(*second, state=result.state).nll)
    with pytest.raises(InputError, match=r"state: this is the whole result of the call before; pass its \.state"):
        slotfast.adapt(*second, state=result)
    with pytest.raises(InputError, match="state: expected the .state of the call before, got dict"):
        slotfast.adapt(*second, state={})


def test_arrays_and_lists_are_taken_for_tensors():
    logits, targets, context, scored = stream(6)
    frequency = torch.arange(1, V + 1)
    expected = slotfast.adapt(logits, targets, context, scored, frequency=frequency, bos_id=BOS).nll
    arrays = [x.numpy() for x in (logits, targets.int(), context, scored)]
    arrays[0].setflags(write=False)
    arrays[1] = arrays[1].astype(">i4")
    got = slotfast.adapt(*arrays, frequency=frequency.tolist(), bos_id=arrays[1].dtype.type(BOS)).nll
    assert _equal(expected, got)
    assert _equal(
        expected, slotfast.adapt(logits, targets, context.tolist(), scored, frequency=frequency.numpy(), bos_id=BOS).nll
    )
    for changed, message in (
        ({"frequency": ["a"] * V}, "frequency: expected a tensor or an array of numbers, got list"),
        ({"frequency": {}}, "frequency: expected a tensor or an array of numbers, got dict"),
        ({"frequency": [[1.0], [1.0, 2.0]]}, "frequency: expected a tensor or an array of numbers, got list"),
        ({"frequency": [1.0] * 3}, r"frequency \(3,\): expected \(50,\)"),
        ({"logits": None}, "logits: expected a tensor or an array of numbers, got NoneType"),
        ({"logits": logits.long()}, "logits: expected floating-point numbers, got torch.int64"),
        ({"targets": targets.float()}, "targets and bos_id: expected integers"),
        ({"targets": targets > 3}, "targets and bos_id: expected integers"),
        ({"bos_id": 1.0}, "targets and bos_id: expected integers, bos_id 1.0"),
        ({"context": "6"}, "context and scored: expected a tensor or an array of numbers, got str"),
        ({"context": [1.0] * 6}, "context and scored: expected an integer or 6 of them"),
    ):
        with pytest.raises(InputError, match=message):
            slotfast.adapt(**{"logits": logits, "targets": targets, "context": context} | changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_biased_losses_are_as_exact_as_torch(dtype):
    """Biases within a nat to far beyond what exp can hold, tokens that are certain, and tokens that are impossible."""
    W, T, size = 8, 70, 300
    generator = torch.Generator().manual_seed(2)
    logits = (6 * torch.randn(W, T, size, generator=generator)).to(dtype)
    logits[:, 0, 7] = 60.0  # certain
    logits[:, 1, 5] = -math.inf
    targets = torch.randint(0, size, (W, T), generator=generator)
    targets[:, :2] = torch.tensor([7, 5])
    spread = torch.tensor([0.0, 1e-3, 1.0, 10.0, 39.0, 41.0, 90.0, 1e4])
    bias = spread[:, None] * torch.rand(W, size, generator=generator)
    batch = WindowBatch(logits, targets, torch.zeros(W, dtype=torch.int64), torch.full((W,), T))
    exact = -(logits.double() + bias[:, None].double()).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    wide = torch.promote_types(dtype, torch.float32)
    torchs = -(logits.to(wide) + bias[:, None].to(wide)).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    got = Adjusted(batch, bias).nll().view(W, T)
    assert got.dtype == wide and torch.equal(got.isinf(), exact.isinf()) and got.min() >= 0
    for w in range(W):
        bound = 2 * (torchs[w] - exact[w]).abs().nan_to_num().max() + (1e-6 if wide == torch.float32 else 1e-12)
        assert (got[w] - exact[w]).abs().nan_to_num().max() <= bound, spread[w]
    assert torch.equal(got[0], Adjusted(batch).nll().view(W, T)[0])  # a bias of 0


def test_a_looser_tolerance_ends_sooner_at_the_same_loss():
    windows, row = stream(13), "causal-lbfgs:ridge=0.3,clamp=none"
    batch, evaluations = WindowBatch(*windows), []
    for tolerance in ("1e-3", "1e-7", "1e-9"):
        adapter = Adapter(parse_preset(f"{row},tolerance={tolerance}"))
        adapter.step(batch)
        work = adapter.work()["evaluations"]
        assert work.total() == 12  # windows with a context
        evaluations.append(sum(number * windows for number, windows in work.items()))
    assert evaluations == sorted(evaluations) and len(set(evaluations)) == 3
    assert PRESETS["causal-lbfgs"].tolerance == 1e-7 and PRESETS["pr1350"].tolerance == 1e-9
    exact = Adapter(parse_preset(f"{row},phases=200x20,tolerance=1e-12")).step(
        WindowBatch(windows[0].double(), *windows[1:])
    )
    loose = Adapter(parse_preset(f"{row},tolerance=1e-7")).step(batch)
    assert (loose.nll() - exact.nll()).abs().max() < 0.01 and abs(loose.nll().mean() - exact.nll().mean()) < 1e-4


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize(
    "text",
    [
        *("none", "causal", "causal-unigram", "causal-bigram", "causal-window", "causal-lbfgs"),
        *("pr1350:focal=80", "pr1350-window:focal=80", "pr1350-window:focal=80,importance=0.5"),
        "causal-lbfgs:optimizer=mm,steps=2",
    ],
)
def test_windows_may_be_views_of_one_tape(text):
    """The same bits as windows of their own, and nothing as large as those is ever made."""
    W, length, stride = 30, 96, 4
    generator = torch.Generator().manual_seed(5)
    tape = head(torch.randn((W - 1) * stride + length, D, generator=generator))
    tokens = torch.randint(0, V, (len(tape),), generator=generator)
    tokens[torch.randint(0, len(tape), (3,), generator=generator)] = BOS
    logits = tape.as_strided((W, length, V), (stride * V, V, 1))
    targets = tokens.as_strided((W, length), (stride, 1))
    ends = torch.full((W,), length - stride), torch.full((W,), length)
    ends[1][-1] = length - 1
    results, hidden = [], to_hidden(logits)
    for keep in (Tensor.clone, lambda view: view):
        adapter, largest = Adapter(parse_preset(text), bos_id=BOS), Largest()
        batch = WindowBatch(keep(logits), keep(targets), *ends, hidden=hidden, head=head)
        with torch.no_grad(), largest:
            results += [adapter.step(batch).nll(), Adjusted(batch).nll()]
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    if adapter.row.scope != "batch":  # all rows of which are one problem
        assert largest.elements < logits.numel()


def test_narrow_logits_are_adapted_in_float32():
    logits, *rest = stream(9)
    narrow = logits.bfloat16()
    for name in ("causal", "causal-bigram", "causal-window", "causal-lbfgs"):
        a, b = (slotfast.adapt(z, *rest, preset=name, bos_id=BOS).nll.float() for z in (narrow, narrow.float()))
        assert (a - b).abs().nan_to_num().max() < 1e-4, name
