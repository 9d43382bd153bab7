"""The library that Hugging Face folders need."""

import importlib
from pathlib import Path
from types import ModuleType

from ..errors import InputError


def transformers_library(folder: Path) -> ModuleType:
    """The library; raises InputError, naming what needs it, where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError(f"{folder}: reading it needs transformers: pip install 'slotfast[hf]'") from None
