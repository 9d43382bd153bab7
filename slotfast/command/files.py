"""Files that a command writes: whole or not at all, and checked before the work."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[io.BufferedWriter]:
    """Open a file for binary writing that appears under its name only when it is complete."""
    path = Path(os.path.realpath(path))
    is_device = path.exists() and not path.is_file()  # or a pipe: nothing to replace
    temporary = _temporary(path)
    try:
        with (path if is_device else temporary).open("wb") as file:
            yield file
            file.flush()
            if not is_device:
                os.fsync(file.fileno())
        if not is_device:
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def json_text(document: Any, allow_nan: bool = False) -> str:
    """A document as indented JSON.

    Raises:
        ValueError: NaN or infinite numbers, unless allowed.
    """
    return json.dumps(document, indent=2, allow_nan=allow_nan)


def write_json(path: str | os.PathLike, document: Any, allow_nan: bool = False) -> None:
    """Write a document as indented JSON, whole or not at all.

    Raises:
        ValueError: NaN or infinite numbers, unless allowed.
    """
    text = json_text(document, allow_nan)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def check_writable(path: str | os.PathLike) -> None:
    """Raise InputError, before any work is done, where `atomic_write` could not write."""
    path = Path(os.path.realpath(path))
    if os.path.isdir(path):  # Path.is_dir raises where a folder on the way may not be entered
        raise InputError(f"{path}: is a folder, expected a file")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: its folder does not exist or cannot be written")
    try:
        _temporary(path).touch()
        _temporary(path).unlink()
    except OSError as error:  # a name that is too long, a quota
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")
