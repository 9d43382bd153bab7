"""Spoilt and hostile model files: each is refused in one line or holds a model that works; nothing runs or grows.

    python -m tests.fuzz_artifacts --count 1000 --seed 7     mutants of each form

Prints one line for each form: mutants refused, and mutants that are models after all (formats without a check sum
cannot tell a flipped bit of a weight). Memory is limited to twice what the largest genuine file needs.
"""

import argparse
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import re
import resource
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import brotli
import torch
import zstandard

from slotfast.artifact import Artifact, load_artifact, write_artifact
from slotfast.artifact.community import decode_community
from slotfast.artifact.format import _PREFIX, MAGIC
from slotfast.artifact.load import is_ours
from slotfast.errors import InputError
from tests.community_files import FORMS, pr1855, saved
from tests.models import randomised

_SLACK_BYTES = 24 << 20  # the allocator's own, and what Python and torch make on the way
_NOT_EVALUATED = "final_model.int6.ptz of PR #1855"
_HUGE = (0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)


class _Malice:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def genuine(folder: Path) -> dict[str, bytes]:
    """A file of every form, all of one model."""
    small = dict(vocab_size=512, width=128, heads=4, kv_heads=2, mlp_width=256, seq_len=2048, rope_dims=16)
    tables = dict(layers=2, xsa_layers=2, value_layers=(0, 1), bigram_width=32, value_width=32)
    model = randomised(small | tables, spread=0.3)
    write_artifact(folder / "ours", Artifact.from_model(model, {"seed": 1}, torch.rand(512).softmax(0)))
    files = {"slotfast": (folder / "ours").read_bytes()}
    forms = FORMS | {_NOT_EVALUATED: pr1855}
    return files | {name: make(model.state_dict())[0] for name, make in forms.items()}


# ---------------------------------------------------------------------------------------------------------------------
# mutations of bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), rng.randrange(min(100, len(data))), len(data) - 1))]


def grow(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 7, 5000)))


def wipe(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice((1, 4, 30, 2000))
    length = min(length, len(data) - start)
    return data[:start] + bytes([rng.choice((0, 255, 65))]) * length + data[start + length :]


def enlarge(data: bytes, rng: random.Random) -> bytes:
    """A huge number where a size may stand: mostly near an end of the file, where headers are."""
    width = rng.choice((1, 2, 4, 8))
    reach = rng.choice((64, 400, len(data)))
    start = rng.randrange(max(min(reach, len(data)) - width, 1))
    start = rng.choice((start, max(len(data) - width - start, 0)))
    number = rng.choice([value for value in _HUGE if value < 1 << 8 * width])
    return data[:start] + number.to_bytes(width, "little") + data[start + width :]


_BYTES = (flip, cut, grow, wipe, enlarge)


# ---------------------------------------------------------------------------------------------------------------------
# mutations that keep check sums right


def inside(data: bytes, rng: random.Random) -> bytes:
    """Change what is inside, and wrap it as it was."""
    mutate = rng.choice(_BYTES)
    if data.startswith(MAGIC):
        _, version, header_bytes, _ = _PREFIX.unpack(data[: _PREFIX.size])
        start = _PREFIX.size + 32
        header, payload = data[start : start + header_bytes], data[start + header_bytes :]
        if rng.random() < 0.6:
            header = _hostile_json(header, rng) if rng.random() < 0.7 else mutate(header, rng)
        else:
            payload = mutate(payload, rng)
        prefix = _PREFIX.pack(MAGIC, version, len(header), len(payload))
        return prefix + hashlib.sha256(prefix + header + payload).digest() + header + payload
    if data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        header = _hostile_json(header, rng) if rng.random() < 0.7 else mutate(header, rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    unwrap, wrap = _wrapping(data)
    raw = unwrap(data)
    if raw.startswith(b"BSHF"):
        return wrap(mutate(raw, rng))
    return wrap(_archive(raw, rng) if rng.random() < 0.8 else mutate(raw, rng))


def _wrapping(data: bytes) -> tuple[Callable, Callable]:
    if data.startswith(b"PK"):
        return bytes, bytes
    if data.startswith(b"\xfd7zXZ"):
        return lzma.decompress, lambda raw: lzma.compress(raw, preset=0)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return lambda packed: zstandard.ZstdDecompressor().decompress(packed), lambda raw: zstandard.compress(raw, 1)
    if data.startswith(b"\x78"):
        return zlib.decompress, lambda raw: zlib.compress(raw, 1)
    return brotli.decompress, lambda raw: brotli.compress(raw, quality=1)


def _archive(raw: bytes, rng: random.Random) -> bytes:
    """A zip archive with its pickle, or a list of its members, changed."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (program,) = [name for name in members if name.endswith("data.pkl")]
    kind = rng.randrange(4)
    if kind == 0:
        name = rng.choice(list(members))
        members[name] = rng.choice((b"", members[name][:-1], members[name] * 2))
    elif kind == 1:
        del members[rng.choice(list(members))]
    elif kind == 2:
        data = members[program]
        start = rng.randrange(len(data))
        members[program] = (
            data[:start] + rng.choice((b"cos\nsystem\n", b"c__builtin__\nexec\n", b"R", b"b")) + data[start:]
        )
    else:
        members[program] = rng.choice(_BYTES)(members[program], rng)
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return buffer.getvalue()


def _hostile_json(header: bytes, rng: random.Random) -> bytes:
    """A header with one of its values replaced."""
    document = json.loads(header)
    place, key = document, None
    while isinstance(place, dict | list) and place:
        parent = place
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place = place[key]
        if rng.random() < 0.1:
            break
    parent[key] = rng.choice((*_HUGE, -1, 0, 3.5, "x", None, [], {}, True, [1 << 40, 1 << 40], "int8", "lzma", "rans"))
    return json.dumps(document).encode()


# ---------------------------------------------------------------------------------------------------------------------
# files made to hurt


def hostile(touched: Path) -> Iterator[tuple[str, bytes]]:
    """Archives that expand without end, and pickles with code that would leave a trace."""
    zeros = bytes(1 << 26)  # more than the limit on memory leaves
    xz = lzma.compress(zeros, preset=0)
    yield "xz bomb", xz
    yield "brotli bomb", brotli.compress(zeros, quality=1)
    yield "zlib bomb", zlib.compress(zeros, 1)
    yield "zstd bomb", zstandard.compress(zeros, 1)
    stream = zstandard.ZstdCompressor(1).compressobj()
    yield "zstd bomb of unsaid size", stream.compress(zeros) + stream.flush()
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, write_content_size=False)
    yield "greedy zstd", zstandard.ZstdCompressor(compression_params=window).compress(b"x")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", zeros)
    yield "zip bomb", buffer.getvalue()
    yield "nested bomb", zlib.compress(xz)
    yield "greedy xz", lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}])
    for function, argument in ((os.system, f"touch {touched}"), (eval, f"open({str(touched)!r}, 'w')")):
        contents = {"w": {"x": _Malice(function, argument)}, "m": {}}
        yield "pickle with code", pickle.dumps(contents)
        yield "archive with code", saved(contents)
        yield "xz with code", lzma.compress(saved(contents))
        yield "zlib with code", zlib.compress(saved(contents))
        yield "brotli with code", brotli.compress(saved(contents), quality=1)
        yield "zstd with code", zstandard.compress(saved(contents), 1)


# ---------------------------------------------------------------------------------------------------------------------


def outcome(path: Path) -> str | None:
    """The line with which a file is refused; None where it is a model that works, or decodes and is none of ours."""
    try:
        if not is_ours(path) and decode_community(path).describe().lacks:
            return None
        artifact = load_artifact(path, None if is_ours(path) else {"generation": "pr1019"})
    except InputError as error:
        line = str(error)
        assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 500, line[:500]
        assert not re.search("memory(?! usage limit| for decoding)", line.lower()), line  # but for limits of ours
        return line
    model = artifact.model()
    tokens = torch.zeros((1, 4), dtype=torch.int64)
    assert model.hidden(tokens).shape[:2] == (1, 4)
    return None


def run(count: int, seed: int) -> int:
    """Fuzz every form; returns the number of mutants that were models after all."""
    with tempfile.TemporaryDirectory() as folder:
        folder, accepted = Path(folder), 0
        files, path, touched = genuine(folder), folder / "mutant", folder / "touched"
        bombs = list(hostile(touched))
        need = 0
        for data in (*files.values(), *files.values()):  # the second time nothing is imported any more
            path.write_bytes(data)
            before = _peak_bytes()
            assert outcome(path) is None
            need = max(need, len(data) * 12, _peak_bytes() - before if need else 0)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_size_bytes() + 2 * need + _SLACK_BYTES, hard))
        for name, data in bombs:
            path.write_bytes(data)
            assert outcome(path) is not None, name
            assert not touched.exists(), name
        print(f"{len(bombs)} bombs and pickles with code refused; genuine files need {need / 1e6:.0f} MB")
        for form, data in files.items():
            rng, models = random.Random(f"{seed} {form}"), 0
            for number in range(count):
                mutate = inside if number % 2 else rng.choice(_BYTES)
                mutant = mutate(data, rng)
                path.write_bytes(mutant)
                refused = outcome(path) is not None
                models += not refused
                # Our files have a check sum: what it does not cover is nothing.
                assert refused or mutate is inside or mutant == data or form != "slotfast", (form, number, mutate)
            assert not touched.exists(), form
            print(f"{form}: {count - models} of {count} mutants refused, {models} are models", flush=True)
            accepted += models
    return accepted


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _size_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="mutants of each form")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    sys.exit(0 if run(arguments.count, arguments.seed) >= 0 else 1)
