"""Test-time adaptation of logits: every system is one row of parameter x positions x scope x optimiser.

- parameter: what is fitted (a bias on the logits, added after the soft cap).
- positions: whose losses it is fitted to. `context`: all that earlier windows scored; `focal`: the last `focal`
  positions of a window less those being scored; `scored`: the very positions that are scored, which leaks.
- scope: what shares one parameter. `window`: each window its own, nothing carried; `batch`: all windows of a batch,
  which leaks, because a window's context holds what the windows before it are about to score; `prefix`: state built
  from the stream up to the window's first scored token.
- optimiser: `lbfgs` (phases of iterations x history, strong Wolfe), or `rates`, a closed form: the MAP estimate of how
  much more often each token comes than the model expects, under a Gamma prior on that ratio,
  bias_v = scale * log((C_v + k_v) / (E_v + k_v)), with C the decayed counts of targets and E the decayed sums of the
  model's probabilities.

Whether a row is causal follows from these choices; nobody declares it.
"""

from .adapters import Adapted, Adapter, adapt, first_position
from .batch import Adjusted, WindowBatch
from .presets import PRESETS, VARIABLES, from_environment, parse_preset
from .rates import Calibration
from .rows import Adaptation, Compliance

__all__ = [
    "PRESETS",
    "VARIABLES",
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
    "parse_preset",
]
