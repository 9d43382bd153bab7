"""What an audit found: tests with their verdicts, the first leak and what it looks like, as a table and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from . import checks
from .causes import looks_like, patterns
from .findings import Findings, Leak

Verdict = Literal["PASS", "FAIL", "UNTESTED"]
CONDITIONS = ("C1", "C2", "C3", "C4", "bytes")


@dataclass(frozen=True)
class Test:
    """One line of the report.

    Args:
        name: what was asked.
        verdict: PASS, FAIL or UNTESTED.
        conditions: which it speaks about, and which fail with it.
        covered: how much was looked at, in words.
        detail: what was seen.
        pairs: of changed token and watched score, or positions, that were looked at.
    """

    name: str
    verdict: Verdict
    conditions: tuple[str, ...]
    covered: str = ""
    detail: str = ""
    pairs: int = 0


@dataclass(frozen=True)
class Report:
    """The result of an audit of one loop.

    Args:
        name: of the loop.
        tests: every test, in order.
        noise: largest difference between reruns of one stream, nats.
        leaks: what leaked, each with the pair of tokens and the pattern it looks like.
        places: how many altered streams there were for each kind of place.
        unreached: kinds of place that the stream or the loop does not have.
        seeds, runs, seconds, tokens, vocab_size: of the audit.
    """

    name: str
    tests: list[Test]
    noise: float
    leaks: list[dict[str, Any]]
    places: dict[str, int]
    unreached: list[str]
    seeds: list[int]
    runs: int
    seconds: float
    tokens: int
    vocab_size: int
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> dict[str, Verdict]:
        """Each condition's verdict: FAIL where any test of it fails, PASS where what is needed to say so passed."""
        return {name: self._condition(name) for name in CONDITIONS}

    def _condition(self, name: str) -> Verdict:
        if any(test.verdict == "FAIL" and name in test.conditions for test in self.tests):
            return "FAIL"
        verdict = {test.name: test.verdict for test in self.tests}
        needed = {
            "C1": [["future tokens"]],
            "C2": [["own value", "charges", "distributions"], ["substituted totals"]],  # either list
            "C3": [["scores before use"]],
            "C4": [["every token once", "left to right"]],
            "bytes": [["bytes"]],
        }[name]
        passed = any(all(verdict.get(test) == "PASS" for test in tests) for tests in needed)
        return "PASS" if passed else "UNTESTED"

    @property
    def failed(self) -> frozenset[str]:
        """Conditions that fail; `repeat` where the loop does not even repeat itself."""
        failed = {name for name, verdict in self.conditions.items() if verdict == "FAIL"}
        return frozenset(
            failed | {"repeat" for test in self.tests if test.name == "repeats" and test.verdict == "FAIL"}
        )

    @property
    def clean(self) -> bool:
        """Whether nothing failed; what is UNTESTED is neither clean nor leaking."""
        return not self.failed

    def as_dict(self) -> dict[str, Any]:
        """JSON-able keys."""
        return {
            "loop": self.name,
            "verdict": "clean" if self.clean else "leak",
            "conditions": self.conditions,
            "tests": [asdict(test) for test in self.tests],
            "leaks": self.leaks,
            "noise_floor_nats": self.noise if np.isfinite(self.noise) else None,
            "places": self.places,
            "unreached": self.unreached,
            "seeds": self.seeds,
            "runs": self.runs,
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
            "vocab_size": self.vocab_size,
            **self.extra,
        }

    def __str__(self) -> str:
        """A table for people."""
        seeds = ", ".join(map(str, self.seeds))
        lines = [
            f"{self.name}: {self.tokens:,} tokens, vocabulary {self.vocab_size:,}, seed {seeds}, "
            f"{self.runs} runs in {self.seconds:.1f} s, noise floor {self.noise:.1e} nats"
        ]
        width = max(len(test.name) for test in self.tests)
        for test in self.tests:
            about = "; ".join(filter(None, (test.covered, test.detail)))
            lines.append(f"  {'/'.join(test.conditions) or '-':<8}  {test.name:<{width}}  {test.verdict:<8}  {about}")
        lines.append("  conditions: " + ", ".join(f"{name} {verdict}" for name, verdict in self.conditions.items()))
        if self.unreached:
            lines.append("  not reached: " + "; ".join(self.unreached))
        for leak in self.leaks:
            lines.append(f"  LEAK: {leak['text']}")
            lines.append(f"    looks like: {leak['looks_like']}")
        return "\n".join(lines)


def judge(
    found: Findings, *, seeds: list[int], runs: int, seconds: float, vocab_size: int, bytes_known: bool,
    fixed_length: str | None, ranks: int | None,
) -> Report:  # fmt: skip
    """Findings of one loop, as tests."""
    tests = [
        _repeats(found),
        *_future(found, fixed_length),
        *_distribution(found, vocab_size),
        *_order(found),
        _bytes(found, bytes_known),
    ]
    unreached = [kind for kind in _KINDS if kind not in found.kinds]
    if ranks is None:
        unreached.append("rank borders other than the middle (--ranks says how many ranks share the stream)")
    unreached += [MEMORY, FILLS, PROVENANCE]
    leaks = [_described(leak) for leak in (found.leak, found.own) if leak]
    leaks += [
        {"relation": test.name, "text": f"{test.name}: {test.detail}", "looks_like": advice}
        for test, advice in patterns(tests, found)
    ]
    return Report(
        found.name, tests, found.noise.nll, leaks, dict(sorted(found.kinds.items())), unreached,
        seeds, runs, seconds, len(found.reference.tokens), vocab_size,
    )  # fmt: skip


PROVENANCE = "what weights and files were made from: no run of a loop shows it"
FILLS = "what only fills on a longer stream, as large hash tables do: scale their buckets to this stream's length"
MEMORY = "memory from call to call that hides itself (fresh= and --fresh-process look for it)"
_KINDS = (
    "event border",
    "inside an event",
    "window border",
    "batch border",
    "rank border",
    "document border",
    "far end",
    "anywhere",
    "fresh stream",
)


def _repeats(found: Findings) -> Test:
    detail = ""
    if found.unsteady:
        detail = f"reruns of one stream differ by {found.unsteady:.2g} nats: chance or memory, nothing can be certified"
    elif found.remembers:
        detail = (
            f"after other streams the first one scores {found.remembers:.2g} nats apart: state is kept between calls"
        )
    return Test("repeats", "FAIL" if detail else "PASS", (), "reruns at the start and at the end", detail)


def _future(found: Findings, fixed_length: str | None) -> list[Test]:
    counts = {
        name: checks.pairs(len(found.bases[name]), probes, found.bases[name]) for name, probes in found.probes.items()
    }
    covered = sum(some for some, _ in counts.values())
    some, all_ = counts.get("given", (0, 0))
    about = f"{some:,} of {all_:,} (changed, watched) pairs, {covered - some:,} in {len(counts) - 1} fresh streams"
    leak = found.leak
    verdict: Verdict = "FAIL" if leak else "PASS" if covered else "UNTESTED"
    detail = _leak_text(leak) if leak else "" if covered else "no altered stream could be compared"
    own = _leak_text(found.own) if found.own else ""
    if fixed_length:
        length = Test("stream length", "UNTESTED", ("C1",), "", f"on another length {fixed_length}")
    elif found.by_length and leak:
        length = Test("stream length", "FAIL", ("C1",), f"{found.lengths} lengths", "scores move with what is cut off")
    elif found.by_length:
        why = f"scores move by up to {found.by_length:.2g} nats with the length alone: the plan follows it"
        length = Test("stream length", "UNTESTED", ("C1",), f"{found.lengths} lengths", why)
    else:
        verdict_ = "PASS" if found.lengths else "UNTESTED"
        length = Test("stream length", verdict_, ("C1",), f"{found.lengths} lengths")
    before_use = "FAIL" if leak or found.own else verdict
    return [
        Test("future tokens", verdict, ("C1",), about, detail, covered),
        length,
        Test("scores before use", before_use, ("C3",), about, "as above" if leak else own, covered),
    ]


def _distribution(found: Findings, vocab_size: int) -> list[Test]:
    none = "the loop gives no distributions"
    positions = len(found.own_positions)
    tests = []
    if found.own:
        tests.append(Test("own value", "FAIL", ("C1", "C2"), f"{positions} tokens", _leak_text(found.own), positions))
    else:
        why = found.blurred if positions else none
        tests.append(Test("own value", "UNTESTED" if why else "PASS", ("C1", "C2"), f"{positions} tokens", why))
    about = f"{found.rows:,} distributions"
    if found.worst_mismatch:
        at, by = found.worst_mismatch
        detail = f"token {at} is charged {by:+.3g} nats beside its own distribution"
        tests.append(Test("charges", "FAIL", ("C2",), about, detail, found.rows))
    else:
        tests.append(_if_all("charges", found, about))
    if found.worst_total or "narrow" in found.problems:
        at, total = found.worst_total or (0, 0.0)
        detail = found.problems.get("narrow") or f"that of token {at} sums to {total:.6g}"
        tests.append(Test("distributions", "FAIL", ("C2",), about, detail, found.rows))
    else:
        tests.append(_if_all("distributions", found, about))
    return [*tests, _sums(found, vocab_size), _bets(found)]


def _if_all(name: str, found: Findings, about: str) -> Test:
    """Passed only where every charge came with its distribution: the others could be anything."""
    if found.rows >= found.charges and not found.blurred:
        return Test(name, "PASS", ("C2",), about, "", found.rows)
    why = f"only with {found.rows:,} of {found.charges:,} charges" if found.rows else "the loop gives no distributions"
    why = found.blurred if found.rows >= found.charges else why
    return Test(name, "UNTESTED", ("C2",), "", why)


def _sums(found: Findings, vocab_size: int) -> Test:
    name, complete = "substituted totals", [total for _, n, total in found.sums if n == vocab_size]
    tried = sum(n for _, n, _ in found.sums)
    if found.worst_sum:
        at, total = found.worst_sum
        n = next(n for where, n, value in found.sums if (where, value) == found.worst_sum)
        detail = f"{n} of {vocab_size} tokens in position {at} together get probability {total:.6g}"
        return Test(name, "FAIL", ("C2",), f"{tried} runs", detail, len(found.sums))
    if found.rounded_sums:
        why = f"up to {found.rounded_sums:.1e} beside 1: charges in half precision leave that open"
        return Test(name, "UNTESTED", ("C2",), f"{tried} runs", why)
    # A state that takes most of the stream to fill has no part in earlier totals
    deepest = max((at for at, n, _ in found.sums if n == vocab_size), default=0)
    if complete and deepest < found.late and not found.gives_rows:
        why = (
            f"only up to token {deepest}, {len(complete)} positions: one behind {found.late} needs about "
            f"{found.late_reruns} reruns (--reruns), or logprobs= in log.score, which shows all totals"
        )
        return Test(name, "UNTESTED", ("C2",), f"{tried} runs", why)
    if complete:
        off = max(abs(total - 1) for total in complete)
        about = f"{len(complete)} positions x {vocab_size}, up to token {deepest}"
        return Test(name, "PASS", ("C2",), about, f"within {off:.1e} of 1", tried)
    if found.gives_rows:
        return Test(name, "UNTESTED", ("C2",), "", "the distributions themselves are added up")
    why = (
        f"all {vocab_size} tokens need about {found.late_reruns} reruns (--reruns); logprobs= in log.score would show "
        "all totals, and a gate or tilt that looks at its target"
    )
    if found.sums:
        why += f"; {tried // len(found.sums)} of them get {max(total for *_, total in found.sums):.3g}"
    return Test(name, "UNTESTED", ("C2",), "", why)


def _bets(found: Findings) -> Test:
    bets = found.bets
    if not bets.count:
        return Test("drawn totals", "UNTESTED", ("C2",), "", "no token was drawn")
    about = f"{bets.count:,} drawn tokens"
    if bets.proven:
        odds = f"1e{bets.best / np.log(10):.0f}" if bets.best < 700 else "1e300"
        detail = f"probabilities come to {bets.average:.4g} on average{bets.where}: over 1 at odds of {odds}"
        return Test("drawn totals", "FAIL", ("C2",), about, detail, bets.count)
    return Test("drawn totals", "PASS", ("C2",), about, "no sign of totals above 1", bets.count)


def _order(found: Findings) -> list[Test]:
    reference = found.reference
    tests = []
    if reference.updates:
        detail = found.problems.get("early", "")
        updates = f"{reference.updates} updates"
        tests.append(Test("updates after charges", "FAIL" if detail else "PASS", ("C3",), updates, detail))
    else:
        tests.append(Test("updates after charges", "UNTESTED", ("C3",), "", "the loop reports no updates"))
    once, order = found.problems.get("once", ""), found.problems.get("order", "")
    if not reference.ordered:
        why = "the loop reports no events"
        verdict: Verdict = "FAIL" if once else "UNTESTED"
        return [
            *tests,
            Test("every token once", verdict, ("C4",), "", once or f"{why}: one loss for each token"),
            Test("left to right", "UNTESTED", ("C4",), "", why),
        ]
    events = f"{len(reference.starts):,} events"
    tests.append(
        Test("every token once", "FAIL" if once else "PASS", ("C4",), f"{len(reference.nll) - 1:,} tokens", once)
    )
    tests.append(Test("left to right", "FAIL" if order else "PASS", ("C4",), events, order))
    return tests


def _bytes(found: Findings, known: bool) -> Test:
    problem = found.problems.get("bytes", "")
    if found.bytes_checked:
        about = f"{found.bytes_checked:,} tokens"
        return Test("bytes", "FAIL" if problem else "PASS", ("bytes",), about, problem, found.bytes_checked)
    told = not np.isnan(found.reference.bytes).all()
    why = "no byte rule: a tokenizer gives it" if told else "the loop counts no bytes"
    return Test("bytes", "UNTESTED", ("bytes",), "", why if told or not known else "the loop counts no bytes")


# ---------------------------------------------------------------------------------------------------------------------
# what a leak looks like


def _leak_text(leak: Leak) -> str:
    what = "its own distribution" if leak.relation == "own" else f"the score of token {leak.moved.score}"
    alone = "" if leak.alone else " together with the ones before it"
    more = f"; {leak.moved.count:,} scores move, by up to {leak.moved.largest:.3g}" if leak.moved.count > 1 else ""
    stream = "" if leak.stream == "given" else f" (stream {leak.stream})"
    return (
        f"changing token {leak.token}{alone} moves {what} from {leak.moved.before:.6g} to {leak.moved.after:.6g} nats"
        f"{more}{stream}"
    )


def _described(leak: Leak) -> dict[str, Any]:
    known = asdict(leak)
    # JSON has no infinities: a score that only one of the streams has is null
    known["moved"] = {key: value if np.isfinite(value) else None for key, value in known["moved"].items()}
    return {**known, "text": _leak_text(leak), "looks_like": looks_like(leak)}
