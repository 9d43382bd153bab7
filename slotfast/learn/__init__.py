"""Score first, then learn: the model learns from the stream chunk by chunk, and from each only once it is charged.

- what learns: `lora`, factors of rank r beside the linear layers; `norms`, gains and gates; `all` weights.
- from what: chunks of C tokens, `steps` of the optimiser on each.
- scope: `stream`, what it learns lasts to the end; `document`, it starts afresh at each BOS, also with documents side
  by side in slots.
- optimiser: SGD with momentum or AdamW, with weight decay and a bound on the gradient's norm.
- keys: `stale`: those of earlier chunks stay as the weights made them then; `refresh`, `recompute`: the window is
  forwarded again, every few chunks or for each.
- order: that of the stream, or the longest document first.

Whether a row is causal follows from these choices, and the auditor measures it.
"""

import inspect
import sys
from types import ModuleType

from .api import Learned, learn, make_loop
from .charged import Charged, FrozenLoop
from .documents import DocumentLoop
from .layers import PROJECTIONS
from .loop import LearningLoop
from .lora import Lora
from .presets import CALIBRATED, LEARNING, calibrated_row, given_keys, parse_row
from .row import Learning
from .top import OnTop

__all__ = [
    "CALIBRATED",
    "LEARNING",
    "PROJECTIONS",
    "Charged",
    "DocumentLoop",
    "FrozenLoop",
    "Learned",
    "Learning",
    "LearningLoop",
    "Lora",
    "OnTop",
    "calibrated_row",
    "given_keys",
    "learn",
    "make_loop",
    "parse_row",
]


class _Called(ModuleType):
    """This package, which is called as its function: `slotfast.learn(...)`, beside `slotfast.adapt(...)`."""

    __call__ = staticmethod(learn)


__signature__ = inspect.signature(learn)
sys.modules[__name__].__class__ = _Called
