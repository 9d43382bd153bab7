"""Names of a package that are imported on first use, so that `--help` need not wait for torch."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def exports(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: its `__name__`.
        names: those that it takes from each of its modules: {".loop": ["Scored"]}, and modules themselves:
            {".": ["loop"]}.

    Returns:
        The two functions. A name is set on the package once it has been imported.
    """
    modules = {name: module for module, given in names.items() for name in given}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if modules[name] == ".":
            value: Any = importlib.import_module(f".{name}", package)
        else:
            value = getattr(importlib.import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *modules})
