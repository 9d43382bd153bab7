"""A text as it is scored: its tokens, and what their tokenizer says of them."""

from dataclasses import dataclass

import numpy as np

from .shards import TokenStream
from .tokenizers import ByteTable


@dataclass(frozen=True)
class Text:
    """A text as it is scored.

    Args:
        stream: its tokens.
        byte_table: the bytes that each token stands for.
        bos_id: the token that starts a document.
    """

    stream: TokenStream
    byte_table: ByteTable
    bos_id: int

    @property
    def headless(self) -> bool:
        """Whether it begins with tokens before the first BOS; they count as a document."""
        return len(self.stream) > 0 and int(self.stream.read(0, 1)[0]) != self.bos_id

    @property
    def documents(self) -> int:
        """How many there are."""
        return self.stream.count(self.bos_id) + self.headless

    @property
    def starts(self) -> np.ndarray:
        """The position of each one's first token, int64 [documents]."""
        parts, position = [np.zeros(int(self.headless), np.int64)], 0
        for chunk in self.stream.chunks():
            parts.append(np.flatnonzero(chunk == self.bos_id) + position)
            position += len(chunk)
        return np.concatenate(parts)

    def documents_before(self, position: int) -> int:
        """How many begin before this position."""
        return self.stream.count(self.bos_id, position) + self.headless

    def bytes_of(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of tokens 1, 2, ... of a piece [n + 1], each with the token before it: int64 [n]."""
        return self.byte_table.count(tokens[1:], tokens[:-1])
