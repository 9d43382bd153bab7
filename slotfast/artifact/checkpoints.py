"""Tensors out of .pt and .safetensors files, without executing or believing anything in them.

A .pt file is a zip archive of a pickle and the tensors' bytes. A pickle is a program; `read_torch` runs the few
instructions that torch.save writes for dictionaries of tensors on a machine of its own, which knows three functions,
all of them in this file, and checks every size against the archive's members. That is less than what
`torch.load(weights_only=True)` runs, and the same with every version of torch. A .safetensors file is a JSON table of
contents and bytes.

Both raise InputError where a file is damaged, hostile, or holds what they do not know.
"""

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import InputError
from .bounded import one_line, shortened, unique_json

_MAX_MEMBERS = 1 << 14
_PIECE = 1 << 22
_MAX_PICKLE_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 22
_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FUNCTIONS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"}
# What packers of few bits leave in a pickle beside tensors: bytes, and float8, which has no storage class of its own.
_PACKED = {"_codecs encode", "torch._utils _rebuild_tensor_v3", "torch.storage UntypedStorage"}
_PACKERS = re.compile(rb"X(.)\0\0\0(ternary\w*|binary\w*|fp8\w*|fp4\w*|nf4\w*|int4\w*)", re.DOTALL)


def read_torch(file: BinaryIO) -> Any:
    """What torch.save wrote: dictionaries, lists, tuples, strings, numbers, tensors.

    Args:
        file: seekable, at any position.
    """
    try:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        # Counted before zipfile makes an object for each.
        if sum(piece.count(b"PK\1\2") for piece in iter(lambda: file.read(_PIECE), b"")) > _MAX_MEMBERS:
            raise InputError(f"an archive of more than {_MAX_MEMBERS} members")
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise InputError("two members of one name")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise InputError("compressed members, which torch.save does not write")
            if sum(info.file_size for info in members.values()) > size:
                raise InputError("members that overlap or claim more bytes than the file has")
            pickles = [name for name in members if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise InputError(f"an archive with {len(pickles)} data.pkl, expected what torch.save writes")
            (name,) = pickles
            prefix = name.removesuffix("data.pkl")
            if members[name].file_size > _MAX_PICKLE_BYTES:
                with archive.open(name) as member:
                    found = _packing(member.read(_MAX_PICKLE_BYTES))
                pickled = f"a pickle of {members[name].file_size} bytes, expected at most {_MAX_PICKLE_BYTES}"
                raise InputError(found or pickled)
            if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder") != b"little":
                raise InputError("not little-endian")
            program = archive.read(name)
            return _Machine(lambda key: archive.read(f"{prefix}data/{key}")).run(program)
    except InputError:
        raise
    except (
        zipfile.BadZipFile,
        EOFError,
        KeyError,
        NotImplementedError,
        OSError,
        OverflowError,
        RuntimeError,
        ValueError,
        struct.error,
    ) as error:
        raise InputError(f"a damaged archive: {one_line(error)}") from None


def read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """Tensors of a .safetensors file by name.

    Args:
        file: seekable, at any position.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise InputError(f"a header of {length} bytes in a file of {size}")
    try:
        header = unique_json(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = [
            (*entry["data_offsets"], name, _SAFETENSORS[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in entries.items()
        ]
        spans.sort()
        tensors, end = {}, 0
        for start, stop, name, dtype, shape in spans:
            if start != end or not _sizes(shape) or stop - start != math.prod(shape) * dtype.itemsize:
                raise InputError(f"tensor {name!r} of {dtype} {list(shape)} at bytes {start} to {stop}")
            if stop > size - 8 - length:
                raise InputError(f"tensor {name!r} ends behind the file: truncated")
            tensors[name] = _tensor(file.read(stop - start), dtype).reshape(shape)
            end = stop
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise InputError(f"a header that is none: {one_line(error)}") from None
    if end != size - 8 - length:
        raise InputError(f"{size - 8 - length - end} bytes behind the last tensor")
    return tensors


def packed(kinds: Iterable[str]) -> str:
    """The error for tensors in packings that nothing here unpacks."""
    return f"its tensors are packed as {' and '.join(sorted(set(kinds)))}: such packing is not supported"


def _packing(program: bytes) -> str | None:
    """The error for a pickle that names packings; None where it names none."""
    names = (match[2][: match[1][0]].decode() for match in _PACKERS.finditer(program))
    kinds = {name for name in names if name.isidentifier()}
    return packed(kinds) if kinds else None


@dataclass(frozen=True)
class _Function:
    """A function that a pickle names; it is never called, only compared with those that are known."""

    name: str


class _Mark:
    """Marks where a tuple, or a dictionary's next items, begin on the stack."""


class _Machine:
    """Runs the pickles of `torch.save`.

    Args:
        member: bytes of one storage by its key.
    """

    def __init__(self, member: Callable[[str], bytes]):
        self.member = member
        self.storages: dict[str, Tensor] = {}
        self.program = b""

    def run(self, program: bytes) -> Any:
        self.program = program
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for code, argument, _ in pickletools.genops(program):
                if code.name == "STOP":
                    (result,) = stack
                    return result
                self._step(code.name, argument, stack, memo)
        except InputError:
            raise
        except (IndexError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise InputError(f"a damaged pickle: {one_line(error)}") from None
        raise InputError("a pickle without an end")

    def _step(self, code: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        match code:
            case "PROTO":
                pass
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code == "NEWTRUE")
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(code[-1]))]
                stack.append(tuple(items[::-1]))
            case "TUPLE":
                items = _down_to_mark(stack)
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _list(stack[-1]).append(item)
            case "APPENDS":
                items = _down_to_mark(stack)
                _list(stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], key, value)
            case "SETITEMS":
                items = _down_to_mark(stack)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _set(stack[-1], key, value)
            case "BUILD":  # attributes of an OrderedDict: torch's notes on versions of modules
                stack.pop()
                _dictionary(stack[-1])
            case "GLOBAL":
                if argument not in _FUNCTIONS and argument not in _STORAGES:
                    found = _packing(self.program) if argument in _PACKED else None
                    named = f"its pickle names {argument.replace(' ', '.')!r}: it holds more than tensors"
                    raise InputError(found or named)
                stack.append(_Function(argument))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case _:
                raise InputError(f"its pickle holds the instruction {code}, which dictionaries of tensors do not need")

    def _storage(self, identity: Any) -> Tensor:
        """1-D tensor of a whole storage."""
        kind, storage, key, _, numel = identity
        if kind != "storage" or not isinstance(storage, _Function) or not isinstance(key, str):
            raise InputError("a tensor without a storage")
        if key not in self.storages:
            dtype = _STORAGES[storage.name]
            raw = self.member(key)
            if not _sizes((numel,)) or len(raw) != numel * dtype.itemsize:
                raise InputError(f"a storage of {len(raw)} bytes for {numel} values of {dtype}")
            self.storages[key] = _tensor(raw, dtype)
        return self.storages[key]


def _call(function: Any, arguments: tuple) -> Any:
    if not isinstance(function, _Function):
        raise InputError("its pickle calls what is no function")
    if function.name == "collections OrderedDict":
        if arguments not in ((), ([],)):
            raise InputError("an OrderedDict with contents of its own")
        return {}
    if function.name == "torch._utils _rebuild_parameter":
        return arguments[0]
    if function.name != "torch._utils _rebuild_tensor_v2":
        raise InputError(f"its pickle calls {function.name}")
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Tensor) or not _sizes((offset, *shape)) or not _sizes(stride):
        raise InputError("a tensor of impossible shape")
    if len(stride) != len(shape) or len(shape) > 8:
        raise InputError("a tensor of impossible strides")
    # A view may repeat its storage without end; a copy of that would fill the memory.
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and (offset + last >= storage.numel() or math.prod(shape) > storage.numel()):
        raise InputError(f"a tensor {list(shape)} in a storage of {storage.numel()} values")
    return storage.as_strided(shape, stride, offset)


def _sizes(values: Any) -> bool:
    return all(isinstance(value, int) and 0 <= value < 1 << 40 for value in values)


def _tensor(raw: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _down_to_mark(stack: list[Any]) -> list[Any]:
    items = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise InputError("its pickle appends to what is no list")
    return value


def _dictionary(value: Any) -> dict:
    if not isinstance(value, dict):
        raise InputError("its pickle sets items of what is no dictionary")
    return value


def _set(place: Any, key: Any, value: Any) -> None:
    if not isinstance(key, str | int):  # hashing a tuple that is nested deep enough would exhaust the stack
        raise InputError(f"a key of type {type(key).__name__}")
    if key in _dictionary(place):
        raise InputError(f"key {shortened(str(key), 100)!r} is given twice")
    place[key] = value
