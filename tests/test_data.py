"""Shards, text files and byte counts, the well-formed and the broken."""

import bz2
import gzip
import json
import lzma
import struct
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from slotfast.data import ByteTable, Tokenizer, TokenStream, open_shards, read_documents, read_shard, write_shard
from slotfast.errors import InputError
from tests.models import SENTENCES, write_tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the experiments' data are not on this machine")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(str(resources.files("slotfast") / "demo" / "demo.model"))


# shards


def test_shards_round_trip(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65536, 1000)
    for number, part in enumerate((tokens[:0], tokens[:700], tokens[700:])):
        write_shard(tmp_path / f"fineweb_val_{number:06}.bin", part)
    (tmp_path / "fineweb_val_bytes_000000.bin").write_bytes(b"a byte sidecar, which the pattern matches too")
    stream = open_shards(str(tmp_path / "fineweb_val_*.bin"))
    np.testing.assert_array_equal(stream.read(0, 2000), tokens)
    np.testing.assert_array_equal(stream.read(690, 710), tokens[690:710])
    assert len(open_shards(str(tmp_path / "fineweb_val_*.bin"), max_tokens=701)) == 701
    raw = (tmp_path / "fineweb_val_000001.bin").read_bytes()
    assert struct.unpack("<3i", raw[:12]) == (20240520, 1, 700) and len(raw) == 1024 + 2 * 700
    assert stream.sha256() == TokenStream([tokens]).sha256()
    assert stream.count(int(tokens[3])) == int((tokens == tokens[3]).sum())
    assert stream.count(int(tokens[3]), 3) == int((tokens[:3] == tokens[3]).sum())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: b"", "0 bytes, shorter than a shard's header of 1024 bytes"),
        (lambda raw: b"\0" * 4 + raw[4:], "magic number 0 at byte 0, expected 20240520"),
        (lambda raw: raw[:4] + b"\2\0\0\0" + raw[8:], "shard version 2 at byte 4, expected 1"),
        (lambda raw: raw[:-1], "1043 bytes, expected 1044 for the 10 tokens"),
        (lambda raw: raw + b"\0", "1045 bytes, expected 1044"),
        (lambda raw: raw[:8] + b"\xff\xff\xff\xff" + raw[12:], "for the -1 tokens"),
    ],
)
def test_broken_shards_say_what_is_wrong(tmp_path, spoil, message):
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(10))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        read_shard(path)


def test_missing_shards_and_foreign_tokens(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_shards(str(tmp_path / "*.bin"))
    with pytest.raises(InputError, match=r"0\.\.65535"):
        write_shard(tmp_path / "a.bin", [70000])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="token id 9 at position 5 .* ends at 8"):
        TokenStream([np.array([1, 2]), np.array([3, 4, 5, 9])]).check_vocabulary(9)


# text files


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", bytes),
        (".xz", lzma.compress),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_documents_of_every_format(tmp_path, suffix, pack):
    documents = ["one\ntwo é", "", "three"]
    lines = "\n".join(json.dumps({"text": text}) for text in documents) + "\n\n"
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines.encode()))
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(documents[0].encode()))
    assert list(read_documents(tmp_path / f"a.jsonl{suffix}")) == documents
    assert list(read_documents(tmp_path / f"a.txt{suffix}")) == documents[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2: not JSON"),
        ("a.jsonl", b'{"txt": "x"}', "line 1: expected a JSON object with the key 'text'"),
        ("a.jsonl", b"[1]", "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}', "line 1: key 'text' holds int"),
        ("a.txt.xz", lzma.compress(b"hello" * 99)[:-20], "truncated or corrupt"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON that can be read"),
        ("a.txt.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 30, "truncated or corrupt"),
        ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-12], "truncated or corrupt"),
        ("a.jsonl.zst", b"not zstd at all", "truncated or corrupt"),
        ("a.jsonl.zst", b"", "truncated or corrupt"),
        ("a.csv", b"id,text\n1,one\n", "a table, expected plain text, or .jsonl with a key 'text'"),
        ("a.txt", b'\xef\xbb\xbf"id","text"\r\n1,"one"\r\n', "a table, expected plain text"),
        ("a.txt", b"__index__\ttext\tlabel\n1\tone\t0\n", "a table, expected plain text"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n1\tone\n", mtime=0), "a table, expected plain text"),
        ("a.json", b'\xef\xbb\xbf [{"text": "one"},\n {"text": "two"}]\n', "JSON, expected plain text"),
        ("a.txt", b'{"text": "one"}\n{"text": "two"}\n', "its first line is a JSON object; .*, by its name"),
        ("a.txt", "words".encode("utf-16"), "a.txt: UTF-16 where UTF-8 is read"),
        ("a.txt", b"PAR1\x15\x04 all of it ASCII PAR1", "a Parquet file"),
        ("a.txt", gzip.compress(b"hello", mtime=0), r"compressed by gzip: its name must end with \.gz"),
        ("a.txt", "wide".encode("utf-16-le"), "a zero at byte 1: a binary file, or not UTF-8"),
    ],
)
def test_broken_text_says_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(tmp_path / name))


def test_missing_text(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        list(read_documents(tmp_path / "a.txt"))
    with pytest.raises(InputError, match="is a folder, expected a file"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "[sic] he said\n",
        "{a} {b}\n",
        "[1] A footnote.\n[2] Another.\n",
        "17",
        '"quoted"',
        "one, two\n",
        "text\n",
        "text, and more\n",
    ],
)
def test_plain_text_that_resembles_something_else_is_taken(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert list(read_documents(tmp_path / "a.txt")) == [text]


SKIPPABLE = b"\x50\x2a\x4d\x18\x05\0\0\0hello"  # a frame of other people's notes
PACKERS = {
    ".xz": lzma.compress,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_is_cut_anywhere_is_refused_and_all_of_its_parts_are_read(tmp_path, suffix, name):
    path, rng = tmp_path / f"{name}{suffix}", np.random.default_rng(0)
    text = " ".join(map(str, rng.integers(0, 1 << 30, 40_000)))  # of several blocks
    content = (json.dumps({"text": text}) + "\n" if name == "a.jsonl" else text).encode()
    packed = PACKERS[suffix](content)
    for end in (1, 5, 30, len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:end])
        with pytest.raises(InputError, match="truncated or corrupt"):
            list(read_documents(path))
    half = len(content) // 2
    between = SKIPPABLE if suffix == ".zst" else b""
    path.write_bytes(between + PACKERS[suffix](content[:half]) + between + PACKERS[suffix](content[half:]) + between)
    assert list(read_documents(path)) == [text]


# bytes

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=80)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT | st.text(" \n\tab1é€𝄞<0x41></s>", max_size=40), max_size=4))
def test_the_rule_counts_the_bytes_of_any_text(tokenizer, documents):
    tokens, count = tokenizer.encode_documents(documents)
    assert count.rule == count.normalized == count.raw == sum(len(text.encode()) for text in documents)
    assert count.exact and count.unknown == 0
    assert int((tokens == tokenizer.bos_id).sum()) == len(documents)
    for text in documents:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_the_tokenizer_cannot_carry_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"U\+2581 at character 1"):
        tokenizer.encode("a\u2581b")
    with pytest.raises(InputError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


def test_a_cut_keeps_the_counts_true(tokenizer):
    documents = ["abc é def " * 20, "ghi"]
    tokens, count = tokenizer.encode_documents(documents, max_tokens=17)
    assert len(tokens) == 17
    assert count.rule == int(tokenizer.byte_table.count(tokens[1:], tokens[:-1]).sum()) and count.exact


def test_what_a_cut_leaves_out_and_carriage_returns_are_known(tokenizer):
    whole, _ = tokenizer.encode_documents(["ab", "cd"])
    for limit, cut in ((None, False), (len(whole), False), (len(whole) - 1, True), (3, True)):
        tokens, count = tokenizer.encode_documents(["ab", "cd"], limit)
        assert count.cut == cut == (len(tokens) < len(whole)) and count.crlf == 0
        assert TokenStream([whole[:3], whole[3:]], limit).cut == cut
    assert tokenizer.encode_documents(["a\r\nb", "c\rd", "e\r\n"])[1].crlf == 2


TEXTS = [" the cat", "the cat", "  two  spaces ", "", " ", "cat\n dog", "naïve"]


@pytest.mark.parametrize("dummy", [True, False])
@pytest.mark.parametrize("fallback", [True, False])
def test_a_space_in_front_of_every_text_changes_none(tmp_path, dummy, fallback):
    tokenizer = write_tokenizer(tmp_path / "t.model", add_dummy_prefix=dummy, byte_fallback=fallback)
    for text in TEXTS if fallback else TEXTS[:5]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if dummy:  # as the tokenizer itself does it
            assert ids[1:] == sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode(text)
        _, count = tokenizer.encode_documents([text, "x" * fallback])
        if dummy or fallback:
            assert count.exact and count.rule == len(text.encode()) + fallback
    assert tokenizer.byte_table.fault is None


@pytest.mark.parametrize(
    ("options", "example"),
    [
        ({"treat_whitespace_as_suffix": True}, "the▁"),
        ({"allow_whitespace_only_pieces": True}, "▁▁"),
        ({"user_defined_symbols": ["▁▁", "the▁cat"]}, "the▁cat"),
    ],
)
def test_a_vocabulary_shows_what_the_byte_rule_misjudges(tmp_path, options, example):
    tokenizer = write_tokenizer(tmp_path / "t.model", add_dummy_prefix=False, **options)
    fault = tokenizer.byte_table.fault
    assert "U+2581 behind their start" in fault.why
    pieces = [tokenizer._processor.id_to_piece(token) for token in range(tokenizer.vocab_size)]
    assert fault.excess[pieces.index(example)] == 2 and fault.excess[pieces.index("<0x41>")] == 0
    tokens, count = tokenizer.encode_documents(["the cat sat on the mat and two  spaces here"])
    assert count.rule - int(fault.excess[tokens].sum()) == count.raw < count.rule


def test_a_vocabulary_without_the_rules_space_is_misjudged(tmp_path):
    glued = [text.replace(" ", "\u0120") for text in SENTENCES]
    spelt = write_tokenizer(tmp_path / "g.model", glued, add_dummy_prefix=False)
    assert "have a letter for a byte" in spelt.byte_table.fault.why
    tokens, count = spelt.encode_documents(["the\u0120cat"])
    assert count.rule - int(spelt.byte_table.fault.excess[tokens].sum()) == len("the cat")
    none = write_tokenizer(tmp_path / "n.model", [text.replace(" ", "") for text in SENTENCES], add_dummy_prefix=False)
    assert "no piece has U+2581" in none.byte_table.fault.why and none.byte_table.fault.excess is None


def _rule_in_words(processor, tokens) -> int:
    """The contest's byte rule, read aloud, one token at a time."""
    total, after_boundary = 0, True
    for token in tokens:
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            after_boundary = True
            continue
        if processor.is_byte(token):
            total += 1
        else:
            piece = processor.id_to_piece(token)
            if piece[0] == "\u2581":
                piece = piece[1:]
                total += not after_boundary
            total += len(piece.encode("utf-8"))
        after_boundary = False
    return total


@needs_shared
@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("sp1024_contest_settings.model", True),
        ("fineweb_8192_bpe.model", True),
        ("community_1024_no_byte_fallback.model", False),
    ],
)
def test_other_tokenizers_differences_are_stated(name, exact):
    tokenizer = Tokenizer(SHARED / "tokenizers" / name)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    documents = [text for text, _ in zip(read_documents(SHARED / "text" / "val.jsonl.xz"), range(20), strict=False)]
    tokens, count = tokenizer.encode_documents(documents)
    assert count.rule == sum(_rule_in_words(processor, tokenizer.encode(text)) for text in documents)
    assert count.raw == sum(len(text.encode()) for text in documents)
    if exact:  # byte pieces, but a normaliser that drops white space: the rule counts the normalised text
        assert count.rule == count.normalized <= count.raw and count.unknown == 0
    # three spaces fewer, three bytes more for a fraction: the lengths agree, the texts do not
    _, count = tokenizer.encode_documents(["naïve 日本語 text  with   spaces ¼"])
    assert not count.exact and count.altered == 1
    assert (count.unknown == 0) == exact
    if exact:
        assert count.rule == count.normalized


def test_byte_table_of_hand_made_pieces():
    table = ByteTable(
        np.array([0, 3, 1, 0]), np.array([False, True, False, True]), np.array([True, False, False, False])
    )
    tokens = np.array([1, 1, 2, 3, 0, 3])
    np.testing.assert_array_equal(table.count(tokens[1:], tokens[:-1]), [4, 1, 1, 0, 0])


def test_not_a_tokenizer(tmp_path):
    (tmp_path / "x.model").write_bytes(b"junk")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "x.model")
    (tmp_path / "x.model").write_bytes(b"")
    with pytest.raises(InputError, match="x.model: is empty$"):
        Tokenizer(tmp_path / "x.model")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer(tmp_path / "y.model")
