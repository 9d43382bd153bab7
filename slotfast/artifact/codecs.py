"""Lossless coding of one tensor's bytes: several codecs, of which the one that gives the fewest bytes is kept.

raw      the bytes
brotli   quality 11
lzma     raw LZMA2, preset 9 extreme
planes   brotli over all the values' first bytes, then all their second bytes, ...: for floats
rans     `rans`, at the entropy of the codes: for matrices of integers
"""

import lzma

import brotli
import numpy as np

from ..errors import InputError
from . import rans
from .bounded import unbrotli, unlzma

# On a matrix, brotli and LZMA beat rANS only where there are repetitions. Brotli at this quality finds these in a
# hundredth of the time: where it does not beat rANS, the others are not tried.
_PROBE_QUALITY = 5


def encode(array: np.ndarray) -> tuple[str, bytes]:
    """The codec that does best, and its bytes.

    Args:
        array: little-endian numbers of any shape.
    """
    array = np.ascontiguousarray(array)
    raw = array.tobytes()
    found = {"raw": raw}
    if array.dtype == np.int8:
        coded = rans.encode(array)
        if coded is not None:
            found["rans"] = coded
            if len(brotli.compress(raw, quality=_PROBE_QUALITY)) >= len(coded):
                return "rans", coded
    elif array.itemsize > 1:
        planes = array.reshape(-1, 1).view(np.uint8).T.tobytes()
        found["planes"] = brotli.compress(planes, quality=11)
    found["brotli"] = brotli.compress(raw, quality=11, lgwin=24)
    found["lzma"] = lzma.compress(raw, lzma.FORMAT_RAW, filters=_lzma_filters(len(raw)))
    return min(found.items(), key=lambda item: len(item[1]))


def decode(codec: str, data: memoryview, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array, read-only or not.

    Raises:
        InputError: unknown codec, or data that do not decode to exactly this array; never decodes further than that.
    """
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    try:
        if codec == "rans" and dtype == np.int8 and len(shape) == 2:
            return rans.decode(data, shape)
        if codec == "raw":
            raw = bytes(data) if len(data) == size else b""
        elif codec in ("brotli", "planes"):
            raw = unbrotli(data, size)
        elif codec == "lzma":
            raw = unlzma(data, size, _lzma_filters(size))
        else:
            known = "raw, brotli, lzma, planes, or rans for a matrix of integers"
            raise InputError(f"codec {codec!r} of {dtype.name} {list(shape)}: expected {known}")
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"a tensor's {codec} data does not decode to {list(shape)} of {dtype.name}: {error}") from None
    if len(raw) != size:
        raise InputError(f"a tensor's {codec} data does not decode to the {size} bytes of its shape")
    if codec == "planes":
        raw = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T.tobytes()
    return np.frombuffer(raw, dtype).reshape(shape)


def order0_bytes(codes: np.ndarray) -> float:
    """Bytes that the entropy of the codes' frequencies comes to: a bound for coders that treat every code alike.

    Args:
        codes: int8, any shape.
    """
    count = np.bincount(codes.ravel().astype(np.int16) + 128, minlength=256)
    count = count[count > 0]
    return float((count * np.log2(codes.size / count)).sum() / 8)


def _lzma_filters(raw_bytes: int) -> list[dict[str, int]]:
    # The dictionary follows from the size in the header, not from the stream: a stream cannot ask for memory.
    dictionary = min(max(raw_bytes, 4096), 1 << 26)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
