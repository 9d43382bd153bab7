"""Whether every token is counted with its right number of bytes."""

import numpy as np

from ..log import Record
from .base import Check, Findings, Test, verdict_of

_LOOKS_LIKE = "a leading space counted twice (#1719), byte pieces counted as 3 (#1143), a constant (#897, #2071)"


class Bytes(Check):
    """How many bytes the loop counts for tokens, compared with the byte rule."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.problem, self.checked = "", 0

    def see_run(self, record: Record) -> None:
        told, rule = ~np.isnan(record.bytes), self.found.byte_rule
        if callable(rule):
            expected = np.asarray(rule(record.tokens))
        elif rule is not None and np.array_equal(record.tokens, self.found.reference.tokens):
            expected = np.asarray(rule)
        else:
            return
        if not told.any():
            return
        expected = np.concatenate([np.zeros(len(told) - len(expected)), expected])  # [N] or [N - 1]
        wrong = np.where(told, record.bytes != expected, record.charges > 0)
        wrong[0] = False
        self.checked += int(told.sum())
        if wrong.any() and not self.problem:
            first = int(np.flatnonzero(wrong)[0])
            said = f"as {record.bytes[first]:g} bytes" if told[first] else "without bytes"
            self.problem = (
                f"token {first} is counted {said}, the rule gives {expected[first]:g}; "
                f"in all {np.nansum(record.bytes[1:]):,.0f} for {expected[1:].sum():,.0f}"
            )

    def tests(self) -> list[Test]:
        if self.checked:
            verdict, about = verdict_of(self.problem), f"{self.checked:,} tokens"
            return [Test("bytes", verdict, ("bytes",), about, self.problem, self.checked, _LOOKS_LIKE)]
        told = not np.isnan(self.found.reference.bytes).all()
        why = "no byte rule: a tokenizer gives it" if told else "the loop counts no bytes"
        return [Test("bytes", "UNTESTED", ("bytes",), "", why)]
