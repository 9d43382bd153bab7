"""The artifact: what goes in comes out, and a damaged or hostile file ends in one clear line."""

import hashlib
import json
import lzma
import math
import struct
import tracemalloc

import brotli
import pytest
import torch

from slotfast import ops
from slotfast.artifact import Artifact, read_artifact, write_artifact
from slotfast.artifact.codecs import _lzma_filters
from slotfast.artifact.format import _PREFIX, MAGIC
from slotfast.errors import InputError
from slotfast.kernels import dequantize_int6_ref
from slotfast.model import PackedLinear
from slotfast.quantize import QuantizedMatrix, quantize_rows


@pytest.fixture
def artifact(tiny_model):
    return Artifact.from_model(tiny_model, {"seed": 7}, torch.rand(64).softmax(0))


def test_round_trip(artifact, tmp_path):
    path = tmp_path / "a.slotfast"
    size = write_artifact(path, artifact)
    back = read_artifact(path)
    assert size == path.stat().st_size and [p.name for p in tmp_path.iterdir()] == ["a.slotfast"]
    assert back.config == artifact.config and back.metadata["seed"] == 7 and torch.equal(back.unigram, artifact.unigram)
    kinds = set()
    for name, tensor in artifact.tensors.items():
        other = back.tensors[name]
        if isinstance(tensor, QuantizedMatrix):
            kinds.add(tensor.bits)
            assert torch.equal(tensor.codes, other.codes) and torch.equal(tensor.scale, other.scale)
            assert tensor.bits == other.bits and int(tensor.codes.abs().max()) <= 2 ** (tensor.bits - 1) - 1
        else:
            assert torch.equal(tensor, other)
    assert kinds == {6, 8}
    tokens = torch.arange(32)[None]
    assert torch.equal(artifact.model().hidden(tokens), back.model().hidden(tokens))


@pytest.mark.parametrize("bits", [6, 8])
def test_rounding_is_within_half_a_step_or_clipped(bits):
    weight = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 50)[:, None]
    matrix = quantize_rows(weight, bits)
    step = matrix.scale.float()[:, None]
    limit = 2 ** (bits - 1) - 1
    error = (matrix.dequantize() - weight).abs()
    assert bool((error <= 0.5001 * step).logical_or(matrix.codes.abs() == limit).all())
    whole = (weight.abs().amax(1) / limit).half().float()[:, None]
    unclipped = ((weight / whole).round().clamp(-limit, limit) * whole - weight).square().sum(1)
    assert bool((error.square().sum(1) <= unclipped * 1.0001).all())  # the search never does worse than no clipping


def test_rows_of_zeros_and_of_one_value():
    matrix = quantize_rows(torch.tensor([[0.0, 0.0], [3.0, 3.0], [1e-9, 0.0]]), 6)
    assert torch.equal(matrix.dequantize()[0], torch.zeros(2))
    assert (matrix.dequantize()[1] - 3).abs().max() < 3e-3


def _rewritten(path, change_header=lambda header: None, payload=None, write=json.dumps):
    """The file with its header changed and its hash made right again: what an attacker would write."""
    raw = path.read_bytes()
    _, version, header_bytes, _ = _PREFIX.unpack(raw[: _PREFIX.size])
    start = _PREFIX.size + 32
    header = json.loads(raw[start : start + header_bytes])
    payload = raw[start + header_bytes :] if payload is None else payload
    header = change_header(header) or header
    data = write(header).encode()
    prefix = _PREFIX.pack(MAGIC, version, len(data), len(payload))
    path.write_bytes(prefix + hashlib.sha256(prefix + data + payload).digest() + data + payload)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: b"", "is empty$"),
        (lambda raw: b"PK\3\4" + raw, "not a slotfast artifact"),
        (lambda raw: raw[:20], "truncated inside the first 24"),
        (lambda raw: raw[:8] + struct.pack("<I", 9) + raw[12:], "version 9, this slotfast reads 1"),
        (lambda raw: raw[:-1], "truncated or damaged"),
        (lambda raw: raw + b"x", "truncated or damaged"),
        (lambda raw: raw[:16] + struct.pack("<Q", 1 << 60) + raw[24:], "truncated or damaged"),
        (lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:], "SHA-256 does not match"),
        (lambda raw: raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:], "SHA-256 does not match"),
    ],
)
def test_damaged_files(artifact, tmp_path, spoil, message):
    path = tmp_path / "a"
    write_artifact(path, artifact)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_artifact(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "again"), [('"config"', '"config": {}'), ('"codec"', '"codec": "raw"'), ('"layers"', '"layers": 1')]
)
def test_a_header_that_says_something_twice(artifact, tmp_path, key, again):
    write_artifact(tmp_path / "a", artifact)
    _rewritten(tmp_path / "a", write=lambda header: json.dumps(header).replace(key, f"{again}, {key}", 1))
    name = key.strip('"')
    with pytest.raises(InputError, match=f"key '{name}' is given twice"):
        read_artifact(tmp_path / "a")


def _set(*keys, value):
    def change(header):
        place = header
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


HOSTILE = {
    "no header object": (lambda header: [1], "does not describe an artifact"),
    "a header of other types": (_set("tensors", value=3), "does not describe an artifact"),
    "an impossible model": (_set("config", "heads", value=3), "heads 3"),
    "a model of unknown parts": (_set("config", "surprise", value=1), "surprise: expected no key of this name"),
    "a model far larger than the file": (_set("config", "width", value=8192), "too many for a file of this size"),
    "an unknown tensor": (_set("tensors", 0, "name", value="x"), "this model has no such"),
    "another shape": (_set("tensors", 0, "shape", value=[1 << 40]), "this model has"),
    "an unknown type": (_set("tensors", 0, "type", value="int4"), "of type 'int4'"),
    "an unknown codec": (_set("tensors", 0, "codec", value="pickle"), "codec 'pickle'"),
    "a negative length": (_set("tensors", 0, "bytes", value=-1), "-1 bytes"),
    "a length past the end": (_set("tensors", 0, "bytes", value=1 << 50), "bytes at 0 of a payload"),
    "a length of another type": (_set("tensors", 0, "bytes", value="9"), "9 bytes at 0"),
    "a tensor less": (lambda header: header["tensors"].pop() and None, "belong to no tensor"),
    "a calibration out of range": (
        _set("metadata", "calibration", value={"scale": -50, "decay": 0.9, "gates": [[0, 0]] * 6}),
        "calibration.scale: expected at least 0",
    ),
    "a calibration that is no number": (
        _set("metadata", "calibration", value={"scale": 1, "decay": math.nan, "gates": [[0, 0]] * 6}),
        "calibration.decay: expected",
    ),
    "a calibration of too few gates": (
        _set("metadata", "calibration", value={"scale": 1, "decay": 0.9, "gates": [[0, 0]]}),
        "calibration.gates: expected at least 6 of them",
    ),
    "a hash that is no text": (_set("metadata", "tokenizer_sha256", value=7), "tokenizer_sha256: expected text"),
    "many value layers": (_set("config", "value_layers", value=[0] * 300), "value_layers"),
    "an infinite cap": (_set("config", "softcap", value=math.inf), "softcap: expected a finite number"),
    "an endless window": (_set("config", "seq_len", value=1 << 30), "seq_len"),
    "a long name": (_set("tensors", 0, "name", value="x" * 5000), "tensor 'xxxx.*x[.]{3}$"),
    "a long shape": (_set("tensors", 0, "shape", value=[1] * 5000), r"1, 1.*[.]{3}$"),
    "a long codec": (_set("tensors", 0, "codec", value="z" * 5000), r"codec 'zz.*[.]{3}$"),
    "no metadata": (lambda header: header.pop("metadata") and None, "does not describe an artifact"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers(artifact, tmp_path, change, message):
    path = tmp_path / "a"
    write_artifact(path, artifact)
    _rewritten(path, change)
    with pytest.raises(InputError, match=message) as caught:
        read_artifact(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codec", ["brotli", "planes", "lzma", "raw"])
def test_a_bomb_is_not_unpacked(artifact, tmp_path, codec):
    path = tmp_path / "a"
    write_artifact(path, artifact)
    read_artifact(path)  # what the first call imports is not measured
    raw = bytes(1 << 24)
    bomb = {
        "brotli": lambda: brotli.compress(raw, quality=4),
        "planes": lambda: brotli.compress(raw, quality=4),
        "lzma": lambda: lzma.compress(raw, lzma.FORMAT_RAW, filters=_lzma_filters(len(raw))),
        "raw": lambda: raw[: 1 << 22],
    }[codec]()

    def change(header):
        header["tensors"][0] |= {"codec": codec, "bytes": len(bomb)}

    _rewritten(path, change, bomb)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="does not decode to"):
            read_artifact(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(bomb) + (1 << 20)


def test_nan_weights_are_refused(artifact, tmp_path):
    artifact.tensors["smear.gate"][3] = math.nan
    write_artifact(tmp_path / "a", artifact)
    with pytest.raises(InputError, match=r"'smear\.gate' holds NaN"):
        read_artifact(tmp_path / "a")


def test_a_failed_write_leaves_the_old_file(artifact, tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_artifact(path, artifact)
    before = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_artifact(path, artifact)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_codes_beyond_their_bits_are_refused(artifact, tmp_path):
    name = "blocks.0.mlp.fc.weight"
    artifact.tensors[name].codes[3, 4] = 40
    write_artifact(tmp_path / "a", artifact)
    with pytest.raises(InputError, match=r"'blocks.0.mlp.fc.weight' of type 'int6' holds codes from .* to 40"):
        read_artifact(tmp_path / "a")


def test_frequencies_that_are_none_are_refused(artifact, tmp_path):
    artifact.unigram[0] = 3.0
    write_artifact(tmp_path / "a", artifact)
    with pytest.raises(InputError, match="no frequencies"):
        read_artifact(tmp_path / "a")


def test_only_linear_layers_are_packed(artifact):
    """A file may call any matrix int6; embeddings and mixing weights stay what they are."""
    for name in ("tok_emb.weight", "blocks.0.resid_mix"):
        matrix = artifact.tensors[name]
        dense = matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix
        artifact.tensors[name] = quantize_rows(dense, 6)
    tokens = torch.arange(32)[None]
    dense, packed = artifact.model().hidden(tokens), artifact.model("int6").hidden(tokens)
    assert (dense - packed).abs().max() < 1e-4


def test_packed_layers_keep_matrices_where_those_of_all_stay_in_the_cache(artifact, monkeypatch):
    """As on a GPU whose L2 cache holds them, or not: what decides is their bytes together."""
    asked, given = set(), []
    product = ops.int6_linear

    def spy(x, weight, backend, dense):
        given.append(dense)
        return product(x, weight, backend, dense)

    monkeypatch.setattr(ops, "int6_linear", spy)
    tokens = torch.arange(32)[None]
    for fits in (False, True):
        monkeypatch.setattr(ops, "keeps_dense", lambda backend, device, n: asked.add(n) or fits)  # noqa: B023
        model = artifact.model("int6").cast_matrices(torch.float32)
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert asked == {4 * sum(n * k for n, k in (module.shape for module in packed))}
        given.clear()
        model.hidden(tokens)
        assert len(given) >= len(packed) and all((dense is not None) == fits for dense in given)
        assert not any("dense" in name for name in model.state_dict())
    for module in packed:
        assert torch.equal(module.dense, dequantize_int6_ref(module.packed, torch.float32))
    given.clear()
    model.hidden(tokens, torch.bfloat16)
    assert given and not any(dense is not None for dense in given)
