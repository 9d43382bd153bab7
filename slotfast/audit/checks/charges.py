"""Whether each distribution that comes with a charge agrees with it, and sums to 1."""

import numpy as np

from ..log import Record
from ..moves import COARSE, STREAM_NOISE
from .base import Check, Findings, Test

SUM_TOLERANCE = 1e-4
_CHARGES_LOOK_LIKE = "a rescaled charge beside an honest distribution, or a training loss in its place"
_ROWS_LOOK_LIKE = "weights or bonuses added after normalisation (#886, #978)"


class Charges(Check):
    """The distributions that the loop gives, whatever the stream."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.rows = self.charges = 0
        self.row_precision = 0.0  # of the coarsest distributions
        self.narrow = ""
        self.worst_total: tuple[int, float] | None = None
        self.worst_mismatch: tuple[int, float] | None = None

    def see_run(self, record: Record) -> None:
        self.narrow = self.narrow or record.narrow or ""
        given = ~np.isnan(record.total)
        self.rows, self.charges = self.rows + int(given.sum()), self.charges + int(record.charges[1:].sum())
        if not given.any():
            return
        self.row_precision = max(self.row_precision, record.row_precision)
        off = np.where(given, np.abs(record.total - 1), 0)
        if off.max() > max(SUM_TOLERANCE, 8 * record.row_precision) and self.worst_total is None:
            self.worst_total = int(off.argmax()), float(record.total[off.argmax()])
        off = np.where(given, np.abs(record.mismatch), 0)
        allowed = np.maximum(1e-5, 8 * record.row_precision) * (1 + np.nan_to_num(np.abs(record.nll)))
        wrong = off > allowed  # whatever the noise: both come out of one run
        if wrong.any() and self.worst_mismatch is None:
            worst = int(np.where(wrong, off, 0).argmax())
            self.worst_mismatch = worst, float(record.mismatch[worst])

    @property
    def blurred(self) -> str:
        """Why the distributions, if there are any, cannot clear the loop; they may still convict it."""
        if self.row_precision > COARSE:
            return "half precision, in which a small gain does not show"
        if self.found.noise.rows > STREAM_NOISE:
            return f"distributions differ by {self.found.noise.rows:.2g} nats between reruns of one stream"
        return ""

    @property
    def clear(self) -> bool:
        """Whether every charged token of the reference came with a distribution that can clear the loop."""
        reference = self.found.reference
        given = reference.rows is not None and reference.charges > 0
        return bool(np.any(given)) and not np.isnan(reference.total[given]).any() and not self.blurred

    def tests(self) -> list[Test]:
        return [self._charges(), self._distributions()]

    def _charges(self) -> Test:
        if self.worst_mismatch is None:
            return self._if_all("charges")
        at, by = self.worst_mismatch
        detail = f"token {at} is charged {by:+.3g} nats beside its own distribution"
        return Test("charges", "FAIL", ("C2",), self._about, detail, self.rows, _CHARGES_LOOK_LIKE)

    def _distributions(self) -> Test:
        if not self.worst_total and not self.narrow:
            return self._if_all("distributions")
        at, total = self.worst_total or (0, 0.0)
        detail = self.narrow or f"that of token {at} sums to {total:.6g}"
        return Test("distributions", "FAIL", ("C2",), self._about, detail, self.rows, _ROWS_LOOK_LIKE)

    @property
    def _about(self) -> str:
        return f"{self.rows:,} distributions"

    def _if_all(self, name: str) -> Test:
        """PASS only where every charge came with its distribution, since the others could be anything."""
        if self.rows >= self.charges and not self.blurred:
            return Test(name, "PASS", ("C2",), self._about, "", self.rows)
        if self.rows >= self.charges:
            why = self.blurred
        elif self.rows:
            why = f"only with {self.rows:,} of {self.charges:,} charges"
        else:
            why = "the loop gives no distributions"
        return Test(name, "UNTESTED", ("C2",), "", why)
