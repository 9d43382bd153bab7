"""Decompression that stops at a bound: a stream that would expand further is refused, and never held.

Each `un` function returns all decoded bytes, or raises ValueError where the data are damaged, end early, continue past
their end, or decode to more than `limit` bytes.
"""

import json
import lzma
import zlib
from typing import Any

import brotli
import zstandard

_ZSTD_PIECE = 256  # bytes of a zstd stream may come to 32 KiB each


def unbrotli(data: bytes | memoryview, limit: int) -> bytes:
    """Decode a brotli stream of at most `limit` bytes."""
    decoder, pieces, size = brotli.Decompressor(), [], 0
    try:
        while not decoder.is_finished():
            piece = decoder.process(data, output_buffer_limit=limit + 1 - size)
            if not piece and not decoder.is_finished():
                raise ValueError("truncated")
            pieces.append(piece)
            size += len(piece)
            data = b""
            _check(size, limit)
    except brotli.error as error:
        raise ValueError(f"damaged: {error}") from None
    return b"".join(pieces)


def unlzma(data: bytes | memoryview, limit: int, filters: list[dict[str, int]] | None = None) -> bytes:
    """Decode at most `limit` bytes of an xz file, or of raw LZMA where filters are given."""
    if filters:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    else:  # preset 9 needs 65 MiB; a stream may ask for 4 GiB
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 27)
    try:
        raw = decoder.decompress(data, max_length=limit + 1)
        _check(len(raw), limit)
        if not decoder.eof and not filters:  # an xz file ends with a check sum, which may still be unread
            raw += decoder.decompress(b"", max_length=1)
            _check(len(raw), limit)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"damaged: {error}") from None
    if not filters and not decoder.eof:
        raise ValueError("truncated")
    if decoder.eof and decoder.unused_data:
        raise ValueError("data behind the end")
    return raw


def unzlib(data: bytes | memoryview, limit: int) -> bytes:
    """Decode a zlib stream of at most `limit` bytes."""
    decoder = zlib.decompressobj()
    try:
        raw = decoder.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from None
    _check(len(raw), limit)
    if not decoder.eof:
        raise ValueError("truncated")
    if decoder.unused_data:
        raise ValueError("data behind the end")
    return raw


def unzstd(data: bytes | memoryview, limit: int) -> bytes:
    """Decode a zstd frame of at most `limit` bytes."""
    decoder, pieces, size = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(), [], 0
    try:
        for start in range(0, len(data), _ZSTD_PIECE):
            if decoder.eof:
                raise ValueError("data behind the end")
            pieces.append(decoder.decompress(data[start : start + _ZSTD_PIECE]))
            size += len(pieces[-1])
            _check(size, limit)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged: {error}") from None
    if not decoder.eof:
        raise ValueError("truncated")
    if decoder.unused_data:
        raise ValueError("data behind the end")
    return b"".join(pieces)


def unique_json(text: str | bytes) -> Any:
    """The value of JSON; ValueError also where an object has a key twice, as readers differ in which one they take."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {shortened(key, 100)!r} is given twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(f"decodes to more than {limit} bytes")


def one_line(error: BaseException) -> str:
    """An exception's type and message, in one line of bearable length."""
    return shortened(f"{type(error).__name__}: {error}")


def printable(text: str) -> str:
    """A text, such as a name in a hostile file, with all that a terminal would obey written out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shortened(text: str, length: int = 300) -> str:
    """A text in one line of bearable length: names and values of a hostile file may be long."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
