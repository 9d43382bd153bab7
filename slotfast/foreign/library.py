"""What is asked of other people's code, and how it fails."""

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


def first_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
