"""Whether the tokens of the vocabulary, each put in one position, are charged probabilities that sum to 1."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ...words import counted
from ..log import Record
from ..moves import MARGIN
from .base import Check, Findings, Pair, Test
from .charges import SUM_TOLERANCE, Charges
from .excess import explain

_LOOKS_LIKE = (
    "a hashed cache with the target in its key (#779, #886), a gate or tilt that looks at its target (#1420), the "
    "better of several models for each token (#573), a mixture over bytes (#1835, #1872), or a training loss"
)
_OF_A_LEAK = "what the leak above explains: charges that know what comes need not sum to 1"


class Totals(Check):
    """Totals by substitution; and of the few tokens that altered streams happen to have in one position."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self._lowest = 0, 0.0, 0.0  # charge: position, nats, precision
        self._few: dict[tuple[str, int], dict[int, float]] = {}  # by stream and position: tokens, their charges
        self.sums: list[tuple[int, int, float]] = []  # position, tokens substituted, total
        self.worst: tuple[int, int, float] | None = None
        self.rounded = 0.0  # how far off totals may be that charges in half precision explain
        self._wrong: tuple[Tensor, int, np.ndarray] | None = None  # the first complete one: stream, position, charges
        self._explained: str | None = None
        self.late_reruns = 0  # runs of a round that leave room for a late total; set when the budget is divided

    @property
    def late(self) -> int:
        """First position after three quarters of the stream and two events: totals from there on can clear a loop."""
        length, starts = len(self.found.reference.tokens), self.found.reference.starts
        behind = int(starts[2]) if len(starts) > 2 else 0
        return min(max(3 * length // 4, behind), length - 1)

    def see_run(self, record: Record) -> None:
        at = int(np.nan_to_num(record.nll).argmin())
        if record.nll[at] < self._lowest[1]:
            self._lowest = at, float(record.nll[at]), record.nll_precision

    def see_pair(self, pair: Pair) -> None:
        at = pair.probe.at
        if pair.moved or not pair.same_length or at >= len(pair.base.tokens):
            return
        seen = self._few.setdefault((pair.of, at), {})
        for record in (pair.base, pair.other):
            seen[int(record.tokens[at])] = record.nll[at]
        precision = max(pair.base.nll_precision, pair.other.nll_precision)
        total, off, allowed = self._off(np.array([*seen.values()]), precision, False)
        if off > allowed:
            self.worst = self.worst or (at, len(seen), total)

    def see_total(self, stream: Tensor, at: int, tokens: Sequence[int], nll: np.ndarray, precision: float) -> None:
        complete = len(tokens) == self.found.stream.vocab_size
        total, off, allowed = self._off(nll, precision, complete)
        self.sums.append((at, len(tokens), total))
        if off > allowed:
            self.worst = self.worst or self.sums[-1]
            if self._wrong is None and complete:
                self._wrong = stream, at, nll
        elif off > self._tolerance:
            self.rounded = max(self.rounded, off)

    @property
    def _tolerance(self) -> float:
        return SUM_TOLERANCE + MARGIN * self.found.noise.nll

    def _off(self, nll: np.ndarray, precision: float, complete: bool) -> tuple[float, float, float]:
        """The total of what tokens are charged, how far it is off, and how far it may be by rounding."""
        share = np.where(np.isnan(nll), 0.0, np.exp(np.minimum(-np.nan_to_num(nll), 600)))
        # rounded to nearest, twice: where the normaliser is subtracted as well
        rounding = precision * float((share * (1 + np.where(share > 0, np.abs(nll), 0))).sum())
        total = float(share.sum())
        return total, abs(total - 1) if total > 1 or complete else 0.0, self._tolerance + rounding

    def see_last(self, record: Record) -> None:
        at, nll, precision = self._lowest
        total, off, allowed = self._off(np.array([nll]), precision, False)
        if off > allowed:
            self.worst = self.worst or (at, 1, total)
        if self._wrong and not self.found.leak and not self.found.own:
            self._explained = explain(self.found, *self._wrong)

    def tests(self) -> list[Test]:
        name, vocab_size = "substituted totals", self.found.stream.vocab_size
        complete = [(at, total) for at, n, total in self.sums if n == vocab_size]
        tried, clear = sum(n for _, n, _ in self.sums), self.found.check(Charges).clear
        if self.worst:
            at, n, total = self.worst
            detail = f"{n} of {vocab_size} tokens in position {at} together get probability {total:.6g}"
            detail = detail if n > 1 else f"token {at} is charged a probability of {total:.6g}"
            about = f"{tried} runs" if tried else "altered streams"
            return [Test(name, "FAIL", ("C2",), about, detail, len(self.sums), self.looks_like)]
        if self.rounded:
            why = f"up to {self.rounded:.1e} beside 1: charges in half precision leave that open"
            return [Test(name, "UNTESTED", ("C2",), f"{tried} runs", why)]
        # A state that takes most of the stream to fill plays no part in earlier totals
        deepest = max((at for at, _ in complete), default=0)
        if complete and deepest < self.late and not clear:
            why = (
                f"only up to token {deepest}, {counted(len(complete), 'position')}: one behind {self.late} needs about "
                f"{self.late_reruns} reruns (--reruns), or logprobs= in log.score, which shows all totals"
            )
            return [Test(name, "UNTESTED", ("C2",), f"{tried} runs", why)]
        if complete:
            off = max(abs(total - 1) for _, total in complete)
            about = f"{counted(len(complete), 'position')} x {vocab_size}, up to token {deepest}"
            return [Test(name, "PASS", ("C2",), about, f"within {off:.1e} of 1", tried)]
        if clear:
            return [Test(name, "UNTESTED", ("C2",), "", "the distributions themselves are added up")]
        why = (
            f"all {vocab_size} tokens need about {self.late_reruns} reruns (--reruns); logprobs= in log.score would "
            "show all totals, and a gate or tilt that looks at its target"
        )
        if self.sums:
            why += f"; {tried // len(self.sums)} of them get {max(total for *_, total in self.sums):.3g}"
        return [Test(name, "UNTESTED", ("C2",), "", why)]

    @property
    def looks_like(self) -> str:
        """What totals other than 1 look like, by substitution or by bets."""
        return _OF_A_LEAK if self.found.leak or self.found.own else self._explained or _LOOKS_LIKE

    def unreached(self) -> list[str]:
        if self.worst or self.found.check(Charges).clear:
            return []
        return [
            "positions where no total was taken, though a gate or tilt that looks at its target may act there alone: "
            "logprobs= in log.score shows every total"
        ]
