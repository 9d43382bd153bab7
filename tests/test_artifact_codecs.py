"""Codecs: every one gives back what went in, rANS at the entropy that its contexts leave, damage in one clear line."""

import struct

import brotli
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slotfast.artifact import codecs, rans
from slotfast.artifact.bounded import unbrotli, unlzma, unzlib
from slotfast.errors import InputError

needs_constriction = pytest.mark.skipif(rans.constriction is None, reason="no constriction here: nothing to compare")


def _gaussian(rng, shape, size=6.0, rows=0.0, columns=0.0, limit=31):
    """Codes as trained matrices have them: Gaussian, rows and columns of different sizes."""
    sizes = 2 ** rng.normal(0, rows, shape[0])[:, None] * 2 ** rng.normal(0, columns, shape[1])
    return np.round(rng.standard_normal(shape) * size * sizes).clip(-limit, limit).astype(np.int8)


def _order0(codes):
    """Bytes that the entropy of the codes' frequencies comes to."""
    count = np.bincount(codes.ravel().astype(int) + 128)
    count = count[count > 0]
    return float(-(count * np.log2(count / codes.size)).sum() / 8)


MATRICES = {
    "one weight": (1, 1),
    "a row": (1, 300),
    "a column": (300, 1),
    "primes": (127, 257),
    "a layer's": (512, 512),
}


@needs_constriction
@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("size", [0.0, 0.3, 6.0, 60.0])
def test_rans_gives_back_what_went_in(shape, size):
    codes = _gaussian(np.random.default_rng(0), shape, size, rows=0.5, columns=0.5, limit=127)
    assert np.array_equal(rans.decode(rans.encode(codes), shape), codes)


@needs_constriction
@settings(max_examples=60, deadline=None)
@given(arrays(np.int8, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_rans_gives_back_anything(codes):
    blob = rans.encode(codes)
    assert np.array_equal(rans.decode(blob, codes.shape), codes)


@needs_constriction
def test_rans_is_at_the_entropy_bound():
    codes = _gaussian(np.random.default_rng(1), (1536, 512))
    assert len(rans.encode(codes)) < 1.002 * _order0(codes)
    raw = codes.tobytes()
    assert len(rans.encode(codes)) < 0.998 * len(brotli.compress(raw, quality=11))


@needs_constriction
def test_sizes_of_rows_and_columns_go_below_it():
    """The mixture has heavier tails than any one row and column: knowing them saves what the entropies differ by."""
    rng = np.random.default_rng(2)
    mixed = _gaussian(rng, (512, 1024), 6.0, rows=0.3, columns=0.7)
    assert len(rans.encode(mixed)) < 0.96 * _order0(mixed)
    shuffled = rng.permutation(mixed.ravel()).reshape(mixed.shape)  # the same frequencies, sizes gone
    assert len(rans.encode(shuffled)) > 0.998 * _order0(mixed)


@needs_constriction
@pytest.mark.parametrize("seed", range(3))
def test_the_library_decodes_what_the_definition_says(seed, monkeypatch):
    """A file must mean the same with every version of the library, and without it."""
    codes = _gaussian(np.random.default_rng(seed), (40, 60), 4.0 * seed, rows=0.5, columns=0.5)
    blob = rans.encode(codes)
    assert np.array_equal(rans.decode(blob, codes.shape), codes)
    monkeypatch.setattr(rans, "constriction", None)
    assert rans.encode(codes) is None
    assert np.array_equal(rans.decode(blob, codes.shape), codes)


def test_frequencies_are_whole_and_sum_to_two_to_the_24():
    rng = np.random.default_rng(3)
    for _ in range(200):
        levels = rng.integers(0, 256, rng.integers(2, 257)).astype(np.uint8)
        levels[rng.integers(len(levels))] = rng.integers(1, 256)
        found = rans._frequencies(levels)
        assert found.dtype == np.int64 and found.min() >= 1 and found.sum() == 1 << 24
        # levels are quarters of doublings
        exact = np.where(levels > 0, 2.0 ** ((levels.astype(float) - levels.max()) / 4), 0)
        assert np.abs(found / 2**24 - exact / exact.sum()).max() < 3e-5


# Written once and committed: a file of today must be read for ever.
KEPT = "150000000b088001fb0d010402020101ff0000fffefe00fc03b974879fa2d72e7d1bcde59872b995107d026545ffcd2d4c"


def test_a_committed_stream_is_still_read():
    row, column = np.indices((6, 8))
    codes = (3 * row * row + 5 * column) % 9 - row
    assert np.array_equal(rans.decode(bytes.fromhex(KEPT), (6, 8)), codes)


@needs_constriction
def test_damaged_streams_are_refused_or_decode_to_the_shape():
    """No check sum here, the file has one: but nothing crashes, and most damage is seen."""
    rng = np.random.default_rng(4)
    codes = _gaussian(rng, (30, 40), 5.0, columns=0.8)
    blob, refused = rans.encode(codes), 0
    for _ in range(400):
        spoilt = bytearray(blob)
        for _ in range(rng.integers(1, 4)):
            spoilt[rng.integers(len(spoilt))] ^= 1 << rng.integers(8)
        try:
            assert rans.decode(bytes(spoilt[: rng.choice([len(spoilt), rng.integers(len(spoilt))])]), codes.shape).shape
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "i1"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (700,), (50, 60)])
def test_every_array_comes_back(dtype, shape):
    array = (np.random.default_rng(5).standard_normal(shape) * 20).astype(dtype)
    codec, blob = codecs.encode(array)
    back = codecs.decode(codec, memoryview(blob), np.dtype(dtype), shape)
    assert back.dtype == array.dtype and np.array_equal(back, array)


def test_each_codec_wins_somewhere():
    rng = np.random.default_rng(6)
    won = {
        codecs.encode(array)[0]
        for array in (
            rng.integers(-128, 128, 50, np.int8),
            _gaussian(rng, (200, 200)),
            np.tile(_gaussian(rng, (8, 64)), (40, 1)),
            np.tile(rng.integers(-128, 128, 1 << 16, np.int8), 40).reshape(40, -1),
            (2 ** rng.normal(-6, 0.3, 3000)).astype("<f2"),
        )
    }
    assert {"raw", "brotli", "planes"} <= won and won <= {"raw", "brotli", "lzma", "planes", "rans"}
    assert rans.constriction is None or "rans" in won


@pytest.mark.parametrize(
    ("codec", "dtype", "message"),
    [("pickle", "i1", "codec 'pickle'"), ("rans", "<f2", "codec 'rans' of float16")],
)
def test_unknown_codecs(codec, dtype, message):
    with pytest.raises(InputError, match=message):
        codecs.decode(codec, memoryview(b""), np.dtype(dtype), (2, 2))


def _streams():
    import lzma
    import zlib

    raw = bytes(5000)
    yield "brotli", unbrotli, brotli.compress(raw), raw
    yield "lzma", unlzma, lzma.compress(raw), raw
    yield "zlib", unzlib, zlib.compress(raw), raw


@pytest.mark.parametrize(("unpack", "data", "raw"), [case[1:] for case in _streams()], ids=[c[0] for c in _streams()])
def test_bounded_decompression(unpack, data, raw):
    assert unpack(data, len(raw)) == raw and unpack(data, 10 * len(raw)) == raw
    for spoilt, limit, message in (
        (data, len(raw) - 1, "more than 4999 bytes"),
        (data[:-1], len(raw), "truncated|damaged"),
        (b"", len(raw), "truncated|damaged"),
        (data + b"x", len(raw), "behind the end|damaged"),
        (b"\xff" + data, len(raw), "damaged|truncated"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            unpack(spoilt, limit)
        assert "\n" not in str(caught.value)


def test_an_xz_file_cannot_ask_for_memory():
    import lzma

    raw = bytes(1000)
    greedy = lzma.compress(raw, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}])
    with pytest.raises(ValueError, match="damaged: Memory usage limit"):
        unlzma(greedy, 1 << 20)


@needs_constriction
def test_tables_that_cannot_be():
    good = rans.encode(_gaussian(np.random.default_rng(7), (20, 30)))

    def with_side(raw):
        side = brotli.compress(raw)
        return struct.pack("<I", len(side)) + side + good[4 + struct.unpack_from("<I", good)[0] :]

    for raw in (
        b"",
        struct.pack("<BbB", 0, 0, 2),
        struct.pack("<BbB", 65, 0, 2) + bytes(50 + 65 * 3),
        struct.pack("<BbB", 1, 100, 60) + bytes(61),
        struct.pack("<BbB", 1, 0, 0) + bytes(1),
        struct.pack("<BbB", 1, -3, 5) + bytes(5),
        struct.pack("<BbB", 1, -3, 5) + bytes(6),
        struct.pack("<BbB", 2, -3, 5) + bytes(12),
        bytes(100_000),
    ):
        with pytest.raises(ValueError):
            rans.decode(with_side(raw), (20, 30))
