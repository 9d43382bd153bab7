"""Whether every token is charged once, from left to right, before a state uses it, as the loop reports it."""

import numpy as np

from ...words import counted
from ..log import Record
from .base import Check, Findings, Test, Verdict, verdict_of

_EARLY_LOOKS_LIKE = "an update before the score, as in pre-quantisation training (#1306)"
_ORDER_LOOKS_LIKE = "documents in another order (#402, #1530), or a second pass (#846)"
_TAIL_LOOKS_LIKE = "tail windows: the last tokens are scored again until one is left (fixed in #1394)"


class Order(Check):
    """The events and updates that the loop reports."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.order = self.early = self.once = ""
        self.once_looks_like = ""

    def see_run(self, record: Record) -> None:
        self.order, self.early = self.order or record.misordered or "", self.early or record.early or ""
        if self.once:
            return
        wrong = record.charges != 1
        wrong[0] = record.ordered and record.charges[0] > 0
        if record.endless and not wrong.any():  # beside a charge that is one: its bytes would still count
            self.once, self.once_looks_like = f"{record.endless}, besides", charged_amiss(record)
        elif wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            times = f"{record.charges[position]} times" if record.charges[position] else "never"
            why = "; it has no predecessor" if position == 0 else ""
            problem = record.endless or f"token {position} is charged {times}{why}"
            self.once, self.once_looks_like = f"{problem}; {int(wrong.sum())} such tokens", charged_amiss(record)
        elif record is self.found.reference and (endless := np.flatnonzero(np.isposinf(record.nll))).size:
            # of other streams, tokens that never occur may have no probability
            self.once = f"token {endless[0]} is charged inf nats; {endless.size} such tokens"
            self.once_looks_like = "a distribution that leaves out a token which comes"

    def tests(self) -> list[Test]:
        reference = self.found.reference
        verdict: Verdict
        if reference.updates:
            verdict, about = verdict_of(self.early), f"{reference.updates} updates"
            tests = [Test("updates after charges", verdict, ("C3",), about, self.early, looks_like=_EARLY_LOOKS_LIKE)]
        else:
            tests = [Test("updates after charges", "UNTESTED", ("C3",), "", "the loop reports no updates")]
        if not reference.ordered:
            why = "the loop reports no events"
            detail = self.once or f"{why}: one loss for each token"
            verdict = "FAIL" if self.once else "UNTESTED"
            return [
                *tests,
                Test(
                    "every token once",
                    "FAIL" if self.once else "UNTESTED",
                    ("C4",),
                    "",
                    detail,
                    looks_like=self.once_looks_like,
                ),
                Test("left to right", "UNTESTED", ("C4",), "", why),
            ]
        verdict, about = verdict_of(self.once), f"{len(reference.nll) - 1:,} tokens"
        tests.append(Test("every token once", verdict, ("C4",), about, self.once, looks_like=self.once_looks_like))
        verdict, about = verdict_of(self.order), counted(len(reference.starts), "event")
        # tokens that are scored again come after later ones
        looks_like = _TAIL_LOOKS_LIKE if self.once_looks_like == _TAIL_LOOKS_LIKE else _ORDER_LOOKS_LIKE
        tests.append(Test("left to right", verdict, ("C4",), about, self.order, looks_like=looks_like))
        return tests


def charged_amiss(record: Record) -> str:
    """What it looks like when tokens are charged never, or more than once."""
    length, charges = len(record.charges), record.charges[1:]
    again, never = np.flatnonzero(charges > 1) + 1, np.flatnonzero(charges == 0) + 1
    if record.charges[0] and record.ordered:
        return "a charge for token 0, which nothing foretells"
    if record.endless:
        return "a charge that is no number, which a mean may skip"
    if len(again) and not len(never):
        if len(again) == length - again[0] and again[0] > length // 2:
            return _TAIL_LOOKS_LIKE
        return "rescoring (#846), or the best of several passes (#573)"
    if len(never) and not len(again):
        if len(never) == length - never[0]:
            return "the stream's end left out, as an incomplete last window or batch"
        return "only a part of the stream: documents or tokens left out"
    return "some tokens charged never and others more than once: windows that do not meet"
