"""Files that lie, hurt or are of another kind: each is refused in one line, and nothing in them is run."""

import io
import lzma
import os
import pickle
import zipfile

import brotli
import pytest
import torch
import zstandard

from slotfast.artifact import load_artifact
from slotfast.errors import InputError
from slotfast.model import GPT, GPTConfig
from tests.community_files import packed, safetensors, saved


@pytest.fixture(scope="module")
def state():
    """Of a small model with every part."""
    sizes = dict(vocab_size=70, layers=3, width=32, heads=2, kv_heads=1, mlp_width=40, bigram_width=8, value_width=8)
    torch.manual_seed(3)
    return GPT(GPTConfig(bigram_buckets=40, value_layers=(1, 2), **sizes)).state_dict()


class _Malice:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickles_are_not_executed(tmp_path):
    touched = tmp_path / "touched"
    for function in (os.system, exec, eval):
        argument = f"touch {touched}" if function is os.system else f"open({str(touched)!r}, 'w')"
        data = saved({"w": {"x": _Malice(function, argument)}, "m": {}})
        for form in (data, lzma.compress(data)):
            (tmp_path / "a").write_bytes(form)
            with pytest.raises(InputError, match=f"its pickle names '[a-z_]+.{function.__name__}': it holds more than"):
                load_artifact(tmp_path / "a")
            assert not touched.exists()
        (tmp_path / "a").write_bytes(pickle.dumps({"x": _Malice(function, argument)}))
        with pytest.raises(InputError):
            load_artifact(tmp_path / "a")
    assert not touched.exists()


def _archive(members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _members(contents):
    with zipfile.ZipFile(io.BytesIO(saved(contents))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_sizes_in_pickles_are_held_against_the_archive(tmp_path):
    members = _members({"a": torch.arange(16, dtype=torch.int8)})
    program = members["archive/data.pkl"]
    more = b"J\0\0\x10\0"
    for changed, message in (
        (program.replace(b"cpuq\6K\x10t", b"cpuq\6" + more + b"t"), "a storage of 16 bytes for 1048576 values"),
        (program.replace(b"K\x10\x85", more + b"\x85"), r"a tensor \[1048576\] in a storage of 16 values"),
        (program.replace(b"K\x10\x85q\x08K\1", more + b"\x85q\x08K\0"), r"a tensor \[1048576\] in a storage of 16"),
        (program.replace(b"QK\0K\x10", b"QK\7K\x10"), r"a tensor \[16\] in a storage of 16"),
        (program[:-1], "damaged pickle: .* pickle exhausted before seeing STOP"),
        (b"\x80\2" + b"]" * 100 + b".", "damaged pickle"),
        (b"\x80\2i1\n2\n.", "instruction INST|damaged"),
        (b"\x80\2}" + b")" + b"\x85" * 200_000 + b"K\1s.", "a key of type tuple"),
        (b"\x80\2}(X\1\0\0\0aK\1X\1\0\0\0aK\1u.", "key 'a' is given twice"),
        (b"\x80\2}X\1\0\0\0aK\1sX\1\0\0\0aK\2s.", "key 'a' is given twice"),
    ):
        assert changed != program
        (tmp_path / "a").write_bytes(_archive(members | {"archive/data.pkl": changed}))
        with pytest.raises(InputError, match=message) as caught:
            load_artifact(tmp_path / "a")
        assert "\n" not in str(caught.value)


def _twice(members):
    buffer = io.BytesIO(_archive(members))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("archive/data/0", members["archive/data/0"])
    return buffer.getvalue()


def test_archives_that_torch_does_not_write(tmp_path):
    members = _members({"a": torch.zeros(1 << 16)})
    for data, message in (
        (_archive(members, compression=zipfile.ZIP_DEFLATED), "compressed members"),
        (_archive({"a/data.pkl": b".", "b/data.pkl": b"."}), "2 data.pkl"),
        (_archive({"x": b""}), "0 data.pkl"),
        (_twice(members), "two members of one name"),
        (_archive({"archive/data.pkl": bytes(1 << 21)}), "a pickle of 2097152 bytes"),
        (_archive(members | {"archive/byteorder": b"big"}), "not little-endian"),
        (saved({"a": torch.zeros(9)})[:-30], "damaged archive"),
        (saved([1, 2]), "holds a list"),
        (saved({"a": 3}), "entry 'a' is no tensor"),
    ):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a")


def _renamed(data, old, new):
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(old, new, 1)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def test_safetensors_that_lie(state, tmp_path):
    data, _ = safetensors(state)
    for spoilt, message in (
        (data[:-1], "ends behind the file"),
        (data + b"x", "1 bytes behind the last tensor"),
        ((1 << 60).to_bytes(8, "little") + data[8:], "a header of"),
        (data.replace(b'"F32"', b'"X32"', 1), "a header that is none"),
        (data.replace(b'"shape": [70', b'"shape": [71', 1), "at bytes"),
        (data.replace(b'"data_offsets": [0', b'"data_offsets": [9', 1), "at bytes"),
        (_renamed(data, b"blocks.1.attn.q_gain", b"blocks.0.attn.q_gain"), "'blocks.0.attn.q_gain' is given twice"),
        (_renamed(data, b'"shape": [70, 32], ', b'"dtype": "F32", "shape": [70, 32], '), "'dtype' is given twice"),
        (_renamed(data, b'"format": "pt"', b'"format": "pt", "format": "pt"'), "'format' is given twice"),
    ):
        assert spoilt != data
        (tmp_path / "a").write_bytes(spoilt)
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a")


def test_other_files(tmp_path):
    for data, message in (
        (b"", "/a: is empty$"),
        (b"hello, world" * 9, "expected one of"),
        (b"PGRP" + bytes(99), "PR #1855's grouped container"),
        (b"LRZI" + bytes(99), "an lrzip archive, which only the program lrzip unpacks"),
        (lzma.compress(b"text"), "holds b'text' compressed as xz"),
        (zstandard.compress(b"text"), "holds b'text' compressed as zstd"),
        (zstandard.compress(b"text" * 99)[:-1], "truncated"),
        (zstandard.compress(b"text") + b"x", "data behind the end"),
        (zstandard.compress(b"text") + bytes(999), "data behind the end"),
        (zstandard.compress(bytes(1 << 24)), "decodes to more than"),
        (zstandard.compress(b"text")[:4] + bytes([255] * 20), "damaged"),
        (brotli.compress(b"BSHF\x63" + bytes(50)), "stride of 99"),
        (brotli.compress(b"BSHF"), "stride of 0"),
    ):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_artifact(tmp_path / "a")
    with pytest.raises(InputError, match="cannot be read"):
        load_artifact(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("kind", ["ternary", "ternary_bitmask", "fp8", "fp4"])
@pytest.mark.parametrize("size", [32, 1024])
def test_packings_that_are_not_supported_are_named(kind, size, tmp_path):
    state = {"tok_emb.weight": torch.rand(size, size), "blocks.0.attn.q_gain": torch.ones(2)}
    (tmp_path / "a").write_bytes(packed(state, kind))
    with pytest.raises(InputError, match=f"packed as ({kind}|fp16 and {kind}|{kind} and fp16): .* not supported"):
        load_artifact(tmp_path / "a")


def test_tensors_under_two_names_are_refused(state, tmp_path):
    for more in ({"module.smear.gate": state["smear.gate"]}, {"kv_bank": torch.zeros(6, 16, 32)}):
        (tmp_path / "a").write_bytes(saved(dict(state) | more))
        with pytest.raises(InputError, match="is stored twice"):
            load_artifact(tmp_path / "a", {"generation": "pr1019"})
