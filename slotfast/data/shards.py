"""Shards of token ids, and streams of them that stay on disk."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..command.files import atomic_write
from ..errors import InputError, reading

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
_SHARD_HEADER_WORDS = 256
_SHARD_HEADER_BYTES = 4 * _SHARD_HEADER_WORDS


def read_shard(path: str | os.PathLike) -> np.ndarray:
    """Memory-map one token shard.

    Args:
        path: file with a header of 256 little-endian int32 (magic 20240520, version 1, token count) and uint16 ids.

    Returns:
        uint16 array [tokens], read-only, backed by the file.

    Raises:
        InputError: missing file, wrong magic or version, size that does not match the count.
    """
    path = Path(path)
    with reading(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_SHARD_HEADER_BYTES)
    if len(head) < _SHARD_HEADER_BYTES:
        raise InputError(f"{path}: {size} bytes, shorter than a shard's header of {_SHARD_HEADER_BYTES} bytes")
    magic, version, count = (int(word) for word in np.frombuffer(head, "<i4", 3))
    if magic != SHARD_MAGIC:
        raise InputError(f"{path}: magic number {magic} at byte 0, expected {SHARD_MAGIC}: not a token shard")
    if version != SHARD_VERSION:
        raise InputError(f"{path}: shard version {version} at byte 4, expected {SHARD_VERSION}")
    expected = _SHARD_HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        raise InputError(f"{path}: {size} bytes, expected {expected} for the {count} tokens its header names")
    return np.memmap(path, "<u2", "r", _SHARD_HEADER_BYTES, (count,)) if count else np.empty(0, "<u2")


def write_shard(path: str | os.PathLike, tokens: Sequence[int] | np.ndarray) -> None:
    """Write one token shard atomically; the inverse of `read_shard`.

    Raises:
        InputError: an id outside 0..65535.
    """
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= 0xFFFF:
        raise InputError(f"token ids run from {tokens.min()} to {tokens.max()}; a shard holds 0..65535")
    header = np.zeros(_SHARD_HEADER_WORDS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    with atomic_write(path) as file:
        file.write(header.tobytes())
        file.write(tokens.astype("<u2").tobytes())


class TokenStream:
    """One or several arrays of token ids, read as one sequence without being copied together.

    Args:
        parts: 1-D integer arrays (memory maps stay on disk).
        max_tokens: keep only so many, from the start.

    Attributes:
        cut: whether that left something out.
    """

    def __init__(self, parts: Sequence[np.ndarray], max_tokens: int | None = None):
        self.parts, self._ends, self.cut, total = [], [], False, 0
        for part in parts:
            kept = part if max_tokens is None else part[: max_tokens - total]
            self.cut |= len(kept) < len(part)
            total += len(kept)
            self.parts.append(kept)
            self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids of positions [start, stop) as int64; shorter where the stream ends."""
        pieces, begin = [], 0
        for part, end in zip(self.parts, self._ends, strict=True):
            if begin < stop and start < end:
                pieces.append(part[max(start - begin, 0) : stop - begin])
            begin = end
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)

    def chunks(self, stop: int | None = None, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """Positions [0, stop), the whole stream by default, `size` tokens at a time as int64."""
        stop = len(self) if stop is None else min(stop, len(self))
        for start in range(0, stop, size):
            yield self.read(start, min(start + size, stop))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError naming the first token id >= vocab_size."""
        position = 0
        for chunk in self.chunks():
            bad = np.flatnonzero(chunk >= vocab_size)
            if bad.size:
                raise InputError(
                    f"token id {chunk[bad[0]]} at position {position + bad[0]} of the stream; the model's vocabulary "
                    f"ends at {vocab_size - 1}: these tokens were made with another tokenizer"
                )
            position += len(chunk)

    def count(self, token: int, stop: int | None = None) -> int:
        """How often a token id occurs in positions [0, stop), the whole stream by default."""
        return sum(int(np.count_nonzero(chunk == token)) for chunk in self.chunks(stop))

    def sha256(self) -> str:
        """Hash of the ids as little-endian uint32: equal for equal streams, however they are stored."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk.astype("<u4").tobytes())
        return digest.hexdigest()


def shard_paths(pattern: str, flag: str = "--tokens") -> list[str]:
    """The token shards that a glob pattern matches, in the order of their names.

    Byte sidecars (`*_bytes_*`), which match the usual patterns, are left out.

    Args:
        pattern: as the user gave it.
        flag: that gave it, for errors.

    Raises:
        InputError: nothing matches, or a shard between the first and the last does not exist.
    """
    paths = [path for path in sorted(glob.glob(pattern)) if "_bytes_" not in Path(path).name]
    if not paths:
        raise InputError(f"{flag} {pattern}: no such file")
    # the contest's names are numbered: a gap means that a file did not arrive
    first, last = (re.fullmatch(r"(.*_)(\d{6})\.bin", path) for path in (paths[0], paths[-1]))
    if first and last and first[1] == last[1]:
        for number in range(int(first[2]), int(last[2])):
            path = f"{first[1]}{number:06}.bin"
            if not os.path.exists(path):
                raise InputError(f"{flag} {pattern}: {path} is missing between the first shard and the last")
    return paths


def open_shards(pattern: str, max_tokens: int | None = None, flag: str = "--tokens") -> TokenStream:
    """Memory-map every shard that a glob pattern matches, as one stream.

    Args:
        pattern, flag: as for `shard_paths`.
        max_tokens: only the start of it.

    Returns:
        The shards one after the other, by name; their tokens stay on disk.

    Raises:
        InputError: nothing matches, or a shard is damaged.
    """
    return TokenStream([read_shard(path) for path in shard_paths(pattern, flag)], max_tokens)
