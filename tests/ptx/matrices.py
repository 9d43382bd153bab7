"""Instructions of a warp, or of four, on matrices: ldmatrix, stmatrix, mma and wgmma."""

import numpy as np

from . import numbers

_LANE = np.arange(32)
_ROW, _COLUMN = _LANE // 4, _LANE % 4 * 2  # of the pair that a lane holds in an 8 x 8 matrix
_GROUP = 128  # threads that make a wgmma
_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # of a descriptor: bytes of a row


def _halves(kind, registers):
    """(..., 2) float32 of 16-bit pairs."""
    low, high = numbers.halves(np.asarray(registers))
    if kind == "bf16":
        return np.stack((numbers.from_bf16(low), numbers.from_bf16(high)), -1)
    return np.stack((low.view(np.float16), high.view(np.float16)), -1).astype(np.float32)


def left_fragment(kind, registers):
    """(16, 16) of each warp from its 4 registers a lane: (4, warps, 32) -> (warps, 16, 16)."""
    pairs = _halves(kind, registers)
    out = np.empty((pairs.shape[1], 16, 16), np.float32)
    for index in range(4):
        for half in range(2):
            out[:, _ROW + 8 * (index % 2), _COLUMN + half + 8 * (index // 2)] = pairs[index, :, :, half]
    return out


def right_fragment(kind, registers):
    """(16, 8) of each warp from its 2 registers a lane: (2, warps, 32) -> (warps, 16, 8)."""
    pairs = _halves(kind, registers)
    out = np.empty((pairs.shape[1], 16, 8), np.float32)
    for index in range(2):
        for half in range(2):
            out[:, _COLUMN + half + 8 * index, _ROW] = pairs[index, :, :, half]
    return out


def accumulators(matrix):
    """Registers that hold (warps, 16, n) float32: (n / 2, warps, 32)."""
    n = matrix.shape[2]
    return np.stack(
        [
            matrix[:, _ROW + 8 * (part // 2), 8 * block + _COLUMN + part % 2]
            for block in range(n // 8)
            for part in range(4)
        ]
    )


def from_accumulators(registers):
    """(n / 2, warps, 32) -> (warps, 16, n)."""
    out = np.empty((registers.shape[1], 16, 2 * len(registers)), np.float32)
    for index, register in enumerate(registers):
        out[:, _ROW + 8 * (index % 4 // 2), 8 * (index // 4) + _COLUMN + index % 2] = register
    return out


def descriptor_places(descriptors, rows, transposed):
    """Byte addresses of (rows, 16) 16-bit elements that each matrix descriptor (groups,) means: (groups, rows, 16).

    Not transposed, K is contiguous; transposed, the rows are.
    """
    bits = np.asarray(descriptors, np.uint64)
    start, leading, stride = (((bits >> np.uint64(at)) & np.uint64(0x3FFF)).astype(np.int64) << 4 for at in (0, 16, 32))
    start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
    modes = np.unique(bits >> np.uint64(62))
    if len(modes) != 1:
        raise NotImplementedError("wgmma with several swizzles at once")
    width = _SWIZZLES[int(modes[0])]
    row, k = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
    if transposed:
        of = width // 2
        far, near = (stride, leading) if width == 16 else (leading, stride)
        place = start + row // of * far + k // 8 * near + k % 8 * width + row % of * 2
    elif width == 16:
        place = start + row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
    else:
        place = start + row // 8 * stride + row % 8 * width + k * 2
    if width > 16:
        place = place ^ ((place >> 7) & (width // 16 - 1)) << 4
    return place


class Matrices:
    """What a machine does with matrices; the rest of it is in `run.py`."""

    def _by_warp(self, registers):
        """(registers, warps, 32)"""
        return np.stack([np.broadcast_to(x, self.lane.shape) for x in registers]).reshape(len(registers), -1, 32)

    def _rows(self, address, mask, count, number):
        """Threads that name the rows of `count` matrices, their places in shared memory, and which warps take part."""
        self.whole_warps(mask, number)
        lanes = np.flatnonzero(mask & (self.lane % 32 < 8 * count))
        return lanes, self._access(self.shared_, address, lanes), mask.reshape(-1, 32)[:, 0]

    def load_matrices(self, address, mask, count, transposed, number):
        lanes, (place, thread, epoch), warps = self._rows(address, mask, count, number)
        words = self.shared_.load(place, 4, 4, thread, epoch, number, warps=True)  # (4, rows)
        elements = np.stack(numbers.halves(words), -1).transpose(1, 0, 2).reshape(-1, count, 8, 8)
        out = np.zeros((count, len(warps), 32), np.uint32)
        row, column = (_COLUMN, _ROW) if transposed else (_ROW, _COLUMN)
        step = (1, 0) if transposed else (0, 1)
        for index in range(count):
            matrix = elements[:, index]
            out[index, warps] = numbers.pack(matrix[:, row, column], matrix[:, row + step[0], column + step[1]])
        return out.reshape(count, -1)

    def store_matrices(self, address, mask, registers, transposed, number):
        count = len(registers)
        lanes, (place, thread, epoch), warps = self._rows(address, mask, count, number)
        low, high = numbers.halves(self._by_warp(registers)[:, warps])
        elements = np.empty((low.shape[1], count, 8, 8), np.uint16)
        row, column = (_COLUMN, _ROW) if transposed else (_ROW, _COLUMN)
        step = (1, 0) if transposed else (0, 1)
        for index in range(count):
            elements[:, index, row, column] = low[index]
            elements[:, index, row + step[0], column + step[1]] = high[index]
        words = np.ascontiguousarray(elements).view(np.uint32).reshape(-1, 4).T
        self.shared_.store(place, 4, words, thread, epoch, number, warps=True)

    def multiply_matrices(self, kind, a, b, c, mask, number):
        self.whole_warps(mask, number)
        a, b = left_fragment(kind, self._by_warp(a)), right_fragment(kind, self._by_warp(b))
        c = from_accumulators(self._by_warp([np.asarray(x) for x in c]))
        product = np.matmul(a, b, dtype=np.float64) + c
        return accumulators(product.astype(np.float32)).reshape(4, -1)

    # wgmma: computed when issued; its operands in shared memory are being read until the group is waited for

    def reset_products(self):
        self.products: list = []
        self.committed_products = np.zeros(len(self.lane), np.int32)

    def _operand(self, kind, descriptor, rows, transposed, first, number):
        """(groups, rows, 16) from shared memory, of the groups whose first threads these are."""
        memory = self.shared_
        descriptor = np.broadcast_to(descriptor, self.lane.shape)
        for lane in (32, 64, 96):
            if (descriptor[first] != descriptor[first + lane]).any():
                self.report.add("wgmma", f"{self.lines[number]}: descriptors of a group differ")
        place = descriptor_places(descriptor[first], rows, transposed)
        inside = (place < self.stride).all(axis=(1, 2))
        if not inside.all():
            self.report.add("outside shared", self.lines[number], (~inside).sum())
            place = np.where(place < self.stride, place, 0)
        place = place + self.shared_base[first].astype(np.int64)[:, None, None]
        units = np.unique(place.reshape(len(first), -1) // memory.unit, axis=1)
        self._read(units, first, number)
        flat = units.ravel()
        if not memory.valid[flat].all():
            self.report.add("outside shared", self.lines[number])
        if memory.arriving[flat].any():
            self.report.add("shared race", f"wgmma {self.lines[number]} before cp.async has been waited for")
        memory.asynchronous = True
        memory.busy[flat] += 1
        self.products.append((first, self.committed_products[first], units, number))
        values = memory.views[2][place // 2]
        return numbers.from_bf16(values) if kind == "bf16" else values.view(np.float16).astype(np.float32)

    def _read(self, units, first, number):
        """As reads by all threads of the groups."""
        each = units.shape[1]
        low, high = (np.repeat(first + more, each).astype(np.int32) for more in (0, _GROUP - 1))
        self.shared_.touch(units.ravel(), low, high, np.repeat(self.epoch[first], each), False, number)

    def multiply_group(self, kind, n, acc, left, right, keep, transposed_left, transposed_right, mask, number):
        self.whole_warps(mask, number)
        by_group = mask.reshape(-1, _GROUP)
        if (by_group.any(axis=1) & ~by_group.all(axis=1)).any():
            self.report.add("a part of a warpgroup", self.lines[number])
        first = np.flatnonzero(by_group.all(axis=1)) * _GROUP
        groups = first // _GROUP
        if isinstance(left, tuple):
            warps = left_fragment(kind, self._by_warp(left)).reshape(-1, 64, 16)
            a = warps[groups]
        else:
            a = self._operand(kind, left, 64, transposed_left, first, number)
        b = self._operand(kind, right, n, transposed_right, first, number)
        product = np.matmul(a, b.transpose(0, 2, 1), dtype=np.float64)
        old = from_accumulators(self._by_warp(acc)).reshape(-1, 64, n)
        keeps = np.broadcast_to(keep, self.lane.shape)[first][:, None, None]
        new = old.copy()
        new[groups] = (product + np.where(keeps, old[groups], 0)).astype(np.float32)
        return accumulators(new.reshape(-1, 16, n)).reshape(len(acc), -1)

    def commit_products(self, mask):
        self.committed_products[mask] += 1

    def wait_products(self, mask, pending, number):
        left = []
        for first, group, units, issued in self.products:
            done = mask[first] & (group < self.committed_products[first] - int(pending))
            if done.any():
                self.shared_.busy[units[done].ravel()] -= 1
                self._read(units[done], first[done], issued)
            if not done.all():
                left.append((first[~done], group[~done], units[~done], issued))
        self.products = left
