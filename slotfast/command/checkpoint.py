"""Checkpoints: written atomically, read without executing anything, refused where damaged or another run's.

A file is the SHA-256 of the rest, then what `torch.save` writes: torch alone reads flipped bits without a word.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError, reading
from .files import atomic_write


def save(path: str | os.PathLike, command: str, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a state and the description of the run that it belongs to.

    Args:
        command: whose state it is, such as slotfast.train.
        run, state: numbers, strings, tensors, and lists and dicts of them.
    """
    content = io.BytesIO()
    torch.save({"format": _format(command), "run": dict(run), "state": dict(state)}, content)
    with atomic_write(path) as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def load(path: str | os.PathLike, command: str, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of a run, or None where there is no file yet.

    Args:
        command: whose state it should be.
        run: description of this run; each of its keys must have the value it had.

    Raises:
        InputError: not a checkpoint, damaged, or of another run.
    """
    if not os.path.exists(path):
        return None
    try:
        with reading(path), open(path, "rb") as file:
            digest, content = file.read(hashlib.sha256().digest_size), file.read()
        if not digest:
            raise InputError(f"{path}: is empty")
        if hashlib.sha256(content).digest() != digest:
            raise ValueError
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (MemoryError, InputError):  # says nothing about the file
        raise
    except Exception:  # torch's reader may raise anything where a file is made to deceive
        raise InputError(f"{path}: cannot be read as a checkpoint: damaged, or another kind of file") from None
    if not isinstance(found, dict) or found.get("format") != _format(command):
        raise InputError(f"{path}: not a checkpoint of {command}")
    for name, value in run.items():
        if found["run"].get(name) != value:
            raise InputError(f"{path}: made with {name} {found['run'].get(name)!r}, this run has {value!r}")
    return found["state"]


def _format(command: str) -> str:
    return f"{command} checkpoint 1"
