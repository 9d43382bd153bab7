"""Whether a loop gives the same scores for the same stream."""

from ..log import Record
from ..moves import MARGIN, noise_between
from .base import Check, Findings, Test, verdict_of

_MEMORY = 1e-5  # nats: less is a rounding that happened to be the same before
_LOOKS_LIKE = "several passes, or a cache that survives the call (#846, #991)"


class Repeats(Check):
    """Reruns of one stream, at the start and behind all others."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.remembers = 0.0  # nats between the first run of the stream and the last

    def see_last(self, record: Record) -> None:
        gap = noise_between(self.found.reference, record).nll
        if gap > max(MARGIN * self.found.noise.nll, _MEMORY):
            self.remembers = gap

    def tests(self) -> list[Test]:
        detail, unsteady = "", self.found.unsteady
        if unsteady:
            detail = f"reruns of one stream differ by {unsteady:.2g} nats: chance or memory, nothing can be certified"
        elif self.remembers:
            detail = (
                f"after other streams the first one scores {self.remembers:.2g} nats apart: state is kept between calls"
            )
        covered = "reruns at the start and at the end"
        return [Test("repeats", verdict_of(detail), (), covered, detail, looks_like=_LOOKS_LIKE)]
