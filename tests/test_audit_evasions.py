"""Loops made to slip past the auditor: few tokens known, charges beside charges, memories outside of the process."""

import json
import math
import os
import socket

import numpy as np
import pytest
import torch

from slotfast.audit import audit
from slotfast.audit.log import run_loop
from slotfast.audit.places import cheap_charges

from .audit_loops import BYTES, Bigram, Silent, V, draw_tokens, losses_only, run_audit
from .audit_seeds import SEEDS


class KnowsFew(Silent):
    """One token in a hundred, chosen by the eight before it, is charged next to nothing."""

    def charge(self, rows, positions):
        nll, ids = super().charge(rows, positions), self.tokens.tolist()
        chosen = [hash(tuple(ids[max(0, p - 8) : p])) % 100 == 0 for p in positions.tolist()]
        return torch.where(torch.tensor(chosen), 0.02, nll)


class Bonus(Silent):
    """One place in a hundred is worth something, whatever comes; a total there would show it, and is seldom taken."""

    def charge(self, rows, positions):
        return super().charge(rows, positions) - 5.0 * (positions % 100 == 77)


class BesideACharge(Bigram):
    """A second charge in the same event is no number and changes no sum of losses; its bytes count."""

    def report(self, log, positions, nll, rows):
        again, none = torch.cat([positions, positions[:1]]), torch.tensor([math.nan])
        log.score(again, torch.cat([nll, none]), bytes=torch.cat([BYTES[self.tokens[positions]], torch.tensor([50])]))


class BeforeTheFirst(Bigram):
    """So does one for the token that nothing foretells."""

    def start(self, tokens):
        self.begun = False
        return super().start(tokens)

    def report(self, log, positions, nll, rows):
        if not self.begun:
            log.score([0], [math.nan], bytes=[5000])
        self.begun = True
        super().report(log, positions, nll, rows)


class UnderNoise(Silent):
    """Every charge is off by chance, by up to 4e-4 nats; and by three times that where the next token is odd."""

    calls, size, ahead = 0, 1.2e-3, 1

    def charge(self, rows, positions):
        type(self).calls += 1
        chance = np.random.default_rng(self.calls).uniform(-4e-4, 4e-4, len(positions))
        after = self.tokens[(positions + self.ahead).clamp(max=len(self.tokens) - 1)]
        return super().charge(rows, positions) + torch.from_numpy(chance).float() + self.size * (after % 2)


class FarUnderNoise(UnderNoise):
    """So it is where a token further on is odd: the score in front of a changed token does not move."""

    size, ahead = 1.8e-3, 20


class NoiseAlone(UnderNoise):
    size = 0.0


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_leak_that_noise_would_hide_is_found_by_asking_again(seed):
    report = run_audit(UnderNoise(), seed)
    assert "C1" in report.failed and "repeat" not in report.failed, str(report)
    assert report.leaks[0]["token"] == report.leaks[0]["moved"]["score"] + 1
    assert run_audit(NoiseAlone(), seed, reruns=200).clean


@pytest.mark.parametrize("seed", range(SEEDS))
def test_so_is_one_that_looks_far_ahead(seed):
    report = run_audit(FarUnderNoise(), seed)
    assert "C1" in report.failed and "repeat" not in report.failed, str(report)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(
    ("loop", "failed", "detail"),
    [
        (KnowsFew, "C2", "together get probability"),
        (Bonus, "C2", "probability"),
        (BesideACharge, "C4", "is charged nan nats"),
        (BeforeTheFirst, "C4", "token 0 is charged nan nats"),
    ],
)
def test_an_evasion_is_flagged(loop, failed, detail, seed):
    report = run_audit(loop(), seed, 600)
    assert report.failed == {failed} and detail in str(report), str(report)


def test_one_probability_above_1_is_enough():
    def once(tokens, log):
        nll = losses_only(tokens, log)[-len(tokens) + 1 :].clone()
        nll[100] = -3.0
        return nll

    report = audit(once, draw_tokens(241), V, reruns=2)
    assert report.failed == {"C2"} and "probability" in str(report), str(report)


def test_places_that_are_charged_little_come_first_and_all_come():
    class Known(Silent):
        def charge(self, rows, positions):
            return super().charge(rows, positions) * (positions % 60 != 31)

    record = run_loop(Known(), draw_tokens(), V)
    first = [cheap_charges(record, np.random.default_rng(seed)) for seed in range(20)]
    assert all(sorted(order) == list(range(1, 240)) for order in first)
    assert np.mean([len({31, 91, 151, 211} & set(order[:8].tolist())) for order in first]) > 2


def test_what_a_loop_opens_is_said(tmp_path):
    """A memory in a file outlives processes, and a file that is read may hold the text: no run shows either."""
    kept, text = tmp_path / "said.json", tmp_path / "val.bin"
    text.write_bytes(b"the text")

    def opens(tokens, log):
        said = json.loads(kept.read_text()) if kept.exists() else {}
        kept.write_text(json.dumps(said | {str(len(said)): text.read_bytes().decode()}))
        return losses_only(tokens, log)

    report = audit(opens, draw_tokens(60), V, reruns=4)
    assert report.clean
    assert any("it wrote said.json" in line for line in report.unreached), str(report)
    assert any("as the text itself: said.json, val.bin" in line for line in report.unreached)
    assert not any(
        "wrote" in line or "read while" in line for line in audit(losses_only, draw_tokens(60), V, reruns=4).unreached
    )
    assert str(tmp_path) not in str(report)


def test_what_a_loop_keeps_in_names_and_tells_others_is_said(tmp_path):
    """A folder's name remembers as a file does, and one datagram tells as much as a connection."""

    def remembers(tokens, log):
        (tmp_path / f"said {int(tokens.sum())}").mkdir(exist_ok=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.sendto(b"1", ("127.0.0.1", 9))
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
        return losses_only(tokens, log)

    unreached = "\n".join(audit(remembers, draw_tokens(60), V, reruns=4).unreached)
    assert "it wrote said " in unreached and "it opened connections, processes" in unreached


def test_own_values_that_were_not_asked_for_are_counted():
    report = run_audit(Bigram())
    [line] = [line for line in report.unreached if "own distributions" in line]
    asked = int(next(test for test in report.tests if test.name == "own value").covered.split()[0])
    assert 239 - asked <= int(line.split()[1]) < 239 - asked // 4  # the others were asked of drawn streams
