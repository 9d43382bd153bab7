"""How far long work is: a bar on a terminal, and lines where there is none."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
_FIRST_SECONDS, _SECONDS = 3.0, 10.0  # until the first line, which knows the pace by then; between two lines


class Progress:
    """A bar on a terminal with the time that is left, and lines that say it elsewhere; called with what was just done.

    Args:
        total: units of work, >= 1; None where nobody knows.
        done: those that an earlier run has done, 0..total.
        unit: their name, in the plural.
        silent: say nothing, as ranks other than 0.
        lines: print lines where there is no terminal.
    """

    def __init__(self, total: int | None, done: int, unit: str, silent: bool = False, lines: bool = True):
        self.total, self.earlier, self.done, self.unit = total, done, done, unit
        self.begin = time.perf_counter()
        self.next = self.begin + (_SECONDS if total is None else _FIRST_SECONDS)
        options = {"unit": f" {unit}", "file": sys.stderr, "leave": False, "disable": True if silent else None}
        self.bar = tqdm(total=total, initial=done, **options)
        self.drawn = not self.bar.disable  # whether anybody sees a bar, and notes beside it
        self.lines = lines and not silent and not self.drawn

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, count: int, note: str = "") -> None:
        """Count what was just done; a note stands beside it."""
        self.done += count
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.perf_counter()
        if self.lines and now >= self.next and self.done != self.total:
            self.next = now + _SECONDS
            print(self._line(now) + f", {note}" * bool(note), file=sys.stderr, flush=True)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items; each counts once the next one is asked for."""
        for item in items:
            yield item
            self(1)

    def _line(self, now: float) -> str:
        spent = now - self.begin
        if self.total is None:
            return f"{self.done:,} {self.unit} in {_spoken(spent)}"
        left = spent * (self.total - self.done) / max(self.done - self.earlier, 1)
        return f"{self.done:,} of {self.total:,} {self.unit}, about {_spoken(left)} left"


def print_above(line: str, file: TextIO) -> None:
    """Print a line that the bar, where there is one, stays below."""
    tqdm.write(line, file=file)
    file.flush()


def _spoken(seconds: float) -> str:
    """A time in the unit that fits it."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
