"""Arithmetic of PTX on numpy arrays, where numpy has no function for it.

Approximate instructions give the rounded result. With `error`, results of ex2, lg2, div.full and the like are off by up
to 2 units in the last place, by an amount that the operands decide: what the ISA allows, and the same in every lane.
"""

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i2, i4, i8 = np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
_SMALLEST = np.finfo(f4).tiny


def flush(x):
    """Subnormal float32 become 0."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(f4(0), x), x)


def fma32(a, b, c):
    """Rounded twice where the exact value is within 2**-29 of halfway between two float32."""
    return (np.multiply(a, b, dtype=f8) + c).astype(f4)


def fma64(a, b, c):
    """In 80 bits; the product loses its last ones."""
    return (np.multiply(a, b, dtype=np.longdouble) + c).astype(f8)


def from_bf16(x):
    return (np.asarray(x).astype(u4) << u4(16)).view(f4)


def to_bf16(x):
    """Nearest, ties to even."""
    bits = np.asarray(x, f4).view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def pack(low, high):
    return low.astype(u4) | (high.astype(u4) << u4(16))


def halves(x):
    return x.astype(u2), (x >> u4(16)).astype(u2)


def shift_left(a, b, bits):
    return np.where(b < bits, a << np.minimum(b, a.dtype.type(bits - 1)).astype(a.dtype), a.dtype.type(0))


def shift_right(a, b, bits):
    """Arithmetic for signed a."""
    b = np.minimum(b, bits - 1).astype(a.dtype) if a.dtype.kind == "i" else b
    if a.dtype.kind == "i":
        return a >> b
    return np.where(b < bits, a >> np.minimum(b, a.dtype.type(bits - 1)).astype(a.dtype), a.dtype.type(0))


def divide(a, b):
    """Integers, towards 0; a division by 0 gives all ones."""
    by = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        wide = np.abs(a.astype(i8)) // np.abs(by.astype(i8)) * np.sign(a).astype(i8) * np.sign(by).astype(i8)
        quotient = wide.astype(a.dtype)
    else:
        quotient = a // by
    return np.where(b == 0, a.dtype.type(0) - a.dtype.type(1), quotient)


def remainder(a, b):
    return a - divide(a, b) * b


def multiply_high(a, b):
    """Upper half of the product of two unsigned 64-bit numbers."""
    low, half = u8(0xFFFFFFFF), u8(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + (a0 * b1 + (middle & low) >> half)


def bit_field(a, position, length, signed):
    """bfe of 32-bit a, with both numbers immediate."""
    field = (a >> u4(position)) & u4((1 << min(length, 32 - position)) - 1)
    if not signed or length == 0:
        return field
    rest = u4(32 - length)
    return ((field << rest).view(i4) >> i4(rest)).view(u4)


def permute_bytes(a, b, selector):
    """prmt in its default mode, with an immediate selector."""
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out = u4(0)
    for place in range(4):
        nibble = selector >> 4 * place & 0xF
        byte = (both >> u8(8 * (nibble & 7))).astype(u4) & u4(0xFF)
        if nibble & 8:
            byte = np.where(byte & u4(0x80), u4(0xFF), u4(0))
        out = out | (byte << u4(8 * place))
    return out


def to_integer(x, kind, rounding):
    """cvt of a float to an integer: saturates; NaN gives 0."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](np.asarray(x, f8))
    limits = np.iinfo(kind)
    clipped = np.clip(rounded, float(limits.min), float(limits.max))
    out = np.where(np.isnan(clipped), 0, clipped)
    high = out >= float(limits.max)
    return np.where(high, kind(limits.max), np.where(high, 0, out).astype(kind))


class Approximate:
    """ex2, lg2 and other instructions whose last bits the ISA leaves open."""

    def __init__(self, error: bool):
        self.error = error

    def _off(self, x, *operands, most):
        """x moved by up to `most` units in the last place."""
        if not self.error:
            return x
        key = u4(0x9E3779B9)
        for operand in operands:
            key = (key ^ np.asarray(operand, f4).view(u4)) * u4(0x85EBCA6B)
            key = key ^ (key >> u4(13))
        steps = (key % u4(2 * most + 1)).astype(i4) - i4(most)
        moved = (np.asarray(x, f4).view(i4) + steps).view(f4)
        return np.where(np.isfinite(x) & np.isfinite(moved) & (np.abs(x) > 2 * _SMALLEST), moved, x)

    def ex2(self, x):
        return self._off(flush(np.exp2(flush(x).astype(f8)).astype(f4)), x, most=2)

    def lg2(self, x):
        return self._off(np.log2(flush(x).astype(f8)).astype(f4), x, most=1)

    def divide(self, a, b):
        return self._off((np.asarray(a).astype(f8) / b).astype(f4), a, b, most=2)

    def reciprocal(self, x):
        return self._off((1 / np.asarray(x).astype(f8)).astype(f4), x, most=1)

    def square_root(self, x):
        return self._off(np.sqrt(np.asarray(x).astype(f8)).astype(f4), x, most=1)

    def reciprocal_square_root(self, x):
        return self._off((1 / np.sqrt(np.asarray(x).astype(f8))).astype(f4), x, most=1)

    def tanh(self, x):
        return self._off(np.tanh(np.asarray(x).astype(f8)).astype(f4), x, most=2)

    @staticmethod
    def reciprocal64(x):
        """rcp.approx.ftz.f64: the operand's lower 32 bits are ignored, and the result's are 0."""
        upper = u8(0xFFFFFFFF00000000)
        return ((1 / (x.view(u8) & upper).view(f8)).view(u8) & upper).view(f8)
