"""Other people's files: the contest's compressed artifacts and plain checkpoints in, PR #1019's form out.

    xz(torch.save)               {"w": tensors, "m": meta}        PR #1019, #1350
    brotli(shuffled torch.save)  the same                         PR #1179, #1217
    brotli(shuffled torch.save)  the same, meta in words          PR #1394
    zlib(torch.save)             "int8_clean_per_row_v1"          the baseline
    torch.save, .safetensors     a state dict                     checkpoints, banked or not

"w" holds a quantised matrix as `name.q` (int8) and `name.scale` (float16, one a row), anything else under its own name;
"m" says of each parameter which. Shuffled: "BSHF", the stride, then every stride-th byte from the first, from the
second, and so on. None of these says how large it is, so they are decompressed as a stream under a bound from the
file's size; none is trusted with its pickle (`checkpoints`). Which model the tensors belong to is guessed from their
names and shapes (`architecture`). The scripts' own loaders round embeddings to bfloat16; so does a bfloat16 forward
here, and a float32 forward does not.
"""

import io
import lzma
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..command.files import atomic_write
from ..errors import InputError
from ..quantize import QuantizedMatrix
from .architecture import check_names, guess_config
from .bounded import shortened, unbrotli, unlzma, unzlib
from .checkpoints import read_safetensors, read_torch
from .contents import Artifact, expansion_limit, parameter_shapes

_ZIP, _XZ, _SHUFFLED, _GROUPED = b"PK\3\4", b"\xfd7zXZ\0", b"BSHF", b"PGRP"
_MAX_COMPRESSED_BYTES = 1 << 28  # the contest's limit is 16,000,000
_MAX_CHECKPOINT_BYTES = 1 << 32
_BASELINE = "int8_clean_per_row_v1"
# Where checkpoints of training loops keep the state dict.
_STATE_KEYS = ("model_state_dict", "state_dict", "model", "ema")
_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}

Tensors = dict[str, Tensor | QuantizedMatrix]


def read_community(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """Read an artifact or a checkpoint of somebody else; executes nothing.

    Args:
        overrides: settings of the model that replace what is guessed.

    Returns:
        The artifact, uncalibrated; its metadata say the `format`, what was `assumed` of the model and what was
        `left_out` of the file.

    Raises:
        InputError: damaged or hostile file, another kind of file, tensors that this model has no place for.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            form, contents = _read(file, size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: {shortened(str(error))}") from None
    try:
        tensors, baseline = _tensors_of(contents)
        config, assumed = guess_config(tensors, baseline, overrides or {})
        shapes = parameter_shapes(config, limit=expansion_limit(size))
        left_out = check_names(tensors, shapes)
        tensors = {name: _checked(name, tensors[name]) for name in shapes}
    except InputError as error:
        raise InputError(f"{path}: {shortened(str(error))}") from None
    return Artifact(config, tensors, {"format": form, "assumed": assumed, "left_out": left_out})


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
    if start.startswith(_ZIP) or (len(start) > 8 and start[8:9] == b"{"):
        if size > _MAX_CHECKPOINT_BYTES:
            raise ValueError(f"{size} bytes, expected at most {_MAX_CHECKPOINT_BYTES}")
        return ("checkpoint", read_torch(file)) if start.startswith(_ZIP) else ("safetensors", read_safetensors(file))
    if start.startswith(_GROUPED):
        raise ValueError("PR #1855's grouped container, which only the program lrzip unpacks")
    if size > _MAX_COMPRESSED_BYTES:
        raise ValueError(f"{size} bytes, expected at most {_MAX_COMPRESSED_BYTES} of a compressed artifact")
    file.seek(0)
    data, limit = file.read(), expansion_limit(size)
    if start.startswith(_XZ):
        form, raw = "xz", unlzma(data, limit)
    elif start[:1] == b"\x78" and int.from_bytes(start[:2]) % 31 == 0:
        form, raw = "zlib", unzlib(data, limit)
    else:  # a brotli stream has no magic number
        try:
            form, raw = "brotli", unbrotli(data, limit)
        except ValueError as error:
            if "more than" in str(error):
                raise
            known = "slotfast, xz, brotli and zlib artifacts, .pt, .safetensors"
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


def _tensors_of(contents: Any) -> tuple[Tensors, bool]:
    """Tensors by the names of our parameters, and whether they are the baseline's."""
    if not isinstance(contents, dict):
        raise InputError(f"holds a {type(contents).__name__}, expected a dictionary of tensors")
    if contents.get("__quant_format__") == _BASELINE:
        return _baseline(contents), True
    if "w" in contents and "m" in contents:
        return _unbanked(_quantized(contents["w"], contents["m"])), False
    for key in _STATE_KEYS:
        if isinstance(contents.get(key), dict):
            contents = contents[key]
            break
    prefix = re.compile(r"^(module\.|_orig_mod\.)+")
    tensors: Tensors = {}
    for name, tensor in contents.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise InputError(f"entry {str(name)!r} is no tensor: expected a state dict")
        tensors[prefix.sub("", name)] = tensor
    later = any(name.startswith(("bigram.", "smear.", "ve_shared.", *_BANKS, "skip_gates")) for name in tensors)
    return _unbanked(tensors), not later


def _quantized(weights: Any, meta: Any) -> Tensors:
    """PR #1019's and PR #1394's dictionaries: codes and scales, or float16, by what the meta say."""
    if not isinstance(weights, dict) or not isinstance(meta, dict):
        raise InputError("'w' and 'm': expected dictionaries")
    tensors: Tensors = {}
    taken = set()
    for name, info in meta.items():
        kind = info.get("type") if isinstance(info, dict) else info
        if not isinstance(kind, str) or not isinstance(name, str):
            raise InputError(f"meta of {str(name)!r}: expected the kind of a tensor")
        if kind.startswith("passthrough"):
            tensors[name] = _of(weights, name)
            taken.add(name)
            continue
        bits = re.fullmatch(r"int([2-8])|.*\(int([2-8])\)", kind)
        if bits is None:
            raise InputError(f"tensor {name!r} is stored as {kind!r}, which has no home in this model")
        codes, scale = _of(weights, f"{name}.q"), _of(weights, f"{name}.scale")
        tensors[name] = _matrix(name, codes, scale, int(bits[1] or bits[2]))
        taken |= {f"{name}.q", f"{name}.scale"}
    # What no meta name is left for `check_names` to refuse, or to know.
    return tensors | {str(name): _of(weights, name) for name in weights if name not in taken}


def _baseline(contents: Mapping[str, Any]) -> Tensors:
    parts = [contents.get(key) for key in ("quantized", "scales", "passthrough")]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{_BASELINE}: expected the dictionaries 'quantized', 'scales' and 'passthrough'")
    quantized, scales, passthrough = parts
    tensors: Tensors = {str(name): _of(passthrough, name) for name in passthrough}
    return tensors | {str(name): _matrix(str(name), _of(quantized, name), _of(scales, name), 8) for name in quantized}


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


def _unbanked(tensors: Tensors) -> Tensors:
    """Banks [layers or 2 * layers, N, K] as the matrices of each layer."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name not in _BANKS:
            found[name] = tensor
            continue
        layers = _BANKS[name]
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or len(tensor) % len(layers) or len(tensor) > 512:
            raise InputError(f"tensor {name!r}: expected a bank of matrices, [{len(layers)} * layers, N, K]")
        n = len(tensor) // len(layers)
        for index, matrix in enumerate(tensor):
            found[f"blocks.{index % n}.{layers[index // n]}.weight"] = matrix
    return found


def _checked(name: str, tensor: Tensor | QuantizedMatrix) -> Tensor | QuantizedMatrix:
    """Finite, and float32 where it is no quantised matrix."""
    values = tensor.scale if isinstance(tensor, QuantizedMatrix) else tensor
    if not values.is_floating_point():
        raise InputError(f"tensor {name!r} holds {values.dtype}, expected floats")
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"tensor {name!r} holds NaN or infinite values")
    return tensor if isinstance(tensor, QuantizedMatrix) else tensor.float().contiguous()
