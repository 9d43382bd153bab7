"""The auditor: loops that leak in one way each are found, with the cause; loops that do not are clean."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from slotfast.audit import Hints, audit, audit_rows
from slotfast.audit.log import Log, run_loop
from slotfast.audit.streams import Stream, synthetic
from slotfast.errors import InputError

from .audit_loops import (
    BOS,
    Backwards,
    BestOfEvent,
    Bigram,
    Bucket,
    CutTail,
    Denominator,
    DocumentBegins,
    Documents,
    EventBegins,
    Focal,
    Half,
    HalfPrecision,
    HalfRows,
    HiddenRows,
    Infinite,
    LastToken,
    LateInADocument,
    Narrow,
    NextDocument,
    NextDocumentLength,
    NextEvent,
    NextRank,
    NextToken,
    Noisy,
    NoisyLeak,
    NoisyRows,
    NoProbability,
    NotANumber,
    OneEvent,
    OracleMin,
    OtherCharge,
    OwnToken,
    Partial,
    Pooled,
    Ranks,
    RealisedTemperature,
    Remembers,
    Rescored,
    Seldom,
    SharedBatch,
    Silent,
    SilentOwnToken,
    SpaceTwice,
    TakesBack,
    TooNoisy,
    Unnormalised,
    UpdateFirst,
    V,
    WholeStream,
    draw_tokens,
    losses_only,
    run_audit,
    token_by_token,
)
from .audit_seeds import SEEDS

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


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__)
def test_a_leak_is_flagged_with_its_condition(leak, seed):
    # a leak of one event in fifteen takes more looking
    report = run_audit(leak(), seed, hints=Hints(ranks=2), reruns=400 if leak is OneEvent else 64)
    assert report.failed >= LEAKS[leak], str(report)
    assert report.leaks and report.as_dict()["verdict"] == "leak"


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize(
    "loop",
    [Bigram(), Silent(), HalfRows(), Ranks(), Documents(), Noisy(), TakesBack(), losses_only, token_by_token],
    ids=lambda loop: getattr(loop, "__name__", type(loop).__name__),
)
def test_an_honest_loop_is_clean(loop, seed):
    report = run_audit(loop, seed, hints=Hints(stride=4, ranks=2))
    assert report.clean and not report.leaks, str(report)
    assert report.conditions["C1"] == report.conditions["C2"] == "PASS"


def test_a_leak_above_the_noise_is_found_and_chance_is_refused():
    noisy, leak, chance = (run_audit(loop()) for loop in (Noisy, NoisyLeak, TooNoisy))
    assert noisy.clean and 1e-6 < noisy.noise < 1e-5
    assert "C1" in leak.failed and leak.noise < 1e-5
    assert "repeat" in chance.failed and chance.noise > 1e-2


def test_what_there_is_no_data_for_is_untested():
    report = audit(losses_only, draw_tokens(), V, bos_id=BOS)
    assert report.conditions == {"C1": "PASS", "C2": "PASS", "C3": "PASS", "C4": "UNTESTED", "bytes": "UNTESTED"}
    verdicts = {test.name: test.verdict for test in report.tests}
    assert verdicts["updates after charges"] == verdicts["charges"] == verdicts["left to right"] == "UNTESTED"
    assert any("rank border" in kind for kind in report.unreached) and "event border" in report.unreached
    # totals over 2,400 tokens are out of reach
    many = audit(
        lambda tokens, log: torch.full((len(tokens),), math.log(2400)), draw_tokens() * 100, 2400, seconds=0.02
    )
    assert many.conditions["C2"] == "UNTESTED"
    counted = audit(Bigram(), draw_tokens(), V, bos_id=BOS)
    assert counted.conditions["bytes"] == "UNTESTED" and "no byte rule" in str(counted)


def test_distributions_for_some_charges_stand_for_those_alone():
    report = run_audit(Partial())
    assert "C2" in report.failed
    verdicts = {test.name: test.verdict for test in report.tests}
    assert verdicts["charges"] == verdicts["distributions"] == "UNTESTED"
    assert "only with " in str(report)


def test_a_loop_of_whole_windows_is_audited_at_its_length():
    class Whole(Silent):
        def start(self, tokens):
            assert len(tokens) == 240, "needs 240 tokens"
            return super().start(tokens)

    report = run_audit(Whole())
    assert report.clean and report.conditions["C2"] == "PASS"
    assert (
        "needs 240 tokens" in str(report) and {t.name: t.verdict for t in report.tests}["stream length"] == "UNTESTED"
    )

    class WholeLeak(Whole, SilentOwnToken):
        pass

    assert run_audit(WholeLeak()).failed == {"C2"}


def test_the_first_leaking_pair_is_traced_to_one_token():
    report = run_audit(NextRank(), hints=Hints(ranks=2))
    leak = report.leaks[0]
    assert leak["relation"] == "future" and leak["alone"]
    tokens, middle = len(draw_tokens()), leak["token"]
    assert (middle, leak["moved"]["score"]) == (tokens // 2, tokens // 2 - 1) or leak["stream"] != "given"
    assert leak["moved"]["count"] == 1 and leak["moved"]["before"] != leak["moved"]["after"]
    shared = run_audit(SharedBatch()).leaks[0]
    assert shared["same_event"] and "#1350" in shared["looks_like"]
    whole = run_audit(WholeStream()).leaks[0]
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

    alone, anew = run_audit(Repeats(), reruns=4), run_audit(Repeats(), reruns=4, fresh=Repeats)
    assert alone.conditions["C1"] == "PASS" and any("fresh=" in kind for kind in alone.unreached)
    assert anew.conditions["C1"] == "FAIL" and anew.leaks[-1]["relation"] == "fresh loops"
    honest = run_audit(Bigram(), reruns=4, fresh=Bigram)
    assert honest.clean and honest.tests[-1].verdict == "PASS" and not any("memory" in x for x in honest.unreached)


def test_a_loop_without_a_memory_that_leaks_is_not_called_one_with_a_memory():
    report = run_audit(NextToken(), reruns=8, fresh=NextToken)
    assert report.leaks[-1]["relation"] == "fresh loops" and "needs no memory" in report.leaks[-1]["looks_like"]


@pytest.mark.parametrize("length", [30, 96, 150])
def test_the_shortest_length_that_a_loop_takes_is_found(length):
    class Long(Silent):
        def start(self, tokens):
            assert len(tokens) >= length, "too short"
            return super().start(tokens)

    report = run_audit(Long())
    assert report.clean and report.conditions["C2"] == "PASS", str(report)
    assert {test.name: test.verdict for test in report.tests}["stream length"] == "PASS"

    class LongLeak(Long, EventBegins):
        pass

    assert run_audit(LongLeak(), reruns=200).failed == {"C2"}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_stream_starts_as_the_given_one_does(seed):
    class Starts(Silent):
        def start(self, tokens):
            seen.add((int(tokens[0]), bool(((tokens >= 0) & (tokens < V)).all())))
            return super().start(tokens)

    seen = set()
    run_audit(Starts(), seed, reruns=300)
    assert seen == {(BOS, True)}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_noise_hides_nothing(seed):
    tokens = draw_tokens(seed=seed) % (V - 1)  # the last one never comes
    hidden, seldom = (audit(loop(), tokens, V, bos_id=BOS, seeds=[seed], reruns=400) for loop in (NoisyRows, Seldom))
    assert hidden.failed & {"C2", "repeat"} and hidden.conditions["C2"] != "PASS", str(hidden)
    assert seldom.failed & {"C1", "repeat"}, str(seldom)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_long_document_is_drawn_where_the_stream_has_none(seed):
    tokens = draw_tokens(400, seed)
    tokens[::40] = BOS
    report = audit(LateInADocument(), tokens, V, bos_id=BOS, seeds=[seed])
    assert "C1" in report.failed and report.leaks[0]["stream"] != "given", str(report)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_never_comes_may_have_no_probability(seed):
    tokens = synthetic(240, 20, BOS, np.random.default_rng(seed))
    report = audit(NoProbability(), tokens, V, bos_id=BOS, seeds=[seed])
    assert report.clean and report.conditions["C4"] == "PASS", str(report)
    tokens[100] = 20
    report = audit(NoProbability(), tokens, V, bos_id=BOS, seeds=[seed])
    assert report.failed == {"C4"} and "token 100 is charged inf nats; 1 such" in str(report)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_half_precision_neither_clears_nor_convicts(seed):
    def losses(tokens, log):
        own = Log()
        Half()(tokens, own)
        return torch.cat([call[2] for call in own.scores])

    for loop in (Half(), losses):
        report = run_audit(loop, seed)
        assert report.clean and report.conditions["C2"] == "UNTESTED" and "half precision" in str(report), str(report)
    sums = {test.name: test.verdict for test in run_audit(HalfRows(), seed).tests}
    assert sums["charges"] == sums["distributions"] == sums["own value"] == "UNTESTED"
    assert sums["substituted totals"] == "PASS"


def test_of_several_loops_those_that_leak_are_run_no_further():
    loops, runs = {"leak": SharedBatch(), "honest": Silent()}, Counter()

    def run(tokens, names):
        runs.update(names)
        return {name: run_loop(loops[name], tokens, V) for name in names}

    options = {"byte_rule": None, "hints": None, "seeds": [0]}
    reports = audit_rows(run, list(loops), Stream(draw_tokens(), V, BOS), **options, reruns=40)
    assert [report.clean for report in reports] == [False, True]
    wide, runs = runs, Counter()
    reports = audit_rows(run, list(loops), Stream(draw_tokens(), V, BOS), **options, reruns=40, limit=1e-3)
    assert [report.clean for report in reports] == [False, True]
    assert runs["honest"] < wide["honest"]


def test_reports_repeat_with_their_seed_and_differ_without():
    def covered(seed):
        return [test.covered for test in audit(Bigram(), draw_tokens(), V, seeds=[seed], seconds=1e-9).tests]

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
        run_audit(loop)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tokens", "vocab"), [([1, 2], 4), ([1, 2, 9], 4), ([0.5] * 9, 4), ([[1, 2, 3]], 4)])
def test_a_stream_that_does_not_fit_is_refused(tokens, vocab):
    with pytest.raises(InputError, match="expected"):
        audit(losses_only, torch.tensor(tokens), vocab)
