"""The folder layout that the public `kernels` library loads: a variant for each backend, with metadata beside the code.

Made for version 0.17 of that library. A variant's metadata names its one backend, and tells the kernels of one process
apart by their `id`: the hash of the code. The code is the same in all: it runs wherever Triton does, and its references
on CPUs.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .source import Folder

BACKENDS = ("cuda", "cpu")


def write_hub(target: Path, name: str, kernels: Sequence[str] = (), folder: Folder | None = None) -> list[Path]:
    """Write kernels, with their references, specs and cases, as a repository of the kernel hub.

    Args:
        target: folder of the repository; made where it does not exist.
        name: the kernel's name on the hub: lower-case letters, digits and dashes.
        kernels: files of the kernels folder, with what they need; all by default.
        folder: the kernels folder.

    Returns:
        The folders that hold the code, one for each of `BACKENDS`.

    Raises:
        InputError: unknown kernel, or a folder that is there already.
    """
    folder = folder or Folder()
    wanted = {public: folder.public[public] for kernel in kernels for public in folder.exported(kernel)}
    wanted = wanted or folder.public
    modules = folder.modules(sorted({target.module.partition(".")[0] for target in wanted.values()}))
    variants = {backend: target / "build" / f"torch-{backend}" for backend in BACKENDS}
    if there := [variant for variant in variants.values() if variant.exists()]:
        raise InputError(f"{there[0]}: is there already")
    try:
        for backend, variant in variants.items():
            _write_code(variant, modules, folder)
            _write_metadata(variant, name, backend)
    except BaseException as error:  # an interrupt too leaves no half of a variant
        for variant in variants.values():
            shutil.rmtree(variant, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{target}: cannot be written: {error.strerror}") from None
        raise
    return list(variants.values())


def _write_code(variant: Path, modules: Sequence[str], folder: Folder) -> None:
    for module in modules:
        place = variant / folder.files[module].relative_to(folder.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder.files[module], place)
    (variant / "__init__.py").write_text(_init(modules, folder), "utf-8")


def _write_metadata(variant: Path, name: str, backend: str) -> None:
    digest = hashlib.sha256()
    for path in sorted(variant.rglob("*.py")):
        digest.update(path.relative_to(variant).as_posix().encode() + b"\0" + path.read_bytes())
    metadata = {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{backend}_{digest.hexdigest()[:7]}",
        "version": 1,
        "license": "mit",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


def _init(modules: Sequence[str], folder: Folder) -> str:
    """An `__init__.py` that offers what the kernels folder offers of these modules."""
    offered = {public: name for public, name in folder.public.items() if name.module in modules}
    lines = [f"from .{name.module} import {public}" for public, name in offered.items()]
    return "\n".join([*lines, "", f"__all__ = {sorted(offered)}", ""])
