"""The contest's GPT, every part of it a setting: tokens -> hidden states -> logits of the positions that are asked for.

The architecture and its names are those of PR #1019 of openai/parameter-golf, so that tensors can be exchanged with
community artifacts; what later entries added (skip gates, repeated layers, parallel residuals, document awareness) is
off by default. `hidden` and `head` are apart: an evaluation needs the logits of few positions, and adaptations of
the hidden state go through `head` alone.
"""

from .causal import CausalModel
from .config import GPTConfig
from .gpt import GPT
from .layers import Attend, AttendRotated, Linear, PackedLinear, WindowAttention, rotary_table, rotate, single

__all__ = [
    "GPT",
    "Attend",
    "AttendRotated",
    "CausalModel",
    "GPTConfig",
    "Linear",
    "PackedLinear",
    "WindowAttention",
    "rotary_table",
    "rotate",
    "single",
]
