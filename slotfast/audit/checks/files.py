"""What the loop opened while it ran, which no run of it can clear."""

from collections.abc import Collection

from ..log import Record
from ..opened import Opened
from .base import Check, Findings

_SHOWN = 3


class Files(Check):
    """Files, processes and connections of all runs."""

    def __init__(self, found: Findings):
        super().__init__(found)
        self.opened = Opened()

    def see_run(self, record: Record) -> None:
        for name in ("read", "written", "outside"):
            getattr(self.opened, name).update(getattr(record.opened, name))

    def unreached(self) -> list[str]:
        lines = []
        if self.opened.written:
            names = _names(self.opened.written)
            lines.append(f"what it remembers in files, also in fresh processes: it wrote {names}")
        if self.opened.read:
            lines.append(
                f"what is in files that it read while it scored, as the text itself: {_names(self.opened.read)}"
            )
        if self.opened.outside:
            lines.append(f"what it asks or tells others: it opened {_names(self.opened.outside)}")
        return lines


def _names(found: Collection[str]) -> str:
    names = sorted(found)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
