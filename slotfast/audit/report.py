"""What an audit found: tests with their verdicts, the first leak and what it looks like, as a table and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .. import contest
from .checks import NEEDED, Findings, Test, Verdict

LEGEND = f"{contest.LEGEND}; bytes: as the rule counts them"


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
        """Each condition's verdict: FAIL where any test of it fails, PASS where all passed that are needed for it."""
        return {name: self._condition(name) for name in NEEDED}

    def _condition(self, name: str) -> Verdict:
        if any(test.verdict == "FAIL" and name in test.conditions for test in self.tests):
            return "FAIL"
        verdict = {test.name: test.verdict for test in self.tests}
        passed = any(all(verdict.get(test) == "PASS" for test in tests) for tests in NEEDED[name])
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
            "tests": [{k: v for k, v in asdict(test).items() if k != "looks_like"} for test in self.tests],
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
        """A table for people, and what its conditions are."""
        return f"{self.table()}\n  {LEGEND}"

    def table(self) -> str:
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


_PROVENANCE = "what weights and files were made from: no run of a loop shows it"
_FILLS = "what only fills behind {:,} tokens, as large hash tables do: scale their buckets to this stream's length"
MEMORY = "memory from call to call that hides itself (fresh= and --fresh-process look for it)"
_KINDS = (
    "event border",
    "inside an event",
    "window border",
    "batch border",
    "rank border",
    "document border",
    "far end",
    "cheap charge",
    "anywhere",
    "fresh stream",
)


def judge(found: Findings, *, seeds: list[int], runs: int, seconds: float, ranks: int | None) -> Report:
    """What the checks of one loop conclude."""
    tests = [test for check in found.checks for test in check.tests()]
    unreached = [kind for kind in _KINDS if kind not in found.kinds]
    if ranks is None:
        unreached.append("rank borders other than the middle (--ranks says how many ranks share the stream)")
    unreached += [line for check in found.checks for line in check.unreached()]
    unreached += [MEMORY, _FILLS.format(len(found.stream.tokens)), _PROVENANCE]
    leaks = [leak.as_dict() for leak in (found.leak, found.own) if leak]
    leaks += [
        {"relation": test.name, "text": f"{test.name}: {test.detail}", "looks_like": test.looks_like}
        for test in tests
        if test.verdict == "FAIL" and test.looks_like
    ]
    return Report(
        found.name, tests, found.noise.nll, leaks, dict(sorted(found.kinds.items())), unreached,
        seeds, runs, seconds, len(found.stream.tokens), found.stream.vocab_size,
    )  # fmt: skip
