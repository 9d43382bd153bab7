"""What a training reads: text or token shards to train on, a tokenizer, and tokens that measure the training."""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
from torch import Tensor

from .. import corpus
from ..command.files import atomic_write
from ..command.progress import Progress
from ..data import Tokenizer, TokenStream, open_shards, read_documents, read_shard, shard_paths
from ..errors import InputError
from ..overlap import MAX_OVERLAP, overlap, sketch
from ..words import counted
from ..worker import Worker

_HELD_OUT_EVERY = 32  # every 32nd document is kept from training and measures it
NONCAUSAL = "weights that have learned validation text have no honest score on it; --allow-noncausal does it anyway"
_SAMPLED_TOKENS = 100_000_000  # enough for frequencies and a sketch; shards of the contest hold ten billion


@dataclass(frozen=True)
class Sources:
    """What a training is asked to read.

    Args:
        text, tokens: a file of text, or a glob of token shards to learn; the standard library where neither is given.
        data_path: folder of the contest's shards, used where neither is given.
        val_text, val_tokens: the same, to measure the training; some documents are held out where neither is given.
        max_val_tokens: measure on the start.
        tokenizer: SentencePiece model, or None to train one.
        tokenizer_path: where it is, or will be written.
        vocab_size: pieces of one that is trained.
        seed: of the order of documents.
        seq_len: of a training window.
        ttt_text, ttt_tokens: what the finished weights are adapted to; None: they are not.
        allow_noncausal: let it be the text that measures the training.
        going_on: whether the run was saved, and its tokenizer is there.
        overwrite: whether a tokenizer that is there may be replaced by another.
    """

    text: str | None
    tokens: str | None
    data_path: str | None
    val_text: str | None
    val_tokens: str | None
    max_val_tokens: int | None
    tokenizer: str | None
    tokenizer_path: Path
    vocab_size: int
    seed: int
    seq_len: int
    ttt_text: str | None
    ttt_tokens: str | None
    allow_noncausal: bool
    going_on: bool
    overwrite: bool


@dataclass(frozen=True)
class Inputs:
    """Everything that a training reads.

    Args:
        new_tokenizer: what the tokenizer's file is to hold, where it was trained here; None where it is there.
        names, shards: token ids to learn, a memory map each or one array for text.
        val: tokens that measure the training, or None.
        val_bytes: that they stand for, by the byte rule.
        held_out: some of the training documents that are not learned from, or None where others measure the training.
        ttt: tokens that the finished weights are adapted to, or None.
        ttt_overlap: share of the runs of `ttt` that `val` has too, or of `val` that `ttt` has, the larger one; None
            where one of them is missing.
        trained_on: where the tokens come from, for people.
        about: how much there is of everything, for people.
    """

    tokenizer: Tokenizer
    new_tokenizer: bytes | None
    names: Sequence[str]
    shards: Sequence[np.ndarray]
    val: TokenStream | None
    val_bytes: int
    held_out: TokenStream | None
    ttt: TokenStream | None
    ttt_overlap: float | None
    trained_on: str
    about: str

    @property
    def tokens(self) -> int:
        return sum(map(len, self.shards))

    def unigram(self) -> Tensor:
        """Frequency of each token in the training stream, float32 [V].

        Raises:
            InputError: a token that the tokenizer does not have.
        """
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        for chunk in TokenStream(self.shards, _SAMPLED_TOKENS).chunks():
            if chunk.max(initial=0) >= len(counts):
                raise InputError(f"token id {chunk.max()} in {self.trained_on}: the tokenizer has {len(counts)} pieces")
            counts += np.bincount(chunk, minlength=len(counts))
        return torch.from_numpy(counts / counts.sum()).float()

    def write_tokenizer(self) -> None:
        """Write the tokenizer that was trained here: an interrupted run leaves none that nothing was trained with."""
        if self.new_tokenizer is not None:
            with atomic_write(self.tokenizer.path) as file:
                file.write(self.new_tokenizer)

    def sketches(self) -> dict[str, str]:
        """Sketches by which the texts that the model learns from are recognised later; see `slotfast.overlap`."""
        streams = {"training": TokenStream(self.shards, _SAMPLED_TOKENS), "ttt": self.ttt}
        return {name: sketch(stream) for name, stream in streams.items() if stream is not None}

    def fingerprint(self) -> str:
        """A hash by which a resumed run recognises its data: of each shard's name, length and both ends."""
        digest = hashlib.sha256()
        for name, shard in zip(self.names, self.shards, strict=True):
            digest.update(f"{Path(name).name} {len(shard)} ".encode())
            for end in (shard[:4096], shard[-4096:]):
                digest.update(end.astype("<u4").tobytes())
        return digest.hexdigest()


def read_inputs(sources: Sources, worker: Worker) -> Inputs:
    """Read everything; train a tokenizer where none is given, on rank 0 for all.

    Raises:
        InputError: anything missing, damaged, contradictory or too little.
    """
    tokens, val_tokens, flag, made = sources.tokens, sources.val_tokens, "--tokens", None
    if tokens and sources.text:
        raise InputError("--tokens and --text: give one of them")
    if val_tokens and sources.val_text:
        raise InputError("--val-tokens and --val-text: give one of them")
    if sources.data_path and not tokens and not sources.text:
        tokens, flag = os.path.join(sources.data_path, "fineweb_train_*.bin"), "--data-path"
        if not val_tokens and not sources.val_text:
            val_tokens = os.path.join(sources.data_path, "fineweb_val_*.bin")
    if tokens and not sources.tokenizer:
        raise InputError(f"{flag} {tokens}: needs the --tokenizer that made them")
    if tokens:
        names = shard_paths(tokens, flag)
        shards, held_out, trained_on = [read_shard(name) for name in names], [], tokens
        tokenizer = Tokenizer(sources.tokenizer_path)
        about = counted(len(shards), "shard")
    else:
        learned, held_out = _documents(sources)
        # A resumed run must have the very tokenizer it had.
        if sources.tokenizer is None and not sources.going_on:
            made = _make_tokenizer(sources, learned, worker)
        tokenizer = Tokenizer(sources.tokenizer_path, made)
        trained_on = (sources.text and Path(sources.text).name) or "standard library"
        names, shards = [trained_on], [tokenizer.encode_documents(learned)[0]]
        about = counted(len(learned), "document")
    val, val_bytes = _read_val(sources, tokenizer, val_tokens, held_out, sources.max_val_tokens)
    if val is not None and not val_bytes:
        raise InputError("the documents that are held out to measure the training are empty: give more text")
    ttt, shared = None, None
    if sources.ttt_text or sources.ttt_tokens:
        # compared with all of the validation text, measured on its start or not
        whole, _ = _read_val(sources, tokenizer, val_tokens, held_out, None)
        ttt, shared = _read_ttt(sources, tokenizer, whole)
    about += f", {counted(sum(map(len, shards)), 'token')}"
    if held_out:
        about += f"; {counted(len(held_out), 'document')} held out"
    measured = (val, val_bytes, val if held_out else None)
    return Inputs(tokenizer, made, names, shards, *measured, ttt, shared, trained_on, about)


def _read_val(
    sources: Sources, tokenizer: Tokenizer, val_tokens: str | None, held_out: list[str], limit: int | None
) -> tuple[TokenStream | None, int]:
    """The first `limit` tokens that measure the training and the bytes behind them; None and 0 where there are none."""
    if val_tokens:
        val = open_shards(val_tokens, limit, "--val-tokens" if sources.val_tokens else "--data-path")
        val.check_vocabulary(tokenizer.vocab_size)
        pieces = (val.read(start, start + (1 << 22) + 1) for start in range(0, len(val), 1 << 22))
        return val, sum(int(tokenizer.byte_table.count(piece[1:], piece[:-1]).sum()) for piece in pieces)
    if not (sources.val_text or held_out):
        return None, 0
    documents = read_documents(sources.val_text) if sources.val_text else held_out
    ids, count = tokenizer.encode_documents(documents, limit)
    return TokenStream([ids]), count.rule


def _read_ttt(sources: Sources, tokenizer: Tokenizer, val: TokenStream | None) -> tuple[TokenStream, float | None]:
    """The stream to adapt to, and how much it shares with the validation stream."""
    name = sources.ttt_text or sources.ttt_tokens
    if sources.ttt_tokens:
        stream = open_shards(sources.ttt_tokens, flag="--ttt-tokens")
    else:
        stream = TokenStream([tokenizer.encode_documents(read_documents(sources.ttt_text))[0]])
    stream.check_vocabulary(tokenizer.vocab_size)
    if len(stream) <= sources.seq_len:
        raise InputError(f"{name}: {counted(len(stream), 'token')}; one training window needs {sources.seq_len + 1}")
    if val is None:
        return stream, None
    # Both ways: a small part of a long validation stream may be most of what this training sees.
    shared = max(overlap(val, stream), overlap(stream, val))
    if shared > MAX_OVERLAP and not sources.allow_noncausal:
        raise InputError(f"{name}: shares {shared:.1%} with the text that measures the training; {NONCAUSAL}")
    return stream, shared


def _documents(sources: Sources) -> tuple[list[str], list[str]]:
    """Documents to learn, in random order, and documents to measure with; none of these where others are given."""
    if sources.text is not None:
        documents = list(read_documents(sources.text))
    else:
        modules = corpus.standard_library()
        with Progress(len(modules), 0, "modules of the standard library", lines=False) as progress:
            documents = list(corpus.training_documents(progress.over(modules)))
    np.random.default_rng(sources.seed).shuffle(documents)
    if sources.val_text or sources.val_tokens:
        return documents, []
    learned = [text for i, text in enumerate(documents) if i % _HELD_OUT_EVERY]
    if not learned:
        raise InputError(f"{counted(len(documents), 'document')}: too few to hold one out and learn from the rest")
    return learned, documents[::_HELD_OUT_EVERY]


def _make_tokenizer(sources: Sources, learned: list[str], worker: Worker) -> bytes:
    """Train one, on rank 0 for all."""
    made = [train_tokenizer(learned, sources.vocab_size) if worker.rank == 0 else b""]
    if worker.world > 1:
        dist.broadcast_object_list(made)
    path = sources.tokenizer_path
    if not sources.overwrite and path.exists() and path.read_bytes() != made[0]:
        # the run to be resumed stopped before its first checkpoint, or never started
        raise InputError(f"{path}: exists, and this run makes another one; --tokenizer takes it, --force overwrites it")
    return made[0]


def train_tokenizer(documents: list[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE model that loses nothing: bytes for rare characters, no normaliser, white space kept.

    Args:
        documents: text; each line is a sentence to SentencePiece.
        vocab_size: pieces, among them 256 bytes, unknown, BOS, EOS and padding.

    Returns:
        What the `.model` file holds.

    Raises:
        InputError: the text has too many or too few characters and pieces for that size.
    """
    written = io.BytesIO()  # a file's name would become part of the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in documents for line in text.splitlines() if line.strip()),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 16,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(f"--vocab-size {vocab_size}: {_why_not(str(error))}") from None
    return written.getvalue()


def _why_not(error: str) -> str:
    """Why SentencePiece refuses a number of pieces, in words that do not name its own flags."""
    if most := re.search(r"value <= (\d+)", error):
        return f"the text is enough for {most[1]} pieces"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"the characters of the text and 256 bytes need at least {least[1]} pieces"
    if "sentences_.empty()" in error:
        return "there is no text to train a tokenizer on"
    return f"no tokenizer can be trained on the text: {re.sub(r'^.*?[)] [[].*?[]] *', '', error.splitlines()[0])}"
