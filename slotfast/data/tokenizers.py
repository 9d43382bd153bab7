"""SentencePiece tokenizers, and the bytes that their pieces stand for."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from ..errors import InputError, reading

_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_LEVEL_SPACE = "\u0120"  # how vocabularies with a character for each byte write it


@dataclass(frozen=True)
class ByteCount:
    """Bytes of a text, counted three ways.

    Args:
        rule: by the per-token rule, the denominator of bits per byte.
        normalized: UTF-8 length after the tokenizer's normaliser.
        raw: UTF-8 length of the text as given.
        unknown: unknown pieces; the rule counts nothing for them.
        altered: documents that the normaliser changed.
        cut: whether `max_tokens` left something out.
        crlf: documents with lines that end in a carriage return, which counts and is scored like any other byte.
    """

    rule: int
    normalized: int
    raw: int
    unknown: int
    altered: int
    cut: bool = False
    crlf: int = 0

    @property
    def exact(self) -> bool:
        """Whether the denominator is the number of bytes of the text exactly as given."""
        return self.rule == self.raw and not self.unknown and not self.altered


class Tokenizer:
    """A SentencePiece model and the byte count of each of its pieces.

    Args:
        path: a `.model` file.
        model: what the file will hold, where it is not written yet.

    Raises:
        InputError: missing file, or not a SentencePiece model.
    """

    def __init__(self, path: str | os.PathLike, model: bytes | None = None):
        self.path = Path(path)
        with reading(path):
            self._model = self.path.read_bytes() if model is None else model
        if not self._model:
            raise InputError(f"{self.path}: is empty")
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
    def _dummy(self) -> tuple[int, int]:
        """What the normaliser adds before and after every text: a space, or nothing."""
        seen = self._processor.normalize("a").replace(_SPACE, " ")
        return len(seen) - len(seen.lstrip(" ")), len(seen) - len(seen.rstrip(" "))

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
        # The rule counts no space for a piece that follows BOS. Where the tokenizer keeps a leading space, and puts
        # none of its own in front of it, the space travels as its byte piece, so that rule and text agree.
        leads = bool(ids) and text.startswith(" ") and self.byte_table.leading_space[ids[0]]
        if leads and self._space_byte is not None and not self._dummy[0]:
            ids = [self._space_byte, *self._processor.encode(text[1:])]
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens vanish."""
        return self._processor.decode([int(token) for token in ids])

    def normalized(self, text: str, ids: np.ndarray) -> str:
        """The text as the normaliser leaves it, without the space that it adds; `ids` are its tokens."""
        before, behind = self._dummy if text else (0, 0)
        seen = self._processor.normalize(text).replace(_SPACE, " ")
        return seen[before : len(seen) - behind]

    def encode_documents(self, documents: Iterable[str], max_tokens: int | None = None) -> tuple[np.ndarray, ByteCount]:
        """The tokens of all documents in one row, and their bytes counted by the rule, normalised and raw.

        For a document that `max_tokens` cuts, all three are the bytes of the tokens that are kept.
        """
        rows, total, rule, normalized, raw, unknown, altered, crlf, cut = [], 0, 0, 0, 0, 0, 0, 0, False
        for number, document in enumerate(documents, 1):
            if cut := total == max_tokens:
                break
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
            crlf += "\r\n" in document
            if cut := len(kept) < len(row):
                break
        tokens = np.concatenate(rows) if rows else np.empty(0, np.int32)
        return tokens, ByteCount(rule, normalized, raw, unknown, altered, cut, crlf)


@dataclass(frozen=True)
class RuleFault:
    """How the byte rule misjudges a vocabulary.

    Args:
        why: what the rule does not know about the vocabulary, in words.
        excess: int64 [V], how many more bytes it counts for each piece than the piece spells; None where that cannot
            be known.
    """

    why: str
    excess: np.ndarray | None = None

    @classmethod
    def of(cls, processor: sentencepiece.SentencePieceProcessor) -> "RuleFault | None":
        """Find it in the pieces alone; None where the rule counts what they spell."""
        size = processor.vocab_size()
        other = (processor.is_control, processor.is_unknown, processor.is_unused, processor.is_byte)
        normal = (token for token in range(size) if not any(kind(token) for kind in other))
        pieces = {token: processor.id_to_piece(token) for token in normal}
        if any(_SPACE in piece for piece in pieces.values()):
            found = {token: 2 * piece.count(_SPACE, 1) for token, piece in pieces.items()}
            why = "have U+2581 behind their start, where the rule counts 3 bytes for a space"
        elif any(_BYTE_LEVEL_SPACE in piece for piece in pieces.values()):
            found = {token: len(piece.encode("utf-8")) - len(piece) for token, piece in pieces.items()}
            why = "have a letter for a byte, of which the rule counts 2"
        else:
            spaced = any(" " in piece for piece in pieces.values())
            single = processor.is_byte(processor.piece_to_id("<0x20>")) and all(len(p) == 1 for p in pieces.values())
            return None if spaced or single else cls("no piece has U+2581, by which the rule knows a space")
        wrong = [token for token, count in found.items() if count]
        if not wrong:
            return None
        excess = np.zeros(size, np.int64)
        excess[wrong] = [found[token] for token in wrong]
        return cls(f"{len(wrong):,} pieces, {pieces[wrong[0]]!r} among them, {why}", excess)


@dataclass(frozen=True)
class ByteTable:
    """UTF-8 bytes of each piece, by the contest's rule.

    Control, unknown and unused pieces count 0 and are boundaries; byte pieces count 1; of any other piece one leading
    U+2581 is dropped and the rest counted, and the dropped one counts 1 unless the token before is a boundary.

    Args:
        base: int64 [V], bytes without the leading space.
        leading_space: bool [V].
        boundary: bool [V].
        fault: how the rule misjudges these pieces, where it does.
    """

    base: np.ndarray
    leading_space: np.ndarray
    boundary: np.ndarray
    fault: RuleFault | None = None

    @classmethod
    def of(cls, processor: sentencepiece.SentencePieceProcessor) -> "ByteTable":
        size = processor.vocab_size()
        fault = RuleFault.of(processor)
        table = cls(np.zeros(size, np.int64), np.zeros(size, bool), np.zeros(size, bool), fault)
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
