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
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor

from ..command.files import atomic_write
from ..errors import Fault, InputError, reading
from ..model import GPTConfig
from ..quantize import QuantizedMatrix
from . import codecs
from .bounded import one_line, shortened, unique_json
from .contents import Artifact, Metadata, expansion_limit, parameter_shapes

MAGIC = b"slotfast"
VERSION = 1
_PREFIX = struct.Struct("<8sIIQ")
_HASH_BYTES = 32
_MAX_HEADER_BYTES = 1 << 22
_TYPES: dict[str, np.dtype[Any]] = {
    "int6": np.dtype("i1"),
    "int8": np.dtype("i1"),
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
}
_BITS = {"int6": 6, "int8": 8}
UNIGRAM = "calibration.unigram"


@dataclass(frozen=True)
class Entry:
    """One stored tensor, in the payload's order.

    Args:
        name: of the parameter; with `.scale` behind it the row scales of one.
        type: int6, int8, fp16 or fp32.
        shape: of the tensor.
        codec: of its bytes.
        bytes: it takes in the payload.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    codec: str
    bytes: int


def write_artifact(path: str | os.PathLike, artifact: Artifact) -> int:
    """Write an artifact, whole or not at all.

    Args:
        path: of the file; what is there is replaced.
        artifact: the model as it is stored.

    Returns:
        Size of the file in bytes.

    Raises:
        InputError: the file cannot be written.
    """
    parts = _encoded(artifact)
    with atomic_write(path) as file:
        for part in parts:
            file.write(part)
    return sum(map(len, parts))


def artifact_bytes(artifact: Artifact) -> int:
    """Size of the file that `write_artifact` would write."""
    return sum(map(len, _encoded(artifact)))


def _encoded(artifact: Artifact) -> list[bytes]:
    """The file's parts, in order."""
    entries, blobs = [], []

    def add(name: str, kind: str, array: np.ndarray) -> None:
        codec, blob = codecs.encode(array.astype(_TYPES[kind]))
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
        allow_nan=False,
    ).encode()
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), sum(map(len, blobs)))
    return [prefix, _digest(prefix, header, *blobs), header, *blobs]


def read_artifact(path: str | os.PathLike) -> Artifact:
    """Read and verify an artifact; executes nothing and allocates at most what its model needs.

    Args:
        path: a .slotfast file.

    Returns:
        The model as it is stored; `.model()` builds it.

    Raises:
        InputError: missing, truncated, damaged or hostile file, NaN or infinite weights.
    """
    header, payload = _verified(Path(path))
    with _described(Path(path)):
        return _parse(header, memoryview(payload))


def read_entries(path: str | os.PathLike) -> list[Entry]:
    """How each tensor of an artifact is stored.

    Raises:
        InputError: as `read_artifact`, except for what only the tensors show.
    """
    header, _ = _verified(Path(path))
    with _described(Path(path)):
        return [Entry(**entry | {"shape": tuple(entry["shape"])}) for entry in unique_json(header)["tensors"]]


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _verified(path: Path) -> tuple[bytes, bytes]:
    """Header and payload of a file whose sizes and hash are right."""
    with reading(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_PREFIX.size)
            if not prefix:
                raise InputError(f"{path}: is empty")
            if not prefix.startswith(MAGIC):
                raise InputError(
                    f"{path}: starts with {prefix[:8]!r}, expected {MAGIC!r}: not a slotfast artifact; "
                    "slotfast artifact convert makes one of other people's"
                )
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
    if _digest(prefix, header, payload) != digest:
        raise InputError(f"{path}: SHA-256 does not match: damaged")
    return header, payload


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Turn what malformed JSON leads to into an InputError of one line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {shortened(str(error))}") from None
    except pydantic.ValidationError as error:
        fault = Fault.of(error)
        raise InputError(f"{path}: header, {shortened(fault.where)}: {shortened(fault.expected)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: header does not describe an artifact: {one_line(error)}") from None


def _parse(header: bytes, payload: memoryview) -> Artifact:
    """Header and payload, hash already verified, to an artifact; raises InputError or what malformed JSON leads to."""
    fields = unique_json(header)
    config = GPTConfig.model_validate(fields["config"])
    shapes = _expected_shapes(config, limit=expansion_limit(len(payload)))
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
        arrays[name] = kind, codecs.decode(entry["codec"], payload[start : start + length], _TYPES[kind], wanted)
        start += length
    if start != len(payload):
        raise InputError(f"{len(payload) - start} bytes of payload belong to no tensor")
    tensors: dict[str, QuantizedMatrix | Tensor] = {}
    for name in shapes:
        if name == UNIGRAM or (name.endswith(".scale") and name.removesuffix(".scale") in shapes):
            continue
        if name not in arrays:
            raise InputError(f"tensor {name!r} is missing")
        kind, array = arrays.pop(name)
        if kind in _BITS:
            if f"{name}.scale" not in arrays:
                raise InputError(f"tensor {name!r} has no scale")
            scale = arrays[f"{name}.scale"][1]
            limit = 2 ** (_BITS[kind] - 1)
            if array.size and not -limit <= int(array.min()) <= int(array.max()) < limit:
                raise InputError(f"tensor {name!r} of type {kind!r} holds codes from {array.min()} to {array.max()}")
            tensors[name] = QuantizedMatrix(_tensor(array), _tensor(scale), _BITS[kind])
        else:
            scale = array
            tensors[name] = _tensor(array.astype(np.float32))
        if not np.isfinite(scale).all():
            raise InputError(f"tensor {name!r} holds NaN or infinite values")
    unigram = _tensor(arrays[UNIGRAM][1]) if UNIGRAM in arrays else None
    if unigram is not None and not ((unigram >= 0).all() and abs(float(unigram.sum()) - 1) < 0.01):
        raise InputError(f"tensor {UNIGRAM!r} holds values that are no frequencies")
    return Artifact(config, tensors, Metadata.model_validate(fields["metadata"]).model_dump(), unigram)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _expected_shapes(config: GPTConfig, limit: int) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that a file of this model may hold; raises InputError above `limit` weights."""
    parameters = parameter_shapes(config, limit)
    scales = {f"{name}.scale": shape[:1] for name, shape in parameters.items() if len(shape) == 2}
    return {**scales, **parameters, UNIGRAM: (config.vocab_size,)}
