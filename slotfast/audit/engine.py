"""The audit itself: which streams a loop is run on, what is compared with what, and which token a leak comes from."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from . import checks
from .causes import charged_amiss, reach_of
from .checks import Moved, Noise
from .findings import Budget, Findings, Leak
from .log import Record
from .places import Hints, places, visits
from .streams import Probe, Source, alter
from .totals import SHORTEST_SUM, share_budget, take_totals

Runs = Callable[[Tensor, Sequence[str]], dict[str, Record]]
ByteRule = Callable[[np.ndarray], np.ndarray]
_LENGTH_CHANGES = ("truncate", "extend")
_MEMORY = 1e-5  # nats: less is a rounding that happened to be the same before


class Auditor:
    """Runs loops on altered streams and keeps what it finds.

    Args:
        run: gives a record of each named loop on a stream.
        names: of the loops, which share every run.
        tokens: int64 [N], the stream.
        vocab_size: V.
        bos_id: the token that starts a document, or None.
        hints: what is known of the loops' structure.
        byte_rule: bytes of every token of a stream, int [N] -> int [N], or None; int [N] for this stream alone.
        budget: how much to run.
    """

    def __init__(
        self,
        run: Runs,
        names: Sequence[str],
        tokens: Tensor,
        vocab_size: int,
        *,
        bos_id: int | None = None,
        hints: Hints | None = None,
        byte_rule: ByteRule | np.ndarray | None = None,
        budget: Budget,
    ):
        self._run, self.names, self.tokens, self.vocab_size = run, list(names), tokens, vocab_size
        self.bos_id, self.hints, self.byte_rule, self.budget = bos_id, hints or Hints(), byte_rule, budget
        self.runs, self._cost, self._seconds = 0, 0.0, 0.0
        self.shortest, self.longest = 3, math.inf  # lengths of streams that the loops are known to refuse lie outside
        self.refusal = ""  # what they said to such a stream
        self.found: dict[str, Findings] = {}

    def audit(self, seeds: Sequence[int]) -> list[Findings]:
        """One round of everything for each seed.

        Raises:
            InputError: a loop failed or reported what cannot be read.
        """
        self._start()
        for number, seed in enumerate(seeds, 1):
            # The order differs from seed to seed, so that nothing is always asked first; what each phase asks follows
            # from the seed alone, however far the one before it came
            phases = [self._probe, self._fresh, lambda source, rounds: take_totals(self, source, rounds)]
            for phase in np.random.default_rng(seed).permutation(len(phases)):
                rng = np.random.default_rng([seed, phase])
                phases[phase](Source(self.tokens, self.vocab_size, self.bos_id, rng), number)
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
                self._note(self.found[name], record)
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
        """Why streams of another length cannot be asked for; None where some can."""
        return self.refusal if self.shortest >= len(self.tokens) else None

    def takes(self, tokens: Tensor) -> bool:
        """Whether the loops can run a stream of this length; some need a whole window, or several."""
        length = len(tokens)
        if length == len(self.tokens):
            return True
        if not self.shortest <= length <= self.longest:
            return False
        try:
            self.records(tokens, names=self.names[:1])  # what shares its runs shares its windows
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

    def _note(self, found: Findings, record: Record) -> None:
        """What every run must satisfy, whatever the stream."""
        for key, problem in (("order", record.misordered), ("early", record.early), ("narrow", record.narrow)):
            if problem:
                found.problems.setdefault(key, problem)
        once = record.charges != 1
        once[0] = record.ordered and record.charges[0] > 0
        if once.any() and "once" not in found.problems:
            position = int(np.flatnonzero(once)[0])
            times = f"{record.charges[position]} times" if record.charges[position] else "never"
            why = "; it has no predecessor" if position == 0 else ""
            problem = record.endless or f"token {position} is charged {times}{why}"
            found.problems["once"] = f"{problem}; {int(once.sum())} such tokens"
            found.once_cause = charged_amiss(record)
        given = ~np.isnan(record.total)
        found.rows, found.charges = found.rows + int(given.sum()), found.charges + int(record.charges[1:].sum())
        if given.any():
            off = np.where(given, np.abs(record.total - 1), 0)
            found.row_precision = max(found.row_precision, record.row_precision)
            allowed = max(checks.SUM_TOLERANCE, 8 * record.row_precision)
            if off.max() > allowed and found.worst_total is None:
                found.worst_total = int(off.argmax()), float(record.total[off.argmax()])
            off = np.where(given, np.abs(record.mismatch), 0)
            allowed = np.maximum(1e-5, 8 * record.row_precision) * (1 + np.nan_to_num(np.abs(record.nll)))
            wrong = off > allowed  # whatever the noise: both come out of one run
            if wrong.any() and found.worst_mismatch is None:
                worst = int(np.where(wrong, off, 0).argmax())
                found.worst_mismatch = worst, float(record.mismatch[worst])
        self._note_bytes(found, record)

    def _note_bytes(self, found: Findings, record: Record) -> None:
        told = ~np.isnan(record.bytes)
        if callable(self.byte_rule):
            expected = np.asarray(self.byte_rule(record.tokens))
        elif self.byte_rule is not None and np.array_equal(record.tokens, self.tokens.numpy()):
            expected = np.asarray(self.byte_rule)
        else:
            return
        if not told.any():
            return
        expected = np.concatenate([np.zeros(len(told) - len(expected)), expected])  # [N] or [N - 1]
        wrong = np.where(told, record.bytes != expected, record.charges > 0)
        wrong[0] = False
        found.bytes_checked += int(told.sum())
        if wrong.any() and "bytes" not in found.problems:
            first = int(np.flatnonzero(wrong)[0])
            said = f"as {record.bytes[first]:g} bytes" if told[first] else "without bytes"
            found.problems["bytes"] = (
                f"token {first} is counted {said}, the rule gives {expected[first]:g}; "
                f"in all {np.nansum(record.bytes[1:]):,.0f} for {expected[1:].sum():,.0f}"
            )

    def _start(self) -> None:
        """The reference, and how far reruns of the same stream differ."""
        records = self.records(self.tokens)
        for name in self.names:
            found = Findings(name, records[name], checks.Bets(len(self.tokens), self.vocab_size))
            self.found[name] = found
            self._note(found, records[name])
            endless = np.flatnonzero(np.isposinf(found.reference.nll))
            if endless.size:  # of other streams, tokens that never occur may have no probability
                problem = f"token {endless[0]} is charged inf nats; {endless.size} such tokens"
                if found.problems.setdefault("once", problem) == problem:
                    found.once_cause = "a distribution that leaves out a token which comes"
        again = [self.records(self.tokens)]
        if any(checks.noise_between(records[name], again[0][name]) != Noise() for name in self.names):
            again += [self.records(self.tokens) for _ in range(3)]
        for name, found in self.found.items():
            for other in again:
                found.differs(checks.noise_between(records[name], other[name]))
            found.bases["given"] = self.tokens.numpy()
        share_budget(self)
        self._find_shortest()

    def _finish(self) -> None:
        """The stream of the start once more: what ran in between must not have left anything behind."""
        for name, record in self.records(self.tokens).items():
            found = self.found[name]
            gap = checks.noise_between(found.reference, record).nll
            if gap > max(checks.MARGIN * found.noise.nll, _MEMORY):
                found.remembers = gap

    # -- the future, and a token's own value --------------------------------------------------------------------------

    def _probe(self, source: Source, rounds: int) -> None:
        """Altered copies of the given stream, every kind of place in turn."""
        bases = {name: found.reference for name, found in self.found.items()}
        for change in _LENGTH_CHANGES:
            at = int(source.rng.integers(len(self.tokens) // 2, len(self.tokens)))
            probe = alter(source, self.tokens, "stream length", change, max(2, at))
            if self.takes(probe.tokens):
                self._compare(probe, self.records(probe.tokens, "probes"), bases, "given")
        kinds = len(places(bases[self.names[0]], self.bos_id, self.hints, source.rng))
        where = visits(bases[self.names[0]], self.bos_id, self.hints, source.rng)
        for turn, (kind, change, at) in enumerate(where):
            if turn >= 2 * kinds and not self.budget.left("probes", rounds):
                return
            probe = alter(source, self.tokens, kind, change, at)
            if probe.at < len(self.tokens):
                self._compare(probe, self.records(probe.tokens, "probes", self._unsettled()), bases, "given")

    def _fresh(self, source: Source, rounds: int) -> None:
        """Streams that the loop has never seen, of another length, the altered ones before their original."""
        length = max(3, len(self.tokens) - int(source.rng.integers(1, max(2, len(self.tokens) // 8))))
        if not self.takes(torch.cat([self.tokens[:1], source.draw(self.tokens[:1], length - 1)[0]])):
            length = len(self.tokens)
        while True:
            names = self._unsettled()
            number = len(self.found[names[0]].bases)
            # Every second one is a single document: what a loop does late in a long one needs it
            single = self.bos_id is not None and number % 2 == 0
            drawn, chance = source.draw(
                self.tokens[:1], length - 1, torch.full((length - 1,), self.bos_id) if single else None
            )
            tokens = torch.cat([self.tokens[:1], drawn])
            stream = f"drawn {rounds}.{number}"
            for name in names:
                self.found[name].bases[stream] = tokens.numpy()
            at = 2 + int(source.rng.integers(length - 2))
            first = alter(source, tokens, "fresh stream", "resample", at)
            altered, bases = (self.records(part, "fresh", names) for part in (first.tokens, tokens))
            for name, base in bases.items():
                self.found[name].bets.play(base, 1, chance)
            self._compare(first, altered, bases, stream)
            for _, change, at in islice(visits(bases[names[0]], self.bos_id, self.hints, source.rng), 5):
                probe = alter(source, tokens, "fresh stream", change, at)
                if probe.at < length:
                    self._compare(probe, self.records(probe.tokens, "fresh", names), bases, stream)
                if not self.budget.left("fresh", rounds):
                    return

    def _unsettled(self) -> list[str]:
        """Loops without a leak, while there are any: of several, those that leak are not asked again and again."""
        return [name for name, found in self.found.items() if found.leak is None] or self.names

    def _compare(self, probe: Probe, records: dict[str, Record], bases: dict[str, Record], stream: str) -> None:
        """Hold every loop's scores of an altered stream against those of the original."""
        for name, record in records.items():
            found, base = self.found[name], bases[name]
            found.bets.play(record, probe.drawn_from, probe.log_chance)
            found.probes.setdefault(stream, []).append(probe)
            found.kinds[probe.kind] = found.kinds.get(probe.kind, 0) + 1
            moved = checks.moved_before(base, record, probe.at, found.noise, probe.same_shape)
            if len(probe.tokens) != len(base.tokens):
                # Where the windows end may follow the length; what tokens are there must not show
                found.lengths += 1
                found.by_length = max(found.by_length, moved.largest if moved else 0.0)
                continue
            if moved and found.noise != Noise() and found.leak is None and not self._again(name, base, probe, record):
                continue
            if moved and found.leak is None:
                found.leak = self._trace(name, base, probe, moved, stream)
            if not moved and found.own is None and checks.has_row(base, probe.at) and checks.has_row(record, probe.at):
                found.own_positions.add((stream, probe.at))
                itself = checks.moved_itself(base, record, probe.at, found.noise, probe.same_shape)
                if itself:
                    self._trace_own(name, base, probe, itself, stream)

    def _again(self, name: str, base: Record, probe: Probe, record: Record) -> bool:
        """Whether a noisy loop's score moves a second time; if not, its noise is what was seen."""
        again = [self.records(torch.from_numpy(r.tokens), names=[name])[name] for r in (base, record)]
        for first, second in zip((base, record), again, strict=True):
            self.found[name].differs(checks.noise_between(first, second))
        return checks.moved_before(*again, probe.at, self.found[name].noise, probe.same_shape) is not None

    def _trace(self, name: str, base: Record, probe: Probe, moved: Moved, stream: str) -> Leak:
        """The one token whose change moves the first score that moved: by halving what is changed."""
        noise, old = self.found[name].noise, torch.from_numpy(base.tokens)
        changed = (old != probe.tokens).nonzero()[:, 0]

        def moves(part: Tensor) -> Moved | None:
            tokens = old.clone()
            tokens[part] = probe.tokens[part]
            record = self.records(tokens, names=[name])[name]
            return checks.moved_before(base, record, int(part[0]), noise, probe.same_shape)

        none, all_ = 0, len(changed)
        while all_ - none > 1:
            middle = (none + all_) // 2
            found = moves(changed[:middle])
            if found:
                all_, moved = middle, found
            else:
                none = middle
        token = int(changed[all_ - 1])
        single = moves(changed[all_ - 1 : all_]) if len(changed) > 1 else moved
        leak = self._leak("future", token, single or moved, probe, base, bool(single), stream)

        def moved_by(at: int) -> Moved | None:
            """What a change of the token at a position moves, which starts and ends no document."""
            tokens = old.clone()
            tokens[at] = next(t for t in ((int(old[at]) + i) % self.vocab_size for i in (1, 2)) if t != self.bos_id)
            record = self.records(tokens, names=[name])[name]
            return checks.moved_before(base, record, at, noise, True)

        became_bos = self.bos_id is not None and self.bos_id in (int(old[token]), int(probe.tokens[token]))
        still = moved_by(token) is not None if became_bos and int(old[token]) != self.bos_id else None
        return replace(leak, **reach_of(base, leak, moved_by), became_bos=became_bos, moves_without_bos=still)

    def _trace_own(self, name: str, base: Record, probe: Probe, moved: Moved, stream: str) -> None:
        """A token's distribution moved when it and later ones were changed: which of them was it?"""
        found, old = self.found[name], torch.from_numpy(base.tokens)
        single = old.clone()
        single[probe.at] = probe.tokens[probe.at]
        record = self.records(single, names=[name])[name]
        alone = checks.moved_itself(base, record, probe.at, found.noise, probe.same_shape)
        if alone:
            found.own = self._leak("own", probe.at, alone, probe, base, True, stream)
            return
        later = probe.tokens.clone()
        later[probe.at] = old[probe.at]
        rest = Probe.of(probe.kind, probe.change, old, later, self.bos_id)
        record = self.records(later, names=[name])[name]
        future = checks.moved_before(base, record, rest.at, found.noise, rest.same_shape)
        if future and found.leak is None:
            found.leak = self._trace(name, base, rest, future, stream)
        elif not future:
            found.own = self._leak("own", probe.at, moved, probe, base, False, stream)

    def _leak(
        self, relation: str, token: int, moved: Moved, probe: Probe, base: Record, alone: bool, stream: str
    ) -> Leak:
        events = base.event[[moved.score, token]] if base.ordered else None
        same = None if events is None else bool(events[0] == events[1])
        apart = 0 if events is None else int(events[1] - events[0])
        return Leak(relation, token, moved, probe.kind, probe.change, alone, same, apart, stream)


def check_stream(tokens: Tensor, vocab_size: int, bos_id: int | None) -> Tensor:
    """The stream as int64 [N] on the CPU.

    Raises:
        InputError: fewer than 3 tokens, ids outside the vocabulary, a vocabulary of fewer than 2.
    """
    tokens = torch.as_tensor(tokens)
    if tokens.ndim != 1 or tokens.is_floating_point() or len(tokens) < 3:
        raise InputError(
            f"tokens of shape {list(tokens.shape)} and type {tokens.dtype}: expected int [N], N at least 3"
        )
    tokens = tokens.to("cpu", torch.int64).clone()
    if vocab_size < 2 or not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise InputError(f"tokens {int(tokens.min())} to {int(tokens.max())}: expected 0 to {vocab_size - 1}")
    if bos_id is not None and not 0 <= bos_id < vocab_size:
        raise InputError(f"BOS {bos_id}: expected 0 to {vocab_size - 1}")
    return tokens
