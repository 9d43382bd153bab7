"""What atomics and fences order between programs.

A program *knows* another up to an epoch: what the other did in epochs before it has happened before whatever the first
does. A release at a place leaves there what its program knows, and its own epochs up to its last barrier; an acquire
that comes after it takes that up, and from the next barrier of its program on, all threads know it. In between, and of
the releasing thread's own accesses since its last barrier, nothing is granted: stricter than the memory model where a
thread works alone. Atomics that change a place carry on what releases have left there, relaxed or not. A fence makes
the atomics of its thread after it release, and those before it acquire.
"""

from dataclasses import dataclass, field

import numpy as np

from .memory import BARRIERS, Memory

OPERATIONS = {
    "add": lambda old, a: old + a,
    "min": lambda old, a: min(old, a),
    "max": lambda old, a: max(old, a),
    "and": lambda old, a: old & a,
    "or": lambda old, a: old | a,
    "xor": lambda old, a: old ^ a,
    "exch": lambda old, a: a,
    "cas": lambda old, a, b: b if old == a else old,
}


@dataclass
class Place:
    """What has been done to a unit of memory by atomics."""

    left: np.ndarray  # epochs [programs], by releases
    done: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # program -> (epoch, thread), in order
    known: dict[int, tuple[int, dict[int, int]]] = field(default_factory=dict)  # program -> epoch, how many of each
    narrow: bool = False  # one of them only reached its own program
    line: int = 0

    def counts(self) -> dict[int, int]:
        return {program: len(done) for program, done in self.done.items()}


class Order:
    """Of one launch: `memory` is global memory, `arrivals` the seed of the order in which atomics arrive that programs
    execute at once; 0 is the programs' own."""

    def __init__(self, memory: Memory, programs: int, arrivals: int):
        self.memory, self.programs = memory, programs
        self.random = np.random.default_rng(arrivals) if arrivals else None
        self.known = np.zeros((programs, programs), np.int64)
        self.coming = self.known.copy()  # what a program's next barrier makes known
        self.places: dict[int, Place] = {}
        self.is_place = np.zeros(len(memory.valid), bool)
        self.fenced: dict[int, np.ndarray] = {}  # thread -> what its last fence releases
        self.observed: dict[int, list] = {}  # thread -> what its next fence acquires

    def barrier(self, programs: np.ndarray):
        """All threads of these have met."""
        self.known[programs] = self.coming[programs]

    def _view(self, program: int, epoch: int) -> np.ndarray:
        view = self.known[program].copy()
        view[program] = epoch
        return view

    def fence(self, threads: np.ndarray, epochs: np.ndarray):
        for thread, epoch in zip(threads.tolist(), epochs.tolist(), strict=True):
            program = epoch // BARRIERS
            for taken in self.observed.pop(thread, ()):
                self._acquire(program, epoch, *taken)
            self.fenced[thread] = self._view(program, epoch)

    def _acquire(self, program: int, epoch: int, place: Place, left: np.ndarray, counts: dict[int, int]):
        np.maximum(self.coming[program], left, out=self.coming[program])
        place.known[program] = epoch, counts

    def atomic(self, address, width, kind, operation, operands, threads, epochs, semantics, scope, line):
        """Old values [lanes] of `kind`; the operands are values [lanes]."""
        memory = self.memory
        ok = memory.usable(address, width, 1, line)
        out = np.zeros(len(address), kind)
        lanes = np.flatnonzero(ok)
        if self.random is not None:
            lanes = self.random.permutation(lanes)
        values = memory.views[width].view(kind)
        for lane in lanes.tolist():
            thread, epoch = int(threads[lane]), int(epochs[lane])
            for unit in memory.units(address[lane : lane + 1], width)[0].tolist():
                self._touch(unit, thread, epoch, semantics, scope, line)
            at = int(address[lane]) // width
            out[lane] = values[at]
            values[at] = OPERATIONS[operation](values[at], *(operand[lane] for operand in operands))
        return out

    def _touch(self, unit: int, thread: int, epoch: int, semantics: str, scope: str, line: int):
        program, place = epoch // BARRIERS, self.places.get(unit)
        if place is None:
            place = self.places[unit] = Place(np.zeros(self.programs, np.int64))
            self.is_place[unit] = True
        self._after_plain(unit, thread, epoch, line)
        place.done.setdefault(program, []).append((epoch, thread))
        place.line = line
        place.narrow |= scope == "cta"
        if place.narrow and len(place.done) > 1:
            self._report("race between programs", f"atomic {self.memory.lines[line]} that only its program is to see")
        # An atomic reads before it writes: what was left there is taken up before its own is added.
        if semantics in ("acquire", "acq_rel"):
            self._acquire(program, epoch, place, place.left.copy(), place.counts())
        else:
            self.observed.setdefault(thread, []).append((place, place.left.copy(), place.counts()))
        if semantics in ("release", "acq_rel"):
            np.maximum(place.left, self._view(program, epoch), out=place.left)
        elif thread in self.fenced:
            np.maximum(place.left, self.fenced[thread], out=place.left)

    def _report(self, kind: str, what: str):
        self.memory.report.add(kind, what)

    def _after_plain(self, unit: int, thread: int, epoch: int, line: int):
        """Loads and stores of the unit that no order puts before this atomic."""
        memory, program = self.memory, epoch // BARRIERS
        for name, when, low, high, where in (
            ("written", memory.write_epoch, memory.write_low, memory.write_high, memory.write_line),
            ("read", memory.read_epoch, memory.read_low, memory.read_high, memory.read_line),
        ):
            before = int(when[unit])
            what = f"atomic {memory.lines[line]}, {name} {memory.lines[where[unit]]}"
            if before >= 0 and before // BARRIERS != program and before >= self.known[program, before // BARRIERS]:
                self._report("race between programs", what)
            elif before == epoch and (low[unit] != thread or high[unit] != thread):
                self._report("global race", what)

    def unordered(self, before: np.ndarray, program: np.ndarray) -> np.ndarray:
        """Whether accesses of these epochs, of other programs, may come after what `program` does now."""
        return before >= self.known[program, before // BARRIERS]

    def plain(self, units: np.ndarray, threads: np.ndarray, epochs: np.ndarray, line: int):
        """Loads or stores of units that atomics have changed."""
        for at in np.flatnonzero(self.is_place[units]).tolist():
            place, thread, epoch = self.places[int(units[at])], int(threads[at]), int(epochs[at])
            program = epoch // BARRIERS
            since, counts = place.known.get(program, (epoch, {}))
            what = f"{self.memory.lines[line]}, atomic {self.memory.lines[place.line]}"
            for other, done in place.done.items():
                if other == program:
                    if any(when == epoch and who != thread for when, who in done):
                        self._report("global race", what)
                elif since >= epoch or counts.get(other, 0) < len(done):
                    self._report("race between programs", what)
