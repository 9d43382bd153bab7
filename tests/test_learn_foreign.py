"""Learning with other people's models: transformers through their own cache, and any module with linear layers."""

import collections
import copy
import json

import pytest
import torch
from torch import nn

from slotfast.errors import InputError
from slotfast.eval.__main__ import main
from slotfast.foreign.models import language_model
from slotfast.learn import Lora, learn
from slotfast.learn.layers import linear_layers

from .models import random_model
from .test_foreign_stream import LONGEST, OWN, WINDOW, V, build

ROW = "learn:chunk=8,lr=0.01,rank=2"
ALL = "learn:chunk=8,lr=1e-3,what=all"
EVERY = ("q", "k", "v", "o", "up", "down", "head")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="Hugging Face models need transformers (the extra hf)")


def _tokens(n=150, vocabulary=V, seed=1):
    return torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


class Recurrent(nn.Module):
    """Somebody's model: no cache, no head apart, names of its own."""

    seq_len = 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(V, 12), nn.GRU(12, 12, batch_first=True)
        self.attention, self.dense = nn.Linear(12, 12), nn.Linear(12, V)

    def forward(self, tokens):
        return self.dense(torch.tanh(self.attention(self.mix(self.table(tokens))[0])))


# layers by kind: GPT-2's are stored the other way round, and its queries, keys and values are one matrix
LAYERS = {
    "GPT2": {"q": "c_attn", "v": "c_attn", "o": "attn.c_proj", "up": "c_fc", "down": "mlp.c_proj", "head": "lm_head"},
    "Llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "up": "gate_proj", "down": "down_proj"},
}


@pytest.mark.parametrize("family", LAYERS)
def test_projections_are_found_by_the_names_of_their_family(transformers, family):
    model = build(transformers, family)
    names = {id(module): name for name, module in model.named_modules()}
    for kind, ending in LAYERS[family].items():
        found = [names[id(layer)] for layer in linear_layers(model, (kind,))]
        assert found and any(name.endswith(ending) for name in found)
        assert len(found) == (1 if kind == "head" else 4 if ending == "gate_proj" else 2)
    assert len(linear_layers(model, EVERY)) == {"GPT2": 9, "Llama": 15}[family]


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_factors_at_zero_change_no_bit_and_others_are_a_product_added_to_the_weight(transformers, family):
    model = build(transformers, family)
    known, length = language_model(model)
    assert length == LONGEST and known.head_apart
    lora, tokens, merged = Lora(known, 2, EVERY), _tokens(20)[None], copy.deepcopy(model)
    plain = known.head(known.hidden(tokens))
    with lora.attached():
        assert torch.equal(lora.head(known, known.hidden(tokens)), plain)
    theirs = linear_layers(merged, EVERY)
    head = merged.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # the table that it was tied to stays
    with torch.no_grad():
        for layer, a, b in zip(theirs, lora.parameters[::2], lora.parameters[1::2], strict=True):
            b.normal_(0, 0.1)
            layer.weight += b @ a if isinstance(layer, nn.Linear) else (b @ a).T
        with lora.attached():
            learned = lora.head(known, known.hidden(tokens))
        torch.testing.assert_close(learned, merged(tokens).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(known.head(known.hidden(tokens)), plain)


MODELS = {
    "GPT2": (lambda transformers: build(transformers, "GPT2"), 3),
    "Llama": (lambda transformers: build(transformers, "Llama"), 3),
    "no cache": (lambda transformers: Recurrent(), 0),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", [ROW, "learn:chunk=8,lr=0.01,steps=2,what=norms", ALL])
def test_no_charge_moves_when_a_later_token_changes(transformers, name, row):
    """The stream starts again from position 0 within it, and it is charged unlearned until the first chunk ends."""
    make, sinks = MODELS[name]
    model = make(transformers).requires_grad_(False)
    if name == "no cache" and "norms" in row:
        row = row.replace("norms", "lora,rank=2")  # it has no gains but biases
    kept = [parameter.clone() for parameter in model.parameters()]
    tokens = _tokens(120)
    before = learn(model, tokens, row, window=WINDOW, sinks=sinks)
    assert torch.equal(before.nll[:8], before.unlearned[:8])
    assert bool((before.nll[8:] != before.unlearned[8:]).any())
    for flipped in (8, 49):
        other = tokens.clone()
        other[flipped] = (other[flipped] + 1) % V
        after = learn(model, other, row, window=WINDOW, sinks=sinks).nll
        assert torch.equal(before.nll[: flipped - 1], after[: flipped - 1])
        assert not torch.equal(before.nll[flipped - 1 :], after[flipped - 1 :])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))


def test_unlearned_it_is_the_stream_and_learning_learns_what_repeats(transformers):
    model = build(transformers, "Llama")
    tokens = _tokens(30).repeat(8)
    found = learn(model, tokens, "learn:chunk=10,lr=0.01,rank=4", window=WINDOW, sinks=2)
    stream = language_model(model)[0].cached_forward(WINDOW, 2, None)
    with torch.inference_mode():
        logits = model.lm_head(stream(tokens[None, :-1]))[0]
    torch.testing.assert_close(
        found.unlearned, nn.functional.cross_entropy(logits, tokens[1:], reduction="none"), rtol=1e-4, atol=1e-4
    )
    assert found.nll[120:].mean() < found.unlearned[120:].mean() - 0.5
    assert set(found.seconds) == {"learned", "on top", "unlearned"} and 1.9 < found.forwards < 2


def test_a_module_without_a_cache_has_its_window_forwarded_again():
    model, tokens = Recurrent(), _tokens(41)
    found = learn(model, tokens, ROW, window=12)
    plain = found.unlearned
    assert found.forwards == pytest.approx((8 + 8 + 4 * 12 + 3 * 12) / 40)  # no window is full in the first chunk
    for start in (0, 8, 16, 32):
        begin = max(0, start + 8 - 12)
        logits = model(tokens[None, begin : start + 8])[0, start - begin :]
        wanted = nn.functional.cross_entropy(logits, tokens[start + 1 : start + 9], reduction="none")
        torch.testing.assert_close(plain[start : start + 8], wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="has no keys that could stay"):
        learn(model, tokens, ROW, window=12, sinks=2)


@pytest.mark.parametrize("row", [ROW, f"{ROW},scope=document", f"{ROW}+causal-window"])
def test_without_a_cache_no_charge_tells_where_the_text_ends(row):
    """The last chunk is short: its window begins where a whole chunk's would."""
    model, tokens = Recurrent(), _tokens(60)
    tokens[21] = 0
    whole = learn(model, tokens, row, window=12, bos_id=0)
    for length in (2, 7, 20, 21, 22, 27, 46):
        cut = learn(model, tokens[:length], row, window=12, bos_id=0)
        for losses, shorter in ((whole.nll, cut.nll), (whole.unlearned, cut.unlearned)):
            torch.testing.assert_close(losses[: length - 1], shorter, rtol=0, atol=1e-5)


def test_the_command_learns_with_a_model_of_others(tmp_path, monkeypatch, capsys):
    """A module with a state of its own, which no gradient may follow into earlier chunks."""
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 12)
    args = ["--model", "own_models:Apart", "--text", str(text), "--stride", "16", "--preset", "learn:chunk=16,lr=0.02"]
    for forward in ("windows", "stream"):
        main([*args, "--forward", forward, "--json", "-"])
        found = json.loads(capsys.readouterr().out)["presets"][1]
        assert found["unlearned"]["gain_bpb"] > 0.1 and found["cost"]["forwards"] > 1.8
    with pytest.raises(InputError, match=r"projections=q.*no 'q' by any name known; its linear layers: out"):
        main([*args[:-1], "learn:chunk=16,projections=q"])


def test_without_the_output_matrix_factors_stand_beside_the_rest():
    assert len(linear_layers(random_model(layers=2, value_layers=(1,)), ("q", "down"))) == 4
    with pytest.raises(
        InputError, match="the model has no 'up' by any name known; its linear layers: attention, dense"
    ):
        linear_layers(Recurrent(), ("up",))
    with pytest.raises(InputError, match="the model has no 'linear layer'"):
        linear_layers(nn.Embedding(3, 3), EVERY)


class InPlace(nn.Module):
    """Somebody's stream whose state is written over, or made anew, as it is told."""

    seq_len = 32

    def __init__(self, over):
        super().__init__()
        torch.manual_seed(0)
        self.over, self.table, self.out = over, nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, tokens):
        return self.stream(tokens, None)[0]

    def stream(self, tokens, state):
        state = state or {"kept": [torch.zeros(1, 1, 8)]}
        sums = state["kept"][0] + self.table(tokens).cumsum(1)
        if self.over:
            state["kept"][0].copy_(sums[:, -1:].detach())
            return self.out(sums), state
        return self.out(sums), {"kept": [sums[:, -1:]]}


@pytest.mark.parametrize("how", ["scope=document", "steps=3", "scope=document,steps=2"])
def test_a_state_that_is_written_over_is_still_there_to_go_back_to(how):
    """Where a document ends within a chunk, and before another step: else the module would know what comes."""
    tokens, row = _tokens(60), f"{ROW},{how}"
    tokens[[13, 14, 40]] = 0
    over, anew = (learn(InPlace(over), tokens, row, window=16, bos_id=0) for over in (True, False))
    assert torch.equal(over.nll, anew.nll) and torch.equal(over.unlearned, anew.unlearned)
    tokens[15] = 1 + tokens[15] % (V - 1)
    after = learn(InPlace(True), tokens, row, window=16, bos_id=0)
    assert torch.equal(over.nll[:14], after.nll[:14]) and not torch.equal(over.nll, after.nll)


def test_layers_that_no_forward_calls_end_with_one_line():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(V, 8), nn.Linear(8, V)

        def forward(self, tokens):
            return self.table(tokens) @ self.out.weight.T

    with pytest.raises(InputError, match="preset 'learn': the model calls none of the layers that would learn"):
        learn(ByHand(), _tokens(20), "learn:chunk=8", window=16)


NO_CACHE = """
import torch
from torch import nn

class Sums(nn.Module):
    seq_len = 16

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(1024, 8), nn.Linear(8, 1024)

    def forward(self, tokens):
        return self.out(self.table(tokens).cumsum(1))
"""


def test_without_a_cache_what_learns_nothing_gains_nothing(tmp_path, monkeypatch, capsys):
    """What a token sees there follows from the row's chunks, so that each row is compared with its own forward."""
    (tmp_path / "no_cache.py").write_text(NO_CACHE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "t.jsonl"
    text.write_text("\n".join('{"text": "The quick brown fox jumps over the lazy dog."}' for _ in range(5)))
    off = [f"learn:{how},steps=0" for how in ("chunk=4", "chunk=16", "chunk=16,scope=document")]
    main(["--model", "no_cache:Sums", "--text", str(text), "--preset", *off, "learn:chunk=4,lr=0.01", "--json", "-"])
    *rows, learning = json.loads(capsys.readouterr().out)["presets"][1:]
    assert [row["unlearned"]["gain_bpb"] for row in rows] == [0, 0, 0]
    assert len({row["unlearned"]["bpb"] for row in rows}) == 3
    assert learning["unlearned"]["bpb"] == rows[0]["unlearned"]["bpb"] and learning["unlearned"]["gain_bpb"] > 0.01


class Conditioned(Recurrent):
    """Layers that are called by name, and on a vector."""

    def __init__(self):
        super().__init__()
        self.condition = nn.Linear(3, 12)

    def forward(self, tokens):
        states = self.mix(self.table(tokens))[0] + self.condition(torch.ones(3))
        return self.dense(input=torch.tanh(self.attention(input=states)))


def test_factors_stand_beside_layers_however_they_are_called():
    model, merged = Conditioned(), Conditioned()
    lora, tokens = Lora(language_model(model)[0], 2, EVERY, alpha=6), _tokens(9)[None]
    with torch.no_grad():
        for layer, a, b in zip(linear_layers(merged, EVERY), lora.values[::2], lora.values[1::2], strict=True):
            b.normal_()
            layer.weight += 3 * b @ a
        with lora.attached():
            torch.testing.assert_close(model(tokens), merged(tokens), rtol=1e-4, atol=1e-4)
    found = learn(model, tokens[0].repeat(9), ROW, window=12)
    assert found.nll[40:].mean() < found.unlearned[40:].mean()


class Streaming(InPlace):
    """Somebody's stream, and what it makes of the states and the state that it should give."""

    def __init__(self, change):
        super().__init__(False)
        self.change = change

    def stream(self, tokens, state):
        states, state = super().stream(tokens, state and state["of"])
        return self.change(states, collections.defaultdict(list, of=state))


class Held:
    def __init__(self, state):
        self.state = state

    def __getitem__(self, name):
        return self.state[name]


def test_a_state_of_a_kind_that_is_not_made_of_what_it_holds_learns_like_any_other():
    tokens = _tokens(60)
    found, plain = learn(Streaming(lambda *pair: pair), tokens, ROW), learn(InPlace(False), tokens, ROW)
    assert torch.equal(found.nll, plain.nll)


@pytest.mark.parametrize(
    ("change", "row", "said"),
    [
        (
            lambda states, state: (states[:, -1:], state),
            ROW,
            rf"gives \[1, 1, {V}\] for a stream's tokens \[1, 8\], exp",
        ),
        (lambda states, state: (states[0], state), ROW, rf"gives \[8, {V}\] for a stream's tokens \[1, 8\], expected"),
        (
            lambda states, state: states,
            ROW,
            r"fails on a stream's tokens int64 \[1, 8\]: ValueError: not enough values",
        ),
        (lambda states, state: (states, Held(state)), ALL, "fails at the pass back: RuntimeError: Trying to backward"),
        (
            lambda states, state: (states, Held(state)),
            f"{ROW},steps=2",
            "state of --model holds Held, of which no copy",
        ),
    ],
)
def test_a_stream_that_does_not_do_what_it_should_ends_with_one_line(change, row, said):
    with pytest.raises(InputError, match=said) as raised:
        learn(Streaming(change), _tokens(60), row)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "what", "said"),
    [
        (
            nn.Embedding(V, V),
            "norms",
            "what=norms: the model has no parameters besides those of linear layers and tables",
        ),
        (nn.Identity(), "all", "what=all: the model has no parameters"),
    ],
)
def test_where_nothing_could_learn_one_line_says_so(model, what, said):
    with pytest.raises(InputError, match=f"^preset 'learn': {said}$"):
        learn(model, _tokens(20), f"learn:chunk=8,what={what}", window=16)
