"""slotfast: test-time logit adaptation of small language models, fast and provably honest."""

import os
import sys
from typing import TYPE_CHECKING

from .lazy import exports

if TYPE_CHECKING:
    from .artifact import Artifact, load_artifact, read_artifact, write_artifact
    from .data import ByteTable, Text, Tokenizer, TokenStream, open_shards, read_documents
    from .errors import InputError
    from .eval import Scored, SlidingPass, Streaming
    from .foreign import read_calibration
    from .learn import learn
    from .model import GPT, GPTConfig
    from .quantize import quantize_model
    from .score import Meter, Score
    from .slot import PRESETS, Adaptation, Adapted, Adapter, Calibration, adapt, parse_preset
    from .windows import Plan
    from .worker import Worker


def _interrupted(kind, error, trace):
    """Make Ctrl-C as quiet while `python -m slotfast...` still imports torch as it is later."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # true while Python looks for the module to run, never in an import as a library
    sys.excepthook = _interrupted

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "PRESETS",
    "Adaptation",
    "Adapted",
    "Adapter",
    "Artifact",
    "ByteTable",
    "Calibration",
    "GPTConfig",
    "InputError",
    "Meter",
    "Plan",
    "Score",
    "Scored",
    "SlidingPass",
    "Streaming",
    "Text",
    "TokenStream",
    "Tokenizer",
    "Worker",
    "adapt",
    "learn",
    "load_artifact",
    "open_shards",
    "parse_preset",
    "quantize_model",
    "read_artifact",
    "read_calibration",
    "read_documents",
    "write_artifact",
]
__getattr__, __dir__ = exports(
    __name__,
    {
        ".": ["learn"],
        ".artifact": ["Artifact", "load_artifact", "read_artifact", "write_artifact"],
        ".data": ["ByteTable", "Text", "Tokenizer", "TokenStream", "open_shards", "read_documents"],
        ".errors": ["InputError"],
        ".eval": ["Scored", "SlidingPass", "Streaming"],
        ".foreign": ["read_calibration"],
        ".model": ["GPT", "GPTConfig"],
        ".quantize": ["quantize_model"],
        ".score": ["Meter", "Score"],
        ".slot": ["PRESETS", "Adaptation", "Adapted", "Adapter", "Calibration", "adapt", "parse_preset"],
        ".windows": ["Plan"],
        ".worker": ["Worker"],
    },
)
