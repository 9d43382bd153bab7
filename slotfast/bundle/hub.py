"""The folder layout that the public `kernels` library loads: build/torch-universal, with metadata beside the code.

Made for version 0.17 of that library, which tells kernels of one process apart by the `id` in their metadata: here the
hash of the code. Metadata must name one backend; the code itself runs wherever Triton does, and its references on CPUs.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .source import Folder

VARIANT = Path("build") / "torch-universal"


def write_hub(target: Path, name: str, kernels: Sequence[str] = (), folder: Folder | None = None) -> Path:
    """Write kernels, with their references, specs and cases, as a repository of the kernel hub.

    Args:
        target: folder of the repository; made where it does not exist.
        name: the kernel's name on the hub: lower-case letters, digits and dashes.
        kernels: files of the kernels folder, with what they need; all by default.
        folder: the kernels folder.

    Returns:
        The folder that holds the code.

    Raises:
        InputError: unknown kernel, or a folder that is there already.
    """
    folder = folder or Folder()
    wanted = {public: folder.public[public] for kernel in kernels for public in folder.exported(kernel)}
    wanted = wanted or folder.public
    modules = folder.modules(sorted({target.module.partition(".")[0] for target in wanted.values()}))
    variant = target / VARIANT
    if variant.exists():
        raise InputError(f"{variant}: is there already")
    try:
        for module in modules:
            place = variant / folder.files[module].relative_to(folder.root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.files[module], place)
        (variant / "__init__.py").write_text(_init(modules, folder), "utf-8")
        digest = hashlib.sha256()
        for path in sorted(variant.rglob("*.py")):
            digest.update(path.relative_to(variant).as_posix().encode() + b"\0" + path.read_bytes())
        metadata = {
            "name": name,
            "id": f"_{name.replace('-', '_')}_{digest.hexdigest()[:7]}",
            "version": 1,
            "license": "mit",
            "python-depends": [],
            "backend": {"type": "cuda"},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"{variant}: cannot be written: {error.strerror}") from None
    return variant


def _init(modules: Sequence[str], folder: Folder) -> str:
    """An `__init__.py` that offers what the kernels folder offers of these modules."""
    offered = {public: name for public, name in folder.public.items() if name.module in modules}
    lines = [f"from .{name.module} import {public}" for public, name in offered.items()]
    return "\n".join([*lines, "", f"__all__ = {sorted(offered)}", ""])
