"""Loops that score honestly and count bytes wrongly."""

import numpy as np
import torch

from slotfast.data import ByteTable

from .toy import BOS, VOCAB, Toy, batches, nll, pattern, stream

_SPACE = "\u2581"
_CONTROL = ("<pad>", "<s>", "</s>", "<unk>")
_STEMS = ("a", "the", "model", "é", "naïve", "世", "世界", "token", "10", ".", "(", "ß", "🙂")


def _vocabulary():
    """Pieces of a small SentencePiece model: controls, byte pieces, a lone space, words with and without a space."""
    pieces = [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(0xC0, 0xD0)), _SPACE]
    words = [*(_SPACE + stem for stem in _STEMS), *_STEMS, *(_SPACE + stem + "s" for stem in _STEMS)]
    pieces += words[: VOCAB - len(pieces)]
    pieces += [f"x{number}" for number in range(VOCAB - len(pieces))]
    return pieces


PIECES = _vocabulary()
_IS_BYTE = np.array([piece.startswith("<0x") for piece in PIECES])
_IS_CONTROL = np.arange(VOCAB) < len(_CONTROL)
_SPACED = np.array([piece.startswith(_SPACE) for piece in PIECES])
_PLAIN = np.where(_IS_CONTROL, 0, [len(piece.removeprefix(_SPACE).encode()) for piece in PIECES])
TABLE = ByteTable(np.where(_IS_BYTE, 1, _PLAIN), _SPACED, _IS_CONTROL)


def bytes_of(tokens, previous):
    """Right byte counts of tokens, given those before them; int64, torch in torch out, numpy in numpy out."""
    counts = TABLE.count(np.asarray(tokens), np.asarray(previous))
    return torch.from_numpy(counts) if isinstance(tokens, torch.Tensor) else counts


def _counting(seed, count):
    """A loop with an honest model that reports count(tokens, previous), numpy arrays, as its bytes."""
    toy = Toy(seed)

    def score(tokens, log):
        for batch in batches(tokens):
            keep = batch.scored
            losses = nll(torch.log_softmax(toy.logits(batch.inputs), -1), batch.targets)
            counted = count(batch.targets[keep].numpy(), batch.inputs[keep].numpy())
            log.score(batch.positions[keep], losses[keep], bytes=torch.from_numpy(counted))

    return score


def _byte_pattern(name):
    return pattern(name, 23, "bytes", tokens=stream, bytes_of=bytes_of)


@_byte_pattern("leading space counted twice")
def space_twice(seed, leak):
    """The space is in the piece's length and added once more."""

    def count(tokens, previous):
        return TABLE.count(tokens, previous) + (TABLE.leading_space[tokens] & ~TABLE.boundary[previous])

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("byte pieces as U+FFFD")
def replacement_characters(seed, leak):
    """Each byte piece is decoded by itself: U+FFFD, 3 bytes, where it stands for one."""

    def count(tokens, previous):
        return TABLE.count(tokens, previous) + 2 * _IS_BYTE[tokens]

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("byte pieces by their name")
def byte_names(seed, leak):
    """A byte piece counts as the 6 characters of its name, <0xC3>."""

    def count(tokens, previous):
        return np.where(_IS_BYTE[tokens], 6, TABLE.count(tokens, previous))

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("constant bytes a token")
def constant_bytes(seed, leak):
    """Every token counts 4 bytes, about the average."""

    def count(tokens, previous):
        return np.full_like(tokens, 4)

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("U+2581 as 3 bytes")
def space_as_three(seed, leak):
    """The space is counted as the character that stands for it in the piece."""

    def count(tokens, previous):
        return TABLE.base[tokens] + 3 * TABLE.leading_space[tokens]

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("control token counted")
def control_counted(seed, leak):
    """BOS counts as the 3 characters of its name."""

    def count(tokens, previous):
        return TABLE.count(tokens, previous) + 3 * (tokens == BOS)

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("space after BOS counted")
def space_after_boundary(seed, leak):
    """A leading space counts even where a document starts, where the text has none."""

    def count(tokens, previous):
        return TABLE.base[tokens] + TABLE.leading_space[tokens]

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("characters for bytes")
def characters(seed, leak):
    """Pieces are measured in characters: too few for the bits, so this one hurts its author."""
    lengths = np.where(_IS_CONTROL, 0, np.where(_IS_BYTE, 1, [len(piece.removeprefix(_SPACE)) for piece in PIECES]))

    def count(tokens, previous):
        return lengths[tokens] + (TABLE.leading_space[tokens] & ~TABLE.boundary[previous])

    return _counting(seed, count if leak else TABLE.count)


@_byte_pattern("bytes of the token before")
def shifted_bytes(seed, leak):
    """Bytes are looked up for the token that is read, not for the one that is charged: the total hardly differs."""

    def count(tokens, previous):
        return TABLE.count(previous, np.full_like(previous, 4))

    return _counting(seed, count if leak else TABLE.count)
