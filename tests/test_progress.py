"""What a long command says of its way: what it will do, how far it is, and what its result's words mean."""

from types import SimpleNamespace

import pytest

from slotfast.audit import checks
from slotfast.audit.report import LEGEND, Report
from slotfast.command.progress import Progress
from slotfast.config import EvalSettings
from slotfast.eval.__main__ import main
from slotfast.eval.program import evaluate


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    fake = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr("slotfast.command.progress.time", fake)
    return now


@pytest.mark.parametrize(
    ("seconds", "earlier", "lines"),
    [
        (0.5, 0, []),  # done before anybody asks
        (2.0, 0, ["2 of 6 windows, about 8 s left"]),
        (8.0, 0, [f"{done} of 6 windows, about {8 * (6 - done)} s left" for done in (1, 3, 5)]),
        (8.0, 4, ["5 of 6 windows, about 8 s left"]),  # the pace is this run's
        (120.0, 3, ["4 of 6 windows, about 4 min left", "5 of 6 windows, about 2 min left"]),
        (7200.0, 4, ["5 of 6 windows, about 2.0 h left"]),
    ],
)
def test_lines_say_how_long_it_will_take(clock, capsys, seconds, earlier, lines):
    with Progress(6, earlier, "windows") as progress:
        for _ in range(earlier, 6):
            clock.seconds += seconds
            progress(1)
    assert capsys.readouterr().err.splitlines() == lines


def test_work_without_a_known_end_says_how_long_it_has_taken(clock, capsys):
    with Progress(None, 0, "runs") as progress:
        for loops in (3, 3, 1):
            clock.seconds += 8
            progress(1, f"now of {loops} loops")
    assert capsys.readouterr().err.splitlines() == ["2 runs in 16 s, now of 3 loops"]


def test_a_silent_rank_says_nothing(clock, capsys):
    with Progress(6, 0, "windows", silent=True) as progress:
        clock.seconds += 50
        progress(1)
    assert capsys.readouterr().err == ""


def test_an_evaluation_says_what_it_will_do_and_what_a_gain_is(capsys):
    main(["--max-tokens", "300", "--preset", "none", "causal"])
    out, err = capsys.readouterr()
    assert err.startswith("scoring 299 tokens of language reference inside Python") and err.endswith(": none, causal\n")
    assert "\ngain: bits per byte less than none" in out
    evaluate(EvalSettings(max_tokens=300, preset=["none"]))
    assert "gain:" not in capsys.readouterr().out


def test_an_audit_says_what_its_conditions_are():
    tests = [checks.Test("own value", "PASS", ("C1", "C2"), "17 tokens", "")]
    report = Report("loop", tests, 0.0, [], {}, [], [0], 3, 1.0, 100, 16)
    assert str(report).splitlines()[-1].strip() == LEGEND and LEGEND not in report.table()
    assert [name for name in report.conditions if f"{name}: " not in LEGEND] == []
