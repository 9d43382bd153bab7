"""The artifact: one file that holds a quantised model, verified before it is used and never executed.

Layout, little-endian:

    magic "slotfast" | version u32 | header bytes u32 | payload bytes u64 | SHA-256 of all the rest, 32 bytes
    header: JSON {"config", "metadata", "tensors": [{"name", "type", "shape", "codec", "bytes"}, ...]}
    payload: the tensors' encoded bytes, one after another in the header's order

A matrix is two entries, its codes (one byte a weight, which entropy coders like better than packed bits) and its row
scales (`name.scale`). Reading checks the hash first, then holds every size against the model's own shapes, so a file
can neither name a tensor the model lacks nor make the reader allocate more than the model needs.
"""

import hashlib
import json
import lzma
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import brotli
import numpy as np
import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .data import atomic_write
from .errors import InputError
from .kernels import pack_int6
from .model import GPT, GPTConfig, PackedLinear
from .ops import Backend
from .quantize import QuantizedMatrix, quantize_rows

MAGIC = b"slotfast"
VERSION = 1
_PREFIX = struct.Struct("<8sIIQ")
_HASH_BYTES = 32
_MAX_HEADER_BYTES = 1 << 22
# A trained tensor shrinks by less than 2, an all-zero one without limit: more than this is taken for a bomb.
_MAX_EXPANSION = 64
_SLACK_BYTES = 1 << 20
_TYPES = {"int6": np.dtype("i1"), "int8": np.dtype("i1"), "fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}
_BITS = {"int6": 6, "int8": 8}
UNIGRAM = "calibration.unigram"


@dataclass(frozen=True)
class Artifact:
    """A model as it is stored.

    Args:
        config: the model's shape.
        tensors: by parameter name; matrices quantised, the rest float32.
        metadata: JSON-able facts: tokenizer hash, how it was trained, calibration.
        unigram: float32 [V], training frequency of each token, or None where the file has none.
    """

    config: GPTConfig
    tensors: Mapping[str, QuantizedMatrix | Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    unigram: Tensor | None = None

    @classmethod
    def from_model(cls, model: GPT, metadata: Mapping[str, Any], unigram: Tensor | None = None) -> "Artifact":
        """Quantise a model: matrices of the blocks to 6 bits, embeddings to 8, the rest to float16."""
        tensors: dict[str, QuantizedMatrix | Tensor] = {}
        for name, tensor in model.state_dict().items():
            if tensor.ndim != 2 or ("blocks" in name and "weight" not in name) or name.startswith("skip_"):
                tensors[name] = tensor.detach().half().float()
            else:
                tensors[name] = quantize_rows(tensor, 6 if name.startswith("blocks.") else 8)
        return cls(model.config, tensors, dict(metadata), unigram)

    def model(self, weights: Literal["dequantized", "int6"] = "dequantized", backend: Backend = "auto") -> GPT:
        """The model in evaluation mode.

        Args:
            weights: `dequantized` gives float32 matrices; `int6` keeps those of 6 bits packed, for the int6 kernel.
            backend: of packed layers.
        """
        model = GPT(self.config)
        model.load_state_dict(
            {name: t.dequantize() if isinstance(t, QuantizedMatrix) else t for name, t in self.tensors.items()}
        )
        if weights == "int6":
            for name, tensor in self.tensors.items():
                layer = name.removesuffix(".weight")
                packable = isinstance(tensor, QuantizedMatrix) and tensor.bits == 6
                if packable and layer != name and isinstance(model.get_submodule(layer), nn.Linear):
                    model.set_submodule(layer, PackedLinear(pack_int6(tensor.codes, tensor.scale), backend))
        return model.eval().requires_grad_(False)


class Metadata(BaseModel):
    """What of an artifact's metadata is acted on; anything else is kept and shown."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    tokenizer_sha256: str | None = None
    scale: float | None = Field(None, ge=0, le=2)


def write_artifact(path: str | os.PathLike, artifact: Artifact) -> int:
    """Write an artifact atomically.

    Returns:
        Size of the file in bytes.
    """
    entries, blobs = [], []

    def add(name: str, kind: str, array: np.ndarray) -> None:
        codec, blob = _compress(np.ascontiguousarray(array, _TYPES[kind]).tobytes())
        entries.append({"name": name, "type": kind, "shape": list(array.shape), "codec": codec, "bytes": len(blob)})
        blobs.append(blob)

    for name, tensor in artifact.tensors.items():
        if isinstance(tensor, QuantizedMatrix):
            add(name, f"int{tensor.bits}", tensor.codes.numpy())
            add(f"{name}.scale", "fp16", tensor.scale.numpy())
        else:
            add(name, "fp16", tensor.numpy())
    if artifact.unigram is not None:
        add(UNIGRAM, "fp32", artifact.unigram.numpy())
    header = json.dumps(
        {"config": artifact.config.model_dump(), "metadata": dict(artifact.metadata), "tensors": entries},
        separators=(",", ":"),
    ).encode()
    payload = b"".join(blobs)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), len(payload))
    with atomic_write(path) as file:
        file.write(prefix + hashlib.sha256(prefix + header + payload).digest() + header + payload)
    return Path(path).stat().st_size


def read_artifact(path: str | os.PathLike) -> Artifact:
    """Read and verify an artifact; executes nothing and allocates at most what its model needs.

    Raises:
        InputError: missing, truncated, damaged or hostile file, NaN or infinite weights.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_PREFIX.size)
            if not prefix.startswith(MAGIC):
                raise InputError(f"{path}: starts with {prefix[:8]!r}, expected {MAGIC!r}: not a slotfast artifact")
            if len(prefix) < _PREFIX.size:
                raise InputError(f"{path}: {size} bytes, truncated inside the first {_PREFIX.size}")
            _, version, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
            if version != VERSION:
                raise InputError(f"{path}: artifact version {version}, this slotfast reads {VERSION}")
            expected = _PREFIX.size + _HASH_BYTES + header_bytes + payload_bytes
            if header_bytes > _MAX_HEADER_BYTES:
                raise InputError(f"{path}: a header of {header_bytes} bytes, expected at most {_MAX_HEADER_BYTES}")
            if size != expected:
                raise InputError(f"{path}: {size} bytes, its header announces {expected}: truncated or damaged")
            digest = file.read(_HASH_BYTES)
            header, payload = file.read(header_bytes), file.read(payload_bytes)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if hashlib.sha256(prefix + header + payload).digest() != digest:
        raise InputError(f"{path}: SHA-256 does not match: damaged")
    try:
        return _parse(header, memoryview(payload))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: header, {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: header does not describe an artifact: {error!r}") from None


def _parse(header: bytes, payload: memoryview) -> Artifact:
    """Header and payload, hash already verified, to an artifact; raises InputError or what malformed JSON leads to."""
    fields = json.loads(header)
    config = GPTConfig.model_validate(fields["config"])
    shapes = _expected_shapes(config, limit=_SLACK_BYTES + _MAX_EXPANSION * len(payload))
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    start = 0
    for entry in fields["tensors"]:
        name, kind, shape, length = entry["name"], entry["type"], tuple(entry["shape"]), entry["bytes"]
        wanted = shapes.get(name)
        if name in arrays or wanted is None or shape != wanted or kind not in _TYPES:
            raise InputError(
                f"tensor {name!r} of type {kind!r} and shape {shape}: this model has {wanted or 'no such'}"
            )
        if not isinstance(length, int) or not 0 <= length <= len(payload) - start:
            raise InputError(f"tensor {name!r}: {length} bytes at {start} of a payload of {len(payload)}")
        raw = _decompress(entry["codec"], payload[start : start + length], math.prod(shape) * _TYPES[kind].itemsize)
        arrays[name] = kind, np.frombuffer(raw, _TYPES[kind]).reshape(shape)
        start += length
    if start != len(payload):
        raise InputError(f"{len(payload) - start} bytes of payload belong to no tensor")
    tensors: dict[str, QuantizedMatrix | Tensor] = {}
    for name in shapes:
        if name == UNIGRAM or (name.endswith(".scale") and name.removesuffix(".scale") in shapes):
            continue
        if name not in arrays:
            raise InputError(f"tensor {name!r} is missing")
        kind, array = arrays[name]
        if kind in _BITS:
            if f"{name}.scale" not in arrays:
                raise InputError(f"tensor {name!r} has no scale")
            scale = arrays[f"{name}.scale"][1]
            limit = 2 ** (_BITS[kind] - 1)
            if array.size and not -limit <= int(array.min()) <= int(array.max()) < limit:
                raise InputError(f"tensor {name!r} of type {kind!r} holds codes from {array.min()} to {array.max()}")
            tensors[name] = QuantizedMatrix(torch.tensor(array), torch.tensor(scale), _BITS[kind])
        else:
            scale = array
            tensors[name] = torch.tensor(array.astype(np.float32))
        if not np.isfinite(scale).all():
            raise InputError(f"tensor {name!r} holds NaN or infinite values")
    unigram = torch.tensor(arrays[UNIGRAM][1]) if UNIGRAM in arrays else None
    if unigram is not None and not ((unigram >= 0).all() and abs(float(unigram.sum()) - 1) < 0.01):
        raise InputError(f"tensor {UNIGRAM!r} holds values that are no frequencies")
    return Artifact(config, tensors, Metadata.model_validate(fields["metadata"]).model_dump(), unigram)


def _expected_shapes(config: GPTConfig, limit: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a file of this model may hold; raises InputError where they come to over `limit` bytes."""
    with torch.device("meta"):  # shapes only: nothing is allocated
        parameters = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    needed = sum(math.prod(shape) for shape in parameters.values())
    if needed > limit:
        raise InputError(f"its model has {needed} parameters, too many for a file of this size")
    scales = {f"{name}.scale": shape[:1] for name, shape in parameters.items() if len(shape) == 2}
    return {**scales, **parameters, UNIGRAM: (config.vocab_size,)}


def _lzma_filters(raw_bytes: int) -> list[dict[str, int]]:
    # The dictionary follows from the size in the header, not from the stream: a stream cannot ask for memory.
    dictionary = min(max(raw_bytes, 4096), 1 << 26)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]


def _compress(raw: bytes) -> tuple[str, bytes]:
    candidates = {
        "raw": raw,
        "brotli": brotli.compress(raw, quality=11, lgwin=24),
        "lzma": lzma.compress(raw, lzma.FORMAT_RAW, filters=_lzma_filters(len(raw))),
    }
    return min(candidates.items(), key=lambda item: len(item[1]))


def _decompress(codec: str, data: memoryview, raw_bytes: int) -> bytes:
    """Exactly `raw_bytes` decoded bytes, or InputError; never decodes further than that."""
    try:
        if codec == "raw":
            raw = bytes(data)
        elif codec == "brotli":
            decoder, raw, finished = brotli.Decompressor(), b"", False
            while len(raw) <= raw_bytes and not finished:
                piece = decoder.process(data, output_buffer_limit=raw_bytes + 1 - len(raw))
                raw, data, finished = raw + piece, b"", decoder.is_finished()
                if not piece and not finished:
                    break
        elif codec == "lzma":
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(raw_bytes))
            raw = decoder.decompress(data, max_length=raw_bytes + 1)
        else:
            raise InputError(f"codec {codec!r}: expected raw, brotli or lzma")
    except (brotli.error, lzma.LZMAError) as error:
        raise InputError(f"a tensor's {codec} data is damaged: {error}") from None
    if len(raw) != raw_bytes:
        raise InputError(f"a tensor's {codec} data does not decode to the {raw_bytes} bytes of its shape")
    return raw
