"""Calibration: what it stores is used, what does not gain is off, what cannot work is refused."""

import json
import re
from importlib import resources

import numpy as np
import pytest
import torch

from slotfast.artifact import Artifact, read_artifact, write_artifact
from slotfast.calibrate import CLOSED_GATES, calibrate, main
from slotfast.command import progress
from slotfast.data import ByteTable, Text, Tokenizer, TokenStream
from slotfast.errors import InputError
from slotfast.model import GPT, GPTConfig
from slotfast.slot import Calibration, parse_preset

V, BOS = 64, 1
BYTES = ByteTable(np.ones(V, np.int64), np.zeros(V, bool), np.arange(V) == BOS)


def _stream(documents=12, repeat=True, seed=0):
    """Documents whose phrases come back, or of tokens drawn alike."""
    rng = np.random.default_rng(seed)
    phrases, pieces = rng.integers(4, V, (6, 12)), []
    for _ in range(documents):
        body = [phrases[rng.integers(6)] if repeat else rng.integers(4, V, 12) for _ in range(12)]
        pieces += [[BOS], *body]
    return TokenStream([np.concatenate(pieces)])


class Uniform(torch.nn.Module):
    """A model that knows nothing: every token is as likely as any other."""

    config = GPTConfig(vocab_size=V, seq_len=32)

    def hidden(self, tokens, dtype=None, first=0, length=None):
        return torch.zeros(*tokens.shape, V)[:, first:]

    def head(self, hidden):
        return hidden


def test_repeats_are_on_where_text_repeats_and_off_where_it_does_not():
    on = calibrate(Uniform(), Text(_stream(), BYTES, BOS), None, stride=8)
    assert on["gates"] != CLOSED_GATES and on["repeats_gain_bpb"] > max(1.0, 2 * on["repeats_gain_se"])
    off = calibrate(Uniform(), Text(_stream(repeat=False), BYTES, BOS), None, stride=8)
    assert off["gates"] == CLOSED_GATES and off["tokens"] == on["tokens"]


def test_one_document_cannot_be_cross_validated():
    assert calibrate(Uniform(), Text(_stream(1), BYTES, BOS), None, stride=8)["gates"] == CLOSED_GATES


def test_stored_numbers_are_those_that_run():
    stored = {"scale": 0.4, "decay": 0.99, "gates": [[-1.0, 0.5]] * 6}
    row = Calibration.stored(None, {"calibration": stored}).resolve(parse_preset("causal"))
    assert (row.scale, row.decay) == (0.4, 0.99) and [list(gate) for gate in row.gates] == stored["gates"]
    assert Calibration.stored(None, {}).resolve(parse_preset("causal:decay=0.9")).decay == 0.9
    shipped = read_artifact(resources.files("slotfast") / "demo" / "demo.slotfast")
    row = Calibration.stored(shipped.unigram, shipped.metadata).resolve(parse_preset("causal"))
    assert row.scale == shipped.metadata["calibration"]["scale"] and row.gates[0][0] < 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    tokenizer = resources.files("slotfast") / "demo" / "demo.model"
    (folder / "t.model").write_bytes(tokenizer.read_bytes())
    config = GPTConfig(
        seq_len=64, layers=1, width=16, heads=2, kv_heads=1, mlp_width=16, rope_dims=4, bigram_buckets=0, value_width=0
    )
    metadata = {"tokenizer_sha256": Tokenizer(folder / "t.model").sha256}
    write_artifact(folder / "m", Artifact.from_model(GPT(config), metadata))
    lines = [
        json.dumps({"text": f"The {n}th of these pages says what all others say, no more. " * 12}) for n in range(6)
    ]
    (folder / "t.jsonl").write_text("\n".join(lines))
    (folder / "one.txt").write_text("a")
    (folder / "empty.jsonl").write_text("\n".join(['{"text": ""}'] * 2000))
    return folder


def _arguments(files, **changes):
    given = {"artifact": "m", "tokenizer": "t.model", "text": "t.jsonl", "out": "c"} | changes
    return [part for name, value in given.items() for part in (f"--{name}", str(files / value))]


def test_the_command_writes_the_same_model_calibrated(files, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    main(_arguments(files))
    before, after = read_artifact(files / "m"), read_artifact(files / "c")
    assert after.metadata["calibration"]["tokens"] > 1000 and before.metadata["calibration"] is None
    said = capsys.readouterr()
    assert "calibrated on" in said.out
    assert "t.jsonl, on cpu: windows and streams, then rates and repeats\n" in said.err
    for unit in (
        "windows",
        "windows as a stream with 0 sinks",
        "windows as a stream with 4 sinks",
        "windows with rates",
    ):
        assert re.search(rf"^\d+ of \d+ {unit}, about \d+ s left$", said.err, re.M), unit
    for name, tensor in before.model().state_dict().items():
        assert torch.equal(tensor, after.model().state_dict()[name])


def test_numbers_of_learn_are_chosen_for_the_row_that_is_asked_for(files, capsys):
    main([*_arguments(files, out="l"), "--forward", "stream", "--learn-trials", "2", "--learn-row", "learn+causal"])
    found = read_artifact(files / "l").metadata["calibration"]["learn"]
    assert (found["row"], found["trials"]) == ("learn+causal", 2)
    assert "bpb for learn+causal here; 2 trials" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--learn-row 'learn\+none': expected 'learn' or 'learn\+causal'"):
        main([*_arguments(files, out="never"), "--learn-row", "learn+none"])


def test_what_cannot_work_is_one_line(files, tmp_path):
    for changes, message in (
        ({"text": "one.txt"}, "1 document, 2 tokens; calibration needs 2 and 1,000"),
        ({"text": "empty.jsonl"}, "stands for no bytes"),
        ({"text": "nothing.txt"}, "nothing.txt"),
    ):
        with pytest.raises(InputError, match=message):
            main(_arguments(files, **changes, out="never"))
        assert not (files / "never").exists()
    with pytest.raises(InputError, match="--artifact .* or --model: one of them is needed"):
        main(["--text", str(files / "t.jsonl"), "--out", str(files / "never")])
    artifact = read_artifact(files / "m")
    other = Artifact(artifact.config, artifact.tensors, {"tokenizer_sha256": "0" * 64}, artifact.unigram)
    write_artifact(files / "other", other)
    with pytest.raises(InputError, match="the model needs 1024 pieces, SHA-256 000000000000"):
        main(_arguments(files, artifact="other", out="never"))
