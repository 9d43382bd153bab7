"""Calibration of `learn`: within its trials it finds what gains, or answers off, and the preset uses it."""

import json

import numpy as np
import pytest
import torch

from slotfast.calibrate import calibrate_learning
from slotfast.calibrate.learning import _Trial
from slotfast.data import ByteTable, Text, TokenStream
from slotfast.errors import InputError
from slotfast.eval.learning import LearningPass, grouped
from slotfast.learn import OnTop, calibrated_row, learn, make_loop, parse_row
from slotfast.slot import Calibration
from slotfast.worker import ALONE

from .models import random_model

V, BOS = 37, 5
BYTES = ByteTable(np.ones(V, np.int64), np.zeros(V, bool), np.arange(V) == BOS)


def _text(repeats):
    """Documents of one phrase that comes back, or of tokens drawn alike."""
    rng = np.random.default_rng(0)
    phrase = rng.integers(6, V, 12)
    pieces = [[BOS, *(phrase if repeats else rng.integers(6, V, 12))] for _ in range(30)]
    return Text(TokenStream([np.concatenate(pieces)]), BYTES, BOS)


@pytest.fixture(scope="module")
def model():
    return random_model(layers=2, value_layers=(1,))


def test_what_gains_is_found_within_the_trials_and_used(model):
    found = calibrate_learning(model, _text(True), trials=5, window=16)
    assert found["trials"] == 5 and found["steps"] == 1 and found["gain_bpb"] > 2 * found["gain_se"] > 0
    stored = {"calibration": {"learn": found}}
    row = calibrated_row(parse_row("learn"), stored)
    assert all(getattr(row, key) == found[key] for key in ("what", "lr", "chunk", "decay", "optimizer"))
    tokens = torch.from_numpy(_text(True).stream.read(0, 391))
    losses = learn(model, tokens, row, window=16)
    gain = float((losses.unlearned - losses.nll).sum()) / np.log(2) / BYTES.count(tokens[1:], tokens[:-1]).sum()
    assert gain == pytest.approx(found["gain_bpb"], rel=1e-6)
    one = calibrate_learning(model, _text(True), trials=1, window=16)
    assert one["trials"] == 1 and one["gain_bpb"] <= found["gain_bpb"] and (one["what"], one["lr"]) == ("lora", 5e-4)


def test_all_that_was_chosen_is_used_from_json_too(model):
    """Whatever learns, with the optimiser's numbers; and nothing is forgotten where no token starts a document."""
    found = {"what": "all", "chunk": 8, "optimizer": "adamw", "lr": 0.01, "decay": 0.0, "steps": 1}
    found |= {"betas": (0.0, 0.999), "eps": 1e-5, "forget": 0.9}
    row = calibrated_row(parse_row("learn"), json.loads(json.dumps({"calibration": {"learn": found}})))
    assert {key: getattr(row, key) for key in found} == found
    text = _text(True)
    bare = Text(text.stream, text.byte_table, None)
    assert not calibrate_learning(model, bare, trials=2, window=16)["forget"]
    assert {"betas", "eps", "forget"} <= calibrate_learning(model, text, trials=1, window=16).keys()


def test_below_counts_the_gain_is_what_learning_adds_to_them(model):
    """A phrase that comes back is soon counted, which leaves less of it to learn."""
    text, calibration = _text(True), Calibration()
    alone = calibrate_learning(model, text, trials=1, window=16)
    below = calibrate_learning(model, text, trials=1, window=16, row="learn+causal", calibration=calibration)
    assert (alone["row"], below["row"], below["lr"]) == ("learn", "learn+causal", alone["lr"])
    nats = []
    for name in ("learn:chunk=16,steps=0+causal", "learn:chunk=16+causal"):
        (rows,) = grouped([parse_row(name)], calibration)
        loop = make_loop(model, rows[0], 16, bos_id=BOS, on_top=OnTop.of(rows, 16, calibration, BOS))
        nats.append(LearningPass(loop, rows, text).run().meter.nats[1].sum())
    gain = (nats[0] - nats[1]) / np.log(2) / text.bytes_of(text.stream.read(0, len(text.stream))).sum()
    assert below["gain_bpb"] == pytest.approx(gain, rel=1e-6) and below["gain_bpb"] < alone["gain_bpb"]


def test_what_shorter_chunks_do_to_counts_is_no_gain_of_learning(model):
    """Learning at next to no rate: all that shorter chunks gain or lose, counts do."""
    trial = _Trial(
        model, _text(True), parse_row("learn+causal").top, None, parse_row("learn:chunk=16"), 16, 0, ALONE, False
    )
    numbers = parse_row("learn:chunk=2,what=all,optimizer=sgd,lr=1e-12")
    assert abs(trial(numbers).gain_bpb) > 0.01 and abs(trial.beside_its_chunks(numbers).gain_bpb) < 1e-6


def test_what_gains_nothing_is_off(model):
    found = calibrate_learning(model, _text(False), trials=1, window=16)
    off = calibrated_row(parse_row("learn"), {"calibration": {"learn": found | {"steps": 0}}})
    tokens = torch.from_numpy(_text(False).stream.read(0, 200))
    losses = learn(model, tokens, off, window=16)
    assert torch.equal(losses.nll, losses.unlearned) and losses.forwards == 1


def test_numbers_of_the_row_stand_and_those_of_another_optimiser_are_none_for_it():
    stored = {"calibration": {"learn": {"what": "all", "optimizer": "sgd", "lr": 0.02, "chunk": 32, "decay": 0.0}}}

    def row(text):
        return calibrated_row(parse_row(text).model_copy(update={"name": text}), stored)

    assert (row("learn+causal").lr, row("learn+causal").chunk) == (0.02, 32)
    assert (row("learn:lr=0.1").lr, row("learn:lr=0.1").what) == (0.1, "all")
    assert (row("learn:what=lora").lr, row("learn:what=lora").chunk) == (5e-4, 64)
    assert calibrated_row(parse_row("learn"), {}) == parse_row("learn")
    other = parse_row("lora-doc")
    assert calibrated_row(other, stored) is other


def test_numbers_that_do_not_go_with_what_a_row_says_are_none_for_it():
    """All weights cannot learn in slots, and have no rank: such a row stays as it is, and says what it does."""
    stored = {"calibration": {"learn": {"what": "all", "optimizer": "sgd", "lr": 0.02, "chunk": 32, "steps": 0}}}
    for text in ("learn:scope=document,slots=4", "learn:keys=recompute", "learn:rank=8", "learn:betas=0.9+0.9"):
        row = parse_row(text).model_copy(update={"name": text})
        assert calibrated_row(row, stored) is row


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"rank": 10**9}, "rank: expected at most 1024"),
        ({"chunk": 1 << 40}, "chunk: expected at most 131072"),
        ({"lr": float("nan")}, "lr: "),
        ({"what": "everything"}, "what: expected 'all', 'lora' or 'norms'"),
        ({"steps": "many"}, "steps: "),
        ([3], "expected numbers by name"),
    ],
)
def test_numbers_of_a_file_that_no_row_can_have_end_with_one_line(numbers, words):
    with pytest.raises(InputError) as caught:
        calibrated_row(parse_row("learn"), {"calibration": {"learn": numbers}})
    assert words in str(caught.value) and "\n" not in str(caught.value)
