"""Whether probabilities come to more than 1, by wagers on tokens that were drawn with known chances."""

import numpy as np

from ..log import Record
from .base import Check, Findings, Pair, Test
from .totals import Totals

_EVIDENCE = 1e6  # odds that a bet must reach before totals above 1 count as proven
_STAKES = np.array([0.003, 0.01, 0.03, 0.1, 0.3, 0.9])


class Bets(Check):
    """Wagers on every drawn token of every run whose tokens were drawn."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.gamblers = Gamblers(len(found.stream.tokens), found.stream.vocab_size)

    def see_drawn(self, record: Record, begin: int, log_chance: np.ndarray) -> None:
        self.gamblers.play(record, begin, log_chance)

    def see_pair(self, pair: Pair) -> None:
        self.gamblers.play(pair.other, pair.probe.drawn_from, pair.probe.log_chance)

    def tests(self) -> list[Test]:
        name, bets = "drawn totals", self.gamblers
        if not bets.count:
            return [Test(name, "UNTESTED", ("C2",), "", "no token was drawn")]
        about = f"{bets.count:,} drawn tokens"
        if not bets.proven:
            return [Test(name, "PASS", ("C2",), about, "no sign of totals above 1", bets.count)]
        odds = f"1e{bets.best / np.log(10):.0f}" if bets.best < 700 else "1e300"
        detail = f"probabilities come to {bets.average:.4g} on average{bets.where}: over 1 at odds of {odds}"
        return [Test(name, "FAIL", ("C2",), about, detail, bets.count, self.found.check(Totals).looks_like)]


class Gamblers:
    """Wagers that a loop's probabilities come to more than 1, on tokens that were drawn with known chances.

    Whatever a predictor has seen, p_t(x) / q(x) has mean sum_x p_t(x) where x is drawn from q. If that never exceeds 1,
    a gambler who stakes a part of his money on each ratio cannot expect to gain: he reaches c times what he had with a
    chance of at most 1 / c (Ville's inequality). Several gamblers with fixed stakes play for their mean, which starts
    at 1: a third of the money is staked on every token, a third on one position each, a third after one token each.

    Args:
        length: N of the stream; positions beyond it count as its last.
        vocab_size: V.
    """

    def __init__(self, length: int, vocab_size: int):
        groups = {"": 1, "in position": length, "behind token": vocab_size}
        self._log_wealth = {kind: np.zeros((n, len(_STAKES))) for kind, n in groups.items()}
        self._total = {kind: np.zeros(n) for kind, n in groups.items()}
        self._count = {kind: np.zeros(n, np.int64) for kind, n in groups.items()}
        self.best = 0.0  # largest mean wealth so far, as a logarithm
        self.where = ""  # what won it
        self.average = 1.0  # probability that came to, there

    def play(self, record: Record, drawn_from: int, log_chance: np.ndarray) -> None:
        """One round for each token from a position on that was drawn with a known chance, and that the loop charged."""
        nll = record.nll[drawn_from:]
        known = ~np.isnan(nll)
        ratio = np.exp(np.minimum(-nll - log_chance, 600)[known])
        position = drawn_from + np.flatnonzero(known)
        if not len(ratio):
            return
        gain = np.log1p(_STAKES * (ratio[:, None] - 1))
        logs = {}
        for kind, wealth in self._log_wealth.items():
            group = {"": 0 * position, "in position": position, "behind token": record.tokens[position - 1]}[kind]
            group = np.minimum(group, len(wealth) - 1)
            np.add.at(wealth, group, gain)
            np.add.at(self._total[kind], group, ratio)
            np.add.at(self._count[kind], group, 1)
            logs[kind] = float(wealth.max() + np.log(np.exp(wealth - wealth.max()).mean()))
        now = np.logaddexp.reduce(list(logs.values())) - np.log(len(logs))
        if now > self.best:
            kind = max(logs, key=logs.__getitem__)
            winner = int(self._log_wealth[kind].max(1).argmax())
            self.best, self.where = float(now), f" {kind} {winner}" if kind else ""
            self.average = float(self._total[kind][winner] / self._count[kind][winner])

    @property
    def count(self) -> int:
        """Tokens that were played for."""
        return int(self._count[""].sum())

    @property
    def proven(self) -> bool:
        return self.best > np.log(_EVIDENCE)
