"""What is asked of lm-evaluation-harness, and what is said where it is not installed."""

import importlib
from typing import Any

from ..errors import InputError


def harness(module: str) -> Any:
    """A module of lm_eval; raises InputError, naming what to install, where there is none."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"slotfast.harness needs lm_eval 0.4.10 or newer: pip install 'slotfast[harness]' ({error})"
        ) from None
