"""The auditor's parts: what is counted, drawn, bet on, and where streams are altered."""

import contextlib
import math
import random

import numpy as np
import pytest
import torch

from slotfast.audit import Hints, audit, checks
from slotfast.audit.checks.bets import Gamblers
from slotfast.audit.checks.future import pairs
from slotfast.audit.log import Log, read_log, run_loop
from slotfast.audit.places import places
from slotfast.audit.streams import Source, Stream, alter
from slotfast.errors import InputError

from .audit_loops import BOS, EVENT, Bigram, V, draw_tokens


def test_pairs_are_counted_as_they_are():
    tokens = draw_tokens(40)
    source = Source(Stream(tokens, V, BOS), np.random.default_rng(0))
    kinds = ("resample", "random", "copy", "echo", "delete", "scramble")
    probes = [alter(source, tokens, "", kinds[i % 6], 3 + 5 * i) for i in range(7)]
    counted = set()
    for probe in probes:
        changed = (probe.tokens != tokens).nonzero()[:, 0].tolist()
        assert changed[0] == probe.at
        counted |= {(c, i) for c in changed for i in range(1, probe.at)}
    assert pairs(40, probes, tokens.numpy()) == (len(counted), 39 * 38 // 2)


@pytest.mark.parametrize("uniform", [False, True])
def test_tokens_are_drawn_with_the_chances_they_say(uniform):
    rng = np.random.default_rng(1)
    tokens = torch.tensor([0, 3, 1, 3, 1, 3])
    source = Source(Stream(tokens, 4, 0), rng)
    counts, chance = np.zeros(4), np.zeros(4)
    for _ in range(4000):
        token, log_chance = source.draw(tokens, 1, torch.tensor([2]), uniform)
        counts[token] += 1
        chance[token] = np.exp(log_chance[0])
    assert counts[2] == 0 and chance.sum() == pytest.approx(1)
    np.testing.assert_allclose(counts / 4000, chance, atol=0.03)


def test_bets_win_against_totals_above_one_only():
    rng = np.random.default_rng(0)
    tokens = draw_tokens(400)
    source = Source(Stream(tokens, V, BOS), rng)
    won = []
    for factor in (1.0, 1.3):
        bets = Gamblers(len(tokens), V)
        for _ in range(20):
            drawn, chance = source.draw(tokens[:1], 300)
            stream = torch.cat([tokens[:1], drawn])
            log = Log()
            log.score(np.arange(1, 301), np.full(300, math.log(V) - math.log(factor)))
            bets.play(read_log(log, stream, V), 1, chance)
        won.append(bets.proven)
    assert won == [False, True] and bets.average == pytest.approx(1.3, rel=0.1)


def test_every_kind_of_place_is_where_it_should_be():
    record = run_loop(Bigram(), draw_tokens(), V)
    found = places(record, BOS, Hints(seq_len=32, stride=8, batch_windows=2, ranks=2), np.random.default_rng(0))
    taken = {kind: {next(where) for _ in range(400)} for kind, where in found.items()}
    near = {kind: {p for p in at if p - 1 in at and p + 1 in at} for kind, at in taken.items()}
    assert near["event border"] == set(range(1 + EVENT, 240, EVENT))
    assert near["document border"] >= set((np.flatnonzero(record.tokens[3:-1] == BOS) + 3).tolist())
    assert near["window border"] >= set(range(33, 238, 8)) and near["batch border"] <= near["window border"]
    assert near["rank border"] == {33 + 12 * 8} and len(near["batch border"]) == 13
    assert taken["far end"] == {238, 239} and min(taken["anywhere"]) < 5 and max(taken["anywhere"]) > 234
    assert all((p - 1) % EVENT for p in taken["inside an event"])


@pytest.mark.parametrize("fails", [False, True])
def test_an_audit_leaves_the_global_generators_as_they_were(fails):
    def draw():
        return random.random(), np.random.random(), float(torch.rand(()))

    def loop(tokens, log):
        drawn.add(draw())
        return 1 / 0 if fails else torch.full((len(tokens),), math.log(V))

    drawn = set()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(InputError) if fails else contextlib.nullcontext():
        audit(loop, draw_tokens(40), V, reruns=2, fresh=lambda: loop)
    assert draw() == expected and len(drawn) == 1  # every run begins alike


def test_a_check_is_one_class_in_one_list(monkeypatch):
    class Infrequent(checks.Check):
        """Nobody charges more than one token in an event."""

        longest = 0

        def see_run(self, record):
            self.longest = max(self.longest, np.bincount(record.event[1:]).max())

        def tests(self):
            verdict = "FAIL" if self.longest > 1 else "PASS"
            return [checks.Test("one by one", verdict, (), detail=f"{self.longest} tokens", looks_like="batches")]

    monkeypatch.setattr("slotfast.audit.engine.CHECKS", (*checks.CHECKS, Infrequent))
    report = audit(Bigram(), draw_tokens(), V, reruns=2)
    assert report.tests[-1].verdict == "FAIL" and report.leaks[-1]["looks_like"] == "batches"
    assert f"one by one: {EVENT} tokens" in str(report) and report.clean  # it speaks about no condition
