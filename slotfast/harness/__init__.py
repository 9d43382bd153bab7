"""slotfast as a model of lm-evaluation-harness: its tasks, scored with a stride, in a stream, with a causal preset.

Importing this registers the model: `lm_eval.simple_evaluate(model="slotfast", model_args={...})`. On a command line,
`slotfast harness` is the command `lm_eval` with this model among its own. Needs lm_eval: the extra `harness`.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from .__main__ import main
    from .model import SlotfastLM

__all__ = ["SlotfastLM", "main"]
__getattr__, __dir__ = exports(__name__, {".__main__": ["main"], ".model": ["SlotfastLM"]})

if find_spec("lm_eval"):
    importlib.import_module("lm_eval.models")  # names its own models only where nothing is named yet
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if "slotfast" not in registry:
        registry.register("slotfast", target=f"{__name__}.model:SlotfastLM")
