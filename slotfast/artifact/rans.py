"""Matrices of small integers at the entropy that their rows and columns leave, by range asymmetric numeral systems.

Trained weights are close to Gaussian, but rows and columns differ in size. So every code's frequency table is chosen by
the sum of a class of its row and a class of its column, both found from the codes' magnitudes: the logarithms of the
fitted row and column sizes, in whole steps. The steps (none, or 1, 2 or 4 a doubling) are those that give the fewest
bytes: 1 to 2% fewer than the order-0 entropy, on the shipped model and on larger ones drawn like it
(bench/artifact_sizes.py). What did not pay: coding differences between neighbours (9% more), and classes of rows alone.

Layout, little-endian:

    side bytes u32 | side, brotli | words u32 [...]
    side: tables u8 (C) | lowest code i8 | codes - 1 u8 (S - 1) | where C > 1: row classes i8 [N], column classes u8 [K]
          | levels u8 [C, S], each the difference from the one before it in its row, modulo 256

A code of row class a and column class b is in table min(max(a + b, 1), C) - 1. A level l > 0 stands for a frequency
proportional to 2^((l - 1) / 4), 0 for one that does not occur; `_frequencies` makes whole numbers of 2^24 of them
without floating point, so that every machine has the same. The words are a stack: rANS with a 64-bit state, 32-bit
words and these frequencies, which holds the codes table by table and within a table row by row, the first code on top.
`constriction` runs it; `_PlainStack` is its definition, and runs where there is no constriction.

Sources: Duda, arXiv 1311.2540; https://bamler-lab.github.io/constriction.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import brotli
import numpy as np

from .bounded import unbrotli

try:
    import constriction
except ImportError:  # it has no wheels for Linux on ARM
    constriction = None

_PRECISION = 24  # bits of a frequency
_LEVELS = 4  # levels a doubling of frequency: half a step costs a thousandth of a bit a code
_STEPS = (0, 1, 2, 4)  # classes a doubling of size
_MAX_TABLES = 64
_CHUNK = 1 << 18  # codes decoded at a time: constriction returns four bytes for each
# 2^(l / _LEVELS) in 1/65536
_FRACTIONS = np.array([65536, 77936, 92682, 110218], np.int64)


@dataclass(frozen=True)
class _Side:
    """What stands before the words.

    Args:
        lowest: the least code that has an entry in the tables.
        rows: int8 [N], class of each row.
        columns: uint8 [K], class of each column.
        levels: uint8 [C, S].
    """

    lowest: int
    rows: np.ndarray
    columns: np.ndarray
    levels: np.ndarray

    def pack(self) -> bytes:
        tables, symbols = self.levels.shape
        classes = self.rows.tobytes() + self.columns.tobytes() if tables > 1 else b""
        differences = np.diff(self.levels, axis=1, prepend=np.uint8(0))
        raw = struct.pack("<BbB", tables, self.lowest, symbols - 1) + classes + differences.tobytes()
        return brotli.compress(raw, quality=11)

    @classmethod
    def unpack(cls, data: bytes | memoryview, shape: tuple[int, int]) -> "_Side":
        n, k = shape
        raw = unbrotli(data, 3 + n + k + _MAX_TABLES * 256)
        if len(raw) < 3:
            raise ValueError(f"{len(raw)} bytes of tables")
        tables, lowest, symbols = struct.unpack_from("<BbB", raw)
        symbols += 1
        classes = n + k if tables > 1 else 0
        if not 1 <= tables <= _MAX_TABLES or symbols < 2 or lowest + symbols > 128:
            raise ValueError(f"{tables} tables of {symbols} codes from {lowest}")
        if len(raw) != 3 + classes + tables * symbols:
            raise ValueError(f"{len(raw)} bytes of tables, expected {3 + classes + tables * symbols}")
        found = np.frombuffer(raw, np.uint8)
        rows, columns = np.zeros(n, np.int8), np.zeros(k, np.uint8)
        if classes:
            rows, columns = found[3 : 3 + n].view(np.int8), found[3 + n : 3 + n + k]
        levels = np.cumsum(found[3 + classes :].reshape(tables, symbols), axis=1, dtype=np.uint8)
        return cls(lowest, rows, columns, levels)

    @property
    def table(self) -> np.ndarray:
        """Index of every code's table, uint8 [N, K]."""
        total = self.rows[:, None].astype(np.int16) + self.columns
        return (total.clip(1, len(self.levels)) - 1).astype(np.uint8)


def encode(codes: np.ndarray) -> bytes | None:
    """Encode a matrix.

    Args:
        codes: int8 [N, K].

    Returns:
        The bytes, or None where there is nothing to code or no constriction.
    """
    if constriction is None or codes.ndim != 2 or codes.size == 0:
        return None
    lowest = min(int(codes.min()), 126)
    symbols = max(int(codes.max()) - lowest + 1, 2)
    shifted = (codes.astype(np.int16) - lowest).astype(np.uint8)
    sides = [_side(shifted, symbols, lowest, rows, columns) for rows, columns in _classes(codes)]
    _, side = min(sides, key=lambda found: found[0])
    table = side.table
    coder = constriction.stream.stack.AnsCoder()
    for index in reversed(range(len(side.levels))):  # a stack: what is decoded first is pushed last
        members = shifted[table == index].astype(np.int32)
        if members.size:
            coder.encode_reverse(members, _model(side.levels[index]))
    packed = side.pack()
    return struct.pack("<I", len(packed)) + packed + coder.get_compressed().astype("<u4").tobytes()


def decode(data: bytes | memoryview, shape: tuple[int, int]) -> np.ndarray:
    """Decode a matrix.

    Args:
        data: what `encode` gave.
        shape: (N, K) of the matrix.

    Returns:
        int8 [N, K].

    Raises:
        ValueError: the data do not hold exactly such a matrix.
    """
    if len(data) < 4:
        raise ValueError(f"{len(data)} bytes")
    (length,) = struct.unpack_from("<I", data)
    if length > len(data) - 4 or (len(data) - 4 - length) % 4:
        raise ValueError(f"{length} bytes of tables in {len(data)}")
    side = _Side.unpack(data[4 : 4 + length], shape)
    words = np.frombuffer(data, "<u4", offset=4 + length).astype(np.uint32)
    if words.size and not words[-1]:
        raise ValueError("the last word is zero")
    table = side.table
    codes = np.empty(shape, np.int8)
    stack = _PlainStack(words) if constriction is None else _Stack(words)
    for index, size in enumerate(np.bincount(table.ravel(), minlength=len(side.levels)).tolist()):
        members = np.empty(size, np.int8)
        for start in range(0, size, _CHUNK):
            chunk = members[start : start + _CHUNK]
            chunk[:] = stack.pop(side.levels[index], len(chunk)) + side.lowest
        codes[table == index] = members
    if not stack.is_empty():
        raise ValueError("its codes end before its data do")
    return codes


class _Stack:
    """Takes codes off a stack of words, by constriction.

    Args:
        words: uint32, the last one not zero.
    """

    def __init__(self, words: np.ndarray):
        self.coder = constriction.stream.stack.AnsCoder(*[words] if words.size else [])

    def pop(self, levels: np.ndarray, count: int) -> np.ndarray:
        """The next `count` codes of one table, int32."""
        return self.coder.decode(_model(levels), count)

    def is_empty(self) -> bool:
        return self.coder.is_empty()


class _PlainStack:
    """What `_Stack` does, in plain Python: a microsecond a code."""

    def __init__(self, words: np.ndarray):
        self.words, self.state = words.tolist(), 0
        while self.words and self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()

    def pop(self, levels: np.ndarray, count: int) -> np.ndarray:
        frequency = _frequencies(levels)
        below = (frequency.cumsum() - frequency).tolist()
        code_of = np.repeat(np.arange(len(frequency), dtype=np.uint8), frequency)
        frequency, codes = frequency.tolist(), np.empty(count, np.int32)
        for at in range(count):
            low = self.state & ((1 << _PRECISION) - 1)
            code = codes[at] = int(code_of[low])
            self.state = frequency[code] * (self.state >> _PRECISION) + low - below[code]
            if self.state < 1 << 32 and self.words:
                self.state = self.state << 32 | self.words.pop()
        return codes

    def is_empty(self) -> bool:
        return self.state == 0 and not self.words


def _frequencies(levels: np.ndarray) -> np.ndarray:
    """Whole numbers of at least 1 that sum to 2^24, int64 [S], of one table's levels; by integer arithmetic alone."""
    steps = levels.astype(np.int64) - 1
    most = steps.max()
    if most < 0:
        raise ValueError("a table without frequencies")
    down = np.maximum(most - steps, 0)  # steps below the most frequent
    power = -down % _LEVELS
    weight = np.where(levels > 0, (_FRACTIONS[power] << 20) >> np.minimum((down + power) // _LEVELS, 40), 0)
    frequency = weight * ((1 << _PRECISION) - len(levels)) // weight.sum() + 1
    frequency[int(frequency.argmax())] += (1 << _PRECISION) - frequency.sum()
    return frequency


def _model(levels: np.ndarray) -> "constriction.stream.model.Categorical":
    # Exact multiples of 2^-24, so the best approximation, which `perfect` asks for, is these frequencies themselves.
    return constriction.stream.model.Categorical(_frequencies(levels) / 2.0**_PRECISION, perfect=True)


def _classes(codes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Candidates for the classes of rows and columns, int [N] and [K]."""
    square = np.square(codes, dtype=np.float32)
    row: np.ndarray = square.mean(1) + 1e-3
    column: np.ndarray = np.ones(codes.shape[1], np.float32)
    for _ in range(4):  # fit mean square = row * column
        column = (square / row[:, None]).mean(0) + 1e-3
        row = (square / column).mean(1) + 1e-3
    sizes = np.log2(row) / 2, np.log2(column) / 2
    for step in _STEPS:
        rows, columns = (np.round((size - size.min()) * step).astype(np.int64) for size in sizes)
        yield rows, columns


def _side(shifted: np.ndarray, symbols: int, lowest: int, rows: np.ndarray, columns: np.ndarray) -> tuple[float, _Side]:
    """The bytes that a choice of classes comes to, and its `_Side`."""
    # The few codes whose sums lie further out share the outermost tables.
    share = np.bincount((rows[:, None] + columns).ravel()).cumsum() / shifted.size
    first, last = (int(np.searchsorted(share, edge)) for edge in (0.002, 0.998))
    last = min(last, first + _MAX_TABLES - 1)
    rows, columns = (rows - first + 1).clip(-128, 127).astype(np.int8), columns.clip(0, 255).astype(np.uint8)
    side = _Side(lowest, rows, columns, np.empty((last - first + 1, 0)))
    index = side.table.astype(np.int64) * symbols + shifted
    counts = np.bincount(index.ravel(), minlength=len(side.levels) * symbols).reshape(-1, symbols)
    levels = np.where(counts, 1 + np.round(_LEVELS * np.log2(np.maximum(counts, 1))), 0).astype(np.uint8)
    side = _Side(lowest, rows, columns, levels)
    bits = 0.0
    for count, level in zip(counts, levels, strict=True):
        if count.any():
            bits += float((count * (_PRECISION - np.log2(_frequencies(level)))).sum())
    return bits / 8 + len(side.pack()), side
