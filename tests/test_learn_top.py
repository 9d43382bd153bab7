"""Rows on top of one that learns: counts of learned probabilities, taken in at chunk ends, afresh where learning is."""

import json

import numpy as np
import pytest
import torch

from slotfast.audit import Hints, audit_rows
from slotfast.audit.own import OwnLoop
from slotfast.audit.streams import Stream, synthetic
from slotfast.data import ByteTable
from slotfast.errors import InputError
from slotfast.eval.__main__ import main
from slotfast.learn import OnTop, learn, make_loop, parse_row
from slotfast.slot import Calibration

from .models import random_model
from .test_learn import BOS, WINDOW, V, _tokens
from .test_learn_eval import ROW, _args, small  # noqa: F401

COUNTED = "learn:chunk=8,lr=0.02,rank=2+causal-unigram:scale=1,k=2,decay=0.99"
TOPS = ("causal", "causal-window", "causal-lbfgs:focal=6,positions=focal")


@pytest.fixture(scope="module")
def model():
    return random_model(layers=2, value_layers=(1,))


def _logprobs(model, tokens, row):
    parts = []
    loop = make_loop(model, parse_row(row), WINDOW, 2, BOS, keep_logprobs=True)
    loop.run(lambda start, stop: tokens.numpy()[start:stop], len(tokens) - 1, parts.append)
    return [(part.start, part.logprobs) for part in parts]


@pytest.mark.parametrize("scope", ["stream", "document", "document,slots=2,keys=recompute"])
def test_counts_are_those_of_learned_probabilities_and_refresh_at_chunk_ends(model, scope):
    tokens, row = _tokens(), COUNTED.replace("rank=2", f"rank=2,scope={scope}")
    found = learn(model, tokens, row, window=WINDOW, sinks=2, bos_id=BOS)
    counts, expected = torch.zeros(2, V, dtype=torch.float64)
    for start, logprobs in _logprobs(model, tokens, row.partition("+")[0]):
        targets = tokens[start + 1 : start + 1 + len(logprobs)]
        if "document" in scope and tokens[start] == BOS:
            counts, expected = torch.zeros(2, V, dtype=torch.float64)
        bias = ((counts + 2) / (expected + 2)).log().clamp(-5, 5)
        adjusted = torch.log_softmax(logprobs + bias, -1)
        wanted = -adjusted[torch.arange(len(targets)), targets]
        torch.testing.assert_close(found.nll[start : start + len(targets)], wanted, rtol=0, atol=1e-9)
        for target, row_logprobs in zip(targets, logprobs, strict=True):
            keep = 0.99 * (0.1 if target == BOS else 1)
            counts, expected = keep * counts, keep * expected
            # what a token adds is decayed by those behind it alone
            counts[target] += 1
            expected += row_logprobs.exp()


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("scope", ["stream", "document"])
def test_no_charge_on_top_moves_when_a_later_token_changes(model, top, scope):
    tokens, row = _tokens(), f"learn:chunk=4,lr=0.02,what=norms,scope={scope}+{top}"
    before = learn(model, tokens, row, window=WINDOW, bos_id=BOS).nll
    plain = learn(model, tokens, row.partition("+")[0], window=WINDOW, bos_id=BOS).nll
    assert torch.equal(before[:1], plain[:1]) and not torch.equal(before, plain)
    for flipped in (9, 22, 33):
        other = tokens.clone()
        other[flipped] = BOS if flipped in (22, 33) else 6 + (int(tokens[flipped]) + 1) % (V - 6)
        after = learn(model, other, row, window=WINDOW, bos_id=BOS).nll
        assert torch.equal(before[: flipped - 1], after[: flipped - 1])
        assert not torch.equal(before[flipped - 1 :], after[flipped - 1 :])


@pytest.mark.parametrize("top", TOPS)
def test_what_is_on_top_goes_on_from_its_state(top):
    """Half of the chunks, saved and read back: the other half has the same bits."""
    logits = torch.randn(48, V, generator=torch.Generator().manual_seed(0))
    targets = _tokens(48)
    first, second = (OnTop.of([parse_row(f"learn:chunk=8+{top}")], 24, bos_id=BOS) for _ in range(2))
    halves = [torch.cat([first.charge(logits[at : at + 8], targets[at : at + 8])[0] for at in range(0, 24, 8)], 1)]
    second.load_state_dict(first.state_dict(), targets[:24].numpy(), "cpu")
    for at in (24, 32, 40):
        pieces = [each.charge(logits[at : at + 8], targets[at : at + 8])[0] for each in (first, second)]
        assert torch.equal(*pieces)
    assert float(halves[0].sum()) > 0


def test_rows_that_learn_alike_share_a_pass(small, tmp_path, capsys, monkeypatch):  # noqa: F811
    made = []
    monkeypatch.setattr(
        "slotfast.eval.program.make_loop",
        lambda *args, **options: made.append(make_loop(*args, **options)) or made[-1],
    )
    rows = [f"{ROW}+causal", ROW, f"{ROW}+causal-window"]
    main(
        _args(
            small, "--json", "-", "--per-token", tmp_path / "rows.npz", "--plot", tmp_path / "p.png", "--preset", *rows
        )
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(capsys.readouterr().out)["presets"]
    assert len(made) == 1 and [row["preset"] for row in found] == ["none", *rows]
    counted, plain, window = found[1:]
    assert counted["resolved_preset"]["top"]["optimizer"] == "rates" and counted["resolved_preset"]["top"]["scale"]
    assert "top" not in plain["resolved_preset"] and "on_top_seconds" in counted["cost"]
    assert counted["causal"] and "; on top, causal: " in counted["why"]
    losses = np.load(tmp_path / "rows.npz")
    for row in found[2:]:
        total = losses[f"adapted_nll:{row['preset']}"].sum(dtype=np.float64)
        assert total == pytest.approx(row["adapted"]["nats"])
    main(_args(small, "--json", "-", "--preset", rows[0]))
    alone = json.loads(capsys.readouterr().out)["presets"][1]
    assert alone["adapted"]["nats"] == counted["adapted"]["nats"] != plain["adapted"]["nats"]
    assert len({row["adapted"]["nats"] for row in (counted, plain, window)}) == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("causal+learn", "in ROW+ROW the first learns"),
        ("causal+causal", "in ROW+ROW the first learns"),
        ("learn+learn", "'learn' on top learns too"),
        ("learn+none", "'none' on top: expected a row that counts"),
        ("learn+pr1350", "'pr1350' on top: expected a row that counts"),
        ("learn+pr1217-window", "'pr1217-window' on top: expected a row that counts"),
        ("learn+cuasal", "'cuasal': no such preset; the nearest is causal"),
        ("learn+causal:rank=3", "'rank' does nothing here"),
        ("learn:top=causal", "'top' does nothing here"),
    ],
)
def test_rows_that_do_not_go_on_top_end_with_one_line(row, words):
    with pytest.raises(InputError) as caught:
        parse_row(row)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_pluses_within_values_join_nothing():
    row = parse_row("learn:betas=0.8+0.9,lr=1e-3+causal-unigram:scale=1")
    assert (row.betas, row.lr, row.top.scale, row.top.parameter) == ((0.8, 0.9), 1e-3, 1, "bias")
    assert parse_row("causal-unigram:parameter=bias+repeats").parameter == "bias+repeats"
    assert parse_row("learn+causal-unigram:parameter=bias+repeats").top.parameter == "bias+repeats"


class RefreshedTooSoon(OnTop):
    """Counts of a chunk, before it is charged."""

    def charge(self, logits, targets, *options):
        super().charge(logits, targets)
        return super().charge(logits, targets, *options)


def test_the_auditor_measures_what_is_computed(tiny_model, monkeypatch):
    rows = {name: parse_row(f"learn:chunk=16,lr=0.01,rank=4+{name}") for name in ("causal",)}
    rows["documents"] = parse_row("learn:chunk=16,lr=0.01,what=norms,scope=document+causal")
    rows["broken"] = rows["causal"].model_copy(update={"name": "broken"})
    monkeypatch.setattr(
        "slotfast.audit.own.OnTop.of",
        lambda rows, window, *more: (RefreshedTooSoon if rows[0].name == "broken" else OnTop)(
            [row.top for row in rows], window, rows[0].chunk, *more
        ),
    )
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    loop = OwnLoop(tiny_model, rows, Calibration(), table, 1, Hints(32, 8, 4, 2))
    stream = Stream(synthetic(66, 64, 1, np.random.default_rng(0)), 64, 1)
    reports = audit_rows(loop, list(rows), stream, byte_rule=loop.byte_rule, hints=loop.hints, seeds=[0], reruns=3)
    for report in reports:
        assert rows[report.name].compliance.causal
        assert report.clean == (report.name != "broken"), str(report)
