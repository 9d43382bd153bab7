"""What a result says of how it is to be read, in the table and in the JSON."""

import json

import numpy as np
import pytest

from slotfast.data import write_shard
from slotfast.eval.__main__ import main
from tests.models import write_tiny, write_tokenizer

TEXT = "the cat sat on the mat and two  spaces here\n" * 12


@pytest.fixture
def notes(tmp_path, capsys):
    """Evaluates a tiny model of a tokenizer; the notes in its JSON, which are lines of its table too."""

    def run(tokenizer, *arguments):
        write_tiny(tmp_path / "m", tokenizer=tokenizer)
        given = ["--artifact", str(tmp_path / "m"), "--tokenizer", str(tokenizer.path), "--preset", "none"]
        main([*given, *map(str, arguments), "--json", str(tmp_path / "r.json")])
        found, lines = json.loads((tmp_path / "r.json").read_text())["notes"], capsys.readouterr().out.splitlines()
        assert set(found) <= set(lines)
        return found

    return run


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"treat_whitespace_as_suffix": True}, TEXT),
        ({"allow_whitespace_only_pieces": True}, TEXT),
        ({"sentences": [TEXT.replace(" ", "\u0120")]}, TEXT.replace(" ", "\u0120")),
    ],
)
def test_shards_of_a_vocabulary_that_the_byte_rule_misjudges_say_by_how_much(tmp_path, notes, options, text):
    tokenizer = write_tokenizer(tmp_path / "t.model", add_dummy_prefix=False, **options)
    tokens, count = tokenizer.encode_documents([text])
    write_shard(tmp_path / "a.bin", tokens)
    (note,) = notes(tokenizer, "--tokens", tmp_path / "a.bin")
    true = len(TEXT)
    assert f"counts {count.rule - true:,} bytes more than the pieces spell" in note
    assert f"bpb is about {true / count.rule:.2f} of what" in note and true / count.rule < 0.97


def test_shards_without_the_rules_space_or_with_unknown_pieces_are_warned_of(tmp_path, notes):
    glued = write_tokenizer(tmp_path / "g.model", [TEXT.replace(" ", "")], add_dummy_prefix=False)
    write_shard(tmp_path / "a.bin", np.arange(1, 40))
    assert "no piece has U+2581" in notes(glued, "--tokens", tmp_path / "a.bin")[0]
    plain = write_tokenizer(tmp_path / "p.model")
    assert notes(plain, "--tokens", tmp_path / "a.bin") == []
    write_shard(tmp_path / "a.bin", [1, plain.unknown_id, 20, plain.unknown_id])
    assert notes(plain, "--tokens", tmp_path / "a.bin")[0].startswith("warning: 2 unknown pieces")


def test_what_was_left_out_and_what_was_not_trained_is_said(tmp_path, notes):
    tokenizer = write_tokenizer(tmp_path / "t.model")
    (tmp_path / "t.txt").write_bytes(TEXT.encode())
    tokens, _ = tokenizer.encode_documents([TEXT])
    write_shard(tmp_path / "a.bin", tokens)
    for name, path in (("--text", "t.txt"), ("--tokens", "a.bin")):
        assert (
            notes(tokenizer, name, tmp_path / path)
            == notes(tokenizer, name, tmp_path / path, "--max-tokens", 5000)
            == []
        )
        assert notes(tokenizer, name, tmp_path / path, "--max-tokens", 90) == [
            "only the first 90 tokens were read (--max-tokens)"
        ]
    chunks = [name, tmp_path / path, "--ttt", "--stride", 16, "--ttt-epochs", 1, "--ttt-chunk"]
    (note,) = notes(tokenizer, *chunks, 32768)
    assert note.startswith("ttt-549:steps=1 trained nothing: the stream is one chunk")
    largest = int(note.partition("chunk=")[2].split()[0])
    (other,) = notes(tokenizer, *chunks, largest + 1)
    assert other.partition(" trained ")[2] == note.partition(" trained ")[2]
    assert notes(tokenizer, *chunks, largest) == []
    assert "a single window" in notes(tokenizer, *chunks, 1, "--max-tokens", 20)[-1]
    (tmp_path / "t.txt").write_bytes(TEXT.encode().replace(b"\n", b"\r\n"))
    assert "end in CRLF" in notes(tokenizer, "--text", tmp_path / "t.txt")[0]
