"""Tokens and text: shards of token ids, text files, SentencePiece tokenizers with their byte tables.

A stream is one long sequence of token ids in which every document starts with BOS. Bits per byte need the number of
UTF-8 bytes that each token stands for; `ByteTable.count` counts them by the contest's rule, and `encode_documents`
keeps the true count beside that, so that a difference is reported and never hidden.
"""

from .documents import is_jsonl, read_documents
from .shards import TokenStream, open_shards, read_shard, shard_paths, write_shard
from .text import Text
from .tokenizers import ByteCount, ByteTable, RuleFault, Tokenizer

__all__ = [
    "ByteCount",
    "ByteTable",
    "RuleFault",
    "Text",
    "TokenStream",
    "Tokenizer",
    "is_jsonl",
    "open_shards",
    "read_documents",
    "read_shard",
    "shard_paths",
    "write_shard",
]
