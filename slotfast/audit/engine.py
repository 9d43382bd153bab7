"""The audit itself: which streams a loop is run on, and what may be spent on them. The checks judge what runs show."""

import math
import time
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .budget import Budget
from .checks import CHECKS, ByteRule, Findings, Pair
from .log import Record
from .moves import Noise, moved_before, noise_between
from .places import Hints, places, visits
from .streams import Probe, Source, Stream, alter
from .substitution import SHORTEST_SUM, share_budget, take_totals

Runs = Callable[[Tensor, Sequence[str]], dict[str, Record]]
_LENGTH_CHANGES = ("truncate", "extend")


class Auditor:
    """Runs loops on altered streams and shows the runs to the checks.

    Args:
        run: gives a record of each named loop on a stream.
        names: of the loops, which share every run.
        stream: the given one.
        hints: what is known of the loops' structure.
        byte_rule: bytes of every token of a stream, int [N] -> int [N], or None; int [N] for this stream alone.
        budget: how much to run.
    """

    def __init__(
        self,
        run: Runs,
        names: Sequence[str],
        stream: Stream,
        *,
        hints: Hints | None = None,
        byte_rule: ByteRule | np.ndarray | None = None,
        budget: Budget,
    ):
        self._run, self.names, self.stream, self.tokens = run, list(names), stream, stream.tokens
        self.hints, self._byte_rule, self.budget = hints or Hints(), byte_rule, budget
        self.runs, self._cost, self._seconds, self._drawn = 0, 0.0, 0.0, 0
        self.shortest, self.longest = 3, math.inf  # stream lengths that the loops have not refused
        self.refusal = ""  # what they said when they refused one
        self.found: dict[str, Findings] = {}

    def audit(self, seeds: Sequence[int]) -> list[Findings]:
        """One round of everything for each seed.

        Raises:
            InputError: a loop failed or reported what cannot be read.
        """
        self._start()
        for number, seed in enumerate(seeds, 1):
            # The order of phases differs from seed to seed, so that none always comes first; what each asks follows
            # from the seed alone, however far the one before it came
            phases = [self._probe, self._fresh, lambda source, rounds: take_totals(self, source, rounds)]
            for phase in np.random.default_rng(seed).permutation(len(phases)):
                rng = np.random.default_rng([seed, phase])
                phases[phase](Source(self.stream, rng), number)
        self._finish()
        return list(self.found.values())

    # -- running ------------------------------------------------------------------------------------------------------

    def records(
        self, tokens: Tensor, phase: str | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Record]:
        begin = time.perf_counter(), time.process_time()
        records = self._run(tokens, self.names if names is None else names)
        for name, record in records.items():
            if name in self.found:
                self.found[name].show("see_run", record)
        cost, seconds = len(tokens) / len(self.tokens), self.budget.seconds_since(begin)
        self.runs, self._cost, self._seconds = self.runs + 1, self._cost + cost, self._seconds + seconds
        if phase:
            self.budget.spent[phase][0] += cost
            self.budget.spent[phase][1] += seconds
        return records

    @property
    def speed(self) -> float:
        """Runs of the whole stream in a second."""
        return self._cost / self._seconds

    @property
    def fixed_length(self) -> str | None:
        """Why streams of another length cannot be run; None where some can."""
        return self.refusal if self.shortest >= len(self.tokens) else None

    def takes(self, tokens: Tensor) -> bool:
        """Whether the loops can run a stream of this length; some need a whole window, or several."""
        length = len(tokens)
        if length == len(self.tokens):
            return True
        if not self.shortest <= length <= self.longest:
            return False
        try:
            self.records(tokens, names=self.names[:1])  # loops that share their runs share their windows
        except InputError as error:
            self.refusal = str(error)
            if length < len(self.tokens):
                self.shortest = length + 1
            else:
                self.longest = length - 1
            return False
        return True

    def _find_shortest(self) -> None:
        """The shortest length, about, that the loops take: shorter streams make totals cheap."""
        length = max(SHORTEST_SUM + 1, (self.hints.seq_len or 0) + 1)
        self.shortest = min(length, len(self.tokens))
        failed = length - 1
        while length < len(self.tokens) and not self.takes(self.tokens[:length]):
            failed, length = length, 2 * length
        if length >= len(self.tokens) and not (failed >= self.shortest - 1 and self.takes(self.tokens[:-1])):
            self.shortest = len(self.tokens)
            return
        works = min(length, len(self.tokens) - 1)
        while works - failed > max(1, works // 16):
            middle = (works + failed) // 2
            if self.takes(self.tokens[:middle]):
                works = middle
            else:
                failed = middle
        self.shortest = works

    def _start(self) -> None:
        """The reference, and how far reruns of the same stream differ."""
        records = self.records(self.tokens)
        for name in self.names:

            def run_again(tokens: Tensor, name: str = name) -> Record:
                return self.records(tokens, names=[name])[name]

            self.found[name] = found = Findings(name, self.stream, records[name], self._byte_rule, run_again)
            found.checks = [kind(found) for kind in CHECKS]
            found.show("see_run", records[name])
        again = [self.records(self.tokens)]
        if any(noise_between(records[name], again[0][name]) != Noise() for name in self.names):
            again += [self.records(self.tokens) for _ in range(3)]
        for name, found in self.found.items():
            for other in again:
                found.differs(noise_between(records[name], other[name]))
        share_budget(self)
        self._find_shortest()

    def _finish(self) -> None:
        """The first stream once more: what ran in between must not have left anything behind."""
        for name, record in self.records(self.tokens).items():
            self.found[name].fixed_length = self.fixed_length
            self.found[name].show("see_last", record)

    # -- the future, and a token's own value --------------------------------------------------------------------------

    def _probe(self, source: Source, rounds: int) -> None:
        """Run altered copies of the given stream, every kind of place in turn."""
        bases, bos_id = {name: found.reference for name, found in self.found.items()}, self.stream.bos_id
        for change in _LENGTH_CHANGES:
            at = int(source.rng.integers(len(self.tokens) // 2, len(self.tokens)))
            probe = alter(source, self.tokens, "stream length", change, max(2, at))
            if self.takes(probe.tokens):
                self._compare(probe, self.records(probe.tokens, "probes"), bases, "given")
        kinds = len(places(bases[self.names[0]], bos_id, self.hints, source.rng))
        where = visits(bases[self.names[0]], bos_id, self.hints, source.rng)
        for turn, (kind, change, at) in enumerate(where):
            if turn >= 2 * kinds and not self.budget.left("probes", rounds):
                return
            probe = alter(source, self.tokens, kind, change, at)
            if probe.at < len(self.tokens):
                self._compare(probe, self.records(probe.tokens, "probes", self._unsettled()), bases, "given")

    def _fresh(self, source: Source, rounds: int) -> None:
        """Run streams of another length that the loop has never seen, the altered ones before their original."""
        length = max(3, len(self.tokens) - int(source.rng.integers(1, max(2, len(self.tokens) // 8))))
        if not self.takes(torch.cat([self.tokens[:1], source.draw(self.tokens[:1], length - 1)[0]])):
            length = len(self.tokens)
        bos_id = self.stream.bos_id
        while True:
            names, self._drawn = self._unsettled(), self._drawn + 1
            # Every second one is a single document, to reach what a loop does late in a long document
            avoid = torch.full((length - 1,), bos_id) if bos_id is not None and self._drawn % 2 == 0 else None
            drawn, chance = source.draw(self.tokens[:1], length - 1, avoid)
            tokens = torch.cat([self.tokens[:1], drawn])
            of = f"drawn {rounds}.{self._drawn}"
            first = alter(source, tokens, "fresh stream", "resample", 2 + int(source.rng.integers(length - 2)))
            altered, bases = (self.records(part, "fresh", names) for part in (first.tokens, tokens))
            for name, base in bases.items():
                self.found[name].show("see_drawn", base, 1, chance)
            self._compare(first, altered, bases, of)
            for _, change, at in islice(visits(bases[names[0]], bos_id, self.hints, source.rng), 5):
                probe = alter(source, tokens, "fresh stream", change, at)
                if probe.at < length:
                    self._compare(probe, self.records(probe.tokens, "fresh", names), bases, of)
                if not self.budget.left("fresh", rounds):
                    return

    def _unsettled(self) -> list[str]:
        """The loops without a leak, or all where all leak: those that leak need not be run again and again."""
        return [name for name, found in self.found.items() if found.leak is None] or self.names

    def _compare(self, probe: Probe, records: dict[str, Record], bases: dict[str, Record], of: str) -> None:
        """Show every loop's checks an altered stream's run beside the original's."""
        for name, record in records.items():
            found, base = self.found[name], bases[name]
            found.kinds[probe.kind] = found.kinds.get(probe.kind, 0) + 1
            moved = moved_before(base, record, probe.at, found.noise, probe.same_shape)
            found.show("see_pair", Pair(of, probe, base, record, moved))
