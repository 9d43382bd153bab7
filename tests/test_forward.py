"""Windows or stream: what is chosen, what is refused, and what a calibration finds."""

import json

import numpy as np
import pytest
import torch

from slotfast.audit import Hints, audit_rows
from slotfast.audit.own import OwnLoop
from slotfast.audit.streams import Stream, synthetic
from slotfast.calibrate import compare_forwards
from slotfast.config import EvalSettings
from slotfast.data import ByteTable, Text, TokenStream
from slotfast.errors import InputError
from slotfast.eval import SlidingPass, Streaming
from slotfast.eval.__main__ import main
from slotfast.eval.inputs import Sources, choose_rows, read_inputs
from slotfast.eval.setup import choose_plan, choose_streaming
from slotfast.model import GPT, GPTConfig
from slotfast.slot import PRESETS, Adapter, Calibration, parse_preset
from slotfast.windows import Plan
from slotfast.worker import Worker
from tests.models import random_model, write_tiny

V, L, BOS = 32, 16, 1
BYTES = ByteTable(np.ones(V, np.int64), np.zeros(V, bool), np.arange(V) < 2)


def documents(count=12, length=60, seed=0):
    rng = np.random.default_rng(seed)
    return TokenStream([np.concatenate([np.r_[BOS, rng.integers(3, V, length)] for _ in range(count)])])


def needs_a_sink() -> GPT:
    """A model whose heads look at the first token of what they see, and predict token 2, wrongly, where it is gone.

    The first position alone has the bigram hash's last bucket, which marks it in dimension 1. Every key is a mixture of
    the mark and of dimension 0, which all positions share; queries look for the mark, and its value is zero.
    """
    config = GPTConfig(
        vocab_size=V, seq_len=L, layers=1, width=8, heads=1, kv_heads=1, mlp_width=4, rope_dims=0, rope_length=64,
        xsa_layers=0, ln_scale=False, unet=False, smear=False, bigram_buckets=7, bigram_width=1, value_width=0,
        softcap=0.0, qk_gain=12.0, tied=False,
    )  # fmt: skip
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        model.tok_emb.weight[:, 0] = 1.0
        model.bigram.embed.weight[-1] = 1.0
        model.bigram.proj.weight[1] = 40.0  # times the hash's scale of 0.05
        attention, block = model.blocks[0].attn, model.blocks[0]
        attention.c_q.weight[1, 0] = attention.c_k.weight[1, 1] = attention.c_k.weight[0, 0] = 1.0
        attention.c_v.weight[2, 0], attention.c_v.weight[2, 1] = 1.0, -0.5
        attention.proj.weight[2, 2] = 10.0
        block.resid_mix[0] = 1.0
        model.lm_head.weight[2, 2] = 5.0
    return model.eval().requires_grad_(False)


def test_a_model_that_needs_a_sink_gets_one():
    stream = documents()
    plan = Plan(len(stream) - 1, L, 4)
    found = compare_forwards(needs_a_sink(), Text(stream, BYTES, BOS), plan, batch_windows=8)
    assert (found["forward"], found["sinks"]) == ("stream", 4)
    assert abs(found["difference_bpb"]) < 1e-4


def test_a_model_that_a_stream_breaks_keeps_windows(monkeypatch):
    monkeypatch.setattr("slotfast.calibrate.fit.SINKS", (0,))
    stream = documents()
    plan = Plan(len(stream) - 1, L, 4)
    found = compare_forwards(needs_a_sink(), Text(stream, BYTES, BOS), plan, batch_windows=8)
    assert (found["forward"], found["sinks"]) == ("windows", 0)
    assert found["difference_bpb"] > 1.0 and found["difference_bpb"] > 2 * found["difference_se"]


def test_without_a_standard_error_windows_stay(tiny_model):
    stream = documents(count=1)
    found = compare_forwards(tiny_model, Text(stream, BYTES, BOS), Plan(len(stream) - 1, L, 4), batch_windows=8)
    assert found["forward"] == "windows" and found["difference_se"] is None


def choose(*arguments, world=1, calibration=None):
    settings = EvalSettings(max_tokens=400, **dict(arguments))
    inputs = read_inputs(settings.pick(Sources))
    inputs.artifact.metadata["calibration"] = calibration
    return choose_streaming(
        settings, choose_rows(settings.preset), inputs, choose_plan(settings, inputs), Worker(world=world)
    )


FOUND = {"forward": {"forward": "stream", "sinks": 4, "difference_bpb": 0.0, "difference_se": 0.1}}


def test_auto_follows_the_calibration_but_for_published_presets_and_other_lengths():
    assert choose(calibration=FOUND).sinks == 4
    assert choose() is None
    assert choose(calibration={"forward": {"forward": "windows", "sinks": 0}}) is None
    assert choose(("preset", ["none", "pr1350-window"]), calibration=FOUND) is None
    assert choose(("preset", ["causal:scale=1"]), calibration=FOUND).sinks == 4
    assert choose(("seq_len", 64), calibration=FOUND) is None
    assert choose(("preset", ["ttt-549"]), calibration=FOUND) is None
    assert choose(("forward", "windows"), calibration=FOUND) is None


def test_what_is_asked_for_comes_before_what_was_found():
    way = choose(("forward", "stream"), ("sinks", 2), ("block_tokens", 33), calibration=FOUND)
    assert (way.sinks, way.block_tokens) == (2, 33)
    assert choose(("forward", "stream"), ("preset", ["pr1350-window"])).sinks == 0


def test_settings_of_a_stream_without_one_are_refused():
    with pytest.raises(InputError, match=r"--sinks 3: is for a stream"):
        choose(("forward", "windows"), ("sinks", 3))
    with pytest.raises(InputError, match=r"--forward stream: preset 'ttt-549' forwards windows"):
        choose(("forward", "stream"), ("preset", ["ttt-549"]))


@pytest.mark.parametrize("flags", [[], ["--weights", "int6"], ["--dtype", "float64"]])
def test_the_command_streams(tmp_path, capsys, flags):
    """The same text both ways; a random model's losses differ by what a window's start sees."""
    write_tiny(tmp_path / "a.slotfast")
    common = ["--artifact", str(tmp_path / "a.slotfast"), "--max-tokens", "900", "--preset", "none", "causal", *flags]
    results = {}
    for way in ("windows", "stream"):
        out = tmp_path / f"{way}.json"
        files = ["--json", str(out), "--per-token", str(tmp_path / f"{way}.npz")]
        main([*common, "--forward", way, *files, *(["--sinks", "1"] if way == "stream" else [])])
        results[way] = json.loads(out.read_text())
        shown = capsys.readouterr().out
        assert "every token once, 1 sink" in shown if way == "stream" else "each recomputed" in shown
    windows, stream = results["windows"], results["stream"]
    assert (stream["forward"], stream["sinks"], stream["presets"][1]["forward"]) == ("stream", 1, "stream")
    assert stream["tokens"] == windows["tokens"] == 899 and stream["bytes"] == windows["bytes"]
    assert stream["base"]["bpb"] == pytest.approx(windows["base"]["bpb"], rel=0.02)
    positions = [np.load(tmp_path / f"{way}.npz")["position"] for way in results]
    np.testing.assert_array_equal(*positions)


@pytest.mark.parametrize("sinks", [0, 3])
def test_the_auditor_passes_a_stream_and_every_causal_preset_on_it(tiny_model, sinks):
    """Blocks end inside windows, batches and ranks; a leak of the stream's own would fail every row."""
    rng, hints = np.random.default_rng(2), Hints(32, 4, 8, 2)
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    names = ["none", "causal", "causal-unigram", "causal-window", "causal-lbfgs", "pr1350"]
    rows = {name: PRESETS[name] for name in names}
    loop = OwnLoop(tiny_model, rows, Calibration(), table, 1, hints, streaming=Streaming(sinks, 12))
    reports = audit_rows(
        loop, names, Stream(synthetic(160, 64, 1, rng), 64, 1),
        byte_rule=loop.byte_rule, hints=hints, seeds=[0], reruns=12,
    )  # fmt: skip
    assert [report.clean for report in reports] == [True, True, True, True, True, False]


@pytest.mark.parametrize("way", [None, Streaming(0, 7)], ids=["windows", "stream"])
@pytest.mark.parametrize("length", [40, 41, 5000])
def test_a_window_longer_than_the_stream_computes_no_more_than_the_stream(monkeypatch, way, length):
    model = random_model(rope_length=8)  # longer windows have another rotary base
    tokens = np.random.default_rng(0).integers(0, 37, 41)
    stream, plan = TokenStream([tokens]), Plan(40, length, 16)
    padded = torch.from_numpy(np.r_[tokens, np.zeros(max(length - 41, 0), np.int64)])[None]
    logits = model.head(model.hidden(padded[:, :length]))[0, :40]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]), reduction="none")
    forwarded, states = [], GPT.states
    monkeypatch.setattr(GPT, "states", lambda self, t, *a, **k: forwarded.append(t.numel()) or states(self, t, *a, **k))
    rows = [Adapter(parse_preset(name), Calibration(None), BOS) for name in ("causal", "pr1350-window")]
    table = ByteTable(np.ones(37, np.int64), np.zeros(37, bool), np.zeros(37, bool))
    options = {"batch_windows": 1, "streaming": way, "worker": Worker(dtype=torch.float64)}
    found = []
    SlidingPass(model, Text(stream, table, BOS), plan, rows, **options).run(on_scored=found.append)
    nll = np.concatenate([part.nll for part in found], 1)
    np.testing.assert_allclose(nll[0], expected.numpy(), rtol=1e-9)
    np.testing.assert_array_equal(nll[2], nll[0])  # nothing to fit to
    assert sum(forwarded) <= 2 * 41 and nll.shape == (3, 40)


def test_a_length_beyond_the_training_and_a_default_stride_within_it(tmp_path, capsys):
    write_tiny(tmp_path / "m")
    given = ["--artifact", str(tmp_path / "m"), "--max-tokens", "40", "--preset", "none", "--json", "-"]
    main([*given, "--seq-len", "70"])
    found = json.loads(capsys.readouterr().out)
    assert "windows have 70 positions, and the model was trained on 64 (--seq-len)" in found["notes"]
    for length in (1, 64):
        main([*given, "--seq-len", str(length)])
        found = json.loads(capsys.readouterr().out)
        assert found["plan"]["stride"] == length and not any("trained on" in note for note in found["notes"])
    with pytest.raises(InputError, match="stride 64: expected 1 to the sequence length 8"):
        main([*given, "--seq-len", "8", "--stride", "64"])
