"""Streams of models of other projects: through transformers' cache, or a module's own state."""

import json
import sys

import pytest
import torch

from slotfast.errors import InputError
from slotfast.eval.__main__ import main
from slotfast.foreign.streams import OwnStream, TransformersStream, transformers_stream

V, LONGEST, WINDOW = 97, 64, 16
SIZES = {"vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LONGEST}
GROUPED = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
NARROW = {"sliding_window": 6, "query_pre_attn_scalar": 8}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="Hugging Face models need transformers (the extra hf)")


def build(transformers, family):
    """A tiny random model: positions learned, rotary ones, layers with windows of their own, no positions at all."""
    kinds = {
        "GPT2": lambda: transformers.GPT2Config(vocab_size=V, n_positions=LONGEST, n_embd=32, n_layer=2, n_head=4),
        "Llama": lambda: transformers.LlamaConfig(**GROUPED),
        "Qwen3": lambda: transformers.Qwen3Config(**GROUPED),
        "Gemma2": lambda: transformers.Gemma2Config(**GROUPED, **NARROW),
        "Mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=6),
        "Bloom": lambda: transformers.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
        "Mamba": lambda: transformers.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kinds[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # small random weights would hide who attends to what
                parameter.mul_(4)
    return model


def read(stream, tokens, block):
    with torch.inference_mode():
        return torch.cat([stream(part) for part in tokens.split(block, 1)], 1)


def alone(model, tokens, place, period, sinks):
    """The last token's states, of one forward with a dense mask over what it may see since the model's last start."""
    start = place // period * period
    begin = max(0, start - (WINDOW - 1)) if start else 0
    kept = [*range(min(sinks, begin)), *range(begin, place + 1)]
    at = torch.tensor(kept)
    visible = (at <= at[:, None]) & ((at[:, None] - at < WINDOW) | (at < sinks))
    mask = torch.zeros(len(at), len(at)).masked_fill(~visible, -1e9)[None, None]
    with torch.inference_mode():
        out = model.base_model(tokens[:, at], attention_mask=mask, position_ids=torch.arange(len(at))[None])
    return out[0][0, -1]


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Qwen3"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_stream_is_a_dense_forward_since_the_last_start(transformers, family, sinks):
    model = build(transformers, family)
    tokens = torch.randint(V, (1, 170), generator=torch.Generator().manual_seed(1))
    stream = transformers_stream(model, model.base_model, LONGEST, WINDOW, sinks)
    whole = read(stream, tokens, 170)
    for place in (0, 5, WINDOW, stream.period - 1, stream.period, 2 * stream.period + 9, 169):
        torch.testing.assert_close(
            whole[0, place], alone(model, tokens, place, stream.period, sinks), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2", "Mistral"])
def test_blocks_of_any_size_and_a_saved_state_change_nothing(transformers, family):
    model = build(transformers, family)
    tokens = torch.randint(V, (1, 170), generator=torch.Generator().manual_seed(2))

    def fresh():
        return TransformersStream(model, model.base_model, LONGEST, WINDOW, 2)

    whole = read(fresh(), tokens, 170)
    for block in (1, 7, 60):
        torch.testing.assert_close(read(fresh(), tokens, block), whole, rtol=1e-4, atol=1e-4)
    first, second = fresh(), fresh()
    read(first, tokens[:, :103], 103)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(read(second, tokens[:, 103:], 67), whole[:, 103:], rtol=1e-4, atol=1e-4)
    late = fresh()  # a rank that begins as far back as `reach` says, having read the sinks
    read(late, tokens[:, :2], 2)
    late.skip(150 - late.reach)
    torch.testing.assert_close(
        read(late, tokens[:, 150 - late.reach :], 9)[:, -20:], whole[:, 150:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["Bloom", "Mamba"])
def test_a_model_whose_cache_is_something_else_is_refused(transformers, family):
    model = build(transformers, family)
    with pytest.raises(InputError, match="does not read through a cache as it reads a whole text"):
        transformers_stream(model, model.base_model, LONGEST, WINDOW)


def test_too_few_positions_are_refused(transformers):
    model = build(transformers, "Llama")
    with pytest.raises(InputError, match=r"windows of 33 tokens need 66 positions, the model has 64; use --seq-len 32"):
        transformers_stream(model, model.base_model, LONGEST, 33)


OWN = '''
import torch
from torch import nn

class Means(nn.Module):
    """Logits of the mean of all embeddings so far: a stream's state is their sum and number."""
    seq_len = 32

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(1024, 8), nn.Linear(8, 1024)

    def forward(self, tokens):
        return self.stream(tokens, None)[0]

    def stream(self, tokens, state):
        total, count = (0.0, 0) if state is None else state
        sums = total + self.embed(tokens).cumsum(1)
        counts = count + torch.arange(1, 1 + tokens.size(1))
        return self.out(sums / counts[:, None]), (sums[:, -1:], count + tokens.size(1))

class Apart(Means):
    def hidden(self, tokens):
        return self.stream(tokens, None)[0]

    def head(self, hidden):
        return self.out(hidden)

    def stream(self, tokens, state):
        total, count = (0.0, 0) if state is None else state
        sums = total + self.embed(tokens).cumsum(1)
        counts = count + torch.arange(1, 1 + tokens.size(1))
        return sums / counts[:, None], (sums[:, -1:], count + tokens.size(1))

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Embedding(1024, 1024)

    def forward(self, tokens):
        return self.out(tokens)
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "streaming.py").write_text(OWN)
    (tmp_path / "t.txt").write_text("To be or not to be, that is the question. " * 20)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("streaming", None)


def run(capsys, project, *arguments):
    main([*arguments, "--text", str(project / "t.txt"), "--stride", "8", "--preset", "causal", "--json", "-"])
    return json.loads(capsys.readouterr().out)


def test_a_module_with_a_stream_of_its_own(project, capsys):
    """Its stream sees everything; a block a token apart and one for all of the text score alike."""
    found = [
        run(capsys, project, "--model", f"streaming:{name}", "--forward", "stream", "--block-tokens", block)
        for name, block in (("Means", "5"), ("Means", "4000"), ("Apart", "64"))
    ]
    losses = [each["presets"][row]["adapted"]["nats"] for each in found for row in (0, 1)]
    assert losses == pytest.approx(losses[:2] * 3, rel=1e-5)
    windows = run(capsys, project, "--model", "streaming:Means")  # without a calibration, auto is windows
    assert windows["forward"] == "windows" and found[0]["forward"] == "stream"
    assert windows["base"]["nats"] != pytest.approx(losses[0], rel=1e-4)


def test_what_a_module_s_own_stream_cannot_do_is_refused(project):
    common = ["--text", str(project / "t.txt"), "--stride", "8", "--forward", "stream", "--preset", "none"]
    with pytest.raises(InputError, match=r"sinks 2: the model's own stream\(tokens, state\) decides what it keeps"):
        main([*common, "--model", "streaming:Means", "--sinks", "2"])
    with pytest.raises(InputError, match=r"streaming:Plain has no stream\(tokens, state\)"):
        main([*common, "--model", "streaming:Plain"])
    stream = OwnStream(lambda tokens, state: (tokens, object()))
    stream(torch.zeros(1, 2))
    with pytest.raises(InputError, match="the stream's state of --model holds object"):
        stream.state_dict()
