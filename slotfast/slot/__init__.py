"""Test-time adaptation of logits: every system is one row of parameter x positions x scope x optimiser.

- parameter: what is fitted. `bias` on the logits, after the soft cap or before it; `bias+temperature`; `hidden`, a
  shift of the hidden states; `hidden+bias`; `lowrank`, a map of rank r from hidden states to logits; `bigram`, a bias
  for each preceding token; `bias+repeats`, a bias and a mixture with what followed the same tokens before.
- positions: those whose losses it is fitted to. `context`: all that earlier windows scored; `focal`: the last `focal`
  positions of a window, without those being scored; `scored`: the very positions that are scored, which leaks.
- scope: what shares one parameter. `window`: each window its own, nothing carried; `batch`: all windows of a batch,
  which leaks, because a window's context holds what the windows before it are about to score; `joint`: one for each
  window under one optimiser, which leaks the same way; `prefix`: state built from what was scored before.
- optimiser: `lbfgs` (phases of iterations x history, strong Wolfe), `adamw`, `mm` (majorise-minimise), or `rates`, a
  closed form of decayed counts (`rates.py`, `repeats.py`).

Whether a row is causal follows from these choices; nobody declares it.
"""

from .adaptation import Adaptation, Compliance
from .adapted import Adapted, adapt
from .adapters import Adapter, first_position
from .batch import Adjusted, WindowBatch
from .presets import PRESETS, from_environment, is_published, parse_preset
from .rates import Calibration

__all__ = [
    "PRESETS",
    "Adaptation",
    "Adapted",
    "Adapter",
    "Adjusted",
    "Calibration",
    "Compliance",
    "WindowBatch",
    "adapt",
    "first_position",
    "from_environment",
    "is_published",
    "parse_preset",
]
