"""Whether a token's distribution moves with the token itself."""

import torch

from ..leak import Leak
from ..moves import Moved, has_row, moved_before, moved_itself
from ..streams import Probe
from .base import Check, Findings, Pair, Test
from .charges import Charges
from .future import trace


class Own(Check):
    """The distribution of the first token that a probe changes, where the loop gives distributions."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.positions: set[tuple[str, int]] = set()

    def see_pair(self, pair: Pair) -> None:
        probe, noise = pair.probe, self.found.noise
        if not pair.same_length or pair.moved or self.found.own is not None:
            return
        if has_row(pair.base, probe.at) and has_row(pair.other, probe.at):
            self.positions.add((pair.of, probe.at))
            itself = moved_itself(pair.base, pair.other, probe.at, noise, probe.same_shape)
            if itself:
                self._trace(pair, itself)

    def _trace(self, pair: Pair, moved: Moved) -> None:
        """A token's distribution moved when it and later ones were changed: which of them was it?"""
        found, base, probe = self.found, pair.base, pair.probe
        old = torch.from_numpy(base.tokens)
        single = old.clone()
        single[probe.at] = probe.tokens[probe.at]
        alone = moved_itself(base, found.run(single), probe.at, found.noise, probe.same_shape)
        if alone:
            found.own = Leak.of("own", probe.at, alone, probe, base, True, pair.of)
            return
        later = probe.tokens.clone()
        later[probe.at] = old[probe.at]
        rest = Probe.of(probe.kind, probe.change, old, later, found.stream.bos_id)
        future = moved_before(base, found.run(later), rest.at, found.noise, rest.same_shape)
        if future and found.leak is None:
            found.leak = trace(found, base, rest, future, pair.of)
        elif not future:
            found.own = Leak.of("own", probe.at, moved, probe, base, False, pair.of)

    def tests(self) -> list[Test]:
        count, own = len(self.positions), self.found.own
        if own:
            return [Test("own value", "FAIL", ("C1", "C2"), f"{count} tokens", own.text, count)]
        why = self.found.check(Charges).blurred if count else "the loop gives no distributions"
        return [Test("own value", "UNTESTED" if why else "PASS", ("C1", "C2"), f"{count} tokens", why)]

    def unreached(self) -> list[str]:
        others = len(self.found.reference.nll) - 1 - sum(of == "given" for of, _ in self.positions)
        if self.found.own or not self.positions or not others:
            return []
        return [
            f"what {others:,} other tokens do to their own distributions, where few may matter: --reruns asks for more"
        ]
