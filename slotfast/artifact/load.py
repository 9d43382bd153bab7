"""Any file that holds a model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, reading
from .community import read_community
from .contents import Artifact
from .format import MAGIC, read_artifact


def is_ours(path: str | os.PathLike) -> bool:
    """Whether a file starts as our artifacts do.

    Raises:
        InputError: it cannot be read.
    """
    with reading(path), Path(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def load_artifact(path: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> Artifact:
    """Read a model from our artifact, a community artifact or a checkpoint; executes nothing.

    Args:
        path: of the file; its first bytes say what it is.
        overrides: settings of the model that other people's files do not say; `generation` names one that gives the
            rest, see `read_community`.

    Returns:
        The model as it is stored; `.model()` builds it.

    Raises:
        InputError: damaged or hostile file, another kind of file, settings that are needed and missing, overrides for a
            file that needs none.
    """
    if not is_ours(path):
        return read_community(path, overrides)
    if overrides:
        raise InputError(f"{path}: says itself what its model is: model settings are for other people's files")
    return read_artifact(path)
