"""Whether a score moves with tokens that come later, and with which of them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...words import counted
from ..leak import Leak, reach_of
from ..log import Record
from ..moves import Moved, Noise, difference, moved_before, noise_between
from ..streams import Probe
from .base import Check, Findings, Pair, Test, Verdict

_AGAIN = 4  # times that a score must move beyond every rerun, where it moves by less than the margin


class Future(Check):
    """Scores before a change, in altered copies of streams."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.probes: dict[str, list[Probe]] = {}
        self.bases: dict[str, np.ndarray] = {}
        self.by_length, self.lengths = 0.0, 0

    def see_pair(self, pair: Pair) -> None:
        found = self.found
        self.bases[pair.of] = pair.base.tokens
        self.probes.setdefault(pair.of, []).append(pair.probe)
        if not pair.same_length:
            # The length may decide where windows end; which tokens are there must not show
            self.lengths += 1
            self.by_length = max(self.by_length, pair.moved.largest if pair.moved else 0.0)
        elif pair.moved and found.leak is None and (found.noise == Noise() or self._moves_again(pair)):
            found.leak = trace(found, pair.base, pair.probe, pair.moved, pair.of)
        elif not pair.moved and found.leak is None and pair.of == "given":
            found.leak = self._under_noise(pair)

    def _moves_again(self, pair: Pair) -> bool:
        """Whether a noisy loop's score moves a second time; if not, only noise was seen."""
        base, other = (self.found.run(torch.from_numpy(record.tokens)) for record in (pair.base, pair.other))
        for first, second in ((pair.base, base), (pair.other, other)):
            self.found.differs(noise_between(first, second))
        return moved_before(base, other, pair.probe.at, self.found.noise, pair.probe.same_shape) is not None

    def _under_noise(self, pair: Pair) -> Leak | None:
        """A leak that is no larger than what reruns may differ by: of the score in front of the change, which that one
        token moves, or of the score that moved most, where all else rounds as before."""
        found, probe = self.found, pair.probe
        if not found.noise.nll or probe.at < 2:
            return None
        base, single = torch.from_numpy(pair.base.tokens), torch.from_numpy(pair.base.tokens).clone()
        single[probe.at] = probe.tokens[probe.at]
        moved = self._moves_each_time(pair, single, probe.at - 1)
        if moved:
            return Leak.of("future", probe.at, moved, probe, pair.base, True, pair.of)
        if not probe.same_shape:
            return None
        score = 1 + int(difference(pair.base.nll[1 : probe.at], pair.other.nll[1 : probe.at]).argmax())
        moved, last = self._moves_each_time(pair, probe.tokens, score), int((base != probe.tokens).nonzero()[-1])
        return Leak.of("future", last, moved, probe, pair.base, last == probe.at, pair.of) if moved else None

    def _moves_each_time(self, pair: Pair, other: Tensor, score: int) -> Moved | None:
        """How far a score lies apart on average where it does so, beyond reruns and in one direction, every time.

        Chance has exceeded the largest difference between reruns once in thousands of scores: in the same direction, at
        one place, again and again, it does not, even where the place was chosen for the first time that it did.
        """
        found, base = self.found, torch.from_numpy(pair.base.tokens)
        seen = [(pair.base.nll[score], pair.other.nll[score])]
        while True:
            gaps = np.array([after - before for before, after in seen])
            limit = max(found.noise.nll, float(Noise().limit(pair.base.nll[score : score + 1], False)[0]))
            if not (abs(gaps) > limit).all() or len(set(np.sign(gaps))) > 1:
                return None
            if len(seen) > _AGAIN:
                break
            records = found.run(base), found.run(other)
            found.differs(noise_between(pair.base, records[0]))
            seen.append((records[0].nll[score], records[1].nll[score]))
        before, after = (float(np.mean(values)) for values in zip(*seen, strict=True))
        return Moved(score, abs(after - before), before, after, 1, abs(after - before))

    def tests(self) -> list[Test]:
        leak, own = self.found.leak, self.found.own
        counts = {name: pairs(len(self.bases[name]), probes, self.bases[name]) for name, probes in self.probes.items()}
        covered = sum(some for some, _ in counts.values())
        some, all_ = counts.get("given", (0, 0))
        about = f"{some:,} of {all_:,} (changed, watched) pairs, {covered - some:,} in "
        about += counted(len(counts) - 1, "fresh stream")
        verdict: Verdict = "FAIL" if leak else "PASS" if covered else "UNTESTED"
        detail = leak.text if leak else "" if covered else "no altered stream could be compared"
        before_use = "FAIL" if own else verdict
        said = "as above" if leak else own.text if own else ""
        return [
            Test("future tokens", verdict, ("C1",), about, detail, covered),
            self._length(),
            Test("scores before use", before_use, ("C3",), about, said, covered),
        ]

    def _length(self) -> Test:
        name, about = "stream length", counted(self.lengths, "length")
        if self.found.fixed_length:
            return Test(name, "UNTESTED", ("C1",), "", f"on another length {self.found.fixed_length}")
        if self.by_length and self.found.leak:
            return Test(name, "FAIL", ("C1",), about, "scores move with what is cut off")
        if self.by_length:
            why = f"scores move by up to {self.by_length:.2g} nats with the length alone: the plan follows it"
            return Test(name, "UNTESTED", ("C1",), about, why)
        return Test(name, "PASS" if self.lengths else "UNTESTED", ("C1",), about)


def trace(found: Findings, base: Record, probe: Probe, moved: Moved, of: str) -> Leak:
    """The one token whose change moves the first score that moved: by halving what is changed."""
    noise, old = found.noise, torch.from_numpy(base.tokens)
    changed = (old != probe.tokens).nonzero()[:, 0]

    def moves(part: Tensor) -> Moved | None:
        tokens = old.clone()
        tokens[part] = probe.tokens[part]
        return moved_before(base, found.run(tokens), int(part[0]), noise, probe.same_shape)

    none, all_ = 0, len(changed)
    while all_ - none > 1:
        middle = (none + all_) // 2
        seen = moves(changed[:middle])
        if seen:
            all_, moved = middle, seen
        else:
            none = middle
    token = int(changed[all_ - 1])
    single = moves(changed[all_ - 1 : all_]) if len(changed) > 1 else moved
    leak = Leak.of("future", token, single or moved, probe, base, bool(single), of)
    vocab_size, bos_id = found.stream.vocab_size, found.stream.bos_id

    def moved_by(at: int) -> Moved | None:
        """What a change of the token at a position moves, which starts and ends no document."""
        tokens = old.clone()
        tokens[at] = next(t for t in ((int(old[at]) + i) % vocab_size for i in (1, 2)) if t != bos_id)
        return moved_before(base, found.run(tokens), at, noise, True)

    became_bos = bos_id is not None and bos_id in (int(old[token]), int(probe.tokens[token]))
    still = moved_by(token) is not None if became_bos and int(old[token]) != bos_id else None
    return replace(leak, **reach_of(base, leak, moved_by), became_bos=became_bos, moves_without_bos=still)


def pairs(length: int, probes: Sequence[Probe], tokens: np.ndarray) -> tuple[int, int]:
    """Distinct (changed token, watched earlier score) pairs that probes of one stream cover, and how many there are."""
    changed = np.zeros(length, bool)
    covered, upper = 0, None
    for probe in sorted(probes, key=lambda probe: -probe.at):
        if upper is not None:
            covered += int(changed.sum()) * (upper - probe.at)
        new = probe.tokens.numpy()
        changed |= new != tokens if len(new) == length else False
        upper = probe.at
    if upper is not None:
        covered += int(changed.sum()) * (upper - 1)  # scores 1..upper - 1
    return covered, (length - 1) * (length - 2) // 2
