"""Reads documents from text files; what is not text is refused, because it would be scored without a word."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from ..errors import InputError

_MAX_LINE_BYTES = 1 << 30  # a longer document is held to be a decompression bomb
_PACKED_BYTES = 1 << 12  # read at once from a .zst: a bomb makes at most 128 MB of them
_TABLES = (".csv", ".tsv")
# What begins like this is not text, even if all of its bytes are ASCII.
_KINDS = {
    b"\xff\xfe": "UTF-16 where UTF-8 is read",
    b"\xfe\xff": "UTF-16 where UTF-8 is read",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive",
    b"%PDF-": "a PDF",
    b"\x1f\x8b": "compressed by gzip: its name must end with .gz",
    b"\xfd7zXZ\0": "compressed by xz: its name must end with .xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: its name must end with .zst",
}
_EXPECTED = "expected plain text, or .jsonl with a key 'text'"


def read_documents(path: str | os.PathLike) -> Iterator[str]:
    """Documents of a text file, one at a time.

    Args:
        path: `.jsonl` (one object a line, key `text`) or plain text (the whole file is one document), either one
            optionally compressed as .xz, .gz, .bz2 or .zst; UTF-8.

    Returns:
        The texts, each read when it is asked for.

    Raises:
        InputError: missing, a folder, truncated, not UTF-8, not JSON, a document of more than 1 GiB, or no plain text:
            a table by its name, JSON, or a binary file.
    """
    path = Path(path)
    where = f"{path}"
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, expected a file")
        with _open_binary(path) as file:
            if not is_jsonl(path):
                data = file.read(_MAX_LINE_BYTES + 1)
                if len(data) > _MAX_LINE_BYTES:
                    raise InputError(f"{path}: more than {_MAX_LINE_BYTES} bytes in one document")
                _check_plain(path, data)
                yield data.decode("utf-8-sig")
                return
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                where = f"{path}, line {number}"
                if len(line) > _MAX_LINE_BYTES:
                    raise InputError(f"{where}: more than {_MAX_LINE_BYTES} bytes in one document")
                if line.strip():
                    text = json.loads(line.decode("utf-8-sig"))["text"]
                    if not isinstance(text, str):
                        raise InputError(f"{where}: key 'text' holds {type(text).__name__}, expected a string")
                    yield text
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None
    except (KeyError, TypeError):
        raise InputError(f"{where}: expected a JSON object with the key 'text'") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON that can be read: numbers too long or nesting too deep") from None
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        raise InputError(f"{where}: cannot be read, truncated or corrupt: {error}") from None


def is_jsonl(path: str | os.PathLike) -> bool:
    """Whether a file is read as one document a line, by its name."""
    return ".jsonl" in Path(path).suffixes[-2:]


def _check_plain(path: Path, data: bytes) -> None:
    """Raise InputError where a file that is not .jsonl holds anything but plain text."""
    if any(suffix.lower() in _TABLES for suffix in path.suffixes[-2:]) or _names_columns(data):
        raise InputError(f"{path}: a table, {_EXPECTED}")
    for head, kind in _KINDS.items():
        if data.startswith(head):
            raise InputError(f"{path}: {kind}, {_EXPECTED}")
    if (place := data.find(b"\0")) >= 0:
        raise InputError(f"{path}: a zero at byte {place}: a binary file, or not UTF-8; {_EXPECTED}")
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if start in (b"{", b"["):
        if isinstance(_json(data), dict | list):
            raise InputError(f"{path}: JSON, {_EXPECTED}")
        first = _json(data.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0])
        if isinstance(first, dict):
            raise InputError(f"{path}: its first line is a JSON object; {_EXPECTED}, by its name")


def _names_columns(data: bytes) -> bool:
    """Whether the first line is the head of a table: names without spaces, `text` among them, with commas or tabs."""
    names = re.split(rb"[,\t;|]", data[:1000].partition(b"\n")[0].strip().removeprefix(b"\xef\xbb\xbf"))
    names = [name.strip(b"\"'") for name in names]
    return len(names) > 1 and b"text" in names and all(re.fullmatch(rb"\w*", name) for name in names)


def _json(data: bytes) -> Any:
    """The value of some bytes as JSON; None where they are not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _open_binary(path: Path) -> BinaryIO:
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstd(path))
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
    return openers.get(path.suffix, open)(path, "rb")


class _Zstd(io.RawIOBase):
    """All frames of a .zst file; zstandard's reader stops after the first, and takes half a frame for a whole one."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            rest = self._frame.unused_data if self._frame and self._frame.eof else b""
            data = rest or self._file.read(_PACKED_BYTES)
            if not data:
                if self._frame is None or not self._frame.eof:
                    raise EOFError("ended before the end of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
