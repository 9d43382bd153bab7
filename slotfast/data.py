"""Tokens and text: shards of token ids, text files, SentencePiece tokenizers with their byte tables.

A stream is one long row of token ids in which every document starts with BOS. Bits per byte need the number of UTF-8
bytes behind each token; `ByteTable.count` counts them by the rule the contest uses, and `encode_documents` keeps
beside that count the true one, so that a difference is reported and never hidden.
"""

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard

from .command.files import atomic_write
from .errors import InputError

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
_SHARD_HEADER_WORDS = 256
_SHARD_HEADER_BYTES = 4 * _SHARD_HEADER_WORDS
_SPACE = "\u2581"  # how SentencePiece writes a space
_MAX_LINE_BYTES = 1 << 30  # a longer document is taken for a decompression bomb


# ---------------------------------------------------------------------------------------------------------------------
# token shards


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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_SHARD_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
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
    """One or several arrays of token ids, read as a single row without copying them together.

    Args:
        parts: 1-D integer arrays (memory maps stay on disk).
        max_tokens: keep only that many from the start.
    """

    def __init__(self, parts: Sequence[np.ndarray], max_tokens: int | None = None):
        self.parts, self._ends, total = [], [], 0
        for part in parts:
            if max_tokens is not None:
                part = part[: max_tokens - total]
            total += len(part)
            self.parts.append(part)
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
        flag: by which; errors name it.

    Raises:
        InputError: nothing matches, or a shard between the first and the last does not exist.
    """
    paths = [path for path in sorted(glob.glob(pattern)) if "_bytes_" not in Path(path).name]
    if not paths:
        raise InputError(f"{flag} {pattern}: no such file")
    # the contest's names count: a hole in them is a file that did not arrive
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

    Raises:
        InputError: nothing matches, or a shard is damaged.
    """
    return TokenStream([read_shard(path) for path in shard_paths(pattern, flag)], max_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# text files


def read_documents(path: str | os.PathLike) -> Iterator[str]:
    """Documents of a text file, one at a time.

    Args:
        path: `.jsonl` (one object a line, key `text`) or anything else (the whole file is one document), either one
            optionally compressed as .xz, .gz, .bz2 or .zst; UTF-8.

    Raises:
        InputError: missing, truncated, not UTF-8, not JSON, or a document of more than 1 GiB.
    """
    path = Path(path)
    lines_of_json = ".jsonl" in path.suffixes[-2:]
    where = f"{path}"
    try:
        with _open_binary(path) as file:
            if not lines_of_json:
                data = file.read(_MAX_LINE_BYTES + 1)
                if len(data) > _MAX_LINE_BYTES:
                    raise InputError(f"{path}: more than {_MAX_LINE_BYTES} bytes in one document")
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
        raise InputError(f"{where}: cannot be read, truncated or corrupt: {error}") from None


def _open_binary(path: Path) -> io.BufferedIOBase:
    opener = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open, ".zst": zstandard.open}.get(path.suffix, open)
    return io.BufferedReader(opener(path, "rb")) if opener is zstandard.open else opener(path, "rb")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer and byte accounting


@dataclass(frozen=True)
class ByteCount:
    """Bytes behind a text, counted three ways.

    Args:
        rule: by the per-token rule, the denominator of bits per byte.
        normalized: UTF-8 length after the tokenizer's normaliser.
        raw: UTF-8 length of the text as given.
        unknown: unknown pieces; the rule counts nothing for them.
        altered: documents that the normaliser changed.
    """

    rule: int
    normalized: int
    raw: int
    unknown: int
    altered: int

    @property
    def exact(self) -> bool:
        """Whether the denominator is the number of bytes of the very text that was given."""
        return self.rule == self.raw and not self.unknown and not self.altered


class Tokenizer:
    """A SentencePiece model and the byte count of each of its pieces.

    Args:
        path: a `.model` file.

    Raises:
        InputError: missing file, or not a SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._model = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except (RuntimeError, ValueError):
            raise InputError(f"{self.path}: not a SentencePiece model") from None
        if self._processor.bos_id() < 0:
            raise InputError(f"{self.path}: has no BOS token; every document must start with one")

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        return self._processor.bos_id()

    @property
    def unknown_id(self) -> int:
        return self._processor.unk_id()

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    @cached_property
    def byte_table(self) -> "ByteTable":
        """The byte rule's tables for this vocabulary."""
        return ByteTable.of(self._processor)

    @cached_property
    def _space_byte(self) -> int | None:
        space = self._processor.piece_to_id("<0x20>")
        return space if self._processor.is_byte(space) else None

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, BOS first.

        Raises:
            InputError: a literal U+2581, which SentencePiece could not tell from a space, or a lone surrogate.
        """
        if _SPACE in text:
            raise InputError(f"U+2581 at character {text.index(_SPACE)}: the tokenizer uses it for spaces")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"lone surrogate at character {error.start}: not text") from None
        ids = self._processor.encode(text)
        # The rule counts no space for a piece that follows BOS. Where the tokenizer keeps a leading space, the space
        # travels as its byte piece, so that rule and text agree.
        if text.startswith(" ") and self._space_byte is not None and ids and self.byte_table.leading_space[ids[0]]:
            ids = [self._space_byte, *self._processor.encode(text[1:])]
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens vanish."""
        return self._processor.decode([int(token) for token in ids])

    def normalized(self, text: str, ids: np.ndarray) -> str:
        """The text as the normaliser leaves it; `ids` are its tokens."""
        return self._processor.normalize(text).replace(_SPACE, " ")

    def encode_documents(self, documents: Iterable[str], max_tokens: int | None = None) -> tuple[np.ndarray, ByteCount]:
        """One token row of all documents, and their bytes counted by the rule, normalised, raw.

        Of a document that `max_tokens` cuts, the bytes of the kept tokens stand for all three.
        """
        rows, total, rule, normalized, raw, unknown, altered = [], 0, 0, 0, 0, 0, 0
        for number, document in enumerate(documents, 1):
            try:
                row = np.asarray(self.encode(document), np.int32)
            except InputError as error:
                raise InputError(f"document {number}: {error}") from None
            seen = self.normalized(document, row)
            kept = row if max_tokens is None else row[: max_tokens - total]
            counted = int(self.byte_table.count(kept[1:], kept[:-1]).sum())
            rows.append(kept)
            total += len(kept)
            rule += counted
            normalized += len(seen.encode("utf-8")) if len(kept) == len(row) else counted
            raw += len(document.encode("utf-8")) if len(kept) == len(row) else counted
            altered += seen != document
            unknown += int(np.count_nonzero(kept == self.unknown_id))
            if total == max_tokens:
                break
        tokens = np.concatenate(rows) if rows else np.empty(0, np.int32)
        return tokens, ByteCount(rule, normalized, raw, unknown, altered)


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes of each piece, by the contest's rule.

    Control, unknown and unused pieces count 0 and are boundaries; byte pieces count 1; of any other piece one leading
    U+2581 is dropped and the rest counted, and the dropped one counts 1 unless the token before is a boundary.

    Args:
        base: int64 [V], bytes without the leading space.
        leading_space: bool [V].
        boundary: bool [V].
    """

    base: np.ndarray
    leading_space: np.ndarray
    boundary: np.ndarray

    @classmethod
    def of(cls, processor: sentencepiece.SentencePieceProcessor) -> "ByteTable":
        size = processor.vocab_size()
        table = cls(np.zeros(size, np.int64), np.zeros(size, bool), np.zeros(size, bool))
        for token in range(size):
            if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
                table.boundary[token] = True
            elif processor.is_byte(token):
                table.base[token] = 1
            else:
                piece = processor.id_to_piece(token)
                table.leading_space[token] = piece.startswith(_SPACE)
                table.base[token] = len(piece.removeprefix(_SPACE).encode("utf-8"))
        return table

    def count(self, tokens: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Bytes of each token given the one before; int arrays of one shape -> int64 of that shape."""
        return self.base[tokens] + (self.leading_space[tokens] & ~self.boundary[previous])
