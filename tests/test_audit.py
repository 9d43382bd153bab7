"""The auditor: loops that leak in one way each, loops that do not, and what the command says about them."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from slotfast import config
from slotfast.artifact import Artifact, write_artifact
from slotfast.audit import Hints, audit, audit_rows
from slotfast.audit.__main__ import main
from slotfast.audit.checks import Bets, pairs
from slotfast.audit.engine import Auditor
from slotfast.audit.findings import Budget
from slotfast.audit.own import OwnLoop
from slotfast.audit.places import places
from slotfast.audit.record import Log, read_log, run_loop
from slotfast.audit.report import judge
from slotfast.audit.streams import Source, alter, synthetic
from slotfast.data import ByteTable, write_shard
from slotfast.errors import InputError
from slotfast.slot import PRESETS, Adaptation, Calibration

V, BOS, EVENT = 24, 0, 16
BYTES = torch.arange(V) % 5


def _tokens(n=240, seed=0):
    return synthetic(n, V, BOS, np.random.default_rng(seed))


class Bigram:
    """Scores events of 16 tokens with smoothed bigram counts of the events before; a subclass spoils one step."""

    distributions, event = True, EVENT

    def __call__(self, tokens, log):
        self.tokens, self.counts = tokens, self.start(tokens)
        for begin in range(1, len(tokens), self.event):
            positions = torch.arange(begin, min(begin + self.event, len(tokens)))
            rows = self.rows(positions)
            nll = self.charge(rows, positions)
            self.report(log, positions, nll, rows if self.distributions else None)
            self.learn(self.counts, positions)
            log.update(positions)
        return self.end(log)

    def start(self, tokens):
        return torch.full((V, V), 0.3)

    def rows(self, positions):
        counts = self.counts[self.tokens[positions - 1]]
        return (counts / counts.sum(1, keepdim=True)).log()

    def charge(self, rows, positions):
        return -rows.gather(1, self.tokens[positions][:, None])[:, 0]

    def report(self, log, positions, nll, rows):
        log.score(positions, nll, bytes=BYTES[self.tokens[positions]], logprobs=rows)

    def learn(self, counts, positions):
        counts.index_put_((self.tokens[positions - 1], self.tokens[positions]), torch.ones(len(positions)), True)

    def end(self, log):
        return None

    def tilted(self, rows, index, tokens, by=1.0):
        """Rows with the logits of some tokens raised; still distributions."""
        rows = rows.clone()
        rows[index, tokens] += by
        return rows.log_softmax(1)


class Silent(Bigram):
    distributions = False


class SharedBatch(Silent):
    """The state of an event is shared by its windows, and holds what they are about to score."""

    def rows(self, positions):
        counts = self.counts
        self.counts = counts.clone()
        self.learn(self.counts, positions)
        rows, self.counts = super().rows(positions), counts
        return rows


class NextToken(Silent):
    """Each distribution has seen the token after its own."""

    def chosen(self, positions):
        return positions + 1 < len(self.tokens)

    def rows(self, positions):
        rows = super().rows(positions)
        index = self.chosen(positions).nonzero()[:, 0]
        return self.tilted(rows, index, self.tokens[positions[index] + 1])


class NextEvent(NextToken):
    """Only the last token of an event sees the first of the next."""

    def chosen(self, positions):
        return (positions % EVENT == 0) & (positions + 1 < len(self.tokens))


class NextDocument(NextToken):
    """Only the last token of a document sees that the next one starts."""

    def chosen(self, positions):
        after = (positions + 1).clamp(max=len(self.tokens) - 1)
        return (self.tokens[after] == BOS) & (positions + 1 < len(self.tokens))


class NextRank(NextToken):
    """Only where the second of two ranks begins."""

    def chosen(self, positions):
        return positions == len(self.tokens) // 2 - 1


class OneEvent(NextToken):
    """Only within a single event."""

    def chosen(self, positions):
        return (positions // EVENT == 5) & (positions % EVENT > 0)


class Pooled(NextToken):
    """Blocks of four tokens see their last one."""

    def rows(self, positions):
        rows = Bigram.rows(self, positions)
        last = (positions // 4 * 4 + 3).clamp(max=len(self.tokens) - 1)
        index = (last > positions).nonzero()[:, 0]
        return self.tilted(rows, index, self.tokens[last[index]])


class WholeStream(Silent):
    """Counts start from the statistics of the stream."""

    def start(self, tokens):
        return super().start(tokens) + 0.2 * torch.bincount(tokens, minlength=V)


class LastToken(Silent):
    """Everything knows how the stream ends."""

    def start(self, tokens):
        counts = super().start(tokens)
        counts[:, tokens[-1]] += 0.5
        return counts


class NextDocumentLength(Silent):
    """A document's first token knows how long it is."""

    def rows(self, positions):
        rows, begins = super().rows(positions), self.tokens[positions - 1] == BOS
        for i in begins.nonzero()[:, 0].tolist():
            after = (self.tokens[positions[i] :] == BOS).nonzero()
            length = int(after[0]) if len(after) else 99
            rows[i] = (rows[i] * (1 + length / 100)).log_softmax(0)
        return rows


class Denominator(Silent):
    """Counts are divided by a number of distinct tokens that includes those being scored."""

    def rows(self, positions):
        kinds = len(self.tokens[positions].unique())
        return (super().rows(positions) * (1 + 1 / kinds)).log_softmax(1)


class OwnToken(Bigram):
    """The distribution is tilted towards the token that comes, and still sums to 1."""

    def rows(self, positions):
        return self.tilted(super().rows(positions), torch.arange(len(positions)), self.tokens[positions])


class SilentOwnToken(OwnToken):
    distributions = False


class Bucket(Silent):
    """A cache keyed by context and target adds what it finds, unnormalised."""

    def charge(self, rows, positions):
        mine = super().charge(rows, positions)
        key = self.counts[self.tokens[positions - 1], self.tokens[positions]]
        return torch.where(key > 1, (mine.exp().reciprocal() * 0.5 + 0.5).log().neg(), mine)


class RealisedTemperature(Silent):
    """Only the logit of the token that came is rescaled."""

    def charge(self, rows, positions):
        own = rows.gather(1, self.tokens[positions][:, None])[:, 0]
        return -(own * 0.8 - torch.log(1 - own.exp() + (own * 0.8).exp()))


class Focal(Silent):
    """A training loss in place of the charge."""

    def charge(self, rows, positions):
        nll = super().charge(rows, positions)
        return (1 - (-nll).exp()) ** 2 * nll


class OtherCharge(Bigram):
    """Honest distributions beside another charge."""

    def charge(self, rows, positions):
        return 0.98 * super().charge(rows, positions)


class Unnormalised(Bigram):
    """A bonus added after normalisation."""

    def rows(self, positions):
        rows = super().rows(positions)
        rows[:, 3] += 0.2
        return rows


class Narrow(Bigram):
    """A distribution over part of the vocabulary."""

    def report(self, log, positions, nll, rows):
        log.score(positions, nll, logprobs=rows[:, :-1])


class OracleMin(Silent):
    """The better of two predictors, chosen when the token is known."""

    def charge(self, rows, positions):
        return super().charge(rows, positions).clamp(max=math.log(V))


class BestOfEvent(Silent):
    """The better of two temperatures for an event, chosen by its score."""

    def charge(self, rows, positions):
        both = [super(BestOfEvent, self).charge((rows * t).log_softmax(1), positions) for t in (0.7, 1.3)]
        return min(both, key=lambda nll: float(nll.sum()))


class UpdateFirst(Bigram):
    """An update is reported before its tokens are charged."""

    def report(self, log, positions, nll, rows):
        log.update(positions[:1])
        super().report(log, positions, nll, rows)


class Rescored(Bigram):
    """The stream is charged a second time with what was learnt."""

    def end(self, log):
        positions = torch.arange(1, len(self.tokens))
        log.score(positions, self.charge(self.rows(positions), positions))


class Backwards(Bigram):
    """The second half is scored first."""

    def report(self, log, positions, nll, rows):
        self.held = [*getattr(self, "held", []), (positions, nll, rows)]

    def end(self, log):
        half = len(self.held) // 2
        for positions, nll, rows in self.held[half:] + self.held[:half]:
            super().report(log, positions, nll, rows)
        self.held = []


class CutTail(Bigram):
    """The last, incomplete event is left out."""

    def report(self, log, positions, nll, rows):
        if len(positions) == self.event:
            super().report(log, positions, nll, rows)


class DocumentBegins(Silent):
    """The two tokens behind a BOS are charged too little, whatever they are."""

    def charge(self, rows, positions):
        near = (self.tokens[positions - 1] == BOS) | (self.tokens[(positions - 2).clamp(min=0)] == BOS)
        return super().charge(rows, positions) * torch.where(near, 0.7, 1.0)


class EventBegins(Silent):
    """The first token of an event is charged too little."""

    def charge(self, rows, positions):
        nll = super().charge(rows, positions)
        nll[0] *= 0.9
        return nll


class HalfPrecision(Bigram):
    """Charges are a hundredth too small, which distributions in half precision do not show."""

    def report(self, log, positions, nll, rows):
        log.score(positions, 0.99 * nll, logprobs=rows.bfloat16())


class HiddenRows(Bigram):
    """No distribution comes with every eighth token, and those are charged too little."""

    def report(self, log, positions, nll, rows):
        chosen = positions % 8 == 3
        log.score(positions, torch.where(chosen, 0.95, 1.0) * nll, logprobs=rows.masked_fill(chosen[:, None], math.nan))


class NotANumber(Silent):
    """The worst charges are left out of a mean that skips what is no number."""

    no_number = math.nan

    def charge(self, rows, positions):
        nll = super().charge(rows, positions)
        return torch.where(nll > 4, self.no_number, nll)


class Infinite(NotANumber):
    no_number = -math.inf


class SpaceTwice(Bigram):
    """A byte too many for some tokens."""

    def report(self, log, positions, nll, rows):
        tokens = self.tokens[positions]
        log.score(positions, nll, bytes=BYTES[tokens] + (tokens % 7 == 3), logprobs=rows)


class Remembers(Bigram):
    """State is kept between calls."""

    kept = None

    def start(self, tokens):
        self.kept = super().start(tokens) if self.kept is None else self.kept
        return self.kept


LEAKS = {
    SharedBatch: {"C1", "C3"},
    NextToken: {"C1"},
    NextEvent: {"C1"},
    NextDocument: {"C1"},
    NextRank: {"C1"},
    OneEvent: {"C1"},
    Pooled: {"C1"},
    WholeStream: {"C1", "C3"},
    LastToken: {"C1"},
    NextDocumentLength: {"C1"},
    Denominator: {"C1"},
    OwnToken: {"C1", "C2", "C3"},
    SilentOwnToken: {"C2"},
    Bucket: {"C2"},
    RealisedTemperature: {"C2"},
    Focal: {"C2"},
    OtherCharge: {"C2"},
    Unnormalised: {"C2"},
    Narrow: {"C2"},
    OracleMin: {"C2"},
    BestOfEvent: {"C1"},
    DocumentBegins: {"C2"},
    EventBegins: {"C2"},
    HalfPrecision: {"C2"},
    HiddenRows: {"C2"},
    UpdateFirst: {"C3"},
    Rescored: {"C4"},
    Backwards: {"C4"},
    CutTail: {"C4"},
    NotANumber: {"C4"},
    Infinite: {"C4"},
    SpaceTwice: {"bytes"},
    Remembers: {"repeat"},
}


def _bytes(tokens):
    return BYTES[tokens]


def _audit(loop, seed=0, n=240, **options):
    return audit(loop, _tokens(n, seed), V, byte_counts=_bytes, bos_id=BOS, seeds=[seed], **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__)
def test_a_leak_is_flagged_with_its_condition(leak, seed):
    # a leak of one event in fifteen takes more looking
    seeds = [seed, seed + 100, seed + 200] if leak is OneEvent else [seed]
    options = {"byte_counts": _bytes, "bos_id": BOS, "hints": Hints(ranks=2), "seeds": seeds}
    report = audit(leak(), _tokens(seed=seed), V, **options)
    assert report.failed >= LEAKS[leak], str(report)
    assert report.leaks and report.as_dict()["verdict"] == "leak"


class Ranks(Silent):
    """Two ranks, each with counts of its own from its first token on: where the second begins follows the length."""

    def rows(self, positions):
        half = len(self.tokens) // 2 // EVENT * EVENT + 1
        if positions[0] == half:
            self.counts = self.start(self.tokens)
        return super().rows(positions)


class Documents(Silent):
    """Counts that every document starts anew."""

    def rows(self, positions):
        begin = (self.tokens[: int(positions[0])] == BOS).nonzero()
        self.counts = self.start(self.tokens)
        if len(begin):
            self.learn(self.counts, torch.arange(int(begin[-1]) + 1, int(positions[0])))
        return super().rows(positions)


class Noisy(Bigram):
    """Reruns differ by a millionth of a nat."""

    size, calls = 1e-6, 0

    def charge(self, rows, positions):
        self.calls += 1
        noise = np.random.default_rng(self.calls).standard_normal(len(positions))
        return super().charge(rows, positions) + self.size * torch.from_numpy(noise)


class NoisyLeak(Noisy):
    """A leak of a ten-thousandth of a nat, from the token after the next."""

    def charge(self, rows, positions):
        after = (positions + 2).clamp(max=len(self.tokens) - 1)
        return super().charge(rows, positions) + 1e-4 * (self.tokens[after] % 3)


class Partial(SilentOwnToken):
    """Honest distributions, for every other event."""

    def report(self, log, positions, nll, rows):
        honest = positions[0] // EVENT % 2 == 0
        rows = Bigram.rows(self, positions) if honest else None
        super().report(log, positions, Bigram.charge(self, rows, positions) if honest else nll, rows)


class TooNoisy(Noisy):
    size = 0.01


class NoisyRows(OwnToken):
    """A token that never comes has a probability of chance, which makes all distributions look unsteady."""

    calls = 0

    def rows(self, positions):
        self.calls += 1
        rows = Bigram.rows(self, positions)
        rows[:, -1] = -40 - self.calls % 7
        return self.tilted(rows, torch.arange(len(positions)), self.tokens[positions], by=0.05)


class Seldom(NextToken):
    """A race: one run in ten looks ahead, all others are honest, and none repeats to the last digit."""

    calls = 0

    def start(self, tokens):
        self.calls += 1
        return super().start(tokens) + 1e-7 * (self.calls % 3)

    def chosen(self, positions):
        return super().chosen(positions) & (self.calls % 10 == 7)


class LateInADocument(NextToken):
    """Only behind 150 tokens of one document."""

    def chosen(self, positions):
        begins = (self.tokens == BOS).cumsum(0)
        return super().chosen(positions) & (positions > 150) & (begins[positions] == begins[positions - 150])


class TakesBack(Bigram):
    """What is changed after it was reported changes nothing; events may be empty, and tokens spoilt."""

    def report(self, log, positions, nll, rows):
        super().report(log, positions, nll, rows)
        log.score([], [])
        nll.zero_()
        rows.zero_()

    def end(self, log):
        self.tokens.zero_()


def losses_only(tokens, log):
    nll = torch.full((len(tokens),), math.log(V))
    return nll if len(tokens) % 2 else nll[1:]


def token_by_token(tokens, log):
    seen = torch.ones(V)
    for t in range(1, len(tokens)):
        seen[tokens[t - 1]] += 1
        log.score([t], -(seen[tokens[t]] / seen.sum()).log(), logprobs=(seen / seen.sum()).log()[None])


class NoProbability(Bigram):
    """Tokens that the stream does not have are impossible."""

    impossible = torch.arange(V) >= 20

    def rows(self, positions):
        return super().rows(positions).masked_fill(self.impossible, -math.inf).log_softmax(1)


class Half(Silent):
    """Losses in half precision."""

    def charge(self, rows, positions):
        return super().charge(rows, positions).half()


class HalfRows(Bigram):
    """Distributions in half precision."""

    def report(self, log, positions, nll, rows):
        super().report(log, positions, nll, rows.bfloat16())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "loop",
    [Bigram(), Silent(), HalfRows(), Ranks(), Documents(), Noisy(), TakesBack(), losses_only, token_by_token],
    ids=lambda loop: getattr(loop, "__name__", type(loop).__name__),
)
def test_an_honest_loop_is_clean(loop, seed):
    report = _audit(loop, seed, hints=Hints(stride=4, ranks=2))
    assert report.clean and not report.leaks, str(report)
    assert report.conditions["C1"] == report.conditions["C2"] == "PASS"


def test_a_leak_above_the_noise_is_found_and_chance_is_refused():
    noisy, leak, chance = (_audit(loop()) for loop in (Noisy, NoisyLeak, TooNoisy))
    assert noisy.clean and 1e-6 < noisy.noise < 1e-5
    assert "C1" in leak.failed and leak.noise < 1e-5
    assert "repeat" in chance.failed and chance.noise > 1e-2


def test_what_there_is_no_data_for_is_untested():
    report = audit(losses_only, _tokens(), V, bos_id=BOS)
    assert report.conditions == {"C1": "PASS", "C2": "PASS", "C3": "PASS", "C4": "UNTESTED", "bytes": "UNTESTED"}
    verdicts = {test.name: test.verdict for test in report.tests}
    assert verdicts["updates after charges"] == verdicts["charges"] == verdicts["left to right"] == "UNTESTED"
    assert any("rank border" in kind for kind in report.unreached) and "event border" in report.unreached
    # totals over 2,400 tokens are out of reach
    many = audit(lambda tokens, log: torch.full((len(tokens),), math.log(2400)), _tokens() * 100, 2400, seconds=0.02)
    assert many.conditions["C2"] == "UNTESTED"
    counted = audit(Bigram(), _tokens(), V, bos_id=BOS)
    assert counted.conditions["bytes"] == "UNTESTED" and "no byte rule" in str(counted)


def test_distributions_for_some_charges_stand_for_those_alone():
    report = _audit(Partial())
    assert "C2" in report.failed
    verdicts = {test.name: test.verdict for test in report.tests}
    assert verdicts["charges"] == verdicts["distributions"] == "UNTESTED"
    assert "only with " in str(report)


def test_a_loop_of_whole_windows_is_audited_at_its_length():
    class Whole(Silent):
        def start(self, tokens):
            assert len(tokens) == 240, "needs 240 tokens"
            return super().start(tokens)

    report = _audit(Whole())
    assert report.clean and report.conditions["C2"] == "PASS"
    assert (
        "needs 240 tokens" in str(report) and {t.name: t.verdict for t in report.tests}["stream length"] == "UNTESTED"
    )

    class WholeLeak(Whole, SilentOwnToken):
        pass

    assert _audit(WholeLeak()).failed == {"C2"}


def test_the_first_leaking_pair_is_traced_to_one_token():
    report = _audit(NextRank(), hints=Hints(ranks=2))
    leak = report.leaks[0]
    assert leak["relation"] == "future" and leak["alone"]
    tokens, middle = len(_tokens()), leak["token"]
    assert (middle, leak["moved"]["score"]) == (tokens // 2, tokens // 2 - 1) or leak["stream"] != "given"
    assert leak["moved"]["count"] == 1 and leak["moved"]["before"] != leak["moved"]["after"]
    shared = _audit(SharedBatch()).leaks[0]
    assert shared["same_event"] and "#1350" in shared["looks_like"]
    whole = _audit(WholeStream()).leaks[0]
    assert "whole stream" in whole["looks_like"]


def test_a_loop_that_repeats_what_it_said_is_found_out_by_one_made_anew():
    class Repeats(NextToken):
        """Charges a token as it did when it first met the tokens up to it."""

        def __init__(self):
            self.said = {}

        def charge(self, rows, positions):
            nll, ids = super().charge(rows, positions), self.tokens.tolist()
            said = [self.said.setdefault(tuple(ids[: p + 1]), x) for p, x in zip(positions.tolist(), nll, strict=True)]
            return torch.stack(said)

    alone, anew = _audit(Repeats(), reruns=4), _audit(Repeats(), reruns=4, fresh=Repeats)
    assert alone.conditions["C1"] == "PASS" and any("fresh=" in kind for kind in alone.unreached)
    assert anew.conditions["C1"] == "FAIL" and anew.leaks[-1]["relation"] == "fresh loops"
    honest = _audit(Bigram(), reruns=4, fresh=Bigram)
    assert honest.clean and honest.tests[-1].verdict == "PASS" and not any("memory" in x for x in honest.unreached)


@pytest.mark.parametrize("seed", range(3))
def test_noise_hides_nothing(seed):
    tokens = _tokens(seed=seed) % (V - 1)  # the last one never comes
    hidden, seldom = (audit(loop(), tokens, V, bos_id=BOS, seeds=[seed], reruns=400) for loop in (NoisyRows, Seldom))
    assert hidden.failed & {"C2", "repeat"} and hidden.conditions["C2"] != "PASS", str(hidden)
    assert seldom.failed & {"C1", "repeat"}, str(seldom)


@pytest.mark.parametrize("seed", range(3))
def test_a_long_document_is_drawn_where_the_stream_has_none(seed):
    tokens = _tokens(400, seed)
    tokens[::40] = BOS
    report = audit(LateInADocument(), tokens, V, bos_id=BOS, seeds=[seed])
    assert "C1" in report.failed and report.leaks[0]["stream"] != "given", str(report)


@pytest.mark.parametrize("seed", range(3))
def test_what_never_comes_may_have_no_probability(seed):
    tokens = synthetic(240, 20, BOS, np.random.default_rng(seed))
    report = audit(NoProbability(), tokens, V, bos_id=BOS, seeds=[seed])
    assert report.clean and report.conditions["C4"] == "PASS", str(report)
    tokens[100] = 20
    report = audit(NoProbability(), tokens, V, bos_id=BOS, seeds=[seed])
    assert report.failed == {"C4"} and "token 100 is charged inf nats; 1 such" in str(report)


@pytest.mark.parametrize("seed", range(3))
def test_half_precision_neither_clears_nor_convicts(seed):
    def losses(tokens, log):
        own = Log()
        Half()(tokens, own)
        return torch.cat([call[2] for call in own.scores])

    for loop in (Half(), losses):
        report = _audit(loop, seed)
        assert report.clean and report.conditions["C2"] == "UNTESTED" and "half precision" in str(report), str(report)
    sums = {test.name: test.verdict for test in _audit(HalfRows(), seed).tests}
    assert sums["charges"] == sums["distributions"] == sums["own value"] == "UNTESTED"
    assert sums["substituted totals"] == "PASS"


def test_of_several_loops_those_that_leak_are_run_no_further():
    loops, runs = {"leak": SharedBatch(), "honest": Silent()}, Counter()

    def run(tokens, names):
        runs.update(names)
        return {name: run_loop(loops[name], tokens, V) for name in names}

    options = {"byte_rule": None, "bos_id": BOS, "hints": None, "seeds": [0]}
    reports = audit_rows(run, list(loops), _tokens(), V, **options, reruns=40)
    assert [report.clean for report in reports] == [False, True]
    wide, runs = runs, Counter()
    reports = audit_rows(run, list(loops), _tokens(), V, **options, reruns=40, limit=1e-3)
    assert [report.clean for report in reports] == [False, True]
    assert runs["honest"] < wide["honest"]


def test_reports_repeat_with_their_seed_and_differ_without():
    def covered(seed):
        return [test.covered for test in audit(Bigram(), _tokens(), V, seeds=[seed], seconds=1e-9).tests]

    assert covered(3) == covered(3) != covered(4)


@pytest.mark.parametrize(
    ("loop", "message"),
    {
        "nothing": (lambda tokens, log: None, "reported no scores and returned nothing"),
        "too few losses": (lambda tokens, log: torch.zeros(3), r"shape \[3\]: expected .* 239 returned losses"),
        "a list of words": (lambda tokens, log: ["a"], "returned list"),
        "a position outside": (lambda tokens, log: log.score([240], [1.0]), "position 240 to 240 in a stream of 240"),
        "fewer losses": (lambda tokens, log: log.score([1, 2], [1.0]), "call 0: 1 nll for 2 positions"),
        "flat distributions": (
            lambda tokens, log: log.score([1], [1.0], logprobs=torch.zeros(V)),
            r"logprobs of shape \[24\], expected \[1, 24\]",
        ),
        "positions that are none": (lambda tokens, log: log.score([0.5], [1.0]), "positions of type torch.float"),
        "its own error": (lambda tokens, log: 1 / 0, r"failed at test_audit.py, line \d+: ZeroDivisionError: division"),
    }.values(),
)
def test_a_loop_that_cannot_be_read_is_one_line(loop, message):
    with pytest.raises(InputError, match=message) as caught:
        _audit(loop)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tokens", "vocab"), [([1, 2], 4), ([1, 2, 9], 4), ([0.5] * 9, 4), ([[1, 2, 3]], 4)])
def test_a_stream_that_does_not_fit_is_refused(tokens, vocab):
    with pytest.raises(InputError, match="expected"):
        audit(losses_only, torch.tensor(tokens), vocab)


# ---------------------------------------------------------------------------------------------------------------------
# the parts


def test_pairs_are_counted_as_they_are():
    tokens = _tokens(40)
    source = Source(tokens, V, BOS, np.random.default_rng(0))
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
    source = Source(tokens, 4, 0, rng)
    counts, chance = np.zeros(4), np.zeros(4)
    for _ in range(4000):
        token, log_chance = source.draw(tokens, 1, torch.tensor([2]), uniform)
        counts[token] += 1
        chance[token] = np.exp(log_chance[0])
    assert counts[2] == 0 and chance.sum() == pytest.approx(1)
    np.testing.assert_allclose(counts / 4000, chance, atol=0.03)


def test_bets_win_against_totals_above_one_only():
    rng = np.random.default_rng(0)
    tokens = _tokens(400)
    source = Source(tokens, V, BOS, rng)
    won = []
    for factor in (1.0, 1.3):
        bets = Bets(len(tokens), V)
        for _ in range(20):
            drawn, chance = source.draw(tokens[:1], 300)
            stream = torch.cat([tokens[:1], drawn])
            log = Log()
            log.score(np.arange(1, 301), np.full(300, math.log(V) - math.log(factor)))
            bets.play(read_log(log, stream, V), 1, chance)
        won.append(bets.proven)
    assert won == [False, True] and bets.average == pytest.approx(1.3, rel=0.1)


def test_every_kind_of_place_is_where_it_should_be():
    record = run_loop(Bigram(), _tokens(), V)
    found = places(record, BOS, Hints(seq_len=32, stride=8, batch_windows=2, ranks=2), np.random.default_rng(0))
    taken = {kind: {next(where) for _ in range(400)} for kind, where in found.items()}
    near = {kind: {p for p in at if p - 1 in at and p + 1 in at} for kind, at in taken.items()}
    assert near["event border"] == set(range(1 + EVENT, 240, EVENT))
    assert near["document border"] >= set((np.flatnonzero(record.tokens[3:-1] == BOS) + 3).tolist())
    assert near["window border"] >= set(range(33, 238, 8)) and near["batch border"] <= near["window border"]
    assert near["rank border"] == {33 + 12 * 8} and len(near["batch border"]) == 13
    assert taken["far end"] == {238, 239} and min(taken["anywhere"]) < 5 and max(taken["anywhere"]) > 234
    assert all((p - 1) % EVENT for p in taken["inside an event"])


# ---------------------------------------------------------------------------------------------------------------------
# our own loop


def test_every_preset_is_measured_as_it_is_computed(tiny_model):
    """All rows of one forward, two ranks, batches of 32 windows; few steps, as the verdict is not about numbers."""
    hints = Hints(32, 2, 32, 2)
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    few = {"steps": 2, "phases": ((2, 4),)}
    loop = OwnLoop(
        tiny_model, {name: row.model_copy(update=few) for name, row in PRESETS.items()}, Calibration(), table, 1, hints
    )
    rng = np.random.default_rng(0)
    auditor = Auditor(
        loop, list(PRESETS), synthetic(300, 64, 1, rng), 64,
        bos_id=1, hints=hints, byte_rule=loop.byte_rule, budget=Budget(10, 0.01),
    )  # fmt: skip
    found = auditor.audit([0])
    facts = {"seeds": [0], "runs": auditor.runs, "seconds": 1.0, "vocab_size": 64, "bytes_known": True}
    reports = [judge(each, **facts, fixed_length=auditor.fixed_length, ranks=2) for each in found]
    assert {report.name: report.clean for report in reports} == {
        name: row.compliance.causal for name, row in PRESETS.items()
    }, "\n".join(map(str, reports))
    for report in reports:
        assert report.conditions["C4"] == report.conditions["bytes"] == "PASS"
        assert {"C1", "C3"} <= report.failed or report.conditions["C1"] == report.conditions["C3"] == "PASS"


def _combinations(rng):
    """A row for every combination of the four choices that goes together, its numbers drawn; steps that show."""
    four = (
        ("bias", "bias+temperature", "hidden", "hidden+bias", "lowrank", "bigram", "bias+repeats"),
        ("context", "focal", "scored"),
        ("window", "batch", "joint", "prefix"),
        ("lbfgs", "adamw", "mm", "rates"),
    )
    drawn = {
        "softcap": ("after", "before"),
        "clamp": (None, 5.0, 1.0),
        "focal": (6, 12, 40),
        "batch": (2, 4, 8),
        "warm_start": ("no", "mean", "place"),
        "importance": (0.0, 0.5),
        "ridge": (0.0, 0.3, 3.0),
        "phases": (((2, 4),), ((1, 1), (2, 3))),
        "steps": (2, 3),
        "lr": (0.05, 0.2),
        "lr_end": (None, 0.01),
        "weight_decay": (0.0, 0.1),
        "start": ("zero", "random"),
        "decay": (0.9, 0.99),
        "document_decay": (0.0, 0.5),
        "scale": (0.5, 1.0),
        "k": (None, 0.5),
    }
    for choices in itertools.product(*four):
        named = dict(zip(("parameter", "positions", "scope", "optimizer"), choices, strict=True))
        for _ in range(20):  # numbers, too, may not go together
            numbers = {name: values[rng.integers(len(values))] for name, values in drawn.items()}
            try:
                yield Adaptation(name="/".join(choices), **named, **numbers)
                break
            except ValidationError:
                continue


def test_every_combination_is_measured_as_it_is_computed(tiny_model):
    rng = np.random.default_rng(1)
    rows = {row.name: row for row in _combinations(rng)}
    assert len(rows) > 50
    hints = Hints(32, 4, 8, 1)  # two batches
    table = ByteTable(np.arange(64) % 5, np.arange(64) % 3 == 0, np.arange(64) < 4)
    loop = OwnLoop(tiny_model, rows, Calibration(), table, 1, hints)
    reports = audit_rows(
        loop, list(rows), synthetic(93, 64, 1, rng), 64,
        byte_rule=loop.byte_rule, bos_id=1, hints=hints, seeds=[0], reruns=4,
    )  # fmt: skip
    wrong = [report for report in reports if report.clean != rows[report.name].compliance.causal]
    assert not wrong, "\n".join(f"{rows[report.name].summary()}\n{report}" for report in wrong)
    assert {True, False} == {report.clean for report in reports}


def test_distributions_of_our_own_pass_are_checked_where_it_keeps_them(tiny_model, monkeypatch):
    def uniform_pass(model, stream, plan, adapters, table, bos, *, rank, world, keep_logprobs=False, **_):
        def run(on_scored):
            owned, rows = plan.owned(rank, world), len(adapters) + 1
            for window in (plan[index] for index in owned):
                position = window.start + 1 + np.arange(window.context_end, window.scored_end)
                token = stream.read(int(position[0]), int(position[-1]) + 1)
                logprobs = np.full((rows, len(token), 64), -math.log(64)) if keep_logprobs else None
                nll = np.full((rows, len(token)), math.log(64))
                on_scored(SimpleNamespace(position=position, nll=nll, n_bytes=token % 5, logprobs=logprobs))

        return SimpleNamespace(run=run)

    monkeypatch.setattr("slotfast.audit.own.SlidingPass", uniform_pass)
    table = ByteTable(np.arange(64) % 5, np.zeros(64, bool), np.zeros(64, bool))
    loop = OwnLoop(tiny_model, PRESETS, Calibration(), table, 1, Hints(32, 8, 8, 2))
    tokens = synthetic(120, 64, 1, np.random.default_rng(0))
    records = loop(tokens, ["none", "causal"])
    assert all(record.rows.shape == (120, 64) and (record.charges[1:] == 1).all() for record in records.values())
    run_first = {"bos_id": 1, "hints": loop.hints, "byte_rule": loop.byte_rule, "seeds": [0]}
    for report in audit_rows(loop, ["none", "causal"], tokens, 64, **run_first, seconds=0.1):
        assert report.clean and set(report.conditions.values()) == {"PASS"}


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_model):
    """An artifact of a random model with the demo's tokenizer."""
    from slotfast.model import GPT

    torch.manual_seed(0)
    model = GPT(tiny_model.config.model_copy(update={"vocab_size": 1024})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("small") / "small.slotfast"
    write_artifact(path, Artifact.from_model(model, {}))
    return ["--artifact", str(path), "--seq-len", "16", "--reruns", "8", "--budget", "2"]


def _exit(arguments):
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_audits_our_presets(small, tmp_path, capsys):
    certificate = tmp_path / "c.json"
    assert _exit([*small, "--preset", "none", "causal", "--certificate", str(certificate)]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("no leak found") and "denominator" in out and "C2 PASS" in out
    found = json.loads(certificate.read_text())
    assert found["verdict"] == "clean" and {"slotfast", "artifact", "tokenizer"} == set(found["sha256"])
    assert found["command"].startswith("python -m slotfast.audit --artifact") and found["versions"]["torch"]
    assert [loop["loop"] for loop in found["loops"]] == ["none", "causal"] and found["loops"][0][
        "noise_floor_nats"
    ] == 0
    assert found["loops"][1]["tests"][1]["pairs"] > 1000 and len(found["stream"]["sha256"]) == 64


def test_the_command_finds_the_leaky_preset(small, capsys):
    arguments = ["--stride", "2", "--max-tokens", "200", "--preset", "pr1350", "--json", "-"]
    assert _exit([*small, *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "leak" and found["disagreements"] == []
    assert found["loops"][0]["conditions"]["C1"] == "FAIL" and found["loops"][0]["computed_causal"] is False


def test_a_preset_that_is_not_what_it_says_is_an_error(small, capsys, monkeypatch):
    honest = PRESETS["pr1350"].compliance.__class__(why="so it says")
    monkeypatch.setattr(type(PRESETS["pr1350"]), "compliance", honest)
    assert _exit([*small, "--stride", "2", "--max-tokens", "200", "--preset", "pr1350", "--batch-windows", "32"]) == 1
    assert "ERROR: preset 'pr1350': its choices say causal (so it says); measured, it leaks" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# anybody's loop, from a shell

LOOPS = """
import torch

print("a line of its own")

def clean(tokens, log):
    log.score(range(1, len(tokens)), torch.full((len(tokens) - 1,), 3.0).double().fill_(torch.tensor(16.0).log()))

def future(tokens, log):
    return torch.full((len(tokens),), 1.0 + float(tokens[-1] % 2))

memory = {}

def remembers(tokens, log):
    # knows the future of the first stream of its process, and repeats itself wherever a stream begins alike
    nll, ids = [0.0], tuple(tokens.tolist())
    for t in range(1, len(ids)):
        nll.append(memory.setdefault(ids[: t + 1], 2.8 + 0.01 * (sum(ids) % 10)))
    return torch.tensor(nll)

def broken(tokens, log):
    raise KeyError("no weights")

class Holder:
    score = staticmethod(clean)

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_loops.py").write_text(LOOPS)
    (tmp_path / "my_broken.py").write_text("import nothing_like_this")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_loops", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_anybodys_loop_from_a_shell(here):
    command = [sys.executable, "-m", "slotfast.audit", "--vocab-size", "16", "--max-tokens", "60", "--budget", "0.2"]
    environment = {"PYTHONPATH": str(Path(config.__file__).parents[2]), "PATH": ""}

    def run(*arguments):
        return subprocess.run([*command, *arguments], cwd=here, env=environment, capture_output=True, text=True)

    clean = run("--score", "my_loops:clean", "--json", "-")
    assert clean.returncode == 0 and json.loads(clean.stdout)["verdict"] == "clean", clean.stderr
    assert "a line of its own" in clean.stderr and "my_loops.py" in json.loads(clean.stdout)["sha256"]
    broken = run("--score", "my_loops:broken")
    assert broken.returncode == 2 and broken.stderr.splitlines()[-1].startswith("error: the loop failed at my_loops.py")
    assert "Traceback" not in broken.stderr
    hidden = run("--score", "my_loops:remembers", "--fresh-process")
    assert (
        hidden.returncode == 1 and "altered streams; other tokens from 30 on move the score of token 1" in hidden.stdout
    )


def test_exit_codes_and_what_is_shown(here, capsys):
    small = ["--vocab-size", "16", "--max-tokens", "60", "--budget", "0.2"]
    assert _exit([*small, "--score", "my_loops:future"]) == 1
    out = capsys.readouterr().out
    assert "LEAK: changing token 59 moves the score of token 1 " in out and "LEAK in my_loops:future" in out
    assert _exit([*small, "--score", "my_loops:Holder.score"]) == 0
    assert "no leak found; UNTESTED: bytes" in capsys.readouterr().out
    # without a process of its own, a loop that repeats itself hides what it knows
    _exit([*small, "--score", "my_loops:remembers", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["loops"][0]["conditions"]["C1"] == "PASS"
    with pytest.raises(InputError, match="the loop failed at my_loops.py, line .*KeyError: 'no weights'"):
        main([*small, "--score", "my_loops:broken", "--traceback"])
    assert "Traceback" in capsys.readouterr().err


WRONG = {
    "no function": (["--score", "my_loops"], "expected package.module:function"),
    "no module": (["--score", "my_loop:clean"], "my_loop cannot be imported: ModuleNotFoundError"),
    "a module that fails": (["--score", "my_broken:clean"], "nothing_like_this"),
    "no such function": (["--score", "my_loops:dirty"], "my_loops has no dirty"),
    "a number": (["--score", "my_loops:number"], "is int, expected a function"),
    "no vocabulary": (["--score", "my_loops:clean"], "expected --vocab-size or --tokenizer"),
    "text without a tokenizer": (
        ["--score", "my_loops:clean", "--vocab-size", "16", "--text", "x"],
        "expected --tokenizer beside it",
    ),
    "a model for somebody else's loop": (["--score", "my_loops:clean", "--artifact", "x"], "loads its own model"),
    "a vocabulary for our own": (["--vocab-size", "16"], "the model has its own"),
    "an unknown preset": (["--preset", "casual"], "the nearest is 'causal'"),
    "a batch that splits a preset's": (["--preset", "pr1350", "--batch-windows", "8"], "expected a multiple of 32"),
    "a misspelt flag": (["--scores", "x"], "the nearest is --score"),
    "nowhere to write": (["--certificate", "no/where.json"], "cannot be written"),
    "a certificate to standard output": (["--certificate", "-"], "--certificate -: expected a file"),
    "a stride beyond the window": (["--seq-len", "8", "--stride", "9"], "stride"),
    "processes for our own": (["--fresh-process"], "is for --score"),
    "a BOS outside": (
        ["--score", "my_loops:clean", "--vocab-size", "16", "--bos-id", "16"],
        "--bos-id 16: expected 0 to 15",
    ),
}


def test_the_contest_s_documents_must_have_its_bytes(here, capsys):
    write_shard(here / "val_000000.bin", np.tile([1, 400], 50_000))
    demo = str(Path(config.__file__).parents[1] / "demo" / "demo.model")
    arguments = ["--score", "my_loops:clean", "--tokenizer", demo, "--tokens", "val_*.bin", "--budget", "0.2"]
    assert _exit([*arguments, "--max-tokens", "60"]) == 1
    out = capsys.readouterr().out
    assert "50,000 documents" in out and "the contest's validation set has 151,070,000 to 151,080,000" in out


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_clear_line(here, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)


def test_variables_are_read_and_known(here, monkeypatch, capsys):
    monkeypatch.setenv("SLOT_ENABLED", "1")
    main(["--show-config"])
    out = capsys.readouterr()
    assert "--certificate" in out.out and "nothing reads" not in out.err


# ---------------------------------------------------------------------------------------------------------------------
# the catalogue of known leaks, where it is


def _catalogue():
    folder = Path(__file__).parent / "catalogue"
    if not (folder / "__init__.py").exists():
        return []
    name = "tests.catalogue"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.PATTERNS)


PATTERNS = _catalogue() or [pytest.param(None, marks=pytest.mark.skip(reason="no tests/catalogue here"))]


BUDGETS = (16, 64, 256, 1000, 4000)  # reruns: most leaks show in a few
CHANCE = {"honest when asked again", "noise to hide in"}  # about scores that do not repeat: to say so is a hit


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: getattr(pattern, "name", "none"))
def test_the_catalogue(pattern, seed):
    def byte_counts(tokens):
        return np.concatenate([[0], pattern.bytes_of(tokens[1:].numpy(), tokens[:-1].numpy())])

    options = {"byte_counts": byte_counts if pattern.bytes_of else None, "bos_id": pattern.bos_id, "seeds": [seed]}

    def audited(make, reruns):
        loop = make(seed)
        return audit(loop, pattern.tokens(seed), pattern.vocab_size, reruns=reruns, fresh=lambda: make(seed), **options)

    hits = pattern.breaks | ({"repeat"} if pattern.name in CHANCE else set())
    for reruns in BUDGETS:
        leaky = audited(pattern.leaky, reruns)
        if leaky.failed & hits:
            break
    assert leaky.failed & hits, f"{pattern.name} is missed\n{leaky}"
    clean = audited(pattern.clean, reruns)
    assert clean.clean, f"the honest form of {pattern.name} is flagged\n{clean}"
