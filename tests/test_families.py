"""Five families of Hugging Face models, each with a strided, a streamed and a learned number by one command."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slotfast.calibrate import main as calibrate
from slotfast.eval.__main__ import main

from .folders import V, write_folder

POSITIONS, LENGTH, STRIDE = 128, 48, 16
TEXTS = ["The king — naïve as he is — sails with 日本 over the sea. " * 3, "Into the dark wood.", "x" * 70]
SIZES = {"vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
GROUPED = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "GPT2": {"vocab_size": V, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "Llama": GROUPED,
    "Qwen3": GROUPED,
    "Gemma2": {**GROUPED, "sliding_window": 20, "query_pre_attn_scalar": 8},
    "GPTNeoX": {**SIZES, "hidden_size": 32, "intermediate_size": 48},
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="Hugging Face models need transformers (the extra hf)")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**CONFIGS[request.param])
    write_folder(folder, transformers.AutoModelForCausalLM.from_config(config))
    (folder / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    return folder


def run(folder, capsys, *arguments):
    """The result of the one command that a user types."""
    main(["--model", str(folder), "--text", str(folder / "t.jsonl"), *map(str, arguments), "--json", "-"])
    return json.loads(capsys.readouterr().out)


def by_hand(folder, length, stride):
    """Bits per byte of windows, by transformers alone: `length` positions, `stride` of them new."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([token for text in TEXTS for token in (tokenizer.bos_token_id, *tokenizer.encode(text))])
    nats, scored = 0.0, 0
    for start in range(0, len(ids), stride):
        window = ids[start : start + length + 1]
        with torch.inference_mode():
            losses = F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none").double()
        nats += float(losses[scored - start :].sum())
        scored = start + len(window) - 1
        if scored == len(ids) - 1:
            return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    raise AssertionError("windows end where the text does")


def test_windows_with_a_stride(folder, capsys):
    found = run(folder, capsys, "--seq-len", LENGTH, "--stride", STRIDE, "--preset", "causal")
    assert found["base"]["bpb"] == pytest.approx(by_hand(folder, LENGTH, STRIDE), rel=1e-5)
    assert found["text"]["exact"] and found["adapted"]["gain_bpb"] > 1  # of random weights
    short = run(folder, capsys, "--preset", "none")  # without more said: the model's own length
    assert short["plan"]["seq_len"] == POSITIONS
    assert short["base"]["bpb"] == pytest.approx(by_hand(folder, POSITIONS, 64), rel=1e-5)


@pytest.mark.parametrize("arguments", [("--forward", "stream"), ("--preset", "learn:chunk=16")])
def test_a_stream_has_half_of_the_positions_where_nothing_is_said(folder, capsys, arguments):
    found = run(folder, capsys, *arguments)
    assert found["plan"]["seq_len"] == POSITIONS // 2
    assert any(f"windows have {POSITIONS // 2} of the model's {POSITIONS} positions" in note for note in found["notes"])


def test_a_calibration_with_nothing_said(folder, capsys):
    """Windows of the model's own length, as no stream has such."""
    lines = (json.dumps({"text": f"{n} ships sail over the sea, and {n} more do. " * 4}) for n in range(40))
    (folder / "like.jsonl").write_text("\n".join(lines))
    calibrate(["--model", str(folder), "--text", str(folder / "like.jsonl"), "--out", str(folder / "c.json")])
    assert "forwards not compared" in capsys.readouterr().out
    found = run(folder, capsys, "--calibration", folder / "c.json", "--preset", "causal")
    assert found["calibrated"] and found["forward"] == "windows" and found["plan"]["seq_len"] == POSITIONS


def test_every_token_once_and_learned_from(folder, capsys):
    """What learns is measured against the very stream that the other command scores."""
    common = ("--seq-len", LENGTH, "--stride", STRIDE)
    streamed = run(folder, capsys, *common, "--forward", "stream", "--block-tokens", 37)
    assert streamed["forward"] == "stream" and np.isfinite(streamed["base"]["bpb"])
    learned = run(folder, capsys, *common, "--preset", "learn:chunk=8,lr=0.01,rank=4")
    (row,) = (row for row in learned["presets"] if row["preset"].startswith("learn"))
    assert row["unlearned"]["bpb"] == pytest.approx(streamed["base"]["bpb"], rel=1e-4)
    assert row["unlearned"]["gain_bpb"] > 0.1
