"""What the command reads: functions by their names, a short piece of a stream, and hashes of all of it."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..command.run import no_exit
from ..data import TokenStream
from ..errors import InputError, first_line
from .checks import ByteRule

_PIECES = 6  # documents that a short stream is cut from, at least
_SCANNED_TOKENS = 1 << 22  # of a long stream, where pieces are looked for


def checked_rule(name: str) -> ByteRule:
    """A byte rule of anybody's: bytes of every token of a stream, int64 [N] -> [N] or [N - 1]."""
    rule = load_function("--byte-rule", name)

    def byte_rule(ids: np.ndarray) -> np.ndarray:
        try:
            with no_exit(f"--byte-rule {name}"):
                counts = np.asarray(rule(torch.from_numpy(ids.copy())))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"--byte-rule {name}: failed: {first_line(error)}") from error
        if counts.shape not in ((len(ids),), (len(ids) - 1,)) or counts.dtype.kind not in "iu":
            raise InputError(
                f"--byte-rule {name}: returned {counts.dtype} {list(counts.shape)}, expected integers [{len(ids)}]"
            )
        return counts

    return byte_rule


def load_function(flag: str, name: str) -> Callable[..., Any]:
    """The function of package.module:function; modules of the current directory count.

    Raises:
        InputError: no such module or function, or the module fails when it is imported.
    """
    module, colon, path = name.partition(":")
    if not colon or not module or not path:
        raise InputError(f"{flag} {name}: expected package.module:function")
    if module.endswith(".py"):
        file = Path(module).with_suffix("")
        inside = not file.is_absolute() and ".." not in file.parts
        dotted, where = (".".join(file.parts), "") if inside else (file.name, f" in {file.parent}")
        raise InputError(f"{flag} {name}: expected a module, not a file: {flag} {dotted}:{path}{where}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with no_exit(f"{flag} {name}: importing {module}"):
            found: Any = importlib.import_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{flag} {name}: {module} cannot be imported: {first_line(error)}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{flag} {name}: {module} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{flag} {name}: is {type(found).__name__}, expected a function")
    return found


def excerpt(stream: TokenStream, bos_id: int | None, n: int) -> Tensor:
    """Up to n tokens of a stream, with several documents among them: its start, or the starts of several documents."""
    head = torch.from_numpy(stream.read(0, n))
    if bos_id is None or int((head[1:] == bos_id).sum()) >= _PIECES // 2:
        return head
    tokens = stream.read(0, _SCANNED_TOKENS)
    starts = np.flatnonzero(tokens == bos_id)
    if len(starts) < 2:
        return head
    size = max(16, -(-n // _PIECES))
    pieces = [tokens[a : min(a + size, b)] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    return torch.from_numpy(np.concatenate(pieces)[:n])


def code_hashes(score: Callable | None) -> dict[str, str]:
    """SHA-256 of our own source and of the loop's: its file, and files beside it that it imported."""
    root = Path(str(resources.files("slotfast")))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    hashes = {"slotfast": digest.hexdigest()}
    if score is None:
        return hashes
    loop = getattr(sys.modules.get(getattr(score, "__module__", None) or ""), "__file__", None)
    if loop is None:
        return hashes
    folder = Path(loop).resolve().parent
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        path = Path(file).resolve() if file else folder
        if (
            path.suffix == ".py" and path.is_relative_to(folder) and path.is_file()
        ):  # some modules name a file that does not exist
            hashes[str(path.relative_to(folder))] = sha256(path)
    return hashes


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
