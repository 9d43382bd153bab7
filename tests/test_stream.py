"""The cached forward against one dense forward over the whole stream with a banded mask, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from slotfast.model import rotary_table, rotate
from slotfast.stream import CachedForward
from tests.models import SMALL, VARIANTS, random_model

L, N = SMALL["seq_len"], 47


def random_tokens(n=N, seed=1, batch=2):
    tokens = torch.randint(6, 37, (batch, n), generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = tokens[0, 17 % n] = tokens[-1, 40 % n] = 5
    return tokens


class Dense:
    """Attention over the whole stream, query by query, as the definition says it."""

    def __init__(self, config, window, sinks):
        self.config, self.window, self.sinks = config, window, sinks

    def __call__(self, run, q, k, v, exclude_own):
        group = q.size(2) // k.size(2)
        out = torch.empty_like(q)
        for t in range(q.size(1)):
            oldest = max(0, t - self.window + 1)
            kept = min(self.sinks, oldest)
            seen = [*range(kept), *range(oldest, t + 1)]
            # sinks stand just before the oldest token of the window
            place = torch.tensor([oldest - kept + s for s in range(kept)] + list(range(oldest, t + 1)))
            turned = rotate(q[:, t : t + 1], *rotary_table(self.window, self.config, torch.tensor([t])))
            keys = rotate(k[:, seen], *rotary_table(self.window, self.config, place))
            keys, values = (x.repeat_interleave(group, 2) for x in (keys, v[:, seen]))
            score = torch.einsum("bhd,bshd->bhs", turned[:, 0], keys) / math.sqrt(q.size(-1))
            out[:, t] = torch.einsum("bhs,bshd->bhd", score.softmax(-1), values)
        if exclude_own:
            own = F.normalize(v, dim=-1).repeat_interleave(group, 2)
            out = out - (out * own).sum(-1, keepdim=True) * own
        return out


def dense(model, tokens, window, sinks):
    return model.states(tokens, Dense(model.config, window, sinks), torch.float64)


def in_blocks(cached, tokens, size):
    return torch.cat([cached(block) for block in tokens.split(size, 1)], 1)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("sinks", [0, 3])
def test_equals_a_dense_forward_with_a_band(changes, sinks):
    model, tokens = random_model(**changes), random_tokens()
    expected = dense(model, tokens, L, sinks)
    for size in (1, 7, 64):
        got = in_blocks(CachedForward(model, L, sinks, batch=2), tokens, size)
        assert (got - expected).abs().max() < 1e-12 * expected.abs().max(), size


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 2), (2, 5), (5, 1), (12, 12), (12, 20), (100, 4)])
def test_any_window_and_any_number_of_sinks(window, sinks):
    model, tokens = random_model(), random_tokens(n=40)
    expected = dense(model, tokens, window, sinks)
    for size in (1, 3, 40):
        got = in_blocks(CachedForward(model, window, sinks, batch=2), tokens, size)
        assert (got - expected).abs().max() < 1e-12 * expected.abs().max(), size


def test_a_window_as_long_as_the_stream_is_the_plain_forward():
    model, tokens = random_model(), random_tokens(n=L)
    expected = model.hidden(tokens)
    got = in_blocks(CachedForward(model, L, batch=2), tokens, 5)
    assert (got - expected).abs().max() < 1e-12


def test_a_model_whose_repetitions_are_off_runs_without_them():
    model = random_model(loops=2, loop_start=1, loop_end=3, layers=6, xsa_layers=4)
    model.looping = False
    tokens = random_tokens(L)
    expected = model.hidden(tokens)
    assert (in_blocks(CachedForward(model, L, batch=2), tokens, 1) - expected).abs().max() < 1e-12


def test_packed_weights(tiny_model):
    from slotfast.artifact import Artifact

    packed = Artifact.from_model(tiny_model, {}).model("int6", "torch")
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(3))
    got = in_blocks(CachedForward(packed, 32, batch=2), tokens, 5)
    assert (got - packed.hidden(tokens)).abs().max() < 1e-3


def test_float32_is_close_to_float64():
    model, tokens = random_model(), random_tokens()
    expected = in_blocks(CachedForward(model, L, 2, batch=2), tokens, 16)
    got = in_blocks(CachedForward(model.float(), L, 2, batch=2), tokens, 16)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("sinks", [0, 3])
def test_states_of_the_last_tokens_alone(sinks):
    model, tokens = random_model(), random_tokens()
    expected = in_blocks(CachedForward(model, L, sinks, batch=2), tokens, 20)
    cached = CachedForward(model, L, sinks, batch=2)
    got = [cached(block, first) for block, first in zip(tokens.split(10, 1), (0, 10, 3, 10, 2), strict=True)]
    assert [part.size(1) for part in got] == [10, 0, 7, 0, 5]
    for part, end in zip(got, (10, 20, 30, 40, 47), strict=True):
        torch.testing.assert_close(part, expected[:, end - part.size(1) : end], rtol=0, atol=1e-12)


LOOPED = {"layers": 3, "loops": 1, "loop_start": 1, "loop_end": 2}


@pytest.mark.parametrize("changes", [{}, LOOPED, {"smear": False}], ids=["all", "loops", "no smear"])
def test_depends_on_no_more_than_its_reach(changes):
    """A start that is `reach` earlier gives the state; with every part, one a token later does not."""
    n = 120
    model, tokens = random_model(**{"layers": 2, "value_layers": (1,), **changes}), random_tokens(n)
    whole = in_blocks(CachedForward(model, L, batch=2), tokens, n)[:, -1]

    def from_late_start(later):
        late = CachedForward(model, L, batch=2)
        begin = n - 1 - late.reach + later
        late.skip(begin)
        return (late(tokens[:, begin:])[:, -1] - whole).abs().max()

    assert from_late_start(0) < 1e-12
    if not changes:
        assert from_late_start(1) > 1e-12


def test_a_late_start_keeps_the_sinks():
    n, sinks = 150, 3
    model, tokens = random_model(layers=2, value_layers=(1,)), random_tokens(n)
    whole = in_blocks(CachedForward(model, L, sinks, batch=2), tokens, n)
    late = CachedForward(model, L, sinks, batch=2)
    late(tokens[:, :4])
    begin = n - 10 - late.reach
    late.skip(begin)
    assert (late(tokens[:, begin:])[:, -10:] - whole[:, -10:]).abs().max() < 1e-12


def test_far_along_the_stream_positions_are_still_exact():
    """Distances are all that counts: a stream that starts at 60 million gives what one that starts at 0 gives."""
    model, tokens = random_model(), random_tokens()
    expected = in_blocks(CachedForward(model, L, batch=2), tokens, 9)
    far = CachedForward(model, L, batch=2)
    far.skip(60_000_000)
    assert (in_blocks(far, tokens, 9) - expected).abs().max() < 1e-6


def test_sinks_are_whole_behind_100_000_tokens():
    model = random_model(layers=1, value_layers=(0,))
    tokens = random_tokens(100_050, batch=1)
    cached, sinks = CachedForward(model, L, 2), 2
    for block in tokens[:, :100_000].split(4096, 1):
        cached(block)
    got = cached(tokens[:, 100_000:])[:, -20:]
    fresh = CachedForward(model, L, sinks)
    fresh(tokens[:, :sinks])
    fresh.skip(100_030 - fresh.reach)
    expected = fresh(tokens[:, 100_030 - fresh.reach :])[:, -20:]
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("sinks", [0, 2])
def test_nothing_later_moves_what_is_earlier(sinks):
    model, tokens = random_model(), random_tokens()
    whole = in_blocks(CachedForward(model, L, sinks, batch=2), tokens, 8)
    for flip in (1, 7, 8, 9, 24, 46):
        changed = tokens.clone()
        changed[:, flip] = (changed[:, flip] + 1) % 37
        got = in_blocks(CachedForward(model, L, sinks, batch=2), changed, 8)
        assert torch.equal(got[:, :flip], whole[:, :flip])
        assert not torch.equal(got[:, flip], whole[:, flip])


@pytest.mark.parametrize("sinks", [0, 3])
def test_gradients_are_those_of_the_block_with_earlier_keys_as_constants(sinks):
    """Of a dense forward over the stream whose earlier keys and values are detached."""
    model, tokens = random_model(layers=3, value_layers=(1,)).requires_grad_(True), random_tokens(30)
    cached = CachedForward(model, L, sinks, batch=2)
    with torch.no_grad():
        cached(tokens[:, :21])
    cached(tokens[:, 21:]).square().sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    class Detached(Dense):
        def __call__(self, run, q, k, v, exclude_own):
            k, v = (torch.cat([x[:, :21].detach(), x[:, 21:]], 1) for x in (k, v))
            return super().__call__(run, q, k, v, exclude_own)

    states = model.states(tokens, Detached(model.config, L, sinks), torch.float64)
    states[:, 21:].square().sum().backward()
    assert len(got) > 20
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert name not in got
            continue
        # the embeddings of earlier tokens get a gradient through skips and smear only where the block looks at them
        assert (got[name] - parameter.grad).abs().max() < 1e-9 * (1 + parameter.grad.abs().max()), name


@pytest.mark.parametrize("size", [1, 16])
def test_a_saved_state_goes_on_with_the_same_bits(size):
    model, tokens = random_model().float(), random_tokens(48)
    expected = in_blocks(CachedForward(model, L, 3, batch=2), tokens, size)
    for cut in (0, 16, 32):
        before, after = (CachedForward(model, L, 3, batch=2) for _ in range(2))
        for block in tokens[:, :cut].split(size, 1) if cut else ():
            before(block)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        assert torch.equal(in_blocks(after, tokens[:, cut:], size), expected[:, cut:])


def test_memory_does_not_grow_with_the_stream():
    model = random_model(layers=1, value_layers=(0,))
    cached, sizes = CachedForward(model, L, 2), set()
    for block in random_tokens(2000, batch=1).split(8, 1):
        cached(block)
        sizes.add(cached._memory[0].recent[0].buffer.size(1))
    assert max(sizes) <= 2 * L + 8
