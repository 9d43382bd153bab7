"""Score first, then learn: the model goes on learning from the stream, chunk by chunk, each charged before.

- what learns: `lora`, factors of rank r beside the linear layers; `norms`, gains and gates; `all` weights.
- from what: chunks of C tokens, `steps` of the optimiser on each.
- scope: `stream`, it goes on to the end; `document`, it starts afresh at each BOS.
- optimiser: SGD with momentum or AdamW, with weight decay and a bound on the gradient's norm.
- keys: `stale`: those of earlier chunks stay as the weights of their time made them.
- order: that of the stream.

Whether a row is causal follows from these choices, and the auditor measures it.
"""

from .loop import Charged, Learned, LearningLoop, learn
from .lora import PROJECTIONS, Lora
from .row import LEARNING, Learning, parse_row

__all__ = [
    "LEARNING",
    "PROJECTIONS",
    "Charged",
    "Learned",
    "Learning",
    "LearningLoop",
    "Lora",
    "learn",
    "parse_row",
]
