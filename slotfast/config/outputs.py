"""The check that every command makes before its work: nothing that it writes may destroy anything.

Settings declare the files that they name: `setting(reads=...)` says how to find them, `setting(writes=...)` what will
be there.
"""

import ast
import glob
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..command.files import check_writable
from ..command.plots import pyplot
from ..errors import InputError

# Finds the files to be read from a setting's value.
Reads = Callable[[str], Iterable[str]]


@dataclass(frozen=True)
class Kind:
    """What a command writes.

    Args:
        name: with its article.
        matches: whether an existing file is such a one, which may be overwritten.
        suffix: of its name; empty for any.
        folder: whether it is a folder of files.
        stdout: whether `-` may be given for standard output.
        drawn: whether it needs matplotlib.
    """

    name: str
    matches: Callable[[Path], bool]
    suffix: str = ""
    folder: bool = False
    stdout: bool = False
    drawn: bool = False


def check_outputs(settings: Any, writes: Mapping[str, tuple[str, Kind]] | None = None) -> None:
    """Raise InputError where an output is an input or another output, or replaces a file of another kind.

    Two spellings of one file's name are the same file. `--force` lifts the last of these rules only.

    Args:
        settings: of a command.
        writes: files that no setting names, by what to call them.
    """
    seen: dict[tuple[int, int] | str, str] = {}
    written = dict(writes or {})
    for flag, field, value in settings.given():
        if files := field.json_schema_extra["reads"]:
            values = [value] if isinstance(value, str) else value
            seen |= {_identity(file): flag for each in values for file in files(each)}
        if (kind := field.json_schema_extra["writes"]) and not (value == "-" and kind.stdout):
            written[flag] = (value, kind)
            if kind.drawn:
                pyplot(flag)
    files = []
    for flag, (path, kind) in written.items():
        if path == "-":
            raise InputError(f"{flag} -: expected a {'folder' if kind.folder else 'file'}, not standard output")
        if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
            continue  # a pipe or a device: nothing is lost
        identity = _identity(path)
        if identity in seen:
            raise InputError(f"{seen[identity]} and {flag}: both are {path}")
        seen[identity] = flag
        files += [] if kind.folder else [(flag, path, kind)]
    for flag, path, kind in files:
        check_writable(path)
        if not path.endswith(kind.suffix):
            raise InputError(f"{flag} {path}: is to be {kind.name}: expected a name that ends with {kind.suffix}")
        if not settings.force and not _may_go(Path(path), kind):
            raise InputError(f"{flag} {path}: exists, and is not {kind.name}; --force overwrites it")


def _may_go(path: Path, kind: Kind) -> bool:
    try:
        return not path.exists() or not path.stat().st_size or kind.matches(path)
    except OSError:
        return False


def one_file(path: str) -> list[str]:
    """A file, and nothing else."""
    return [path]


def matching_files(pattern: str) -> list[str]:
    """The files that a pattern matches."""
    return [pattern, *glob.glob(pattern)]


def shards(folder: str) -> list[str]:
    """The contest's shards in a folder."""
    return [folder, *glob.glob(os.path.join(glob.escape(folder), "fineweb_*.bin"))]


def file_or_folder(path: str) -> list[str]:
    """A file, or a folder and the files in it."""
    return [path, *(entry.path for entry in os.scandir(path) if entry.is_file())] if os.path.isdir(path) else [path]


def results(path: str) -> list[str]:
    """A file, or a folder and the results of slotfast.eval in it."""
    found = [path]
    for file in sorted(glob.glob(os.path.join(glob.escape(path), "*.json"))):
        try:
            if b'"presets"' in Path(file).read_bytes():
                found.append(file)
        except OSError:  # reported by whoever needs it
            continue
    return found


def _identity(path: str) -> tuple[int, int] | str:
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        return os.path.realpath(path)


def _starts(*heads: bytes) -> Callable[[Path], bool]:
    def matches(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(max(map(len, heads))).startswith(heads)

    return matches


def _is_npz(path: Path) -> bool:
    """Whether it is a zip archive whose first file is an array: torch's checkpoints are such archives too."""
    with path.open("rb") as file:
        head = file.read(30)
        return head.startswith(b"PK\x03\x04") and file.read(int.from_bytes(head[26:28], "little")).endswith(b".npy")


def _is_script(path: Path) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))


def _is_model(path: Path) -> bool:
    from ..artifact.format import MAGIC  # imports torch, which settings are read without

    return _starts(MAGIC, b"\xfd7zXZ\0")(path)  # a .slotfast, a .ptz


# Ours are indented; a .jsonl has each document on a line of its own.
JSON = Kind("JSON as written here", _starts(b"{\n", b"[\n"))
JSON_OR_STDOUT = Kind(JSON.name, JSON.matches, stdout=True)
ROWS = Kind("an .npz file", _is_npz, ".npz")
PICTURE = Kind("a PNG picture", _starts(b"\x89PNG"), ".png", drawn=True)
PAGE = Kind("an HTML page as written here", _starts(b'<!DOCTYPE html>\n<html lang="en" xmlns'), ".html", drawn=True)
MODEL = Kind("a model", _is_model)
CALIBRATED = Kind("a model or a calibration", lambda path: JSON.matches(path) or _is_model(path))
SCRIPT = Kind("a Python script", _is_script)
PROGRESS = Kind("saved progress", lambda path: True)  # read before it is replaced, and refused if it is none
FOLDER = Kind("a folder", lambda path: True, folder=True)
