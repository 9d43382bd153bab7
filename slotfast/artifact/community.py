"""Other people's files: the contest's compressed artifacts and plain checkpoints in, PR #1019's form out.

    xz(torch.save)               {"w": tensors, "m": meta}        PR #549, #1019, #1350
    zstd or zlib(torch.save)     the same                         PR #287 and others of March, 5 to 8 bits
    brotli(shuffled torch.save)  the same                         PR #1179, #1217
    brotli(shuffled torch.save)  the same, meta in words          PR #1394 to #1493, #1855
    zlib or zstd(torch.save)     "int8_clean_per_row_v1"          the baseline, 3x MLP with QAT
    torch.save, .safetensors     a state dict                     checkpoints, banked or not

"w" holds a quantised matrix as `name.q` (int8) and `name.scale` (float16, one a row), anything else under its own name;
"m" says of each parameter which. PR #1855 adds gates of 8 bits (`name.gq`, `name.gs`) and low-rank corrections of the
rounding error (`name.lqA...`, LQER), which are added here: a corrected matrix has no codes any more. Shuffled: "BSHF",
the stride, then every stride-th byte from the first, from the second, and so on. None of these says how large it is, so
they are decompressed as a stream, under a bound from the file's size; no pickle is trusted (`checkpoints`). The
tensors' names and shapes say in part which model they belong to (`architecture`); the rest has to be told
(`generations`). The scripts' own loaders round embeddings to bfloat16; so does a bfloat16 forward here, and a float32
forward does not.
"""

import io
import lzma
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..command.files import atomic_write
from ..errors import InputError, reading
from ..quantize import QuantizedMatrix
from .architecture import Description, check_tensors, describe
from .bounded import shortened, unbrotli, unlzma, unzlib, unzstd
from .checkpoints import packed, read_safetensors, read_torch
from .contents import Artifact, expansion_limit
from .generations import CODES, PER_ROW, WORDS

_ZIP, _XZ, _ZSTD, _SHUFFLED = b"PK\3\4", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BSHF"
_LRZIP = {b"PGRP": "PR #1855's grouped container", b"LRZI": "an lrzip archive"}
_MAX_COMPRESSED_BYTES = 1 << 28  # the contest's limit is 16,000,000
_MAX_CHECKPOINT_BYTES = 1 << 32
_PER_ROW = r"(int\d_)*int\d_clean_per_row_v1"  # the baseline's, and those of fewer bits after it
# Where checkpoints of training loops keep the state dict.
_STATE_KEYS = ("model_state_dict", "state_dict", "model", "ema")
_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}

Tensors = dict[str, Tensor | QuantizedMatrix]


@dataclass(frozen=True)
class Decoded:
    """What a file holds, whatever model it belongs to.

    Args:
        path: of the file.
        size: of the file in bytes.
        form: of its container.
        kind: how matrices are stored, see `generations.Shown`.
        tensors: by parameter name.
    """

    path: Path
    size: int
    form: str
    kind: str | None
    tensors: Tensors

    def describe(self, overrides: Mapping[str, Any] | None = None) -> Description:
        """What its tensors say of their model, together with what is told of it; raises InputError as `describe`."""
        try:
            return describe(self.tensors, self.kind, overrides or {}, expansion_limit(self.size))
        except InputError as error:
            raise InputError(f"{self.path}: {shortened(str(error))}") from None

    def artifact(self, overrides: Mapping[str, Any] | None = None) -> Artifact:
        """See `read_community`."""
        overrides = overrides or {}
        description = self.describe(overrides)
        try:
            check_tensors(self.tensors, description)
            tensors = {name: _checked(name, self.tensors[name]) for name in description.shapes}
            if description.unsaid:
                raise InputError(description.request)
        except InputError as error:
            raise InputError(f"{self.path}: {shortened(str(error))}") from None
        return Artifact(description.config, tensors, self.metadata(description, overrides))

    def metadata(self, description: Description, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Its form, the generation that was named, what it resembles if not that, and what is assumed and left out."""
        named = {"generation": overrides["generation"]} if "generation" in overrides else {}
        if named and named["generation"] not in description.likely:
            named["resembles"] = description.likely
        about = {"assumed": dict(description.assumed), "left_out": list(description.left_out)}
        return {"format": self.form, **named, **about}


def decode_community(path: str | os.PathLike) -> Decoded:
    """Read the tensors of somebody else's artifact or checkpoint; executes nothing.

    Raises:
        InputError: damaged or hostile file, another kind of file, a packing that is not supported.
    """
    path = Path(path)
    with reading(path):
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                form, contents = _read(file, size)
        except ValueError as error:
            raise InputError(f"{path}: {shortened(str(error))}") from None
    try:
        tensors, kind = _tensors_of(contents)
    except InputError as error:
        raise InputError(f"{path}: {shortened(str(error))}") from None
    return Decoded(path, size, form, kind, tensors)


def read_community(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """Read an artifact or a checkpoint of somebody else; executes nothing.

    Args:
        overrides: settings of the model; `generation` names one that gives those which the others do not.

    Returns:
        The artifact, uncalibrated; its metadata say the `format`, the `generation` that was named, those that the file
        `resembles` where that is none of them, what was `assumed` of the model and what was `left_out` of the file.

    Raises:
        InputError: damaged or hostile file, another kind of file, tensors that this model has no place for, settings on
            which losses depend and that neither the file nor the overrides say.
    """
    return decode_community(path).artifact(overrides)


def write_community(path: str | os.PathLike, artifact: Artifact) -> int:
    """Write the form of PR #1019: xz around torch.save.

    Matrices keep their codes; metadata and training frequencies have no place in it.

    Returns:
        Size of the file in bytes.
    """
    weights: dict[str, Tensor] = {}
    meta: dict[str, Any] = {}
    for name, tensor in artifact.tensors.items():
        if isinstance(tensor, QuantizedMatrix):
            weights |= {f"{name}.q": tensor.codes.contiguous(), f"{name}.scale": tensor.scale.contiguous()}
            meta[name] = {"type": f"int{tensor.bits}"}
        else:
            weights[name] = tensor.half()
            meta[name] = "passthrough"
    buffer = io.BytesIO()
    torch.save({"w": weights, "m": meta}, buffer)
    with atomic_write(path) as file:
        file.write(lzma.compress(buffer.getvalue(), preset=9))
    return Path(path).stat().st_size


def _read(file: io.BufferedReader, size: int) -> tuple[str, Any]:
    """What kind of file it is, and what it holds; ValueError where it is damaged."""
    start = file.read(16)
    if not start:
        raise ValueError("is empty")
    if start.startswith(_ZIP) or (len(start) > 8 and start[8:9] == b"{"):
        if size > _MAX_CHECKPOINT_BYTES:
            raise ValueError(f"{size} bytes, expected at most {_MAX_CHECKPOINT_BYTES}")
        return ("checkpoint", read_torch(file)) if start.startswith(_ZIP) else ("safetensors", read_safetensors(file))
    if start[:4] in _LRZIP:
        raise ValueError(f"{_LRZIP[start[:4]]}, which only the program lrzip unpacks")
    if size > _MAX_COMPRESSED_BYTES:
        raise ValueError(f"{size} bytes, expected at most {_MAX_COMPRESSED_BYTES} of a compressed artifact")
    file.seek(0)
    data, limit = file.read(), expansion_limit(size)
    if start.startswith(_XZ):
        form, raw = "xz", unlzma(data, limit)
    elif start.startswith(_ZSTD):
        form, raw = "zstd", unzstd(data, limit)
    elif start[:1] == b"\x78" and int.from_bytes(start[:2]) % 31 == 0:
        form, raw = "zlib", unzlib(data, limit)
    else:  # a brotli stream has no magic number
        try:
            form, raw = "brotli", unbrotli(data, limit)
        except ValueError as error:
            if "more than" in str(error):
                raise
            known = "slotfast, xz, zstd, brotli and zlib artifacts, .pt, .safetensors"
            raise ValueError(f"starts with {start[:8]!r}: expected one of {known}; or damaged") from None
    del data
    if raw.startswith(_SHUFFLED):
        form, raw = f"{form}, shuffled", _unshuffled(raw)
    if not raw.startswith(_ZIP):
        raise ValueError(f"holds {raw[:8]!r} compressed as {form}, expected what torch.save writes")
    return form, read_torch(io.BytesIO(raw))


def _unshuffled(data: bytes) -> bytes:
    """Undo the byte shuffle; PR #1179 writes the stride as two bytes, PR #1394 as one."""
    stride, start = data[4] if len(data) > 4 else 0, 5
    if data[5:6] == b"\0":
        start = 6
    if not 1 <= stride <= 16:
        raise ValueError(f"bytes shuffled with a stride of {stride}, expected 1 to 16")
    shuffled = np.frombuffer(data, np.uint8, offset=start)
    plain, at = np.empty_like(shuffled), 0
    for offset in range(stride):
        place = plain[offset::stride]
        place[:] = shuffled[at : at + len(place)]
        at += len(place)
    return plain.tobytes()


def _tensors_of(contents: Any) -> tuple[Tensors, str | None]:
    """Tensors by the names of our parameters, and how matrices are stored."""
    if not isinstance(contents, dict):
        raise InputError(f"holds a {type(contents).__name__}, expected a dictionary of tensors")
    if "__quant_format__" in contents:
        return _per_row(contents), PER_ROW
    if "w" in contents and "m" in contents:
        weights, meta = contents["w"], contents["m"]
        if not isinstance(weights, dict) or not isinstance(meta, dict):
            raise InputError("'w' and 'm': expected dictionaries")
        words = any(isinstance(kind, str) and "(" in kind for kind in meta.values())
        return _unbanked(_quantized(weights, meta)), WORDS if words else CODES
    for key in _STATE_KEYS:
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")
    tensors: Tensors = {}
    for name, tensor in contents.items():
        if isinstance(tensor, dict) and isinstance(tensor.get("type"), str):
            raise InputError(packed(entry["type"] for entry in contents.values() if _is_packed(entry)))
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise InputError(f"entry {str(name)!r} is no tensor: expected a state dict")
        _put(tensors, prefix.sub("", name), tensor)
    return _unbanked(tensors), None


def _is_packed(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("type"), str)


def _put(tensors: Tensors, name: str, tensor: Tensor | QuantizedMatrix) -> None:
    if name in tensors:
        raise InputError(f"tensor {name!r} is stored twice")
    tensors[name] = tensor


def _quantized(weights: Mapping[Any, Any], meta: Mapping[Any, Any]) -> Tensors:
    """PR #1019's and PR #1394's dictionaries: codes and scales, or float16, by what the meta say."""
    tensors: Tensors = {}
    taken: set[str] = set()

    def parts(name: str, kind: str, *suffixes: str) -> list[Tensor]:
        missing = [f"{name}{suffix}" for suffix in suffixes if not isinstance(weights.get(f"{name}{suffix}"), Tensor)]
        if missing:
            raise InputError(f"tensor {name!r} is stored as {kind!r}, and tensor {missing[0]!r} is missing")
        taken.update(f"{name}{suffix}" for suffix in suffixes)
        return [weights[f"{name}{suffix}"] for suffix in suffixes]

    for name, info in meta.items():
        kind = info.get("type") if isinstance(info, dict) else info
        if not isinstance(kind, str) or not isinstance(name, str):
            raise InputError(f"meta of {str(name)!r}: expected the kind of a tensor")
        bits = re.fullmatch(r"(?:int([2-8])|.*\(int([2-8])\))(\+lqer(?:_asym)?)?", kind)
        if kind.startswith("passthrough"):
            (tensors[name],) = parts(name, kind, "")
        elif kind == "gate_int8_row":
            codes, scale = parts(name, kind, ".gq", ".gs")
            tensors[name] = _matrix(name, codes, scale, 8)
        elif bits is None:
            packing = ": packing is not supported" if re.match("ternary|binary|fp|nf", kind) else ""
            raise InputError(f"tensor {name!r} is stored as {kind!r}, which has no home in this model{packing}")
        else:
            codes, scale = parts(name, kind, ".q", ".scale")
            matrix = _matrix(name, codes, scale, int(bits[1] or bits[2]))
            if correction := bits[3]:
                end = "_a" if correction.endswith("asym") else ""
                factors = parts(name, kind, *(f".{part}{end}" for part in ("lqA", "lqAs", "lqB", "lqBs")))
                matrix = _corrected(name, matrix, *factors)
            tensors[name] = matrix
    for name, tensor in weights.items():  # tensors that no meta names are refused later, unless they are known
        if name not in taken:
            if not isinstance(tensor, Tensor):
                raise InputError(f"tensor {str(name)!r} is missing")
            _put(tensors, str(name), tensor)
    return tensors


def _per_row(contents: Mapping[str, Any]) -> Tensors:
    """The baseline's dictionaries."""
    form = str(contents["__quant_format__"])
    if not re.fullmatch(_PER_ROW, form):
        raise InputError(packed([repr(form)]))
    parts = (contents.get(key) for key in ("quantized", "scales", "passthrough"))
    quantized, scales, passthrough = (part if isinstance(part, dict) else None for part in parts)
    if quantized is None or scales is None or passthrough is None:
        raise InputError(f"{form}: expected the dictionaries 'quantized', 'scales' and 'passthrough'")
    tensors: Tensors = {str(name): _of(passthrough, name) for name in passthrough}
    for name in quantized:
        _put(tensors, str(name), _matrix(str(name), _of(quantized, name), _of(scales, name), 8))
    return tensors


def _of(tensors: Mapping[str, Any], name: Any) -> Tensor:
    tensor = tensors.get(name)
    if not isinstance(tensor, Tensor):
        raise InputError(f"tensor {str(name)!r} is missing")
    return tensor


def _matrix(name: str, codes: Tensor, scale: Tensor, bits: int) -> Tensor | QuantizedMatrix:
    """A quantised matrix; where its scales are not one float16 a row, its float32 values."""
    if codes.dtype != torch.int8 or not scale.is_floating_point():
        raise InputError(f"tensor {name!r}: {codes.dtype} codes and {scale.dtype} scales, expected int8 and float16")
    limit = 2 ** (bits - 1)
    if codes.numel() and not -limit <= int(codes.min()) <= int(codes.max()) < limit:
        raise InputError(f"tensor {name!r} of {bits} bits holds codes from {codes.min()} to {codes.max()}")
    if codes.ndim == 2 and scale.shape == codes.shape[:1] and scale.dtype == torch.float16:
        return QuantizedMatrix(codes.contiguous(), scale.contiguous(), 6 if bits <= 6 else 8)
    if scale.numel() == 1:
        return codes.float() * scale.float().reshape(())
    if scale.ndim != 1 or codes.ndim < 1 or len(scale) != len(codes):
        raise InputError(f"tensor {name!r}: {list(scale.shape)} scales for {list(codes.shape)} codes")
    return codes.float() * scale.float().reshape(-1, *[1] * (codes.ndim - 1))


def _corrected(
    name: str, matrix: Tensor | QuantizedMatrix, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor
) -> Tensor:
    """A matrix and its low-rank correction; of A, a row or all have a scale, of B, a row or 64 values in a row."""
    values = matrix.dequantize() if isinstance(matrix, QuantizedMatrix) else matrix
    fits = a.ndim == b.ndim == 2 and (len(a), b.size(1)) == values.shape and a.size(1) == len(b)
    groups = b_scale.numel()
    if not fits or not groups or b.numel() % groups or a_scale.numel() not in (1, len(a)):
        sizes = f"{list(a.shape)} x {list(b.shape)}, scales {a_scale.numel()} and {groups}"
        raise InputError(f"tensor {name!r}: its correction, {sizes}, does not fit {list(values.shape)}")
    left = a.float() * a_scale.float().reshape(-1, 1)
    return values + left @ (b.float().reshape(groups, -1) * b_scale.float().reshape(-1, 1)).reshape(b.shape)


def _unbanked(tensors: Tensors) -> Tensors:
    """Banks [layers or 2 * layers, N, K] as the matrices of each layer."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name not in _BANKS:
            _put(found, name, tensor)
            continue
        layers = _BANKS[name]
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or len(tensor) % len(layers) or len(tensor) > 512:
            raise InputError(f"tensor {name!r}: expected a bank of matrices, [{len(layers)} * layers, N, K]")
        n = len(tensor) // len(layers)
        for index, matrix in enumerate(tensor):
            _put(found, f"blocks.{index % n}.{layers[index // n]}.weight", matrix)
    return found


def _checked(name: str, tensor: Tensor | QuantizedMatrix) -> Tensor | QuantizedMatrix:
    """A tensor checked to be finite, as float32 unless it is a quantised matrix."""
    values = tensor.scale if isinstance(tensor, QuantizedMatrix) else tensor
    if not values.is_floating_point():
        raise InputError(f"tensor {name!r} holds {values.dtype}, expected floats")
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"tensor {name!r} holds NaN or infinite values")
    return tensor if isinstance(tensor, QuantizedMatrix) else tensor.float().contiguous()
