"""How far long work is: a bar on a terminal, and lines where there is none."""

import sys
import time

from tqdm import tqdm

_FIRST_SECONDS, _SECONDS = 3.0, 10.0  # until the first line, which knows the pace by then; between two lines


class Progress:
    """A bar on a terminal with the time that is left, and lines that say it elsewhere; called with what was just done.

    Args:
        total: units of work, >= 1.
        done: those that an earlier run has done, 0..total.
        unit: their name, in the plural.
        silent: say nothing, as ranks other than 0.
    """

    def __init__(self, total: int, done: int, unit: str, silent: bool = False):
        self.total, self.earlier, self.done, self.unit, self.silent = total, done, done, unit, silent
        self.begin = time.perf_counter()
        self.next = self.begin + _FIRST_SECONDS
        options = {"unit": f" {unit}", "file": sys.stderr, "leave": False, "disable": True if silent else None}
        self.bar = tqdm(total=total, initial=done, **options)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        now = time.perf_counter()
        if self.bar.disable and not self.silent and now >= self.next and self.done < self.total:
            self.next = now + _SECONDS
            left = (now - self.begin) * (self.total - self.done) / (self.done - self.earlier)
            line = f"{self.done:,} of {self.total:,} {self.unit}, about {_spoken(left)} left"
            print(line, file=sys.stderr, flush=True)


def _spoken(seconds: float) -> str:
    """A time in the unit that fits it."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
