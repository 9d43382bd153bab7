"""Checkpoints: written atomically, read without executing anything, refused where the run is another one."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .data import atomic_write
from .errors import InputError


def save(path: str | os.PathLike, command: str, run: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a state and the description of the run that it belongs to.

    Args:
        command: whose state it is, such as slotfast.train.
        run, state: numbers, strings, tensors, and lists and dicts of them.
    """
    with atomic_write(path) as file:
        torch.save({"format": _format(command), "run": dict(run), "state": dict(state)}, file)


def load(path: str | os.PathLike, command: str, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of a run, or None where there is no file yet.

    Args:
        command: whose state it should be.
        run: description of this run; each of its keys must have the value it had.

    Raises:
        InputError: not a checkpoint, damaged, or of another run.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise InputError(f"{path}: cannot be read as a checkpoint: damaged, or another kind of file") from None
    if not isinstance(found, dict) or found.get("format") != _format(command):
        raise InputError(f"{path}: not a checkpoint of {command}")
    for name, value in run.items():
        if found["run"].get(name) != value:
            raise InputError(f"{path}: made with {name} {found['run'].get(name)!r}, this run has {value!r}")
    return found["state"]


def _format(command: str) -> str:
    return f"{command} checkpoint 1"
