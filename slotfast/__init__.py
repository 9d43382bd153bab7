"""slotfast: test-time logit adaptation of small language models, fast and provably honest."""

import os
import sys
from typing import TYPE_CHECKING

from .lazy import exports

if TYPE_CHECKING:
    from .slot import Adapted, adapt


def _interrupted(kind, error, trace):
    """Ctrl-C while `python -m slotfast...` still imports torch: as quiet as later on."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # so it is while Python looks for the module to run, and never in an import as a library
    sys.excepthook = _interrupted

__version__ = "0.1.0"
__all__ = ["Adapted", "adapt"]
__getattr__, __dir__ = exports(__name__, {".slot": ["Adapted", "adapt"]})
