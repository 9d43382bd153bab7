"""Memory of a launch, and who touched it when: the race detector.

Time is counted in barriers: an access is of an *epoch*, that of its program after so many of its barriers. Two accesses
of different threads to one place are ordered only if they are of one program and of different epochs. For every unit
(the smallest access of the kernel) are kept the epoch of its last write, and of its last read, with the lowest and the
highest thread that took part: so that "another thread did" is decided exactly. Of reads by other programs, the lowest
and the highest program that ever read are kept. Between programs only atomics make an order: order.py.
"""

from collections import Counter

import numpy as np

NEVER = -1
BARRIERS = 1 << 24  # epochs of a program; epoch // BARRIERS is the program
WARP = 32


class Report:
    """What was found: (kind, what) -> how often. `hard` are defects; the rest is named, and may be meant."""

    SOFT = ("within a warp",)

    def __init__(self):
        self.found: Counter = Counter()
        self.opcodes: Counter = Counter()  # executed, by form
        self.branches: Counter = Counter()  # (kernel, line, taken) -> how often
        self.launches = 0

    def add(self, kind: str, what: str, count: int = 1):
        self.found[kind, what] += int(count)

    def merge(self, other: "Report"):
        self.found += other.found
        self.opcodes += other.opcodes
        self.branches += other.branches
        self.launches += other.launches

    @property
    def hard(self) -> list[str]:
        return [f"{kind}: {what}" for kind, what in self.found if kind not in self.SOFT]

    @property
    def soft(self) -> list[str]:
        return [f"{kind}: {what}" for kind, what in self.found if kind in self.SOFT]


def _not_a_number(words):
    kind = {2: np.float16, 4: np.float32, 8: np.float64}.get(words.dtype.itemsize)
    return np.zeros(len(words), bool) if kind is None else np.isnan(np.ascontiguousarray(words).view(kind))


def _who(thread, warps):
    """The lowest and the highest thread of accesses by one, or by all of its warp."""
    return (thread // WARP * WARP, thread // WARP * WARP + WARP - 1) if warps else (thread, thread)


class Memory:
    """Bytes with their history.

    Args:
        name: "global" or "shared", for the report.
        data: uint8, a multiple of 16 long.
        unit: bytes of the smallest access.
        valid: bool a unit, what exists.
        across: whether several programs can reach it.
        lines: source line of each instruction.
    """

    def __init__(self, name, data, unit, valid, across, lines, report):
        self.name, self.data, self.unit, self.valid, self.across = name, data, unit, valid, across
        self.lines, self.report = lines, report
        self.size = len(data)
        self.views = {width: data.view(f"u{width}") for width in (1, 2, 4, 8)}
        units = len(data) // unit
        self.write_epoch, self.read_epoch = (np.full(units, NEVER, np.int64) for _ in range(2))
        self.write_low, self.write_high, self.read_low, self.read_high = np.zeros((4, units), np.int32)
        self.write_line, self.read_line = np.zeros((2, units), np.int32)
        if across:
            self.first_reader = np.full(units, np.iinfo(np.int32).max, np.int32)
            self.last_reader = np.full(units, NEVER, np.int32)
        # Shared memory: what cp.async has not yet brought, and how many wgmma still read.
        self.arriving, self.busy = np.zeros(units, bool), np.zeros(units, np.int16)
        self.asynchronous = False
        self.order = None  # of programs, in global memory of a kernel with atomics
        # A barrier of a warp orders its lanes: `sync` counts them a thread, and with an access its count is kept.
        self.sync = np.zeros(0, np.int32)
        self.write_sync, self.read_sync = np.zeros((2, units), np.int32)

    # Checks of an access

    def usable(self, address, width, count, line):
        """Which of these addresses (a lane) are aligned and exist."""
        length = width * count
        aligned = address % np.uint64(length) == 0
        inside = address < np.uint64(self.size)
        ok = aligned & inside
        if not ok.all():
            if not aligned.all():
                self.report.add(f"misaligned {self.name}", self.lines[line], (~aligned).sum())
            if not inside.all():
                self.report.add(f"outside {self.name}", self.lines[line], (~inside).sum())
        first = (address[ok] // np.uint64(self.unit)).astype(np.int64)
        exists = self.valid[first] & self.valid[first + max(length // self.unit, 1) - 1]
        if not exists.all():
            self.report.add(f"outside {self.name}", self.lines[line], (~exists).sum())
            ok[ok] = exists
        return ok

    def units(self, address, length):
        """(lanes, units) of accesses of so many bytes."""
        first = (address // np.uint64(self.unit)).astype(np.int64)
        return first[:, None] + np.arange(length // self.unit)

    def _race(self, kind, at, units, low, high, other, line):
        """Names accesses `at` (indices into units) that conflict with an earlier one; `other` is what is kept of it."""
        at = np.flatnonzero(at)
        other_low, other_high, other_line, other_sync = (kept[units[at]] for kept in other)
        near = np.minimum(low[at], other_low) // WARP == np.maximum(high[at], other_high) // WARP
        ordered = near & (other_sync != self.sync[low[at]])
        for soft in (False, True):
            for before, count in Counter(other_line[(near == soft) & ~ordered].tolist()).items():
                name = "within a warp" if soft else f"{self.name} race"
                self.report.add(name, f"{kind} {self.lines[line]} after {self.lines[before]}", count)

    def _across(self, kind, bad, units, other_line, line):
        for before, count in Counter(other_line[units[bad]].tolist()).items():
            what = f"{kind} {self.lines[line]}, another program {self.lines[before]}"
            self.report.add("race between programs", what, count)

    def touch(self, units, low, high, epoch, writes, line):
        """Checks accesses to `units` by threads `low` to `high` (all flat, lanes ascending) and remembers them."""
        before = self.write_epoch[units]
        same = before == epoch
        if same.any():
            same &= (self.write_low[units] != low) | (self.write_high[units] != high) | (low != high)
            kept = self.write_low, self.write_high, self.write_line, self.write_sync
            self._race("write" if writes else "read", same, units, low, high, kept, line)
        if self.order is not None:
            self.order.plain(units, low, epoch, line)
        if self.across:
            program = epoch // BARRIERS
            foreign = (before >= 0) & (before // BARRIERS != program)
            if self.order is not None and foreign.any():
                foreign[foreign] = self.order.unordered(before[foreign], program[foreign])
            if foreign.any():
                self._across("written" if writes else "read", foreign, units, self.write_line, line)
        if writes:
            read = self.read_epoch[units] == epoch
            if read.any():
                read &= (self.read_low[units] != low) | (self.read_high[units] != high)
                kept = self.read_low, self.read_high, self.read_line, self.read_sync
                self._race("write", read, units, low, high, kept, line)
            if self.across:
                foreign = (self.last_reader[units] > program) | (self.first_reader[units] < program)
                if foreign.any():
                    self._across("written", foreign, units, self.read_line, line)
            self.write_epoch[units] = epoch
            self.write_line[units] = line
            self.write_sync[units] = self.sync[high]
            self.write_low[units[::-1]] = low[::-1]  # of repeated places the last assignment stays
            self.write_high[units] = high
            if self.across and (self.write_epoch[units] != epoch).any():
                self.report.add("race between programs", f"written {self.lines[line]} by several")
        else:
            again = self.read_epoch[units] == epoch
            if again.any():
                low = np.where(again, np.minimum(self.read_low[units], low), low)
                high = np.where(again, np.maximum(self.read_high[units], high), high)
            self.read_epoch[units] = epoch
            self.read_line[units] = line
            self.read_sync[units] = self.sync[high]
            self.read_low[units[::-1]] = low[::-1]
            self.read_high[units] = high
            if self.across:
                self.first_reader[units[::-1]] = np.minimum(self.first_reader[units], program)[::-1]
                self.last_reader[units] = np.maximum(self.last_reader[units], program)

    # Accesses: an address, a thread and its epoch for each; with `warps`, all lanes of that thread's warp take part

    def load(self, address, width, count, thread, epoch, line, warps=False):
        """(count, lanes) of uint of `width` bytes, 0 where an address cannot be read."""
        ok = self.usable(address, width, count, line)
        out = np.zeros((count, len(address)), f"u{width}")
        if not ok.all():
            address, thread, epoch = address[ok], thread[ok], epoch[ok]
        units = self.units(address, width * count)
        flat, each = units.ravel(), units.shape[1]
        if self.asynchronous and self.arriving[flat].any():
            self.report.add("shared race", f"read {self.lines[line]} before cp.async has been waited for")
        self.touch(flat, *(np.repeat(x, each) for x in (*_who(thread, warps), epoch)), False, line)
        place = (address // np.uint64(width)).astype(np.int64)
        for index in range(count):
            out[index, ok] = self.views[width][place + index]
        return out

    def store(self, address, width, values, thread, epoch, line, warps=False):
        """values: (count, lanes) of uint of `width` bytes."""
        count = len(values)
        ok = self.usable(address, width, count, line)
        if not ok.all():
            address, thread, epoch, values = address[ok], thread[ok], epoch[ok], [v[ok] for v in values]
        units = self.units(address, width * count)
        flat, each = units.ravel(), units.shape[1]
        if self.asynchronous and (self.arriving[flat].any() or self.busy[flat].any()):
            self.report.add("shared race", f"write {self.lines[line]} while cp.async writes or wgmma reads")
        self.touch(flat, *(np.repeat(x, each) for x in (*_who(thread, warps), epoch)), True, line)
        place = (address // np.uint64(width)).astype(np.int64)
        for index in range(count):
            self.views[width][place + index] = values[index]
        for index in range(count):
            found = self.views[width][place + index]
            torn = found != values[index]
            if torn.any():  # arithmetic makes one NaN on a GPU, and many here
                torn &= ~(_not_a_number(found) & _not_a_number(values[index]))
            if torn.any():
                self.report.add("conflicting values in one store", f"{self.name}, {self.lines[line]}", torn.sum())
