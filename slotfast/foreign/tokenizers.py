"""Tokenizers of the `tokenizers` library: exact bytes of each piece."""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import numpy as np

from ..data import ByteTable, Tokenizer
from ..errors import InputError, first_line
from .library import transformers_library


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library and the byte count of each of its pieces.

    A document starts with the tokenizer's BOS, or its EOS where it has none. Special tokens that are written out in a
    text are text.

    Args:
        path: a folder with tokenizer.json, or with what transformers makes one of.

    Raises:
        InputError: no such tokenizer there, or one without BOS and EOS.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        transformers = transformers_library(self.path)
        try:
            loaded = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            self._backend = loaded.backend_tokenizer
        except Exception as error:  # damaged files raise whatever their parsers raise
            raise InputError(f"{path}: not a tokenizer of the tokenizers library: {first_line(error)}") from None
        found = (loaded.bos_token_id, loaded.eos_token_id)
        self._separator = next((token for token in found if token is not None), None)
        if self._separator is None:
            raise InputError(f"{path}: has neither BOS nor EOS; every document must start with one")
        self._backend.no_truncation()
        self._backend.no_padding()
        self._model = self._backend.to_str().encode()
        self._backend.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @property
    def bos_id(self) -> int:
        return self._separator

    @property
    def unknown_id(self) -> int:
        return self._unknown

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    @cached_property
    def _unknown(self) -> int:
        """The token of unknown characters, -1 where there is none: GPT-2's never comes, as every byte has a piece."""
        model = json.loads(self._model)["model"]
        if isinstance(model.get("unk_token"), str):
            token = self._backend.token_to_id(model["unk_token"])
        else:
            token = model.get("unk_id")  # of Unigram models
        return -1 if token is None or token == self._separator else token

    @cached_property
    def byte_table(self) -> ByteTable:
        """UTF-8 bytes of each piece, from how its decoder spells it; `encode_documents` holds their sums to the text.

        A byte-level piece has a character for each byte. Other pieces spell spaces as U+2581, and single bytes as
        <0x0A>.
        """
        stored = json.loads(self._model)
        decoder = stored["decoder"] or {}
        kinds = {part["type"] for part in [decoder, *decoder.get("decoders", [])] if part}
        byte_level = "ByteLevel" in kinds
        space = "\u0120" if byte_level else "\u2581"
        special = {token["id"] for token in stored["added_tokens"] if token["special"]} | {self._unknown}
        literal = {token["id"] for token in stored["added_tokens"]} - special
        # Some put a space in front of every text; the rule for leading spaces leaves it out behind BOS.
        first = self._backend.encode("a", add_special_tokens=False).tokens[:1]
        prepends = bool(first) and first[0].startswith(space)
        size = self.vocab_size
        table = ByteTable(np.zeros(size, np.int64), np.zeros(size, bool), np.zeros(size, bool))
        for piece, token in self._backend.get_vocab(with_added_tokens=True).items():
            if token in special:
                table.boundary[token] = True
            elif token in literal:
                table.base[token] = len(piece.encode("utf-8"))
            elif "ByteFallback" in kinds and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
                table.base[token] = 1
            else:
                table.leading_space[token] = prepends and piece.startswith(space)
                piece = piece[int(table.leading_space[token]) :]
                table.base[token] = len(piece if byte_level else piece.replace(space, " ").encode("utf-8"))
        return table

    def encode(self, text: str) -> list[int]:
        """Token ids of one document, its separator first.

        Raises:
            InputError: a lone surrogate.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"lone surrogate at character {error.start}: not text") from None
        return [self.bos_id, *self._backend.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens vanish."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def normalized(self, text: str, ids: np.ndarray) -> str:
        """What the pieces spell: the text, where the tokenizer loses nothing."""
        return self.decode(ids)
