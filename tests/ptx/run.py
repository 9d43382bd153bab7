"""All threads of all programs of a launch, as one vector.

A step takes the lowest block that any thread has reached, and runs it for all threads that are there: what a branch has
parted meets again behind it, as ptxas arranges, and loops run until their last thread leaves. A thread that waits at a
barrier goes on when all of its program wait.
"""

from typing import NamedTuple

import numpy as np

from . import matrices, numbers
from .memory import BARRIERS, WARP, Memory
from .order import Order
from .parse import Kernel

_WAITING, _GONE = 1 << 24, 1 << 28  # added to the block to go on with; the block of a thread that has ended
_MOST_STEPS = 2_000_000


class Stuck(Exception):
    """A launch that does not end."""


class Conditions(NamedTuple):
    """What a result may not depend on.

    Args:
        poison: byte that memory and registers hold which nothing has written. 0xFF makes NaN and -1; with 0x71 floats
            are large.
        error: approximate instructions err by up to 2 units in the last place.
        arrivals: 0, or the seed of another order in which programs that are at the same atomic arrive.
    """

    poison: int = 0xFF
    error: bool = False
    arrivals: int = 0


USUAL = Conditions()


class Machine(matrices.Matrices):
    """One launch.

    Args:
        kernel: what `parse` made of its PTX; `functions` and `registers` what `translate` made of that.
        grid: programs in x, y, z.
        parameters: one numpy scalar each.
        memory: of the device, and `base`, the address of its first byte.
        shared: bytes of shared memory a program, and `unit` those of the smallest access.
    """

    def __init__(self, kernel: Kernel, translated, grid, parameters, memory, base, shared, unit, under: Conditions):
        self.kernel, (self.functions, names) = kernel, translated
        self.parameters, self.report, self.base = parameters, memory.report, np.uint64(base)
        self.approximate = numbers.Approximate(under.error)
        self.programs, self.threads = int(np.prod(grid)), kernel.threads
        size = self.programs * self.threads
        self.lane = np.arange(size, dtype=np.int32)
        self.program = self.lane // self.threads
        self.tid = [(self.lane % self.threads).astype(np.uint32), np.uint32(0), np.uint32(0)]
        self.ntid = [np.uint32(self.threads), np.uint32(1), np.uint32(1)]
        x, y = grid[0], grid[1]
        self.ctaid = [i.astype(np.uint32) for i in (self.program % x, self.program // x % y, self.program // (x * y))]
        self.nctaid = [np.uint32(n) for n in grid]
        self.epoch = self.program.astype(np.int64) * BARRIERS
        lines = [each.where for each in kernel.instructions]
        self.lines = lines
        self.global_ = memory
        if any(each.parts[0] in ("atom", "red") for each in kernel.instructions):
            memory.order = Order(memory, self.programs, under.arrivals)
        memory.lines = lines
        self.stride = -(-max(shared, 1) // 1024) * 1024
        data = np.full(self.programs * self.stride, under.poison, np.uint8)
        valid = np.arange(len(data) // unit) * unit % self.stride < shared
        self.shared_ = Memory("shared", data, unit, valid, False, lines, self.report)
        self.shared_base = self.program.astype(np.uint64) * np.uint64(self.stride)
        words = {
            width: np.frombuffer(bytes([under.poison]) * (width // 8), f"u{width // 8}")[0] for width in (16, 32, 64)
        }
        self.registers = []
        for name in names:
            width = kernel.widths[name.rstrip("0123456789")]
            self.registers.append(np.bool_(False) if width == 1 else words[width])
        memory.sync = self.shared_.sync = np.zeros(size, np.int32)
        self.committed = np.zeros(size, np.int32)  # groups of cp.async
        self.copies: list = []
        self.reset_products()

    def run(self):
        at = np.zeros(len(self.lane), np.int32)
        for _ in range(_MOST_STEPS):
            here = int(at.min())
            if here >= _WAITING:
                if here < _GONE:
                    self._deadlock(at)
                return
            mask = at == here
            self.full = bool(mask.all())
            taken = self.functions[here](self, self.registers, mask, self.full)
            block = self.kernel.blocks[here]
            last = block.instructions[-1]
            name = last.parts[0]
            at[mask] = _GONE if name in ("ret", "exit") else here + 1
            if name == "bra":
                went = mask if taken is None else taken & mask
                at[went] = block.target
                for way, any_went in ((True, went.any()), (False, (mask & ~went).any())):
                    self.report.branches[self.kernel.name, str(last), way] += int(any_went)
            elif name == "bar":
                at[mask] += _WAITING
                self._release(at)
        raise Stuck(f"{self.kernel.name}: {_MOST_STEPS} blocks and no end")

    def _release(self, at):
        by_program = at.reshape(self.programs, self.threads)
        ready = (by_program >= _WAITING).all(axis=1) & (by_program < _GONE).all(axis=1)
        if ready.any():
            by_program[ready] -= _WAITING
            self.epoch.reshape(by_program.shape)[ready] += 1
            if self.global_.order is not None:
                self.global_.order.barrier(ready)

    def _deadlock(self, at):
        for block in np.unique(at[(at >= _WAITING) & (at < _GONE)] - _WAITING):
            last = self.kernel.blocks[int(block) - 1].instructions[-1]
            self.report.add(
                "deadlock", f"{last.where} waits for threads that never come", (at == block + _WAITING).sum()
            )

    # Memory

    def _lanes(self, mask, guard):
        """Indices of the threads that take part; None for all."""
        if guard is None:
            return None if self.full else np.flatnonzero(mask)
        guard = np.broadcast_to(guard, mask.shape)
        return np.flatnonzero(guard if self.full else guard & mask)

    def _access(self, memory, address, lanes):
        """Address in the memory's data, thread and epoch of each lane."""
        address = np.broadcast_to(address, self.lane.shape)
        base = self.shared_base if memory is self.shared_ else None
        if lanes is None:
            offset = address + base if base is not None else address - self.base
            return self._bounded(offset, address, base), self.lane, self.epoch
        address = address[lanes]
        offset = address + base[lanes] if base is not None else address - self.base
        return self._bounded(offset, address, base), self.lane[lanes], self.epoch[lanes]

    def _bounded(self, offset, address, base):
        """Shared addresses beyond the program's own memory do not become another program's."""
        if base is None:
            return offset
        return np.where(
            address < self.stride, offset, np.uint64(self.shared_.size) + address // np.uint64(16) * np.uint64(16)
        )

    def load(self, memory, address, mask, guard, width, count, number):
        lanes = self._lanes(mask, guard)
        if lanes is None:
            return memory.load(*self._first(memory, address, lanes, width, count), number)
        out = np.zeros((count, len(self.lane)), f"u{width}")
        if len(lanes):
            out[:, lanes] = memory.load(*self._first(memory, address, lanes, width, count), number)
        return out

    def _first(self, memory, address, lanes, width, count):
        place, thread, epoch = self._access(memory, address, lanes)
        return place, width, count, thread, epoch

    def store(self, memory, address, mask, guard, width, values, number):
        lanes = self._lanes(mask, guard)
        if lanes is not None and not len(lanes):
            return
        values = [np.broadcast_to(value, self.lane.shape) for value in values]
        if lanes is not None:
            values = [value[lanes] for value in values]
        place, thread, epoch = self._access(memory, address, lanes)
        memory.store(place, width, values, thread, epoch, number)

    def atomic(self, address, mask, guard, kind, operation, operands, semantics, scope, number):
        lanes = self._lanes(mask, guard)
        lanes = np.arange(len(self.lane)) if lanes is None else lanes
        out = np.zeros(len(self.lane), kind)
        if len(lanes):
            place, thread, epoch = self._access(self.global_, address, lanes)
            operands = [np.broadcast_to(operand, self.lane.shape)[lanes] for operand in operands]
            out[lanes] = self.global_.order.atomic(
                place, out.itemsize, kind, operation, operands, thread, epoch, semantics, scope, number
            )
        return out

    def fence(self, mask, guard):
        if self.global_.order is not None:
            lanes = self._lanes(mask, guard)
            lanes = np.arange(len(self.lane)) if lanes is None else lanes
            self.global_.order.fence(self.lane[lanes], self.epoch[lanes])

    # cp.async: until it is waited for, the place holds poison

    def copy(self, to, source, mask, guard, size, given, number):
        lanes = self._lanes(mask, guard)
        lanes = np.arange(len(self.lane)) if lanes is None else lanes
        if not len(lanes):
            return
        data = np.zeros((size // 4, len(lanes)), np.uint32)
        reads = np.broadcast_to(given, self.lane.shape)[lanes] >= size
        if reads.any():
            place, thread, epoch = self._access(self.global_, source, lanes[reads])
            words = self.global_.load(place, size, 1, thread, epoch, number) if size < 16 else None
            data[:, reads] = (
                self.global_.load(place, 4, 4, thread, epoch, number)
                if words is None
                else words[0].view(np.uint32).reshape(-1, size // 4).T
            )
        place, thread, epoch = self._access(self.shared_, to, lanes)
        memory = self.shared_
        memory.asynchronous = True
        memory.store(place, 4, np.full_like(data, 0xFFFFFFFF), thread, epoch, number)
        memory.arriving[memory.units(place, size)] = True
        self.copies.append((lanes, self.committed[lanes], place, data, number))

    def commit_copies(self, mask):
        self.committed[mask] += 1

    def wait_copies(self, mask, pending, number):
        memory, left = self.shared_, []
        for lanes, group, place, data, issued in self.copies:
            done = mask[lanes] & (group < self.committed[lanes] - pending)
            if done.any():
                memory.arriving[memory.units(place[done], 4 * len(data))] = False
                who = lanes[done]
                memory.store(place[done], 4, data[:, done], self.lane[who], self.epoch[who], issued)
            if not done.all():
                wait = ~done
                left.append((lanes[wait], group[wait], place[wait], data[:, wait], issued))
        self.copies = left

    # Between threads

    def whole_warps(self, mask, number) -> bool:
        if self.full:
            return True
        by_warp = mask.reshape(-1, WARP)
        parted = by_warp.any(axis=1) & ~by_warp.all(axis=1)
        if parted.any():
            self.report.add("a part of a warp", self.lines[number], parted.sum())
        return not parted.any()

    def synchronise_warps(self, mask, number):
        self.whole_warps(mask, number)
        self.shared_.sync[mask] += 1

    def shuffle(self, mode, value, by, mask, number):
        self.whole_warps(mask, number)
        value, by = np.broadcast_to(value, self.lane.shape), np.broadcast_to(by, self.lane.shape)
        lane, by = self.lane % WARP, by.astype(np.int32)
        if mode == "up":  # the first lanes keep their own
            source = np.where(lane >= by, lane - by, lane)
        else:
            source = lane ^ by if mode == "bfly" else by & (WARP - 1)
        return value[self.lane - lane + source]

    # Pairs in a register

    @staticmethod
    def _floats(kind, x):
        low, high = numbers.halves(x)
        if kind == "bf":
            return numbers.from_bf16(low), numbers.from_bf16(high)
        return low.view(np.float16).astype(np.float32), high.view(np.float16).astype(np.float32)

    @staticmethod
    def pack_floats(kind, low, high):
        if kind == "bf":
            return numbers.pack(numbers.to_bf16(low), numbers.to_bf16(high))
        return numbers.pack(*(np.asarray(x).astype(np.float16).view(np.uint16) for x in (low, high)))

    def packed(self, operator, kind, *operands):
        """One operation on both halves; float32 holds what is rounded once, to the halves' type."""
        operate = {"+": np.add, "-": np.subtract, "*": np.multiply, "fma": numbers.fma32}[operator]
        low, high = zip(*(self._floats(kind, x) for x in operands), strict=True)
        return self.pack_floats(kind, operate(*low), operate(*high))
